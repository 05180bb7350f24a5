"""Greedy tokens equal those of transformers, token for token, in float32 on the CPU, however they are computed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from local_worker import local_engine, run_to_end
from model_zoo import demo_model_path, make_tiny_model
from submitting import submit
from transformers import AutoModelForCausalLM, AutoTokenizer

from nanopd import LLM
from nanopd.config import EngineConfig
from nanopd.core.sequence import Sequence
from nanopd.engine.engine import Engine
from nanopd.messages import EventKind
from nanopd.request import SamplingParams

NUM_TOKENS = 20
BLOCK_SIZE = 16
PROMPT_LENGTHS = (1, 5, BLOCK_SIZE, BLOCK_SIZE + 1, 40, 100)
MODELS = {  # group sizes 3, 1, 7, 4; head_dim 64 and 128; tied and untied
    "llama": {"num_heads": 3, "num_kv_heads": 1, "tie_word_embeddings": True},
    "llama-mha": {"num_heads": 4, "num_kv_heads": 4},
    "qwen2": {"num_heads": 7, "num_kv_heads": 1, "tie_word_embeddings": True},
    "qwen3": {"num_heads": 8, "num_kv_heads": 2, "head_dim": 128},
}
MIXED, PREFILL, DECODE = ({"device": "cpu", "role": role} for role in ("mixed", "prefill", "decode"))
WAYS = {
    "one token a step": {"max_num_batched_tokens": 1},
    "chunks of 7": {"max_num_batched_tokens": 7},
    "chunks of a block": {"max_num_batched_tokens": BLOCK_SIZE},
    "chunks of a block and one": {"max_num_batched_tokens": BLOCK_SIZE + 1},
    "whole": {},
    "preempted": {"num_blocks": 12},
    "swapped": {"num_blocks": 12, "swap_space_gb": 0.01, "enable_prefix_caching": False},
    "disaggregated": {"policy": "disaggregated", "workers": [PREFILL, DECODE], "verify_transfers": True},
    "disaggregated, chunks of 33": {
        "policy": "disaggregated",
        "workers": [PREFILL, DECODE],
        "max_num_batched_tokens": 33,
    },
    "disaggregated, preempted": {
        "policy": "disaggregated",
        "workers": [PREFILL, DECODE],
        "num_blocks": 12,
        "handover_timeout_s": 0.01,
    },
    "disaggregated, swapped": {
        "policy": "disaggregated",
        "workers": [PREFILL, DECODE],
        "num_blocks": 12,
        "swap_space_gb": 0.01,
        "enable_prefix_caching": False,
    },
    "all routes": {"policy": "round_robin", "workers": [MIXED, MIXED], "max_num_batched_tokens": 33},
}


def greedy(model: torch.nn.Module, prompt: list[int], num_tokens: int) -> list[int]:
    """The answer of transformers."""
    with torch.no_grad():
        output = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=num_tokens,
            min_new_tokens=num_tokens,
            do_sample=False,
            pad_token_id=0,
        )
    return output[0, len(prompt) :].tolist()


class Reference:
    """A checkpoint, prompts, and what transformers makes of them."""

    def __init__(self, path: Path, prompts: list[list[int]], num_tokens: int) -> None:
        self.path, self.prompts, self.num_tokens = path, prompts, num_tokens
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        model.generation_config.eos_token_id = None
        self.answers = [greedy(model, prompt, num_tokens) for prompt in prompts]

    def engine(self, **keys) -> Engine:
        keys = {"num_blocks": 200, "max_num_seqs": 8, "block_size": BLOCK_SIZE, **keys}
        return local_engine(EngineConfig(model=str(self.path), **keys), self.path)

    def submit(self, engine: Engine) -> list[Sequence]:
        params = SamplingParams(temperature=0, max_tokens=self.num_tokens, ignore_eos=True)
        return [submit(engine, str(i), prompt, params) for i, prompt in enumerate(self.prompts)]

    def check(self, seqs: list[Sequence]) -> None:
        assert [seq.output_token_ids for seq in seqs] == self.answers


@pytest.fixture(scope="module", params=MODELS)
def reference(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    name = request.param
    path = make_tiny_model(tmp_path_factory.mktemp(name), name.split("-")[0], **MODELS[name])
    rng = np.random.default_rng(0)
    prompts = [rng.integers(4, 512, length).tolist() for length in PROMPT_LENGTHS]
    reference = Reference(path, prompts, NUM_TOKENS)
    assert all(len(set(answer)) > 3 for answer in reference.answers), "the model says nothing that could go wrong"
    return reference


one_model_else_slow = pytest.mark.parametrize(
    "reference",
    [pytest.param(name, marks=() if name == "llama" else pytest.mark.slow) for name in MODELS],
    indirect=True,
)


@pytest.mark.parametrize("steps_in_flight", [1, 2])
@pytest.mark.parametrize("way", [way for way in WAYS if way != "one token a step"])
def test_tiny_model(reference: Reference, way: str, steps_in_flight: int) -> None:
    engine = reference.engine(**WAYS[way], steps_in_flight=steps_in_flight)
    seqs = reference.submit(engine)
    run_to_end(engine)
    reference.check(seqs)
    if "preempted" in way or "swapped" in way:
        assert any(event.kind is EventKind.PREEMPTED for seq in seqs for event in seq.events)
    if "swapped" in way:
        assert any(worker.num_swapped for worker in engine.workers)


@pytest.mark.parametrize("steps_in_flight", [1, 2])
@one_model_else_slow
def test_tiny_model_one_token_a_step(reference: Reference, steps_in_flight: int) -> None:
    test_tiny_model(reference, "one token a step", steps_in_flight)


@pytest.mark.parametrize("is_on", [True, False])
@pytest.mark.parametrize("way", ["chunks of 7", "whole", "disaggregated", "disaggregated, chunks of 33", "all routes"])
def test_prefix_hits(reference: Reference, way: str, is_on: bool) -> None:
    """The next turn finds the one before: the answer to a prompt and half of its answer is the other half."""
    engine = reference.engine(**WAYS[way], enable_prefix_caching=is_on)
    seqs = reference.submit(engine)
    run_to_end(engine)
    reference.check(seqs)
    half = NUM_TOKENS // 2
    params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS - half, ignore_eos=True)
    prompts = [seq.token_ids[: seq.num_prompt_tokens + half] for seq in seqs]
    turns = [submit(engine, f"turn {i}", prompt, params) for i, prompt in enumerate(prompts)]
    run_to_end(engine)
    assert [turn.output_token_ids for turn in turns] == [answer[half:] for answer in reference.answers]
    num_hits = [turn.log().num_cached_tokens // BLOCK_SIZE for turn in turns]
    if way == "all routes":
        assert (sum(num_hits) > 0) == is_on
    else:  # what is cached where prompts are computed, but never the last token
        num_more = 0 if "disaggregated" in way else half - 1
        assert num_hits == [(length + num_more) // BLOCK_SIZE * is_on for length in PROMPT_LENGTHS]


@pytest.mark.parametrize("steps_in_flight", [1, 2])
@pytest.mark.parametrize("num_before", [1, 7, 13])
def test_forked(reference: Reference, num_before: int, steps_in_flight: int) -> None:
    """A child forked in mid-answer shares its parent's blocks; both go on as if alone."""
    engine = reference.engine(steps_in_flight=steps_in_flight, max_num_seqs=12)
    parents = reference.submit(engine)
    while any(len(parent.token_times_s) < num_before for parent in parents):
        engine.step()
        for parent in parents:
            if parent.slot is not None:
                engine.schedulers[0].residency.slots.sync(parent)
    children = [
        engine.fork(parent, f"child of {parent.request_id}", list(parent.token_ids))
        for parent in parents
        if not parent.status.is_finished
    ]
    assert len(children) == len(parents)
    run_to_end(engine)
    reference.check(parents)
    reference.check(children)


@pytest.mark.parametrize(
    "way", [*(way for way in WAYS if "a block" not in way and "one token" not in way), "without prefix caching"]
)
def test_several_answers(reference: Reference, way: str) -> None:
    """One prefill, and four answers that are each what a request for one gives with its seed."""
    params = SamplingParams(temperature=1.0, top_p=0.95, seed=5, n=4, max_tokens=NUM_TOKENS, ignore_eos=True)
    alone, together = reference.engine(), reference.engine(**WAYS.get(way, {"enable_prefix_caching": False}))
    expected, answers = [], []
    for i, prompt in enumerate(reference.prompts):
        group: list[Sequence] = []
        for k, one in enumerate(params.split()):
            assert (one.seed, one.n) == (5 + k, 1)
            expected.append(submit(alone, f"{i}/{k}", prompt, one))
            group.append(submit(together, f"{i}/{k}", prompt, one, parent=group[0] if group else None))
        answers += group
    run_to_end(alone)
    run_to_end(together)
    assert [seq.output_token_ids for seq in answers] == [seq.output_token_ids for seq in expected]


@one_model_else_slow
def test_several_answers_one_token_a_step(reference: Reference) -> None:
    test_several_answers(reference, "one token a step")


PROMPTS = (
    "Hi",
    "The capital of France is",
    "Once upon a time there was a small robot who",
    "def fibonacci(n):\n    ",
    "List three reasons to learn a second language:\n1.",
    "Water boils at 100 degrees Celsius because " * 12,
    "In the beginning the ship sailed north, past islands nobody had named. " * 20,
    "The committee met on Monday to discuss the budget, the roof, and the new library. " * 36,
)


@pytest.fixture(scope="module")
def demo() -> Reference:
    path = demo_model_path()
    tokenizer = AutoTokenizer.from_pretrained(path)
    prompts = [tokenizer.encode(text) for text in PROMPTS]
    assert (min(map(len, prompts)), max(map(len, prompts)) > 600) == (1, True)
    return Reference(path, prompts, 48)


@pytest.mark.slow
@pytest.mark.parametrize("steps_in_flight", [1, 2])
@pytest.mark.parametrize("way", ["whole", "disaggregated, chunks of 33", "all routes"])
def test_demo_model(demo: Reference, way: str, steps_in_flight: int) -> None:
    keys = {**WAYS[way], "steps_in_flight": steps_in_flight, "max_model_len": 1024}
    if "max_num_batched_tokens" in keys:
        keys["max_num_batched_tokens"] = 256
    engine = demo.engine(**keys)
    seqs = demo.submit(engine)
    run_to_end(engine)
    demo.check(seqs)


@pytest.mark.process
@pytest.mark.slow
def test_demo_model_in_processes(demo: Reference) -> None:
    """The shipped configuration as a user runs it: two worker processes, every route in turn."""
    params = SamplingParams(temperature=0, max_tokens=demo.num_tokens, ignore_eos=True)
    with LLM(config="cpu-demo") as llm:
        outputs = llm.generate(demo.prompts, params, use_tqdm=False)
    assert [output.outputs[0].token_ids for output in outputs] == demo.answers
    assert {str(output.route) for output in outputs} == {"0->0", "0->1", "1->0", "1->1"}

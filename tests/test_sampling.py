"""Penalties, biases, banned words, min-p and logprobs of prompts, through a tiny model and every way of serving."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from local_worker import local_engine, run_to_end
from model_zoo import load_hf, make_tiny_model
from submitting import submit
from transformers import PreTrainedModel

from nanopd import LLM, RequestError, SamplingParams
from nanopd.config import EngineConfig
from nanopd.core.sequence import Sequence, SequenceStatus
from nanopd.engine.engine import Engine
from nanopd.messages import EventKind

VOCAB_SIZE, NUM_TOKENS, BLOCK_SIZE = 96, 24, 16
MIXED, PREFILL, DECODE = ({"device": "cpu", "role": role} for role in ("mixed", "prefill", "decode"))
DISAGGREGATED = {"policy": "disaggregated", "workers": [PREFILL, DECODE]}
WAYS = {
    "whole": {},
    "chunks of 7": {"max_num_batched_tokens": 7},
    "preempted": {"num_blocks": 8},
    "disaggregated": DISAGGREGATED,
    "disaggregated, preempted": {**DISAGGREGATED, "num_blocks": 8, "handover_timeout_s": 0.01},
    "all routes": {"policy": "round_robin", "workers": [MIXED, MIXED], "max_num_batched_tokens": 33},
}
CASES = [*((way, 2) for way in WAYS), ("disaggregated, preempted", 1)]


def push_up(token_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
    logits[(7 * len(token_ids) + sum(token_ids)) % VOCAB_SIZE] += 4
    return logits


def fail_later(token_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
    return logits if len(token_ids) < 5 else logits[:3]


ASKED = [  # what the requests ask for
    {},
    {"presence_penalty": 1.5},
    {"frequency_penalty": 0.8, "presence_penalty": -0.5},
    {"repetition_penalty": 1.4},
    {"logit_bias": {5: 3.0, 40: -100.0, 7: 2.5}, "frequency_penalty": 0.5},
    {"allowed_token_ids": tuple(range(3, 30)), "repetition_penalty": 1.2},
    {"bad_words": tuple((t,) for t in range(0, VOCAB_SIZE, 3)) + tuple((a, b) for a in range(40) for b in range(5, 9))},
    {"logits_processors": (push_up,), "repetition_penalty": 1.1},
]


def changed(x: torch.Tensor, tokens: list[int], num_prompt: int, params: SamplingParams) -> torch.Tensor:
    """x [vocab_size] float64, by the rules one after the other."""
    out = tokens[num_prompt:]
    for function in params.logits_processors:
        x = function(out, x)
    for token, bias in (params.logit_bias or {}).items():
        x[token] += bias
    banned = {word[-1] for word in params.bad_words if tuple(out[len(out) - len(word) + 1 :]) == word[:-1]}
    for token in range(VOCAB_SIZE):
        if token in banned or token not in (params.allowed_token_ids or range(VOCAB_SIZE)):
            x[token] = -math.inf
        if token in tokens:
            x[token] *= 1 / params.repetition_penalty if x[token] > 0 else params.repetition_penalty
        x[token] -= params.frequency_penalty * out.count(token) + params.presence_penalty * (token in out)
    return x


def expected_tokens(model: PreTrainedModel, prompt: list[int], params: SamplingParams) -> list[int]:
    tokens = list(prompt)
    while len(tokens) < len(prompt) + NUM_TOKENS:
        with torch.no_grad():
            x = model(torch.tensor([tokens])).logits[0, -1].double()
        best = changed(x, tokens, len(prompt), params).topk(2)
        assert best.values[0] - best.values[1] > 1e-4, "too close to tell rounding from a mistake"
        tokens.append(int(best.indices[0]))
    return tokens[len(prompt) :]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"), "qwen3", vocab_size=VOCAB_SIZE, num_layers=1)


@pytest.fixture(scope="module")
def model(path: Path) -> PreTrainedModel:
    return load_hf(path)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    rng = np.random.default_rng(5)
    return [rng.integers(3, VOCAB_SIZE, length).tolist() for length in (1, 40, 17, 60, 16, 9, 33, 20)]


@pytest.fixture(scope="module")
def answers(model: PreTrainedModel, prompts: list[list[int]]) -> list[list[int]]:
    return [expected_tokens(model, p, SamplingParams(**keys)) for p, keys in zip(prompts, ASKED, strict=True)]


def make_engine(path: Path, way: str, **keys) -> Engine:
    keys = {"num_blocks": 200, "max_num_seqs": 8, "block_size": BLOCK_SIZE, **WAYS[way], **keys}
    return local_engine(EngineConfig(model=str(path), **keys), path)


def serve(engine: Engine, prompts: list[list[int]], asked: list[dict], **common) -> list[Sequence]:
    common = {"max_tokens": NUM_TOKENS, "ignore_eos": True, **common}
    pairs = enumerate(zip(prompts, asked, strict=True))
    seqs = [submit(engine, f"{i}", prompt, SamplingParams(**{**common, **keys})) for i, (prompt, keys) in pairs]
    run_to_end(engine)
    return seqs


def was_preempted(seqs: list[Sequence]) -> bool:
    return any(event.kind is EventKind.PREEMPTED for seq in seqs for event in seq.events)


@pytest.mark.parametrize(("way", "steps_in_flight"), CASES)
def test_greedy(path: Path, prompts: list[list[int]], answers: list[list[int]], way: str, steps_in_flight: int) -> None:
    seqs = serve(make_engine(path, way, steps_in_flight=steps_in_flight), prompts, ASKED, temperature=0)
    assert [seq.output_token_ids for seq in seqs] == answers
    assert was_preempted(seqs) == ("preempted" in way)


def test_what_is_asked_for_matters(path: Path, prompts: list[list[int]], answers: list[list[int]]) -> None:
    plain = serve(make_engine(path, "whole"), prompts, [{}] * len(prompts), temperature=0)
    equal = [seq.output_token_ids == answer for seq, answer in zip(plain, answers, strict=True)]
    assert equal == [not keys for keys in ASKED]


def test_prefix_hits(path: Path, prompts: list[list[int]], answers: list[list[int]]) -> None:
    """What was generated before the hit counts as prompt now: for the repetition penalty alone nothing changes."""
    engine = make_engine(path, "whole")
    serve(engine, prompts, ASKED, temperature=0)
    turn = serve(engine, [prompts[3] + answers[3][:10]], [ASKED[3]], temperature=0, max_tokens=NUM_TOKENS - 10)[0]
    assert turn.output_token_ids == answers[3][10:]
    assert turn.num_cached_tokens == 64


@pytest.mark.parametrize("steps_in_flight", [1, 2])
def test_a_request_that_goes_on_elsewhere(
    path: Path, prompts: list[list[int]], answers: list[list[int]], steps_in_flight: int
) -> None:
    engine = make_engine(path, "all routes", steps_in_flight=steps_in_flight, max_num_batched_tokens=256)
    common = {"temperature": 0, "max_tokens": NUM_TOKENS, "ignore_eos": True}
    seqs = [
        submit(engine, f"{i}", p, SamplingParams(**common, **keys)) for i, (p, keys) in enumerate(zip(prompts, ASKED))
    ]
    while any(len(seq.token_times_s) < 8 and seq.slot is not None for seq in seqs):
        engine.step()
        for seq in seqs:
            if seq.slot is not None:
                engine.schedulers[seq.worker].residency.slots.sync(seq)
    for seq in seqs:
        if seq.status is SequenceStatus.RUNNING:
            engine.move(seq.request_id, 1 - seq.route.decode_worker)
    run_to_end(engine)
    assert [seq.output_token_ids for seq in seqs] == answers


def test_samples_are_the_same_in_every_way(path: Path, prompts: list[list[int]]) -> None:
    common = {"temperature": 1.2, "top_p": 0.9, "min_p": 0.02}
    asked = [{**keys, "seed": 50 + i} for i, keys in enumerate(ASKED)]
    results = [serve(make_engine(path, way), prompts, asked, **common) for way in WAYS]
    tokens = [[seq.output_token_ids for seq in seqs] for seqs in results]
    assert tokens.count(tokens[0]) == len(WAYS)


@pytest.mark.parametrize("way", ["whole", "preempted", "disaggregated"])
def test_answers_that_share_a_prompt(path: Path, prompts: list[list[int]], way: str) -> None:
    keys = {"temperature": 1.0, "seed": 9, "max_tokens": NUM_TOKENS, "ignore_eos": True, **ASKED[2], **ASKED[6]}
    params = SamplingParams(n=4, repetition_penalty=1.3, prompt_logprobs=1, **keys).split()
    engine = make_engine(path, way)
    first = submit(engine, "0", prompts[1], params[0])
    seqs = [first, *(submit(engine, str(i), prompts[1], params[i], parent=first) for i in range(1, 4))]
    run_to_end(engine)
    alone = serve(
        make_engine(path, "whole"),
        [prompts[1]] * 4,
        [{**keys, "seed": 9 + i} for i in range(4)],
        repetition_penalty=1.3,
    )
    assert [seq.output_token_ids for seq in seqs] == [seq.output_token_ids for seq in alone]
    assert [len(seq.prompt_logprobs) for seq in seqs] == [len(prompts[1]), 0, 0, 0]


def test_min_p_of_one_is_greedy(path: Path, prompts: list[list[int]]) -> None:
    engine = make_engine(path, "whole")
    drawn, greedy = (serve(engine, prompts, ASKED, **keys) for keys in ({"min_p": 1.0}, {"temperature": 0}))
    assert [seq.output_token_ids for seq in drawn] == [seq.output_token_ids for seq in greedy]


# ------------------------------------------------------------------------------------------- logprobs of prompts


@pytest.mark.parametrize(("way", "steps_in_flight"), CASES)
def test_prompt_logprobs(
    path: Path, model: PreTrainedModel, prompts: list[list[int]], way: str, steps_in_flight: int
) -> None:
    engine = make_engine(path, way, steps_in_flight=steps_in_flight)
    serve(engine, prompts, [{}] * len(prompts), max_tokens=1)  # their blocks are findable, and not to be used
    seqs = serve(engine, prompts, [{"prompt_logprobs": i % 4} for i in range(len(prompts))], repetition_penalty=1.2)
    for seq, prompt in zip(seqs, prompts, strict=True):
        with torch.no_grad():
            exact = model(torch.tensor([prompt])).logits[0].double().log_softmax(-1)
        first, *rows = seq.prompt_logprobs
        assert first is None and len(rows) == len(prompt) - 1
        for row, logprobs, token in zip(rows, exact, prompt[1:], strict=False):
            best = logprobs.topk(seq.params.prompt_logprobs).indices.tolist()
            assert list(row) == list(dict.fromkeys([token, *best]))
            assert list(row.values()) == pytest.approx(logprobs[list(row)].tolist(), abs=1e-4)
        if "all routes" not in way and not was_preempted([seq]):
            assert seq.num_cached_tokens == 0


# ----------------------------------------------------------------------------------------------------- on a GPU


@pytest.mark.gpu
def test_on_a_gpu(path: Path, model: PreTrainedModel, prompts: list[list[int]]) -> None:
    """In bfloat16: each token is among the best ones that the rules leave, but for rounding."""
    common = {"temperature": 0, "max_tokens": NUM_TOKENS, "ignore_eos": True, "prompt_logprobs": 0}
    params = [SamplingParams(**common, **keys) for keys in ASKED]
    keys = {"dtype": "bfloat16", "num_blocks": 400, "max_num_seqs": 16, "max_num_batched_tokens": 64}
    with LLM(str(path), workers=[{"device": "cuda:0"}], **keys) as llm:
        outputs = llm.generate(prompts, params, use_tqdm=False)
    for prompt, output, one in zip(prompts, outputs, params, strict=True):
        tokens = prompt + output.outputs[0].token_ids
        with torch.no_grad():
            logits = model(torch.tensor([tokens])).logits[0].double()
        for position in range(len(prompt), len(tokens)):
            x, deviation = logits[position - 1].clone(), logits[position - 1].std()
            x = changed(x, tokens[:position], len(prompt), one)
            assert x.max() - x[tokens[position]] < 0.1 * deviation
        logprobs = logits.log_softmax(-1)
        for position, row in enumerate(output.prompt_logprobs[1:], 1):
            assert row == {prompt[position]: pytest.approx(logprobs[position - 1, prompt[position]].item(), abs=0.5)}


# ----------------------------------------------------------------------------------------------------- mistakes


def test_a_function_that_fails_ends_its_request_alone(path: Path, prompts: list[list[int]]) -> None:
    engine = make_engine(path, "disaggregated")
    bad, good = serve(engine, prompts[:2], [{"logits_processors": (fail_later,), "logprobs": 2}, {}])
    assert bad.status is SequenceStatus.FINISHED_ERROR and len(bad.output_token_ids) == 5
    assert "a logits processor has failed" in bad.error and "fail_later" not in bad.error
    assert good.status is SequenceStatus.FINISHED_LENGTH and len(good.output_token_ids) == NUM_TOKENS


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("min_p", 1.5),
        ("min_p", -0.1),
        ("presence_penalty", 2.1),
        ("frequency_penalty", "much"),
        ("repetition_penalty", 0),
        ("repetition_penalty", math.inf),
        ("logit_bias", {3: 101}),
        ("logit_bias", {-1: 1}),
        ("logit_bias", {"x": 1}),
        ("logit_bias", [1]),
        ("bad_words", [" "]),
        ("bad_words", [[]]),
        ("bad_words", [[1] * 17]),
        ("bad_words", [3]),
        ("bad_words", ["x"] * 1025),
        ("allowed_token_ids", []),
        ("allowed_token_ids", [-3]),
        ("prompt_logprobs", 21),
        ("logits_processors", [3]),
        ("logits_processors", [lambda token_ids, logits: logits]),
    ],
)
def test_values_that_are_not_allowed(field: str, value: object) -> None:
    with pytest.raises(RequestError) as caught:
        SamplingParams(**{field: value})
    assert caught.value.field == field and caught.value.allowed


@pytest.mark.parametrize(
    "keys", [{"logit_bias": {VOCAB_SIZE: 1}}, {"allowed_token_ids": [VOCAB_SIZE]}, {"bad_words": [[1, VOCAB_SIZE]]}]
)
def test_tokens_that_the_model_does_not_have(path: Path, keys: dict) -> None:
    (field,) = keys
    with pytest.raises(RequestError, match=f"{field}={VOCAB_SIZE} .* 0 to {VOCAB_SIZE - 1}"):
        submit(make_engine(path, "whole"), "0", [1], SamplingParams(**keys))


def test_words_need_a_tokenizer(path: Path) -> None:
    with pytest.raises(RequestError, match="bad_words"):
        submit(make_engine(path, "whole"), "0", [1], SamplingParams(bad_words="word"))

"""A worker on a GPU, through `LLM`: teacher-forced against transformers in float32, with a margin for bfloat16."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from model_zoo import load_hf, make_tiny_model
from transformers import PreTrainedModel

from nanopd import LLM, BeamSearchParams, SamplingParams
from nanopd.worker.sampler import random_numbers

MODELS = {
    "llama": {"num_heads": 3, "num_kv_heads": 1, "tie_word_embeddings": True},
    "qwen2": {"num_heads": 7, "num_kv_heads": 1},
    "qwen3": {"num_heads": 8, "num_kv_heads": 2, "head_dim": 128},
}
PROMPT_LENGTHS = (1, 5, 16, 17, 40, 100, 300)
NUM_TOKENS = 24
MAX_GAP = 0.1  # of a row's standard deviation: how far below the best a chosen token may be
MAX_LOGPROB_ERROR = 0.5  # seen: 0.30, with logits of standard deviation 10
MAX_SHIFT = 0.15  # of a cumulative probability, by rounding

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("architecture", MODELS)
def test_greedy(architecture: str, tmp_path: Path) -> None:
    path = make_tiny_model(tmp_path, architecture, **MODELS[architecture])
    rng = np.random.default_rng(0)
    prompts = [rng.integers(4, 512, length).tolist() for length in PROMPT_LENGTHS]
    greedy = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
    shown = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True, logprobs=3)
    keys = {"dtype": "bfloat16", "num_blocks": 400, "max_num_seqs": 16, "max_num_batched_tokens": 64}
    keys["enable_prefix_caching"] = False  # other chunks, other rounding
    with LLM(str(path), workers=[{"device": "cuda:0"}], **keys) as llm:
        outputs = [output.outputs[0] for output in llm.generate(prompts, shown, use_tqdm=False)]
        plain = [output.outputs[0] for output in llm.generate(prompts, greedy, use_tqdm=False)]
    assert [o.token_ids for o in outputs] == [o.token_ids for o in plain], "logprobs change nothing"
    model = load_hf(path)
    for prompt, output in zip(prompts, outputs, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + output.token_ids])).logits[0, len(prompt) - 1 : -1].float()
        chosen = torch.tensor(output.token_ids)[:, None]
        gap = (logits.max(-1).values - logits.gather(-1, chosen)[:, 0]) / logits.std(-1)
        assert gap.max() < MAX_GAP
        expected = logits.log_softmax(-1).gather(-1, chosen)[:, 0]
        reported = torch.tensor([values[i] for values, i in zip(output.logprobs, output.token_ids, strict=True)])
        assert (expected - reported).abs().max() < MAX_LOGPROB_ERROR


@pytest.mark.parametrize("architecture", MODELS)
def test_seeded_tokens_in_batches_of_1_and_32(architecture: str, tmp_path: Path) -> None:
    """Equal where the number drawn is further from the borders of the token's share than rounding moves them."""
    path, num_tokens = make_tiny_model(tmp_path, architecture, **MODELS[architecture]), 12
    rng = np.random.default_rng(1)
    prompts = [rng.integers(4, 512, length).tolist() for length in rng.integers(1, 60, 32)]
    params = [SamplingParams(temperature=1, seed=2**63 + i, max_tokens=num_tokens, ignore_eos=True) for i in range(32)]
    keys = {"dtype": "bfloat16", "num_blocks": 400, "max_num_seqs": 32, "max_num_batched_tokens": 4096}
    keys["enable_prefix_caching"] = False
    with LLM(str(path), workers=[{"device": "cuda:0"}], **keys) as llm:
        among = [output.outputs[0].token_ids for output in llm.generate(prompts, params, use_tqdm=False)]
        alone = [llm.generate(p, s, use_tqdm=False)[0].outputs[0].token_ids for p, s in zip(prompts, params)]
    model, num_equal = load_hf(path), 0
    for prompt, param, ids, others in zip(prompts, params, alone, among, strict=True):
        margins = margins_of(model, prompt, ids, param.seed)
        assert margins.min() > -MAX_SHIFT
        is_same = np.cumprod(np.equal(ids, others))  # the texts are comparable up to their first difference
        num_equal += is_same.sum()
        if not is_same.all():
            assert margins[is_same.sum()] < MAX_SHIFT
    assert num_equal > 0.5 * 32 * num_tokens


def margins_of(model: PreTrainedModel, prompt: list[int], ids: list[int], seed: int) -> np.ndarray:
    """[num_tokens] how far inside each token's share of the distribution lies the number that was drawn for it."""
    logits = logits_of(model, prompt, ids).double()
    shares = torch.softmax(logits, -1)
    chosen = torch.tensor(ids)[:, None]
    ends = shares.cumsum(-1).gather(-1, chosen)[:, 0].numpy()
    starts = ends - shares.gather(-1, chosen)[:, 0].numpy()
    positions = len(prompt) + np.arange(len(ids))
    uniforms = random_numbers(np.full(len(ids), seed, np.uint64), positions) / 2.0**64
    return np.minimum(uniforms - starts, ends - uniforms)


def logits_of(model: PreTrainedModel, prompt: list[int], ids: list[int]) -> torch.Tensor:  # [num_tokens, vocab]
    with torch.no_grad():
        return model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1].float()


@pytest.mark.parametrize("roles", [("mixed",), ("prefill", "decode")], ids="+".join)
def test_answers_that_share_a_prompt(roles: tuple[str, ...], tmp_path: Path) -> None:
    """n = 4 and a search with four beams: forks on the device, whose tokens and scores transformers confirms."""
    if torch.cuda.device_count() < len(roles):
        pytest.skip(f"needs {len(roles)} GPUs")
    path = make_tiny_model(tmp_path, "qwen3", **MODELS["qwen3"])
    prompt, seed = np.random.default_rng(2).integers(4, 512, 100).tolist(), 7
    workers = [{"device": f"cuda:{i}", "role": role} for i, role in enumerate(roles)]
    keys = {"dtype": "bfloat16", "num_blocks": 400, "max_num_seqs": 16}
    keys["policy"] = "disaggregated" if len(roles) > 1 else "collocated"
    with LLM(str(path), workers=workers, **keys) as llm:
        sampling = SamplingParams(temperature=1, seed=seed, n=4, max_tokens=NUM_TOKENS, ignore_eos=True)
        answers = [o.token_ids for o in llm.generate(prompt, sampling, use_tqdm=False)[0].outputs]
        search = BeamSearchParams(num_beams=4, max_tokens=NUM_TOKENS, ignore_eos=True)
        beams = llm.beam_search(prompt, search, use_tqdm=False)[0].outputs
        assert not any(blocks.used for blocks in llm.stats().blocks)
    model = load_hf(path)
    for i, ids in enumerate(answers):
        assert margins_of(model, prompt, ids, seed + i).min() > -MAX_SHIFT
    assert len(set(map(tuple, answers))) == 4
    assert len({tuple(beam.token_ids) for beam in beams}) == 4
    for beam in beams:
        chosen = torch.tensor(beam.token_ids)[:, None]
        logprobs = logits_of(model, prompt, beam.token_ids).log_softmax(-1).gather(-1, chosen)
        assert abs(beam.score - float(logprobs.mean())) < MAX_LOGPROB_ERROR
    assert [beam.score for beam in beams] == sorted((beam.score for beam in beams), reverse=True)

"""A worker on a GPU, through `LLM`: teacher-forced against transformers in float32, with a margin for bfloat16."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from model_zoo import load_hf, make_tiny_model

from nanopd import LLM, SamplingParams

MODELS = {
    "llama": {"num_heads": 3, "num_kv_heads": 1, "tie_word_embeddings": True},
    "qwen2": {"num_heads": 7, "num_kv_heads": 1},
    "qwen3": {"num_heads": 8, "num_kv_heads": 2, "head_dim": 128},
}
PROMPT_LENGTHS = (1, 5, 16, 17, 40, 100, 300)
NUM_TOKENS = 24
MAX_GAP = 0.1  # of a row's standard deviation: how far below the best a chosen token may be
MAX_LOGPROB_ERROR = 0.5  # seen: 0.30, with logits of standard deviation 10

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("architecture", MODELS)
def test_greedy_and_seeded(architecture: str, tmp_path: Path) -> None:
    path = make_tiny_model(tmp_path, architecture, **MODELS[architecture])
    rng = np.random.default_rng(0)
    prompts = [rng.integers(4, 512, length).tolist() for length in PROMPT_LENGTHS]
    greedy = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
    shown = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True, logprobs=3)
    seeded = SamplingParams(temperature=1, seed=3, max_tokens=12, ignore_eos=True)
    keys = {"dtype": "bfloat16", "num_blocks": 400, "max_num_seqs": 16, "max_num_batched_tokens": 64}
    with LLM(str(path), workers=[{"device": "cuda:0"}], **keys) as llm:
        outputs = [output.outputs[0] for output in llm.generate(prompts, shown, use_tqdm=False)]
        plain = [output.outputs[0] for output in llm.generate(prompts, greedy, use_tqdm=False)]
        alone = llm.generate(prompts[1], seeded, use_tqdm=False)[0].outputs[0].token_ids
        among = llm.generate([prompts[1]] * 8, seeded, use_tqdm=False)[5].outputs[0].token_ids
    assert [o.token_ids for o in outputs] == [o.token_ids for o in plain], "logprobs change nothing"
    assert alone == among
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

"""The decoder's logits against transformers' on the same files, and against itself in other batches."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from model_zoo import load_hf, make_tiny_model
from paged_run import PagedRun, PagedSequence, load
from torch import Tensor

# architecture, heads, kv heads, head_dim, tied, rope
CASES = [
    ("llama", 4, 4, 64, False, "default"),
    ("llama", 3, 1, 128, True, "llama3"),
    ("llama", 8, 2, 64, True, "linear"),
    ("llama", 7, 1, 64, False, "yarn"),
    ("qwen2", 4, 1, 64, False, "default"),
    ("qwen2", 7, 1, 128, True, "yarn"),
    ("qwen2", 6, 2, 64, False, "llama3"),
    ("qwen3", 4, 4, 128, True, "default"),
    ("qwen3", 6, 2, 64, False, "linear"),
    ("qwen3", 14, 2, 128, False, "yarn"),
]
TOLERANCE = 2e-5  # of the largest logit


@pytest.fixture(scope="module", params=CASES, ids=lambda case: "-".join(map(str, case)))
def tiny_model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    architecture, num_heads, num_kv_heads, head_dim, tied, rope = request.param
    return make_tiny_model(
        tmp_path_factory.mktemp("tiny"),
        architecture,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        tie_word_embeddings=tied,
        rope=rope,
    )


def random_tokens(length: int, seed: int) -> list[int]:
    return torch.randint(0, 512, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@torch.inference_mode()
def hf_logits(path: Path, token_ids: list[int]) -> Tensor:
    return load_hf(path)(torch.tensor([token_ids])).logits[0]


def assert_close(logits: Tensor, expected: Tensor) -> None:
    assert logits.dtype == torch.float32
    assert (logits - expected).abs().max() <= TOLERANCE * expected.abs().max()
    assert torch.equal(logits.argmax(-1), expected.argmax(-1))


def test_whole_prompts_equal_transformers(tiny_model: Path) -> None:
    prompts = [random_tokens(length, seed) for seed, length in enumerate((1, 15, 16, 17, 150))]
    run = PagedRun(load(tiny_model))
    logits = run.step([(PagedSequence(prompt), len(prompt)) for prompt in prompts])
    for prompt, part in zip(prompts, logits, strict=True):
        assert_close(part, hf_logits(tiny_model, prompt))


def test_chunks_mixed_with_decode_rows_equal_transformers(tiny_model: Path) -> None:
    run = PagedRun(load(tiny_model))
    decoding, chunked = PagedSequence(random_tokens(60, seed=1)), PagedSequence(random_tokens(60, seed=2))
    parts: dict[int, list[Tensor]] = {0: run.step([(decoding, 20)]), 1: []}
    for chunk in (7, 16, 17, 1, 19):
        for index, logits in enumerate(run.step([(decoding, 1), (chunked, chunk)])):
            parts[index].append(logits)
    for index, sequence in enumerate((decoding, chunked)):
        expected = hf_logits(tiny_model, sequence.token_ids)[: sequence.num_computed]
        assert_close(torch.cat(parts[index]), expected)


def test_logits_do_not_depend_on_batch_or_chunks(tiny_model: Path) -> None:
    """Bit for bit in float32: the basis of equal text on all routes."""
    model = load(tiny_model)
    token_ids = random_tokens(50, seed=3)
    whole = PagedRun(model).step([(PagedSequence(token_ids), 50)])[0]
    run = PagedRun(model)
    sequence = PagedSequence(token_ids)
    others = [PagedSequence(random_tokens(40, seed=seed)) for seed in range(4, 9)]
    parts = [
        run.step([(sequence, n)] + [(other, 3) for other in others])[0] for n in (1, 2, 3, 10, 1, 1, 17, 1, 1, 1, 11, 1)
    ]
    assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_is_near_float32(architecture: str, dtype: str, tmp_path: Path) -> None:
    path = make_tiny_model(tmp_path, architecture, num_heads=6, num_kv_heads=2)
    prompt = random_tokens(40, seed=5)
    expected = hf_logits(path, prompt)
    run, sequence = PagedRun(load(path, dtype)), PagedSequence(prompt)
    logits = torch.cat([run.step([(sequence, n)])[0] for n in (17, 22, 1)])
    error = (logits - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    assert error < {"bfloat16": 0.05, "float16": 0.01}[dtype]


def test_greedy_output_of_the_tiny_models_varies(tiny_model: Path) -> None:
    output = load_hf(tiny_model).generate(
        torch.tensor([random_tokens(8, seed=6)]), max_new_tokens=32, do_sample=False, pad_token_id=0
    )
    assert len(set(output[0, 8:].tolist())) > 6

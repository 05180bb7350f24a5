"""The kernels on a GPU against float64, by the functions that the engine calls."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("numba_cuda", reason="the kernels are written with numba-cuda")

import references as ref
from model_zoo import load_hf, make_tiny_model
from references import PagedCase, error, spec_of, tolerance

from nanopd import LLM, SamplingParams, cuda
from nanopd.cuda import linear
from nanopd.cuda.sampling import draw_tokens
from nanopd.cuda.warp import NAMES
from nanopd.messages import SLOT_INIT
from nanopd.models.weights import PLAIN, Linear
from nanopd.worker.sampler import draws_of, kept_weights

pytestmark = pytest.mark.gpu
DTYPES = (torch.bfloat16, torch.float16)


def on_gpu(array: np.ndarray, dtype: torch.dtype | None = None) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to("cuda", dtype)


def as_numpy(tensor: Tensor) -> np.ndarray:
    return tensor.double().cpu().numpy()


def attention_of(case: PagedCase, dtype: torch.dtype) -> cuda.PagedDecodeAttention:
    layout = spec_of(torch.from_numpy(case.kv).to(dtype)).layout
    sizes = (len(case.seq_lens), case.q.shape[1], layout)
    return cuda.PagedDecodeAttention(*sizes, dtype, torch.device("cuda"), case.num_queries)


def check_attention(case: PagedCase, dtype: torch.dtype) -> None:
    q, kv = on_gpu(case.q, dtype), on_gpu(case.kv, dtype)
    block_tables, seq_lens = on_gpu(case.block_tables), on_gpu(case.seq_lens)
    attend, seen = attention_of(case, dtype), case.defined()
    expected = case.attention()[seen]
    for _ in range(3):  # the workspace is left as it was found
        out = torch.full_like(q, torch.nan)
        attend.begin_step(seq_lens, case.num_queries)
        attend(q, kv, case.layer, spec_of(kv), block_tables, seq_lens, out)
        assert error(as_numpy(out)[seen], expected) < tolerance(NAMES[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("group", range(1, 9))
def test_attention_for_every_group(dtype: torch.dtype, head_dim: int, group: int) -> None:
    rng = np.random.default_rng(group)
    seq_lens = [0, 1, 15, 16, 17, 127, 128, 129, 2049, *rng.integers(1, 900, 9).tolist()]
    check_attention(PagedCase.make(rng, seq_lens, group, 3, head_dim, 16, NAMES[dtype]), dtype)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("block_size", [16, 32, 64, 256])
@pytest.mark.parametrize("num_queries", [1, 2, 3, 4])
def test_attention_for_block_sizes_and_queries(head_dim: int, block_size: int, num_queries: int) -> None:
    rng = np.random.default_rng(block_size)
    seq_lens = [4, 5, 0, 127, 128, 131, 700, 3000]
    case = PagedCase.make(rng, seq_lens, 5, 2, head_dim, block_size, "bf16", num_queries)
    check_attention(case, torch.bfloat16)


@pytest.mark.parametrize(
    "seq_lens", [[20000], [1] * 300, [9000, 1, 1, 1], [0, 0, 5]], ids=["long", "many", "uneven", "padded"]
)
def test_attention_for_shapes_of_a_batch(seq_lens: list[int]) -> None:
    case = PagedCase.make(np.random.default_rng(1), seq_lens, 4, 8, 128, 16, "bf16")
    check_attention(case, torch.bfloat16)


@pytest.mark.parametrize(
    ("dtype", "block_size", "head_dim"), [("float32", 16, 64), ("bfloat16", 24, 64), ("float16", 16, 96)]
)
def test_a_model_without_kernels(dtype: str, block_size: int, head_dim: int, tmp_path: Path) -> None:
    """Each chosen token is the best one of transformers, or nearly."""
    path = make_tiny_model(tmp_path, "qwen3", num_heads=4, num_kv_heads=2, head_dim=head_dim)
    prompts = [np.random.default_rng(n).integers(4, 512, n).tolist() for n in (1, 17, 100)]
    keys = {"dtype": dtype, "block_size": block_size, "num_blocks": 100, "max_num_batched_tokens": 64}
    with LLM(str(path), workers=[{"device": "cuda:0"}], **keys) as llm:
        outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=20, ignore_eos=True), use_tqdm=False)
    for prompt, output in zip(prompts, outputs):
        chosen = output.outputs[0].token_ids
        with torch.no_grad():
            logits = load_hf(path)(torch.tensor([prompt + chosen])).logits[0, len(prompt) - 1 : -1].float()
        gap = logits.max(-1).values - logits.gather(-1, torch.tensor(chosen)[:, None])[:, 0]
        assert (gap / logits.std(-1)).max() < (1e-4 if dtype == "float32" else 0.1)


def test_one_captured_graph_serves_any_lengths() -> None:
    rng = np.random.default_rng(4)
    case = PagedCase.make(rng, [1000, 1000, 1000, 1000], 4, 2, 128, 16, "bf16")
    q, kv = on_gpu(case.q, torch.bfloat16), on_gpu(case.kv, torch.bfloat16)
    block_tables, seq_lens, out = on_gpu(case.block_tables), on_gpu(case.seq_lens), torch.empty_like(q)
    weight = torch.ones(case.q[0].size, dtype=q.dtype, device="cuda")
    attend, spec = attention_of(case, torch.bfloat16), spec_of(kv)

    def step() -> Tensor:
        attend.begin_step(seq_lens)
        normed = cuda.rms_norm(q.view(4, -1), weight, 1e-6)
        for _ in range(3):  # a chain in which each kernel starts while its predecessor ends
            attend(normed.view(q.shape), kv, case.layer, spec, block_tables, seq_lens, out, overlap=True)
        return cuda.rms_norm(out.view(4, -1), weight, 1e-6, overlap=True)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()
    for lengths in ([1000, 1000, 1000, 1000], [1, 900, 17, 256], [0, 1, 0, 0]):
        seq_lens.copy_(torch.tensor(lengths))
        result.fill_(torch.nan)
        graph.replay()
        case.seq_lens = np.asarray(lengths, np.int32)
        normed = PagedCase(ref.rms_norm(case.q.reshape(4, -1), 1.0, 1e-6).reshape(case.q.shape), *_rest(case))
        expected = ref.rms_norm(normed.attention().reshape(4, -1), 1.0, 1e-6)
        live = case.defined()
        assert error(as_numpy(result)[live], expected[live]) < 2 * tolerance("bf16")


def _rest(case: PagedCase) -> tuple:
    return case.kv, case.layer, case.block_tables, case.seq_lens, case.num_queries


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("in_size", "out_size"), [(1024, 4096), (2560, 64), (3584, 4608), (4096, 12288), (18944, 3584)]
)
def test_linear(dtype: torch.dtype, in_size: int, out_size: int) -> None:
    weight = torch.randn(out_size, in_size, device="cuda", dtype=dtype) / in_size**0.5
    norm, bias = torch.randn(in_size, device="cuda", dtype=dtype), torch.randn(out_size, device="cuda", dtype=dtype)
    limit = tolerance(NAMES[dtype])
    for num_rows in (1, 2, 7, 8, 9, 16, 17):
        x = torch.randn(num_rows, in_size, device="cuda", dtype=dtype)
        normed = ref.rms_norm(as_numpy(x), as_numpy(norm), 1e-6) @ as_numpy(weight).T
        with_bias, without = Linear(weight, bias, PLAIN), Linear(weight, None, PLAIN)
        got = linear.norm_linear(x, norm, 1e-6, with_bias)
        assert error(as_numpy(got), normed + as_numpy(bias)) < limit
        assert torch.equal(linear.norm_linear(x, norm, 1e-6, with_bias), got), "the order of the sums is fixed"
        for gate_up, product in ((without, normed), (with_bias, normed + as_numpy(bias))):
            gated = linear.norm_gated_linear(x, norm, 1e-6, gate_up)
            assert error(as_numpy(gated), ref.silu_and_mul(product)) < 2 * limit
        residual = torch.randn(num_rows, out_size, device="cuda", dtype=dtype)
        expected = as_numpy(residual) + as_numpy(x) @ as_numpy(weight).T
        linear.add_linear(x, without, residual)
        assert error(as_numpy(residual), expected) < limit
        linear.add_linear(x, with_bias, residual.zero_())
        assert error(as_numpy(residual), as_numpy(x) @ as_numpy(weight).T + as_numpy(bias)) < limit


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 64), (3, 4096), (500, 5120)])
def test_norm(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    x, weight = torch.randn(shape, device="cuda", dtype=dtype), torch.randn(shape[1], device="cuda", dtype=dtype)
    expected = ref.rms_norm(as_numpy(x), as_numpy(weight), 1e-6)
    assert error(as_numpy(cuda.rms_norm(x, weight, 1e-6)), expected) < tolerance(NAMES[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 48), (3, 2 * 12288), (700, 2 * 3072)])
def test_silu_and_mul(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    gate_up = torch.randn(shape, device="cuda", dtype=dtype)
    assert error(as_numpy(cuda.silu_and_mul(gate_up)), ref.silu_and_mul(as_numpy(gate_up))) < tolerance(NAMES[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("num_tokens", [1, 71, 1001])
def test_rotary_and_store(dtype: torch.dtype, head_dim: int, norm: bool, num_tokens: int) -> None:
    rng, (num_heads, num_kv_heads, block_size, layer) = np.random.default_rng(5), (7, 3, 16, 1)
    qkv = torch.randn(num_tokens, (num_heads + 2 * num_kv_heads) * head_dim, device="cuda", dtype=dtype)
    q_norm, k_norm = (torch.randn(head_dim, device="cuda", dtype=dtype) if norm else None for _ in range(2))
    kv = torch.zeros(70, 2, 2, num_kv_heads, block_size, head_dim, device="cuda", dtype=dtype)
    positions, slots = rng.integers(0, 500, num_tokens), rng.permutation(70 * block_size)[:num_tokens]
    cos_sin = ref.cosines_and_sines(500, head_dim)
    inputs, spec = (qkv, on_gpu(positions), on_gpu(slots)), spec_of(kv, on_gpu(cos_sin))
    q = cuda.rotary_and_store(*inputs, kv, layer, spec, q_norm, k_norm, 1e-6)
    heads = np.split(as_numpy(qkv).reshape(num_tokens, -1, head_dim), [num_heads, num_heads + num_kv_heads], axis=1)
    norms = (q_norm, k_norm)
    normed = [x if w is None else ref.rms_norm(x, as_numpy(w), 1e-6) for x, w in zip(heads, norms)]
    expected_q, expected_k = (ref.rotate(x, cos_sin[positions]) for x in normed)
    stored = as_numpy(kv)[slots // block_size, layer, :, :, slots % block_size]
    assert error(as_numpy(q), expected_q) < tolerance(NAMES[dtype])
    assert error(stored[:, 0], expected_k) < tolerance(NAMES[dtype])
    np.testing.assert_array_equal(stored[:, 1], heads[2])
    assert not kv[:, 0].any()


def test_copy_blocks_reads_all_before_it_writes() -> None:
    kv = torch.randn(12, 3, 2, 2, 16, 64, device="cuda", dtype=torch.bfloat16)
    src, dst = torch.tensor([3, 5, 9, 1]), torch.tensor([5, 7, 2, 3])
    expected = kv.cpu().index_copy(0, dst, kv.cpu()[src])
    cuda.copy_blocks(kv, src.cuda(), dst.cuda())
    assert torch.equal(kv.cpu(), expected)


@pytest.mark.parametrize("max_ctas", [1, 7, 1000])
def test_gather_and_scatter(max_ctas: int) -> None:
    kv = torch.randn(40, 5, 2, 3, 16, 64, device="cuda", dtype=torch.bfloat16)
    ids = torch.tensor([3, 39, 9, 1, 17], device="cuda", dtype=torch.int32)
    block_bytes = kv[0].numel() * 2
    buffer = torch.zeros(5, *kv.shape[1:], device="cuda", dtype=kv.dtype)
    cuda.move_blocks(cuda.Side.of(kv, ids), cuda.Side.of(buffer), 5, block_bytes, 0, max_ctas)
    assert torch.equal(buffer, kv[ids.long()])
    other = torch.zeros_like(kv)
    cuda.move_blocks(cuda.Side.of(buffer), cuda.Side.of(other, ids.flip(0)), 5, block_bytes, 0, max_ctas)
    assert torch.equal(other[ids.flip(0).long()], buffer)
    assert other.flatten(1).any(1).sum() == len(ids)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float32])
@pytest.mark.parametrize("vocab_size", [151936, 50257, 1000])
def test_sampling_agrees_with_its_cpu_twin(dtype: torch.dtype, vocab_size: int) -> None:
    rng, num_rows = np.random.default_rng(8), 60
    params = np.zeros(num_rows, SLOT_INIT)
    params["seed"] = rng.integers(0, 2**63, num_rows)
    params["temperature"] = rng.choice([0.0, 0.01, 0.3, 0.8, 1.0, 5.0, 100.0], num_rows)
    params["top_p"] = rng.choice([1.0, 0.95, 0.5, 0.05], num_rows)
    params["top_k"] = rng.choice([0, 1, 50, 1000, 10**9], num_rows)
    params["min_p"] = rng.choice([0.0, 0.01, 0.3, 1.0], num_rows)
    logits = (3 * torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(9))).to(dtype)
    logits[::3, 17:900] = -torch.inf
    draws, on_device = draws_of(params, np.arange(num_rows)), logits.cuda()
    tokens = draw_tokens(on_device, on_gpu(draws.view(np.int64)))
    num_equal = 0
    for row, (uniform, top_p, top_k, scale, min_p, _) in enumerate(draws.tolist()):
        alone = draw_tokens(on_device[row : row + 1].clone(), on_gpu(draws[row : row + 1].view(np.int64)))
        assert tokens[row] == alone, "other rows do not matter"
        x = logits[row].float()
        cdf = kept_weights(((x - x.max()) * scale).exp2(), top_k, top_p, min_p).numpy().cumsum()
        token, target, rounding = int(tokens[row]), int(cdf[-1]) * uniform >> 64, int(1e-5 * cdf[-1])
        num_equal += token == np.searchsorted(cdf, target, side="right")
        assert cdf[token] + rounding > target
        assert token == 0 or cdf[token - 1] - rounding <= target
    assert num_equal >= 0.9 * num_rows

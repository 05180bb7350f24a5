"""The kernels' own code on small shapes, run by the emulator of a warp, against float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

pytest.importorskip("numba_cuda", reason="the kernels are written with numba-cuda")

import references as ref
from emulator import Emulator, to_bits, to_values
from references import PagedCase, error, random, scale_of, tolerance

from nanopd.cuda import adjusting, attention, blocks, elementwise, sampling
from nanopd.cuda.launch import Spec
from nanopd.cuda.linear import ADD, GATE, MMA_ROWS, STORE, TILE_ROWS, skinny_spec
from nanopd.worker.adjustments import ADJUSTMENT, IN_PROMPT, adjust_logits
from nanopd.worker.sampler import DRAW


def run_decode(case: PagedCase, dtype: str, num_warps: int, num_stages: int, num_ctas: int) -> np.ndarray:
    """[num_rows * num_queries, num_heads, head_dim] through plan and decode kernel."""
    num_rows, num_kv_heads, block_size, head_dim = len(case.seq_lens), *case.kv.shape[3:]
    group = case.q.shape[1] // num_kv_heads
    head_units = num_kv_heads * -(-group * case.num_queries // attention.COLUMNS)
    gpu = Emulator(1 << 23)
    kv = gpu.put(to_bits(case.kv, dtype))
    q, block_tables, seq_lens = gpu.put(to_bits(case.q, dtype)), gpu.put(case.block_tables), gpu.put(case.seq_lens)
    plan, out = gpu.put(np.zeros(num_rows + 1, np.int32)), gpu.put(np.full(case.q.shape, 0x7FFF, np.uint16))  # NaN
    partials = gpu.put(np.full((2 * num_ctas, attention.COLUMNS, head_dim), np.nan, np.float32))
    partial_lse = gpu.put(np.full((2 * num_ctas, attention.COLUMNS), np.nan, np.float32))
    arrivals = gpu.put(np.zeros((num_rows, head_units), np.int32))
    gpu.launch(attention.plan_spec(num_warps), 1, seq_lens, plan, num_rows, head_units)
    layout = attention.SharedLayout(head_dim, num_warps, num_stages)
    parameters = (head_dim, dtype, num_warps, num_stages)
    spec = Spec(attention.decode_kernel, parameters, attention.DECODE_ARGUMENTS, 32 * num_warps, layout.size)
    head, side = 2 * block_size * head_dim, 2 * num_kv_heads * block_size * head_dim
    addresses = (q, kv + case.layer * 2 * side, block_tables, seq_lens, plan, out, partials, partial_lse, arrivals)
    strides = (case.kv.shape[1] * 2 * side, head, side)
    sizes = (num_rows, num_kv_heads, group, case.num_queries, int(math.log2(block_size)), case.block_tables.shape[1])
    gpu.launch(spec, num_ctas, *addresses, *strides, *sizes, scale_of(head_dim) * math.log2(math.e))
    assert not gpu.get(arrivals, (num_rows, head_units), np.int32).any(), "the counters are left as they were"
    return to_values(gpu.get(out, case.q.shape, np.uint16), dtype)


@pytest.mark.parametrize(
    ("head_dim", "dtype", "group", "num_kv_heads", "block_size", "num_queries", "seq_lens"),
    [
        (128, "bf16", 4, 2, 16, 1, [70, 1, 0, 200, 64]),
        (128, "bf16", 8, 1, 32, 1, [257, 15]),
        (128, "f16", 7, 2, 16, 1, [33, 32]),
        (64, "f16", 1, 3, 128, 1, [90, 0, 16]),
        (64, "bf16", 3, 1, 32, 2, [33, 130, 2]),
        (128, "f16", 5, 1, 16, 4, [129, 64, 0, 4]),
    ],
)
@pytest.mark.parametrize(("num_warps", "num_stages", "num_ctas"), [(2, 3, 5), (4, 2, 1), (1, 4, 25)])
def test_decode_attention(
    head_dim: int,
    dtype: str,
    group: int,
    num_kv_heads: int,
    block_size: int,
    num_queries: int,
    seq_lens: list[int],
    num_warps: int,
    num_stages: int,
    num_ctas: int,
) -> None:
    rng = np.random.default_rng(0)
    case = PagedCase.make(rng, seq_lens, group, num_kv_heads, head_dim, block_size, dtype, num_queries)
    got = run_decode(case, dtype, num_warps, num_stages, num_ctas)
    seen = case.defined()
    assert error(got[seen], case.attention()[seen]) < tolerance(dtype)
    # rows of length 0 are left as they are
    assert np.isnan(got[np.repeat(case.seq_lens == 0, num_queries)]).all()


def test_plan_of_many_rows() -> None:
    seq_lens = np.random.default_rng(1).integers(0, 1000, 75).astype(np.int32)
    gpu = Emulator(1 << 16)
    plan = gpu.put(np.zeros(76, np.int32))
    gpu.launch(attention.plan_spec(8), 1, gpu.put(seq_lens), plan, 75, 8)
    cost = (-(-seq_lens // 128) + attention.SEGMENT_COST) * 8 * (seq_lens > 0)
    expected = np.concatenate(([0], np.cumsum(cost)))
    np.testing.assert_array_equal(gpu.get(plan, (76,), np.int32), expected)


@pytest.mark.parametrize(("dtype", "shared_limit"), [("bf16", 227 << 10), ("f16", 99 << 10)])
@pytest.mark.parametrize(
    ("num_rows", "in_size", "result", "norm", "bias"),
    [
        (1, 128, STORE, False, False),
        (3, 2176, STORE, True, True),
        (8, 256, ADD, False, False),
        (13, 640, STORE, False, True),
        (11, 4224, GATE, True, False),
        (2, 384, GATE, False, False),
    ],
)
def test_skinny_linear(
    dtype: str, shared_limit: int, num_rows: int, in_size: int, result: int, norm: bool, bias: bool
) -> None:
    rng, num_tiles = np.random.default_rng(2), 3
    out_size = num_tiles * (MMA_ROWS if result == GATE else TILE_ROWS)
    x = random(rng, num_rows, in_size, dtype=dtype)
    b, norm_weight = random(rng, num_tiles * TILE_ROWS, dtype=dtype), random(rng, in_size, dtype=dtype)
    w = random(rng, num_tiles * TILE_ROWS, in_size, dtype=dtype) / 16
    gpu = Emulator()
    # two elements more to each row: what is past the rows of y stays as it is
    before = random(rng, num_rows, out_size + 2, dtype=dtype)
    y = gpu.put(to_bits(before, dtype))
    norm_address = gpu.put(to_bits(norm_weight, dtype)) if norm else 0
    b_address = gpu.put(to_bits(b, dtype)) if bias else 0
    addresses = (gpu.put(to_bits(w, dtype)), gpu.put(to_bits(x, dtype)), norm_address, b_address, y)
    second_tile = 2 * in_size * (num_tiles if result == GATE else 1) * MMA_ROWS
    sizes = (num_rows, num_tiles, 2 * in_size, 2 * (out_size + 2), second_tile, result)
    gpu.launch(skinny_spec(dtype, -(-num_rows // 8), shared_limit), 2, *addresses, *sizes, 1e-5)
    got = to_values(gpu.get(y, before.shape, np.uint16), dtype)
    rows = to_values(to_bits(ref.rms_norm(x, norm_weight, 1e-5), dtype), dtype) if norm else x
    expected = rows.astype(np.float64) @ w.T.astype(np.float64) + bias * b
    if result == GATE:
        expected = ref.silu_and_mul(expected)
    if result == ADD:
        expected = expected + before[:, :-2]
    assert error(got[:, :-2], expected) < tolerance(dtype)
    np.testing.assert_array_equal(got[:, -2:], before[:, -2:])


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
def test_norm(dtype: str) -> None:
    rng, shape = np.random.default_rng(3), (2, 2304)
    x, weight = random(rng, *shape, dtype=dtype), random(rng, 2304, dtype=dtype)
    gpu = Emulator()
    out = gpu.put(np.zeros(shape, np.uint16))
    addresses = gpu.put(to_bits(x, dtype)), gpu.put(to_bits(weight, dtype))
    gpu.launch(elementwise.norm_spec(dtype), 2, *addresses, out, 2304 // 8, 1e-5)
    got = to_values(gpu.get(out, shape, np.uint16), dtype)
    assert error(got, ref.rms_norm(x, weight, 1e-5)) < tolerance(dtype)


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
def test_silu_and_mul(dtype: str) -> None:
    gate_up = random(np.random.default_rng(4), 3, 2 * 512, dtype=dtype)
    gpu = Emulator()
    out = gpu.put(np.zeros((3, 512), np.uint16))
    gpu.launch(elementwise.silu_spec(dtype), 1, gpu.put(to_bits(gate_up, dtype)), out, 3, 512 // 8)
    assert error(to_values(gpu.get(out, (3, 512), np.uint16), dtype), ref.silu_and_mul(gate_up)) < tolerance(dtype)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("dtype", ["bf16", "f16"])
@pytest.mark.parametrize(("norm", "heads_per_warp"), [(False, 1), (True, 3)])
def test_rotary_and_store(head_dim: int, dtype: str, norm: bool, heads_per_warp: int) -> None:
    rng, (num_tokens, num_heads, num_kv_heads, block_size) = np.random.default_rng(5), (5, 3, 2, 16)
    qkv = random(rng, num_tokens, num_heads + 2 * num_kv_heads, head_dim, dtype=dtype)
    norms = [random(rng, head_dim, dtype=dtype) for _ in range(2)]
    positions, slots = rng.integers(0, 50, num_tokens), rng.permutation(4 * block_size)[:num_tokens]
    cos_sin = ref.cosines_and_sines(50, head_dim)
    gpu = Emulator()
    kv_shape = (4, 2, num_kv_heads, block_size, head_dim)
    kv, q = gpu.put(np.zeros(kv_shape, np.uint16)), gpu.put(np.zeros((num_tokens, num_heads, head_dim), np.uint16))
    norm_addresses = [gpu.put(to_bits(x, dtype)) if norm else 0 for x in norms]
    inputs = gpu.put(to_bits(qkv, dtype)), gpu.put(positions), gpu.put(slots), gpu.put(cos_sin)
    side = 2 * num_kv_heads * block_size * head_dim
    sizes = (num_tokens, num_heads, num_kv_heads, block_size, heads_per_warp)
    strides = (2 * side, 2 * block_size * head_dim, side)
    gpu.launch(elementwise.rotary_spec(head_dim, dtype), 5, *inputs, kv, *norm_addresses, q, *strides, *sizes, 1e-6)
    parts = np.split(qkv, [num_heads, num_heads + num_kv_heads], axis=1)
    normed = [ref.rms_norm(x, w, 1e-6) if norm else x for x, w in zip(parts, norms)]
    expected_q, expected_k = (ref.rotate(x, cos_sin[positions]) for x in normed)
    got_q = to_values(gpu.get(q, (num_tokens, num_heads, head_dim), np.uint16), dtype)
    cache = to_values(gpu.get(kv, kv_shape, np.uint16), dtype)
    stored = cache[slots // block_size, :, :, slots % block_size]  # [num_tokens, 2, num_kv_heads, head_dim]
    assert error(got_q, expected_q) < tolerance(dtype)
    assert error(stored[:, 0], expected_k) < tolerance(dtype)
    np.testing.assert_array_equal(stored[:, 1], parts[2])
    assert np.count_nonzero(cache.any(-1)) == 2 * num_tokens * num_kv_heads


@pytest.mark.parametrize("id_type", [np.int32, np.int64])
@pytest.mark.parametrize("block_bytes", [512, 33 * 1024])
def test_move_blocks(id_type: type, block_bytes: int) -> None:
    rng = np.random.default_rng(6)
    src, dst = rng.integers(0, 1 << 30, (7, block_bytes // 4)), np.zeros((5, block_bytes // 4), np.int32)
    src_ids, dst_ids = np.array([6, 0, 3], id_type), np.array([1, 4, 2], id_type)
    gpu = Emulator()
    src_address, to, ids = gpu.put(src.astype(np.int32)), gpu.put(dst), (gpu.put(src_ids), gpu.put(dst_ids))
    sizes = (block_bytes, block_bytes, src_ids.itemsize, dst_ids.itemsize, 3, block_bytes)
    gpu.launch(blocks.move_spec(), 2, src_address, to, *ids, *sizes)
    dst[dst_ids] = src[src_ids]
    np.testing.assert_array_equal(gpu.get(to, dst.shape, np.int32), dst)
    gpu.launch(blocks.move_spec(), 4, src_address, to, ids[0], 0, *sizes)  # gather
    dst[:3] = src[src_ids]
    np.testing.assert_array_equal(gpu.get(to, dst.shape, np.int32), dst)


def cumulative(logits: np.ndarray, top_k: int, top_p: float, scale: float, min_p: float) -> np.ndarray:
    """[vocab_size] float64: the distribution that a token is drawn from, by sorting."""
    likelihood = np.exp2((logits - logits.max()).astype(np.float64) * scale)
    likelihood[likelihood < min_p] = 0
    if top_k:
        likelihood[likelihood < np.sort(likelihood)[-top_k]] = 0
    best = np.sort(likelihood)[::-1]
    last = np.searchsorted(best.cumsum(), top_p * best.sum())
    likelihood[likelihood < best[min(last, len(best) - 1)]] = 0
    return likelihood.cumsum() / likelihood.sum()


@pytest.mark.parametrize(("dtype", "vocab_size"), [("bf16", 2000), ("f16", 24), ("f32", 3001)])
def test_sampling(dtype: str, vocab_size: int) -> None:
    rng = np.random.default_rng(7)
    rows = [(0, 1.0, 1e30, 0), (0, 1.0, 1.8, 0.01), (10, 1.0, 0.5, 0), (0, 0.9, 0.1, 0.3), (20, 0.7, 1.2, 0.05)]
    rows += [(10**6, 0.2, 1.4, 0), (0, 1.0, 0.4, 1.0)]
    padded = -(-vocab_size // 8) * 8
    logits = np.full((len(rows), padded), -np.inf, np.float32)
    logits[:, :vocab_size] = 3 * rng.standard_normal((len(rows), vocab_size))
    if dtype != "f32":  # many are equal
        logits = to_values(to_bits(logits, dtype), dtype).reshape(logits.shape)
    draws = np.zeros(len(rows), DRAW)
    expected = []
    for i, (x, (top_k, top_p, scale, min_p)) in enumerate(zip(logits, rows)):
        cdf = cumulative(x[:vocab_size], min(top_k, vocab_size), top_p, scale, min_p)
        shares = np.diff(cdf, prepend=0)
        token = rng.choice(np.flatnonzero(shares > 0.2 * shares.max()))  # drawn by the middle of its interval
        uniform = cdf[token] - shares[token] / 2
        draws[i] = int(uniform * 2.0**64), int(top_p * 2.0**64) % 2**64, top_k, scale, min_p, 0
        expected.append(token)
    gpu = Emulator()
    source = logits if dtype == "f32" else to_bits(logits, dtype)
    tokens = gpu.put(np.full(len(rows), -1, np.int64))
    num_chunks = padded * source.itemsize // 16
    addresses = gpu.put(source), gpu.put(draws), tokens
    gpu.launch(sampling.sampling_spec(dtype), len(rows), *addresses, num_chunks, vocab_size)
    assert gpu.get(tokens, (len(rows),), np.int64).tolist() == expected


@pytest.mark.parametrize(
    ("log2_likelihoods", "uniform", "top_p", "top_k", "expected"),
    [
        ((-1, 0, -1), 2**62 - 1, 0, 0, 0),
        ((-1, 0, -1), 2**62, 0, 0, 1),  # a token's share is without its end
        ((-1, 0, -1), 3 * 2**62, 0, 0, 2),
        ((-1, 0, -1), 2**64 - 1, 2**63, 0, 1),  # the best alone reaches half of the mass
        ((-1, 0, -1), 2**64 - 1, 2**63 + 1, 0, 2),
        ((-(2**-24), 0, -1.4 * 2**-24), 2**64 - 1, 0, 1, 1),  # 1 and the float32 before it
        ((-1, 0, -1), 2**64 - 1, 0, 2, 2),  # as likely as the second best
        ((0, 0, -1), 0, 0, 1, 0),
    ],
)
def test_sampling_at_the_border(
    log2_likelihoods: tuple[float, ...], uniform: int, top_p: int, top_k: int, expected: int
) -> None:
    gpu, logits = Emulator(), np.full(12, -np.inf, np.float32)
    logits[[0, 5, 9]] = log2_likelihoods
    tokens, draw = gpu.put(np.full(1, -1, np.int64)), gpu.put(np.array((uniform, top_p, top_k, 1.0, 0, 0), DRAW))
    gpu.launch(sampling.sampling_spec("f32"), 1, gpu.put(logits), draw, tokens, 3, 12)
    assert gpu.get(tokens, (1,), np.int64)[0] == (0, 5, 9)[expected]


@pytest.mark.parametrize("value", [np.nan, -np.inf, np.inf])
def test_sampling_of_what_is_no_number(value: float) -> None:
    """Some token of the vocabulary: what is wrong with a model must not become a wrong address."""
    gpu = Emulator()
    tokens = gpu.put(np.full(1, -1, np.int64))
    logits, draw = gpu.put(np.full(64, value, np.float32)), gpu.put(np.array((2**64 - 1, 2**63, 30, 1.0, 0, 0), DRAW))
    gpu.launch(sampling.sampling_spec("f32"), 1, logits, draw, tokens, 16, 61)
    assert 0 <= gpu.get(tokens, (1,), np.int64)[0] < 61


@pytest.mark.parametrize(("dtype", "width"), [("bf16", 512), ("f16", 256), ("f32", 384)])
@pytest.mark.parametrize("has_biases", [True, False])
def test_adjusting(dtype: str, width: int, has_biases: bool) -> None:
    """Bit for bit what the CPU twin gives."""
    rng, num_rows, table_width = np.random.default_rng(3), 5, width + 8
    logits = random(rng, num_rows, width, dtype=dtype) if dtype != "f32" else rng.normal(size=(num_rows, width))
    logits = np.float32(logits).reshape(num_rows, width)
    logits[:, 5], logits[:, 6], logits[2, 7] = -np.inf, 0, -0.0
    counts = rng.choice([0, 1, 3, IN_PROMPT, IN_PROMPT + 2], (4, table_width)).astype(np.int32)
    biases = rng.choice([0, 1.5, -0.1, -np.inf], (4, table_width)).astype(np.float32)
    counts[0] = biases[0] = 0
    records = np.zeros(num_rows, ADJUSTMENT)
    records["row"], (records["presence"], records["frequency"]) = [3, 1, 0, 2, 1], rng.normal(size=(2, num_rows))
    records["repetition"] = rng.uniform(0.5, 2, num_rows)
    records["inverse"] = 1 / records["repetition"]
    gpu = Emulator()
    out = gpu.put(np.full((num_rows, width), np.nan, np.float32))
    source = gpu.put(logits if dtype == "f32" else to_bits(logits, dtype))
    spec = adjusting.adjusting_spec(dtype)
    num_chunks = width // (4 if dtype == "f32" else 8)
    tables = gpu.put(counts), gpu.put(biases) if has_biases else 0
    sizes = num_rows, num_chunks, table_width
    gpu.launch(spec, -(-num_rows * num_chunks // spec.threads), source, *tables, gpu.put(records), out, *sizes)
    on_host = torch.from_numpy(biases) if has_biases else None
    expected = adjust_logits(torch.from_numpy(logits), torch.from_numpy(counts), on_host, records)
    np.testing.assert_array_equal(gpu.get(out, logits.shape, np.float32), expected.numpy())

"""The CPU operations against plain float64 formulas, in float32 and the 16-bit types."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nanopd.config import KVLayout
from nanopd.cpu import ops
from nanopd.models import AttentionSpec, PrefillRow
from nanopd.models.weights import PLAIN, Linear

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 2e-2, torch.float16: 2.5e-3}  # of the largest value
NUM_LAYERS = 2
LAYER = 1


def assert_close(actual: Tensor, expected: Tensor) -> None:
    """expected is float64."""
    assert actual.shape == expected.shape
    limit = TOLERANCE[actual.dtype] * max(expected.abs().max().item(), 1e-3)
    assert (actual.double() - expected).abs().max() <= limit


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x = x.double()
    return weight.double() * x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("num_tokens", "in_features", "out_features"),
    [(1, 576, 960), (2, 64, 33), (3, 100, 4), (4, 7, 50), (5, 576, 576), (17, 1536, 70), (130, 48, 97), (0, 8, 8)],
)
@pytest.mark.parametrize("has_bias", [False, True])
def test_linear(dtype: torch.dtype, num_tokens: int, in_features: int, out_features: int, has_bias: bool) -> None:
    x = normal(num_tokens, in_features, dtype=dtype)
    weight = normal(out_features, in_features, dtype=dtype, seed=1)
    bias = normal(out_features, dtype=dtype, seed=2) if has_bias else None
    expected = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    product = ops.multiply(x, Linear(weight, bias, PLAIN))
    if num_tokens:
        assert_close(product, expected)
    else:
        assert product.shape == (0, out_features)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_tokens", "hidden"), [(1, 576), (3, 64), (20, 100)])
def test_norms_and_products(dtype: torch.dtype, num_tokens: int, hidden: int) -> None:
    x, weight = normal(num_tokens, hidden, dtype=dtype), normal(hidden, dtype=dtype, seed=2)
    normed = rms_norm_reference(x, weight, 1e-5)
    assert_close(ops.rms_norm(x, weight, 1e-5), normed)
    matrix, residual = normal(2 * hidden, hidden, dtype=dtype, seed=3), normal(num_tokens, 2 * hidden, dtype=dtype)
    product = normed.to(dtype).double() @ matrix.double().T
    linear = Linear(matrix, None, PLAIN)
    assert_close(ops.norm_linear(x, weight, 1e-5, linear), product)
    gate, up = product.to(dtype).double().chunk(2, dim=1)
    assert_close(ops.norm_gated_linear(x, weight, 1e-5, linear), gate * torch.sigmoid(gate) * up)
    expected = residual.double() + x.double() @ matrix.double().T
    ops.add_linear(x, linear, residual)
    assert_close(residual, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_silu_and_mul(dtype: torch.dtype, scale: float) -> None:
    gate_up = scale * normal(5, 2 * 333, dtype=dtype)
    gate, up = gate_up.double().chunk(2, dim=1)
    assert_close(ops.silu_and_mul(gate_up), gate * torch.sigmoid(gate) * up)


def test_silu_of_extremes_is_finite_and_nan_stays() -> None:
    gate_up = torch.tensor([[-1e4, -200.0, -88.0, 88.0, 200.0, 1e4, torch.nan] + [1.0] * 7])
    out = ops.silu_and_mul(gate_up)[0]
    assert_close(out[:6], torch.tensor([0.0, 0.0, 0.0, 88.0, 200.0, 1e4], dtype=torch.float64))
    assert out[6].isnan()


@dataclass
class Cache:
    """KV storage full of NaN but for the contexts stored in it, in blocks of random ids; block 0 is never used."""

    kv: Tensor  # [num_blocks, NUM_LAYERS, 2, num_kv_heads, block_size, head_dim]
    block_tables: Tensor  # [num_sequences, max_blocks] int32, padded with the null block
    keys: list[Tensor]  # per sequence [length, num_kv_heads, head_dim]
    values: list[Tensor]


def make_cache(
    lengths: list[int], num_kv_heads: int, head_dim: int, block_size: int, dtype: torch.dtype = torch.float32
) -> Cache:
    needs = [-(-length // block_size) for length in lengths]
    ids = (1 + torch.randperm(sum(needs) + 3, generator=torch.Generator().manual_seed(3))).tolist()
    shape = (sum(needs) + 4, NUM_LAYERS, 2, num_kv_heads, block_size, head_dim)
    kv = torch.full(shape, torch.nan, dtype=dtype)
    tables = torch.zeros(len(lengths), max(needs) + 1, dtype=torch.int32)
    cache = Cache(kv, tables, [], [])
    for row, (length, need) in enumerate(zip(lengths, needs, strict=True)):
        tables[row, :need] = torch.tensor([ids.pop() for _ in range(need)])
        cache.keys.append(normal(length, num_kv_heads, head_dim, dtype=dtype, seed=2 * row))
        cache.values.append(normal(length, num_kv_heads, head_dim, dtype=dtype, seed=2 * row + 1))
        for i in range(length):
            block = kv[tables[row, i // block_size], LAYER]
            block[0, :, i % block_size] = cache.keys[row][i]
            block[1, :, i % block_size] = cache.values[row][i]
    return cache


def spec_of(kv: Tensor, cos_sin: Tensor | None = None) -> AttentionSpec:
    """Of a layer of a cache with usual scores; cos_sin is wanted by the rotation alone."""
    layout = KVLayout(NUM_LAYERS, *kv.shape[3:], str(kv.dtype).removeprefix("torch."))
    return AttentionSpec(layout.head_dim**-0.5, kv if cos_sin is None else cos_sin, layout)


def attention_reference(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """q [num_heads, head_dim] of one token over keys, values [length, num_kv_heads, head_dim], in float64."""
    group = q.shape[0] // keys.shape[1]
    keys, values = (x.double().repeat_interleave(group, dim=1) for x in (keys, values))
    weights = (torch.einsum("hd,lhd->hl", q.double(), keys) / q.shape[1] ** 0.5).softmax(-1)
    return torch.einsum("hl,lhd->hd", weights, values)


def check_decode(
    lengths: list[int], group: int, num_kv_heads: int, head_dim: int, block_size: int, dtype: torch.dtype
) -> None:
    cache = make_cache(lengths, num_kv_heads, head_dim, block_size, dtype)
    q = 2 * normal(len(lengths), group * num_kv_heads, head_dim, dtype=dtype, seed=99)
    out = torch.full_like(q, torch.nan)
    seq_lens = torch.tensor(lengths, dtype=torch.int32)
    ops.paged_decode_attention(q, cache.kv, LAYER, spec_of(cache.kv), cache.block_tables, seq_lens, out)
    expected = [attention_reference(*row) for row in zip(q, cache.keys, cache.values, strict=True)]
    assert_close(out, torch.stack(expected))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", [1, 16, 64])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(("group", "num_kv_heads"), [(1, 3), (3, 2), (4, 1), (7, 2)])
def test_decode_attention(dtype: torch.dtype, block_size: int, head_dim: int, group: int, num_kv_heads: int) -> None:
    lengths = [1, max(1, block_size - 1), block_size, block_size + 1, 3 * block_size + 5]
    check_decode(lengths, group, num_kv_heads, head_dim, block_size, dtype)


@settings(max_examples=40)
@given(
    lengths=st.lists(st.integers(1, 150), min_size=1, max_size=9),
    group=st.integers(1, 8),
    num_kv_heads=st.integers(1, 3),
    head_dim=st.sampled_from([16, 64, 80, 128]),
    block_size=st.integers(1, 40),
)
def test_decode_attention_of_any_shape(
    lengths: list[int], group: int, num_kv_heads: int, head_dim: int, block_size: int
) -> None:
    check_decode(lengths, group, num_kv_heads, head_dim, block_size, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", [1, 16])
@pytest.mark.parametrize("chunks", [[1], [15, 1], [16, 17], [17, 2, 16], [70], [33, 33, 1]])
@pytest.mark.parametrize(("group", "num_kv_heads", "head_dim"), [(1, 2, 64), (3, 1, 128), (7, 2, 64)])
def test_prefill_attention(
    dtype: torch.dtype, block_size: int, chunks: list[int], group: int, num_kv_heads: int, head_dim: int
) -> None:
    """Each chunk is computed before the next one is stored: what lies behind it is NaN."""
    total = sum(chunks)
    full = make_cache([total], num_kv_heads, head_dim, block_size, dtype)
    kv, block_table = torch.full_like(full.kv, torch.nan), full.block_tables[0]
    q = 2 * normal(total, group * num_kv_heads, head_dim, dtype=dtype, seed=99)
    out = torch.full_like(q, torch.nan)
    cached = 0
    for chunk in chunks:
        end = cached + chunk
        for i in range(cached, end):
            block = int(block_table[i // block_size])
            kv[block, LAYER, :, :, i % block_size] = full.kv[block, LAYER, :, :, i % block_size]
        row = PrefillRow(0, chunk, cached, block_table)
        out[cached:end] = ops.prefill_attention(q[cached:end], kv, LAYER, spec_of(kv), [row])
        cached = end
    keys, values = full.keys[0], full.values[0]
    expected = [attention_reference(q[i], keys[: i + 1], values[: i + 1]) for i in range(total)]
    assert_close(out, torch.stack(expected))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_norms", [False, True])
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim"), [(3, 3, 64), (6, 2, 128), (7, 1, 64)])
def test_rotary_and_store(
    dtype: torch.dtype, has_norms: bool, num_heads: int, num_kv_heads: int, head_dim: int
) -> None:
    block_size, num_tokens = 16, 21
    qkv = normal(num_tokens, (num_heads + 2 * num_kv_heads) * head_dim, dtype=dtype)
    positions = torch.randperm(100, generator=torch.Generator().manual_seed(1))[:num_tokens]
    slots = block_size + torch.randperm(5 * block_size, generator=torch.Generator().manual_seed(2))[:num_tokens]
    angles = normal(100, head_dim // 2, seed=3).double()
    cos_sin = torch.cat((angles.cos(), angles.sin()), dim=1).float()
    kv = torch.full((6, NUM_LAYERS, 2, num_kv_heads, block_size, head_dim), torch.nan, dtype=dtype)
    norms = [normal(head_dim, dtype=dtype, seed=4), normal(head_dim, dtype=dtype, seed=5)] if has_norms else [None] * 2

    q = ops.rotary_and_store(qkv, positions, slots, kv, LAYER, spec_of(kv, cos_sin), *norms, 1e-6)

    heads = qkv.double().view(num_tokens, -1, head_dim).split((num_heads, num_kv_heads, num_kv_heads), dim=1)
    rotated = []
    for part, norm in zip(heads, norms, strict=False):
        part = part if norm is None else rms_norm_reference(part, norm, 1e-6)
        # pairs (i, i + head_dim / 2) as complex numbers, turned by their angle
        pairs = torch.complex(part[..., : head_dim // 2], part[..., head_dim // 2 :])
        turned = pairs * torch.polar(torch.ones_like(angles), angles)[positions].unsqueeze(1)
        rotated.append(torch.cat((turned.real, turned.imag), dim=2))
    stored = kv[slots // block_size, LAYER, :, :, slots % block_size]  # [num_tokens, 2, num_kv_heads, head_dim]
    assert_close(q, rotated[0])
    assert_close(stored[:, 0], rotated[1])
    assert torch.equal(stored[:, 1].double(), heads[2])
    assert kv.isnan().sum() == kv.numel() - stored.numel()  # nothing else was touched


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_what_a_gpu_takes_for_float32_agrees_with_the_kernels(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, num_heads, head_dim = make_cache([1, 33, 16], 2, 80, 16), 6, 80

    def outputs(device: str) -> list[Tensor]:
        qkv, kv, tables = normal(9, 10 * head_dim).to(device), cache.kv.to(device), cache.block_tables.to(device)
        slots, norm = torch.arange(9, device=device), normal(head_dim).to(device)
        stored = torch.zeros_like(kv)
        spec = spec_of(kv, normal(9, head_dim).to(device))
        q = ops.rotary_and_store(qkv, slots.flip(0), slots, stored, LAYER, spec, norm, None, 1e-6)
        decoded, seq_lens = torch.empty_like(q[:3]), torch.tensor([1, 33, 16], dtype=torch.int32, device=device)
        ops.paged_decode_attention(q[:3], kv, LAYER, spec, tables, seq_lens, decoded)
        rows = [PrefillRow(0, 2, 0, tables[2]), PrefillRow(2, 9, 26, tables[1])]
        gate_up = Linear(normal(8, num_heads * head_dim).to(device), None, PLAIN)
        mlp = ops.norm_gated_linear(q.flatten(1), norm.repeat(num_heads), 1e-6, gate_up)
        return [q, stored, decoded, ops.prefill_attention(q, kv, LAYER, spec, rows), mlp]

    expected = outputs("cpu")
    monkeypatch.setattr(ops, "_has_kernels", lambda x: False)
    for got, kernels in zip(outputs(device), expected, strict=True):
        assert_close(got.cpu(), kernels.double())


def test_copy_blocks_reads_before_it_writes() -> None:
    kv = normal(6, NUM_LAYERS, 2, 1, 4, 8)
    before = kv.clone()
    ops.copy_blocks(kv, torch.tensor([1, 2, 5]), torch.tensor([2, 3, 4]))
    assert torch.equal(kv, before[[0, 1, 1, 2, 5, 5]])


def test_embedding() -> None:
    weight = normal(11, 8)
    ids = torch.tensor([3, 0, 10, 3])
    assert torch.equal(ops.embedding(ids, weight), weight[ids])


def test_prepare_thread_follows_torch() -> None:
    import numba

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        ops.prepare_thread()
        assert numba.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
        ops.prepare_thread()

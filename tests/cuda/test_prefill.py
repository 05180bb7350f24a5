"""Prefill attention on the CPU: how rows are put together, and the result against float64, row by row."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("numba_cuda", reason="the package's kernels are written with numba-cuda")

from references import PagedCase, error, random, spec_of, tolerance

from nanopd.cuda import prefill
from nanopd.cuda.prefill import Backends, PrefillAttention
from nanopd.models import PrefillRow

NUM_KV_HEADS, GROUP, BLOCK_SIZE = 2, 3, 4
DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16}


def dense_attention(q: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    return F.scaled_dot_product_attention(q, keys, values, is_causal=True, scale=scale, enable_gqa=True)


def attention_of_any_type(q: Tensor, keys: Tensor, values: Tensor, packed: prefill.Packed, scale: float) -> Tensor:
    """As `prefill.flash_attention`, segment by segment."""
    out, q_end, k_end = torch.empty_like(q), 0, 0
    for q_len, k_len in zip(packed.q_lens, packed.k_lens, strict=True):
        q_end, k_end = q_end + q_len, k_end + k_len
        tokens, places = slice(q_end - q_len, q_end), slice(k_end - k_len, k_end)
        if k_len:
            mask = torch.ones(q_len, k_len, dtype=torch.bool, device=q.device).tril(k_len - q_len)
            heads, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q[tokens], keys[places], values[places]))
            y = F.scaled_dot_product_attention(heads, k, v, attn_mask=mask, scale=scale, enable_gqa=True)
            out[tokens] = y[0].transpose(0, 1)
    return out


class Step:
    """Some decode rows, then chunks of (tokens, tokens before); what nobody has stored is NaN."""

    def __init__(self, num_decode_rows: int, chunks: list[tuple[int, int]], head_dim: int, dtype: str = "bf16") -> None:
        rng = np.random.default_rng(0)
        context_lens = [length + cached for length, cached in chunks]
        self.case = PagedCase.make(rng, context_lens, GROUP, NUM_KV_HEADS, head_dim, BLOCK_SIZE, dtype)
        self.rows, slots, start = [], [0] * num_decode_rows, num_decode_rows
        for (length, cached), table in zip(chunks, self.case.block_tables):
            num_blocks = -(-(length + cached) // BLOCK_SIZE)
            self.rows.append(PrefillRow(start, start + length, cached, torch.from_numpy(table[:num_blocks])))
            positions = np.arange(cached, cached + length)
            slots += (table[positions // BLOCK_SIZE].astype(np.int64) * BLOCK_SIZE + positions % BLOCK_SIZE).tolist()
            start += length
        self.slots = torch.tensor(slots)
        self.q = torch.from_numpy(random(rng, start, GROUP * NUM_KV_HEADS, head_dim, dtype=dtype))

    def check(self, backends: Backends | None, dtype: torch.dtype, device: str, limit: float, every: int = 1) -> None:
        q, kv = self.q.to(device, dtype), torch.from_numpy(self.case.kv).to(device, dtype)
        rows = [replace(row, block_table=row.block_table.to(device)) for row in self.rows]
        attend = PrefillAttention(2048, backends)
        for _ in range(2):  # a plan serves one step
            attend.begin_step(self.slots.to(device))
            for _ in range(2):
                out = attend(q, kv, self.case.layer, spec_of(kv), rows)
        assert out.shape == q.shape
        tokens = [(i, row, t) for i, row in enumerate(rows) for t in range(row.end - 1, row.start - 1, -every)]
        expected = [
            self.case._attend(self.q[t].double().numpy(), i, row.num_cached + 1 + t - row.start) for i, row, t in tokens
        ]
        assert error(out[[t for *_, t in tokens]].double().cpu().numpy(), np.stack(expected)) < limit


CHUNKS = st.tuples(st.integers(1, 20), st.integers(0, 9) | st.just(0))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 3), st.lists(CHUNKS, min_size=1, max_size=4), st.sampled_from([4, 8]), st.booleans())
def test_rows_of_any_lengths(
    num_decode_rows: int, chunks: list[tuple[int, int]], head_dim: int, has_dense: bool
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefill, "LONG", 8)
        patch.setattr(prefill, "GRAIN", 4)
        patch.setattr(prefill, "REPEATS", 1)  # the second step shares a call, the first does not
        backends = Backends(attention_of_any_type, dense_attention if has_dense else None)
        Step(num_decode_rows, chunks, head_dim).check(backends, torch.float32, "cpu", 1e-6)


@pytest.mark.parametrize("num_decode_rows", [0, 2])
@pytest.mark.parametrize(
    ("lengths", "repeats", "shapes", "num_packed"),
    [
        ([8], 0, [(1, 8)], 0),
        ([8, 8, 8], 0, [(3, 8)], 0),
        ([8, 8, 8], 2, [(1, 8), (1, 8), (1, 8)], 0),
        ([8, 12], 0, [(1, 8), (1, 12)], 0),
        ([9], 0, [(1, 8)], 1),
        ([11, 7, 8], 0, [(1, 8), (1, 8)], 10),
        ([4, 4], 0, [(2, 4)], 0),
        ([4, 4], 2, [], 8),
        ([4, 7], 0, [], 11),
    ],
)
def test_which_tokens_are_dense(
    num_decode_rows: int,
    lengths: list[int],
    repeats: int,
    shapes: list[tuple[int, int]],
    num_packed: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(prefill, "LONG", 8)
    monkeypatch.setattr(prefill, "GRAIN", 4)
    monkeypatch.setattr(prefill, "REPEATS", repeats)
    seen: list[tuple[int, int]] = []
    packed: list[int] = []

    def dense(q: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
        # shape and strides make a plan: they must not depend on what else is in the step
        count, heads, length, size = q.shape
        assert keys.stride() == values.stride() == (length * 2 * NUM_KV_HEADS * size, size, 2 * NUM_KV_HEADS * size, 1)
        assert q.stride() == (length * heads * size, size, heads * size, 1)
        seen.append((count, length))
        return dense_attention(q, keys, values, scale)

    def pack(q: Tensor, keys: Tensor, values: Tensor, segments: prefill.Packed, scale: float) -> Tensor:
        packed.append(sum(n for n, k in zip(segments.q_lens, segments.k_lens) if k))
        return attention_of_any_type(q, keys, values, segments, scale)

    step = Step(num_decode_rows, [(length, 0) for length in lengths], 8)
    step.check(Backends(pack, dense), torch.float32, "cpu", 1e-6)
    assert seen == 4 * shapes
    assert packed == ([num_packed] * 4 if num_packed else [])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bf16", "f16"])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(
    ("num_decode_rows", "chunks"),
    [
        (0, [(1024, 0)]),
        (0, [(1280, 0), (1280, 0)]),
        (3, [(1300, 0), (40, 700), (1024, 0), (1, 90), (300, 0)]),
        (0, [(1025, 0)]),
        (1, [(1, 0)]),
    ],
)
def test_on_a_gpu(num_decode_rows: int, chunks: list[tuple[int, int]], head_dim: int, dtype: str) -> None:
    """The backends that are fastest there, and flash alone."""
    step = Step(num_decode_rows, chunks, head_dim, dtype)
    for backends in (None, Backends(prefill.flash_attention, None)):
        step.check(backends, DTYPES[dtype], "cuda", tolerance(dtype), every=29)

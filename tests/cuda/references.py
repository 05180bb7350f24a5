"""What the kernels should compute, in float64 and numpy, and paged caches to compute it from."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from emulator import to_bits, to_values
from numpy.typing import NDArray
from torch import Tensor

from nanopd.config import KVLayout
from nanopd.models import AttentionSpec

Floats = NDArray[np.floating]


def error(got: Floats, expected: Floats) -> float:
    """Relative, over all elements; NaN counts as wrong."""
    difference = np.linalg.norm(got.astype(np.float64) - expected) / np.linalg.norm(expected)
    return float(difference) if np.isfinite(difference) else np.inf


def tolerance(dtype: str) -> float:
    """For a few roundings to the type: bfloat16 keeps 8 bits, float16 11."""
    return 5e-3 if dtype == "bf16" else 1e-3


def random(rng: np.random.Generator, *shape: int, dtype: str) -> NDArray[np.float32]:
    """Normal numbers that the type can represent."""
    return to_values(to_bits(rng.standard_normal(shape), dtype), dtype)


@dataclass
class PagedCase:
    """A batch of sequences in a cache of shuffled blocks. What no sequence has written is NaN, block 0 included."""

    q: NDArray[np.float32]  # [num_rows * num_queries, num_heads, head_dim]
    kv: NDArray[np.float32]  # [num_blocks, num_layers, 2, num_kv_heads, block_size, head_dim]
    layer: int
    block_tables: NDArray[np.int32]  # [num_rows, max_blocks]
    seq_lens: NDArray[np.int32]  # [num_rows]
    num_queries: int

    @classmethod
    def make(
        cls,
        rng: np.random.Generator,
        seq_lens: list[int],
        group: int,
        num_kv_heads: int,
        head_dim: int,
        block_size: int,
        dtype: str,
        num_queries: int = 1,
    ) -> PagedCase:
        num_layers, layer = 2, 1
        needed = [-(-n // block_size) for n in seq_lens]
        ids = iter(rng.permutation(np.arange(1, sum(needed) + 3)))
        kv = np.full((sum(needed) + 3, num_layers, 2, num_kv_heads, block_size, head_dim), np.nan, np.float32)
        block_tables = np.zeros((len(seq_lens), max(needed) + 2), np.int32)
        for row, (n, blocks) in enumerate(zip(seq_lens, needed)):
            for j in range(blocks):
                block_tables[row, j] = block = next(ids)
                filled = min(block_size, n - j * block_size)
                kv[block, layer, :, :, :filled] = random(rng, 2, num_kv_heads, filled, head_dim, dtype=dtype)
        q = random(rng, len(seq_lens) * num_queries, group * num_kv_heads, head_dim, dtype=dtype)
        return cls(q, kv, layer, block_tables, np.asarray(seq_lens, np.int32), num_queries)

    def defined(self) -> NDArray[np.bool_]:
        """Which rows of q see anything."""
        return (self.seq_lens[:, None] - self.num_queries + np.arange(self.num_queries) >= 0).reshape(-1)

    def attention(self) -> NDArray[np.float64]:
        """[num_rows * num_queries, num_heads, head_dim]; 0 where nothing is seen."""
        out = np.zeros(self.q.shape)
        for i in np.flatnonzero(self.defined()):
            row, query = divmod(int(i), self.num_queries)
            limit = int(self.seq_lens[row]) - self.num_queries + 1 + query
            out[i] = self._attend(self.q[i].astype(np.float64), row, limit)
        return out

    def _attend(self, q: NDArray[np.float64], row: int, limit: int) -> NDArray[np.float64]:
        num_kv_heads, block_size, head_dim = self.kv.shape[3:]
        blocks = self.kv[self.block_tables[row, : -(-limit // block_size)], self.layer].astype(np.float64)
        keys, values = blocks.transpose(1, 2, 0, 3, 4).reshape(2, num_kv_heads, -1, head_dim)[:, :, :limit]
        scores = np.einsum("hgd,htd->hgt", q.reshape(num_kv_heads, -1, head_dim), keys) * scale_of(head_dim)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        return np.einsum("hgt,htd->hgd", weights, values).reshape(-1, head_dim)


def scale_of(head_dim: int) -> float:
    """Of the scores in all tests: another one than torch takes where it is told none."""
    return 1.25 * head_dim**-0.5


def spec_of(kv: Tensor, cos_sin: Tensor | None = None) -> AttentionSpec:
    """Of each layer of a cache; cos_sin is wanted by the rotation alone."""
    layout = KVLayout(*kv.shape[1:2], *kv.shape[3:], str(kv.dtype).removeprefix("torch."))
    return AttentionSpec(scale_of(layout.head_dim), kv if cos_sin is None else cos_sin, layout)


def rms_norm(x: Floats, weight: Floats, eps: float) -> NDArray[np.float64]:
    x = x.astype(np.float64)
    return weight * x / np.sqrt((x**2).mean(-1, keepdims=True) + eps)


def silu_and_mul(gate_up: Floats) -> NDArray[np.float64]:
    gate, up = np.split(gate_up.astype(np.float64), 2, axis=-1)
    return gate / (1 + np.exp(-gate)) * up


def cosines_and_sines(num_positions: int, head_dim: int) -> NDArray[np.float32]:
    """[num_positions, head_dim]"""
    angles = np.arange(num_positions)[:, None] * 1e4 ** (-np.arange(0, head_dim, 2) / head_dim)
    return np.concatenate((np.cos(angles), np.sin(angles)), axis=1).astype(np.float32)


def rotate(x: Floats, cos_sin: Floats) -> NDArray[np.float64]:
    """x [tokens, heads, head_dim], cos_sin [tokens, head_dim]"""
    cos, sin = np.split(cos_sin.astype(np.float64)[:, None], 2, axis=-1)
    first, second = np.split(x.astype(np.float64), 2, axis=-1)
    return np.concatenate((first * cos - second * sin, second * cos + first * sin), axis=-1)

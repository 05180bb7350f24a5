"""What a decoder and its runner ask of a device: `nanopd.cpu.ops` and `nanopd.cuda.operations` offer it.

T is the number of a step's tokens. `kv` is a cache as `nanopd.config.KVLayout` lays it out, `layer` a layer's index in
it, and `spec` says how that layer's attention is computed. Weights of norms and activations have the model's dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from nanopd.config import KVLayout
from nanopd.models.batch import PrefillRow
from nanopd.models.weights import Linear


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """How the attention of one layer is computed; layers that are alike share it."""

    scale: float  # of the scores
    cos_sin: Tensor  # [max_positions, head_dim] float32: cosines of the head_dim / 2 frequencies, then their sines
    layout: KVLayout  # of the cache, and so the number of KV heads and the size of a head


class Operations(Protocol):
    """All of them run on one device, in the order of the calls. All arguments are passed by position."""

    def begin_step(self, decode_seq_lens: Tensor, slot_mapping: Tensor, is_decode_only: bool, /) -> None:
        """Comes before the first operation of a step; decode_seq_lens [num_rows] int32, slot_mapping [T] int64."""

    def embedding(self, token_ids: Tensor, weight: Tensor, /) -> Tensor:
        """token_ids [T] int64, weight [vocab, hidden] -> [T, hidden]."""

    def norm_linear(self, x: Tensor, norm: Tensor, eps: float, linear: Linear, /) -> Tensor:
        """RMS norm of x [T, in] with weights norm [in], through the projection -> [T, out]."""

    def norm_gated_linear(self, x: Tensor, norm: Tensor, eps: float, gate_up: Linear, /) -> Tensor:
        """RMS norm of x [T, in], through the projection [T, 2 * size]: silu(first half) * second half [T, size]."""

    def add_linear(self, x: Tensor, linear: Linear, residual: Tensor, /) -> None:
        """residual [T, out] += x [T, in] through the projection."""

    def rotary_and_store(
        self, qkv: Tensor, positions: Tensor, slot_mapping: Tensor, kv: Tensor, layer: int, spec: AttentionSpec,
        q_norm: Tensor | None, k_norm: Tensor | None, eps: float, /,
    ) -> Tensor:  # fmt: skip
        """Rotates Q and K, stores K and V in their slots, and returns Q [T, num_heads, head_dim].

        qkv [T, (num_heads + 2 * num_kv_heads) * head_dim]; positions and slot_mapping [T] int64. q_norm and k_norm
        [head_dim] are weights of an RMS norm of each head before it is rotated.
        """

    def prefill_attention(
        self, q: Tensor, kv: Tensor, layer: int, spec: AttentionSpec, rows: Sequence[PrefillRow], /
    ) -> Tensor:
        """Causal attention of chunks over their histories and themselves, all already stored in the cache.

        q [T, num_heads, head_dim] is of all tokens of the step, and so is the result; what it holds for tokens of no
        row is undefined.
        """

    def paged_decode_attention(
        self, q: Tensor, kv: Tensor, layer: int, spec: AttentionSpec, block_tables: Tensor, seq_lens: Tensor,
        out: Tensor, /,
    ) -> None:  # fmt: skip
        """Attention of one token per sequence over its cached K and V, its own included.

        q and out [num_rows, num_heads, head_dim]; block_tables [num_rows, max_blocks] int32; seq_lens [num_rows]
        int32, context lengths including the token itself.
        """

    def copy_blocks(self, kv: Tensor, src_ids: Tensor, dst_ids: Tensor, /) -> None:
        """Copies whole blocks `src_ids[i]` to `dst_ids[i]`, [n] int64; all are read before any is written."""

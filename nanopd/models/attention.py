"""The attention of a decoder layer, from the norm before it to the sum with the residual stream after it.

Q, K and V share one projection: one product instead of three. Knows no other layer, no files and no sequences.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nanopd.config import ModelConfig
from nanopd.models.batch import InputBatch
from nanopd.models.operations import AttentionSpec, Operations
from nanopd.models.weights import SCHEMES, Linear, Part, Parts, ones


@dataclass(slots=True, eq=False)
class Attention:
    """Causal attention over a paged cache, with biases on QKV (Qwen2) and norms on Q and K (Qwen3) where wanted."""

    index: int  # of the layer in the cache
    spec: AttentionSpec
    eps: float
    input_norm: Tensor  # [hidden]
    qkv: Linear  # hidden -> (num_heads + 2 * num_kv_heads) * head_dim
    q_norm: Tensor | None  # [head_dim]
    k_norm: Tensor | None  # [head_dim]
    o_proj: Linear  # num_heads * head_dim -> hidden

    @classmethod
    def allocate(cls, config: ModelConfig, index: int, spec: AttentionSpec, device: torch.device) -> Attention:
        """Uninitialised weights."""
        scheme, hidden, head_dim = SCHEMES[config.scheme], config.hidden_size, config.head_dim
        q_size, kv_size = config.num_heads * head_dim, config.num_kv_heads * head_dim
        norm = torch.empty(hidden, dtype=getattr(torch, config.dtype), device=device)
        q_norm, k_norm = (norm.new_empty(head_dim) if config.qk_norm else None for _ in range(2))
        qkv = scheme.allocate(q_size + 2 * kv_size, hidden, norm, config.qkv_bias)
        return cls(index, spec, config.rms_norm_eps, norm, qkv, q_norm, k_norm, scheme.allocate(hidden, q_size, norm))

    def parts(self, config: ModelConfig) -> Parts:
        """Names are those of a checkpoint below the layer's own."""
        q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        rows = {"self_attn.q_proj": q_size, "self_attn.k_proj": kv_size, "self_attn.v_proj": kv_size}
        yield from self.qkv.scheme.parts(self.qkv, rows)
        if self.q_norm is not None and self.k_norm is not None:
            yield "self_attn.q_norm.weight", Part(self.q_norm, ones)
            yield "self_attn.k_norm.weight", Part(self.k_norm, ones)
        yield from self.o_proj.scheme.parts(self.o_proj, {"self_attn.o_proj": config.hidden_size})
        yield "input_layernorm.weight", Part(self.input_norm, ones)

    def add(self, ops: Operations, x: Tensor, batch: InputBatch, kv: Tensor) -> None:
        """x [T, hidden] += attention of the norm of x; K and V of the step's tokens are stored in `kv` on the way."""
        spec, index = self.spec, self.index
        qkv = ops.norm_linear(x, self.input_norm, self.eps, self.qkv)
        q = ops.rotary_and_store(
            qkv, batch.positions, batch.slot_mapping, kv, index, spec, self.q_norm, self.k_norm, self.eps
        )
        rows, n = batch.prefill_rows, batch.num_decode_rows
        out = ops.prefill_attention(q, kv, index, spec, rows) if rows else torch.empty_like(q)
        if n:
            tables, seq_lens = batch.decode_block_tables, batch.decode_seq_lens
            ops.paged_decode_attention(q[:n], kv, index, spec, tables, seq_lens, out[:n])
        ops.add_linear(out.flatten(1), self.o_proj, x)

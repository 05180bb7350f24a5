"""One decoder for Llama, Qwen2 (biases on QKV) and Qwen3 (norms on Q and K); inference only.

Owns the weights and the order of the operations; the operations come from `nanopd.cpu.ops` or `nanopd.cuda`, the KV
storage from the caller. Knows nothing of sequences. The caller sets `torch.inference_mode()`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nanopd.config import ModelConfig
from nanopd.cpu import ops
from nanopd.models.batch import InputBatch
from nanopd.models.layers import DecoderWeights, LayerWeights
from nanopd.models.rope import cos_sin_table


class Decoder:
    """A loaded model on one device."""

    def __init__(self, config: ModelConfig, weights: DecoderWeights, max_model_len: int) -> None:
        self.config = config
        self.weights = weights
        self.device = weights.embedding.device
        self.cos_sin = cos_sin_table(config, max_model_len).to(self.device)  # [max_model_len, head_dim] float32
        self.ops: Any = ops  # or an object with the same functions, for another device
        self.between_layers: Callable[[], object] = lambda: None  # called while a step is made

    def forward(self, batch: InputBatch, kv: Tensor) -> Tensor:
        """Computes the step's tokens, stores their K and V, and returns the wanted logits.

        kv [num_blocks, num_layers, 2, num_kv_heads, block_size, head_dim], the model's dtype.
        Returns [num_samples, vocab] in the model's dtype, rows in the order of `batch.logit_indices`.
        """
        x = self.hidden(batch, kv)
        return self.logits(x if batch.logit_indices is None else x.index_select(0, batch.logit_indices))

    def logits(self, x: Tensor) -> Tensor:
        """x [n, hidden], some of what `hidden` returned -> [n, vocab], both in the model's dtype."""
        return self.ops.norm_linear(x, self.weights.norm, self.config.rms_norm_eps, self.weights.lm_head)

    def hidden(self, batch: InputBatch, kv: Tensor) -> Tensor:
        """As `forward`, but returns what all tokens' logits are made of: [T, hidden]."""
        ops, weights, eps = self.ops, self.weights, self.config.rms_norm_eps
        ops.begin_step(batch.decode_seq_lens, batch.slot_mapping, is_decode_only=not batch.prefill_rows)
        x = ops.embedding(batch.token_ids, weights.embedding)  # [T, hidden], the residual stream
        for index, layer in enumerate(weights.layers):
            self.between_layers()
            ops.add_linear(self._attention(x, layer, index, batch, kv), layer.o_proj, x)
            gated = ops.norm_gated_linear(x, layer.post_attention_norm, eps, layer.gate_up)  # [T, intermediate]
            ops.add_linear(gated, layer.down, x)
        return x

    def _attention(self, x: Tensor, layer: LayerWeights, index: int, batch: InputBatch, kv: Tensor) -> Tensor:
        """x [T, hidden] -> [T, num_heads * head_dim], before the output projection."""
        ops = self.ops
        qkv = ops.norm_linear(x, layer.input_norm, self.config.rms_norm_eps, layer.qkv, layer.qkv_bias)
        q = ops.rotary_and_store(
            qkv,
            batch.positions,
            batch.slot_mapping,
            self.cos_sin,
            kv,
            index,
            layer.q_norm,
            layer.k_norm,
            self.config.rms_norm_eps,
        )
        rows, n = batch.prefill_rows, batch.num_decode_rows
        out = ops.prefill_attention(q, kv, index, rows) if rows else torch.empty_like(q)
        if n:
            ops.paged_decode_attention(q[:n], kv, index, batch.decode_block_tables, batch.decode_seq_lens, out[:n])
        return out.flatten(1)

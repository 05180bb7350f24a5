"""One decoder for Llama, Qwen2 (biases on QKV) and Qwen3 (norms on Q and K); inference only.

Owns the weights and the order of the operations; the operations come from `nanopd.cpu` or `nanopd.cuda`, the KV
storage from the caller. Knows nothing of sequences. The caller sets `torch.inference_mode()`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nanopd import cpu
from nanopd.config import ModelConfig
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
        self.ops: Any = cpu  # or an object with the same functions, for another device

    def forward(self, batch: InputBatch, kv: Tensor) -> Tensor:
        """Computes the step's tokens, stores their K and V, and returns the wanted logits.

        kv [num_blocks, num_layers, 2, num_kv_heads, block_size, head_dim], the model's dtype.
        Returns [num_samples, vocab] in the model's dtype, rows in the order of `batch.logit_indices`.
        """
        ops, weights, eps = self.ops, self.weights, self.config.rms_norm_eps
        ops.begin_step(batch.decode_seq_lens, is_decode_only=not batch.prefill_rows)
        residual = ops.embedding(batch.token_ids, weights.embedding)  # [T, hidden]
        x = ops.rms_norm(residual, weights.layers[0].input_norm, eps)
        next_norms = [*(layer.input_norm for layer in weights.layers[1:]), weights.norm]
        for index, (layer, next_norm) in enumerate(zip(weights.layers, next_norms, strict=True)):
            x = ops.linear(self._attention(x, layer, index, batch, kv), layer.o_proj)
            x = ops.add_rms_norm(x, residual, layer.post_attention_norm, eps)
            x = ops.linear(ops.silu_and_mul(ops.linear(x, layer.gate_up)), layer.down)
            x = ops.add_rms_norm(x, residual, next_norm, eps)
        if batch.logit_indices is not None:
            x = x.index_select(0, batch.logit_indices)
        return ops.linear(x, weights.lm_head)

    def _attention(self, x: Tensor, layer: LayerWeights, index: int, batch: InputBatch, kv: Tensor) -> Tensor:
        """x [T, hidden] -> [T, num_heads * head_dim], before the output projection."""
        ops = self.ops
        qkv = ops.linear(x, layer.qkv, layer.qkv_bias)
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
        out = torch.empty_like(q)
        n = batch.num_decode_rows
        if n:
            ops.paged_decode_attention(q[:n], kv, index, batch.decode_block_tables, batch.decode_seq_lens, out[:n])
        for row in batch.prefill_rows:
            tokens = slice(row.start, row.end)
            ops.prefill_attention(q[tokens], kv, index, row.block_table, row.num_cached, out[tokens])
        return out.flatten(1)

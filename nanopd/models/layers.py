"""The weights of a decoder: their shapes, their memory, and which part each tensor of a checkpoint fills.

Q, K and V share one matrix, as do the gate and up projections: one product instead of three or two.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from nanopd.config import ModelConfig


@dataclass(slots=True)
class LayerWeights:
    """One decoder layer. A projection is [out_features, in_features]."""

    input_norm: Tensor  # [hidden]
    qkv: Tensor  # [(num_heads + 2 * num_kv_heads) * head_dim, hidden]
    qkv_bias: Tensor | None  # [(num_heads + 2 * num_kv_heads) * head_dim]
    q_norm: Tensor | None  # [head_dim]
    k_norm: Tensor | None  # [head_dim]
    o_proj: Tensor  # [hidden, num_heads * head_dim]
    post_attention_norm: Tensor  # [hidden]
    gate_up: Tensor  # [2 * intermediate, hidden]
    down: Tensor  # [hidden, intermediate]


@dataclass(slots=True)
class DecoderWeights:
    """All weights of a model; `lm_head` is `embedding` itself where they are tied."""

    embedding: Tensor  # [vocab, hidden]
    layers: list[LayerWeights]
    norm: Tensor  # [hidden]
    lm_head: Tensor  # [vocab, hidden]


def allocate(config: ModelConfig, device: torch.device) -> DecoderWeights:
    """Uninitialised weights in the dtype of `config`."""
    dtype = getattr(torch, config.dtype)

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    hidden, head_dim = config.hidden_size, config.head_dim
    qkv_size = (config.num_heads + 2 * config.num_kv_heads) * head_dim

    def layer() -> LayerWeights:
        return LayerWeights(
            input_norm=empty(hidden),
            qkv=empty(qkv_size, hidden),
            qkv_bias=empty(qkv_size) if config.qkv_bias else None,
            q_norm=empty(head_dim) if config.qk_norm else None,
            k_norm=empty(head_dim) if config.qk_norm else None,
            o_proj=empty(hidden, config.num_heads * head_dim),
            post_attention_norm=empty(hidden),
            gate_up=empty(2 * config.intermediate_size, hidden),
            down=empty(hidden, config.intermediate_size),
        )

    embedding = empty(config.vocab_size, hidden)
    layers = [layer() for _ in range(config.num_layers)]
    lm_head = embedding if config.tie_word_embeddings else empty(config.vocab_size, hidden)
    return DecoderWeights(embedding, layers, empty(hidden), lm_head)


def checkpoint_tensors(config: ModelConfig, weights: DecoderWeights) -> dict[str, Tensor]:
    """The checkpoint's tensor names, each with the (part of a) weight that it fills."""
    tensors = {"model.embed_tokens.weight": weights.embedding, "model.norm.weight": weights.norm}
    if not config.tie_word_embeddings:
        tensors["lm_head.weight"] = weights.lm_head
    for index, layer in enumerate(weights.layers):
        tensors.update((f"model.layers.{index}.{name}", part) for name, part in _layer_tensors(config, layer))
    return tensors


def _layer_tensors(config: ModelConfig, layer: LayerWeights) -> Iterator[tuple[str, Tensor]]:
    q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    for name, part in zip("qkv", layer.qkv.split((q_size, kv_size, kv_size)), strict=True):
        yield f"self_attn.{name}_proj.weight", part
    if layer.qkv_bias is not None:
        for name, part in zip("qkv", layer.qkv_bias.split((q_size, kv_size, kv_size)), strict=True):
            yield f"self_attn.{name}_proj.bias", part
    if layer.q_norm is not None and layer.k_norm is not None:
        yield "self_attn.q_norm.weight", layer.q_norm
        yield "self_attn.k_norm.weight", layer.k_norm
    gate, up = layer.gate_up.chunk(2)
    yield "self_attn.o_proj.weight", layer.o_proj
    yield "mlp.gate_proj.weight", gate
    yield "mlp.up_proj.weight", up
    yield "mlp.down_proj.weight", layer.down
    yield "input_layernorm.weight", layer.input_norm
    yield "post_attention_layernorm.weight", layer.post_attention_norm

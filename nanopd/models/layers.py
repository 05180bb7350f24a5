"""The weights of a decoder, layer by layer, and the names under which a checkpoint has them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nanopd.config import KVLayout, ModelConfig
from nanopd.models.attention import Attention
from nanopd.models.mlp import MLPS, Mlp
from nanopd.models.operations import AttentionSpec
from nanopd.models.rope import cos_sin_table
from nanopd.models.weights import PLAIN, Linear, Part, Parts, ones


@dataclass(slots=True, eq=False)
class Layer:
    """One decoder layer: each half adds its part to the residual stream."""

    attention: Attention
    mlp: Mlp


@dataclass(slots=True, eq=False)
class DecoderWeights:
    """All weights of a model; the weight of `lm_head` is `embedding` itself where they are tied."""

    embedding: Tensor  # [vocab, hidden]
    layers: list[Layer]
    norm: Tensor  # [hidden]
    lm_head: Linear  # hidden -> vocab

    def parts(self, config: ModelConfig) -> Parts:
        """All tensors of a checkpoint, each with its place. Their order decides which dummy weights are drawn."""
        yield "model.embed_tokens.weight", Part(self.embedding)
        yield "model.norm.weight", Part(self.norm, ones)
        if not config.tie_word_embeddings:
            yield from PLAIN.parts(self.lm_head, {"lm_head": config.vocab_size})
        for index, layer in enumerate(self.layers):
            for half in (layer.attention, layer.mlp):
                yield from ((f"model.layers.{index}.{name}", part) for name, part in half.parts(config))


def attention_specs(config: ModelConfig, layout: KVLayout, max_len: int, device: torch.device) -> list[AttentionSpec]:
    """How the attention of each layer is computed, at positions up to `max_len`: in all layers alike."""
    spec = AttentionSpec(config.head_dim**-0.5, cos_sin_table(config, max_len).to(device), layout)
    return [spec] * config.num_layers


def allocate(config: ModelConfig, specs: list[AttentionSpec], device: torch.device) -> DecoderWeights:
    """Uninitialised weights in the dtype of `config`; one layer for each of `specs`."""
    embedding = torch.empty(config.vocab_size, config.hidden_size, dtype=getattr(torch, config.dtype), device=device)
    mlp = MLPS[config.mlp]
    layers = [
        Layer(Attention.allocate(config, index, spec, device), mlp.allocate(config, device))
        for index, spec in enumerate(specs)
    ]
    head = embedding if config.tie_word_embeddings else torch.empty_like(embedding)
    return DecoderWeights(embedding, layers, embedding.new_empty(config.hidden_size), Linear(head, None, PLAIN))

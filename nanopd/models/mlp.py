"""The MLPs of decoder layers, from the norm before them to the sum with the residual stream after them.

A new MLP is a class here and an entry in MLPS. Knows no attention, no files and no sequences.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from nanopd.config import ModelConfig
from nanopd.models.operations import Operations
from nanopd.models.weights import SCHEMES, Linear, Part, Parts, ones


class Mlp(Protocol):
    """What a decoder asks of the second half of a layer."""

    @classmethod
    def allocate(cls, config: ModelConfig, device: torch.device) -> Mlp:
        """Uninitialised weights."""

    def parts(self, config: ModelConfig) -> Parts:
        """Names are those of a checkpoint below the layer's own."""

    def add(self, ops: Operations, x: Tensor) -> None:
        """x [T, hidden] += what the MLP makes of the norm of x."""


@dataclass(slots=True, eq=False)
class GatedMlp:
    """down(silu(gate) * up), dense (SwiGLU, arXiv:2002.05202); gate and up share one projection."""

    eps: float
    norm: Tensor  # [hidden]
    gate_up: Linear  # hidden -> 2 * intermediate
    down: Linear  # intermediate -> hidden

    @classmethod
    def allocate(cls, config: ModelConfig, device: torch.device) -> GatedMlp:
        scheme, hidden, size = SCHEMES[config.scheme], config.hidden_size, config.intermediate_size
        norm = torch.empty(hidden, dtype=getattr(torch, config.dtype), device=device)
        gate_up, down = scheme.allocate(2 * size, hidden, norm), scheme.allocate(hidden, size, norm)
        return cls(config.rms_norm_eps, norm, gate_up, down)

    def parts(self, config: ModelConfig) -> Parts:
        rows = dict.fromkeys(("mlp.gate_proj", "mlp.up_proj"), config.intermediate_size)
        yield from self.gate_up.scheme.parts(self.gate_up, rows)
        yield from self.down.scheme.parts(self.down, {"mlp.down_proj": config.hidden_size})
        yield "post_attention_layernorm.weight", Part(self.norm, ones)

    def add(self, ops: Operations, x: Tensor) -> None:
        ops.add_linear(ops.norm_gated_linear(x, self.norm, self.eps, self.gate_up), self.down, x)


MLPS: dict[str, type[Mlp]] = {"gated": GatedMlp}

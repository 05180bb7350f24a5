"""Tables of the angles of rotary position embeddings, plain or scaled to longer contexts.

Definitions: RoFormer (arXiv:2104.09864); linear: position interpolation (arXiv:2306.15595); llama3: the scaling
published with Llama 3.1; yarn: arXiv:2309.00071. Results agree with transformers' `modeling_rope_utils`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nanopd.config import ModelConfig, RopeScaling


def cos_sin_table(config: ModelConfig, num_positions: int) -> Tensor:
    """[num_positions, head_dim] float32: the cosines of the head_dim / 2 frequencies, then their sines."""
    inv_freq = scaled_inv_freq(config.head_dim, config.rope_theta, config.rope_scaling)
    angles = torch.outer(torch.arange(num_positions, dtype=torch.float32), inv_freq)
    return torch.cat((angles.cos(), angles.sin()), dim=1) * attention_factor(config.rope_scaling)


def scaled_inv_freq(head_dim: int, theta: float, scaling: RopeScaling) -> Tensor:
    """Radians per position of each pair of dimensions, [head_dim / 2] float32."""
    inv_freq = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    if scaling.kind == "linear":
        return inv_freq / scaling.factor
    if scaling.kind == "llama3":
        return _llama3(inv_freq, scaling)
    if scaling.kind == "yarn":
        return _yarn(inv_freq, head_dim, theta, scaling)
    assert scaling.kind == "default", scaling.kind
    return inv_freq


def attention_factor(scaling: RopeScaling) -> float:
    """The factor of the whole table (yarn, section 3.4; mscale as DeepSeek uses it)."""
    if scaling.kind != "yarn":
        return 1.0
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.mscale and scaling.mscale_all_dim:
        return _mscale(scaling.factor, scaling.mscale) / _mscale(scaling.factor, scaling.mscale_all_dim)
    return _mscale(scaling.factor, 1.0)


def _mscale(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1.0 else 1.0


def _llama3(inv_freq: Tensor, scaling: RopeScaling) -> Tensor:
    """Keeps short wavelengths, lengthens long ones by the factor, and blends those between."""
    assert scaling.original_max_position_embeddings is not None
    turns = scaling.original_max_position_embeddings * inv_freq / (2 * math.pi)  # turns within the original context
    blend = ((turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)).clamp(0.0, 1.0)
    return (1 - blend) * inv_freq / scaling.factor + blend * inv_freq


def _yarn(inv_freq: Tensor, head_dim: int, theta: float, scaling: RopeScaling) -> Tensor:
    """Keeps dimensions that turn often, interpolates those that turn seldom, with a linear ramp between."""
    low = _yarn_dim(scaling.beta_fast, head_dim, theta, scaling)
    high = _yarn_dim(scaling.beta_slow, head_dim, theta, scaling)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = high - low or 0.001  # so that nothing is divided by zero
    ramp = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / width).clamp(0.0, 1.0)
    return inv_freq / scaling.factor * ramp + inv_freq * (1 - ramp)


def _yarn_dim(turns: float, head_dim: int, theta: float, scaling: RopeScaling) -> float:
    """The dimension that makes that many turns within the original context."""
    assert scaling.original_max_position_embeddings is not None
    wavelength = scaling.original_max_position_embeddings / (turns * 2 * math.pi)
    return head_dim * math.log(wavelength) / (2 * math.log(theta))

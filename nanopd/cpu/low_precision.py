"""The operations for bfloat16 and float16 on the CPU, in torch: right, not fast. Signatures as in `nanopd.cpu.ops`.

Sums, norms, rotation and softmax are computed in float32 and rounded once.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., size], weight [size] -> [..., size]."""
    return F.rms_norm(x.float(), weight.shape, weight.float(), eps).to(x.dtype)


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """gate_up [T, 2 * size] -> [T, size]."""
    gate, up = gate_up.chunk(2, dim=1)
    return F.silu(gate) * up


def rotary_and_store(
    qkv: Tensor,
    positions: Tensor,
    slot_mapping: Tensor,
    cos_sin: Tensor,
    kv: Tensor,
    layer: int,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
) -> Tensor:
    """Returns the rotated Q [T, num_heads, head_dim]; K and V go to their slots of kv."""
    num_kv_heads, block_size, head_dim = kv.shape[3:]
    num_heads = qkv.shape[1] // head_dim - 2 * num_kv_heads
    heads = qkv.view(qkv.shape[0], -1, head_dim).split((num_heads, num_kv_heads, num_kv_heads), dim=1)
    angles = cos_sin.index_select(0, positions)
    q = _rotate(heads[0] if q_norm is None else rms_norm(heads[0], q_norm, eps), angles)
    k = _rotate(heads[1] if k_norm is None else rms_norm(heads[1], k_norm, eps), angles)
    blocks, offsets = slot_mapping // block_size, slot_mapping % block_size
    layer_kv = kv[:, layer]
    layer_kv[blocks, 0, :, offsets] = k
    layer_kv[blocks, 1, :, offsets] = heads[2]
    return q


def _rotate(x: Tensor, angles: Tensor) -> Tensor:
    """x [T, heads, head_dim], angles [T, head_dim] (cosines, sines of half the size each)."""
    cos, sin = angles.unsqueeze(1).chunk(2, dim=2)
    first, second = x.float().chunk(2, dim=2)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=2).to(x.dtype)


def paged_attention(
    q: Tensor,  # [T, num_heads, head_dim]
    kv: Tensor,
    layer: int,
    block_tables: Tensor,  # [T or 1, max_blocks]
    context_lens: Tensor,  # [T]
    out: Tensor,  # [T, num_heads, head_dim]
) -> None:
    """One token after the other, over the K and V gathered from its blocks."""
    num_kv_heads, block_size, head_dim = kv.shape[3:]
    for t, context_len in enumerate(context_lens.tolist()):
        block_table = block_tables[t % block_tables.shape[0], : -(-context_len // block_size)]
        blocks = kv[block_table.long(), layer].float()  # [blocks, 2, num_kv_heads, block_size, head_dim]
        keys, values = blocks.permute(1, 2, 0, 3, 4).reshape(2, num_kv_heads, -1, head_dim)[:, :, :context_len]
        grouped = q[t].float().view(num_kv_heads, -1, head_dim)
        out[t] = F.scaled_dot_product_attention(grouped, keys, values).reshape(-1, head_dim).to(q.dtype)

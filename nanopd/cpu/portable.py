"""The operations in torch, for any device and type: right, not fast; `nanopd.cpu.ops` says what they compute.

Sums, norms, rotation and softmax are computed in float32 and rounded once. No function waits for a GPU. A cache of one
layer is `layer_kv` [num_blocks, 2 (K, V), num_kv_heads, block_size, head_dim].
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from nanopd.models.operations import AttentionSpec

Norms = tuple[Tensor | None, Tensor | None]  # [head_dim] each, of the heads of Q and of K


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., size], weight [size] -> [..., size]."""
    return F.rms_norm(x.float(), weight.shape, weight.float(), eps).to(x.dtype)


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """gate_up [T, 2 * size] -> [T, size]."""
    gate, up = gate_up.float().chunk(2, dim=1)
    return (F.silu(gate) * up).to(gate_up.dtype)


def rotary_and_store(
    qkv: Tensor, positions: Tensor, slots: Tensor, layer_kv: Tensor, spec: AttentionSpec, norms: Norms, eps: float
) -> Tensor:
    """Returns the rotated Q [T, num_heads, head_dim]; K and V go to their slots of layer_kv."""
    num_kv_heads, block_size, head_dim = spec.layout.num_kv_heads, spec.layout.block_size, spec.layout.head_dim
    num_heads = qkv.shape[1] // head_dim - 2 * num_kv_heads
    heads = qkv.view(qkv.shape[0], -1, head_dim).split((num_heads, num_kv_heads, num_kv_heads), dim=1)
    angles = spec.cos_sin.index_select(0, positions)
    q, k = (_rotate(x if norm is None else rms_norm(x, norm, eps), angles) for x, norm in zip(heads, norms))
    blocks, offsets = slots // block_size, slots % block_size
    layer_kv[blocks, 0, :, offsets] = k
    layer_kv[blocks, 1, :, offsets] = heads[2]
    return q


def _rotate(x: Tensor, angles: Tensor) -> Tensor:
    """x [T, heads, head_dim], rotated by angles [T, head_dim], which are cosines, then sines, of half the size each."""
    cos, sin = angles.unsqueeze(1).chunk(2, dim=2)
    first, second = x.float().chunk(2, dim=2)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=2).to(x.dtype)


def paged_attention(
    q: Tensor, layer_kv: Tensor, spec: AttentionSpec, block_tables: Tensor, context_lens: Tensor, out: Tensor
) -> None:
    """Gathers the blocks that the tables name, and masks what lies behind the contexts.

    q and out [T, num_heads, head_dim]; block_tables [T or 1, max_blocks]; context_lens [T]. On a GPU all rows are
    gathered at once, as the host does not know their lengths.
    """
    num_rows, layout = len(block_tables), spec.layout
    if not q.is_cuda and num_rows > 1:
        rows = zip(*(tensor.split(1) for tensor in (q, block_tables, context_lens, out)), strict=True)
        for one_q, table, context_len, one_out in rows:
            paged_attention(one_q, layer_kv, spec, table, context_len, one_out)
        return
    if not q.is_cuda:
        block_tables = block_tables[:, : -(-int(context_lens.max()) // layout.block_size)]
    blocks = layer_kv[block_tables.long()]  # [num_rows, max_blocks, 2, num_kv_heads, block_size, head_dim]
    keys, values = blocks.permute(2, 0, 3, 1, 4, 5).reshape(2, num_rows, layout.num_kv_heads, -1, layout.head_dim)
    # [num_rows, queries, keys]
    seen = torch.arange(keys.shape[2], device=q.device) < context_lens.view(num_rows, -1, 1)
    # Keys and values that no query sees may be NaN, and 0 * NaN is NaN.
    keys, values = (x.masked_fill(~seen.any(1)[:, None, :, None], 0) for x in (keys, values))
    heads = q.view(num_rows, -1, *q.shape[1:]).transpose(1, 2)
    y = F.scaled_dot_product_attention(heads, keys, values, attn_mask=seen[:, None], scale=spec.scale, enable_gqa=True)
    out.copy_(y.transpose(1, 2).reshape(out.shape))

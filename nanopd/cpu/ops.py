"""The operations of a decoder: float32 on the CPU runs the numba kernels, all else runs torch (`portable`).

This module is `nanopd.models.Operations`; `nanopd.cuda.operations` takes these for what it has no kernels for. With
the kernels every output is computed in an order of its own, so results do not depend on what else is in the batch or
on where a prompt was cut into chunks. Tensors must be contiguous. A projection is multiplied by the function that
PRODUCTS has for its scheme. Knows no model and no scheduling.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numba
import numpy as np
import torch
from torch import Tensor

from nanopd.cpu import kernels, portable
from nanopd.models.batch import PrefillRow
from nanopd.models.operations import AttentionSpec
from nanopd.models.weights import Linear


def prepare_thread() -> None:
    """Gives kernels launched from this thread as many threads as torch has; numba keeps that number for each thread."""
    numba.set_num_threads(min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS))


def begin_step(decode_seq_lens: Tensor, slot_mapping: Tensor, is_decode_only: bool) -> None:
    """Comes before the first operation of a step. What a GPU wants to know of the step makes no difference here."""
    prepare_thread()


def embedding(token_ids: Tensor, weight: Tensor) -> Tensor:
    """token_ids [T] int64, weight [vocab, hidden] -> [T, hidden]."""
    return weight.index_select(0, token_ids)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [T, in], weight [out, in], bias [out], all of one type -> [T, out]; out is at least 4."""
    if not _has_kernels(x):
        return torch.nn.functional.linear(x, weight, bias)
    assert weight.shape[0] >= kernels.ROWS, weight.shape
    out = x.new_empty(x.shape[0], weight.shape[0])
    kernels.linear(x.numpy(), weight.numpy(), _numpy(bias), out.numpy())
    return out


# By the name of a scheme: x [T, in] through a projection -> [T, out].
PRODUCTS: dict[str, Callable[[Tensor, Linear], Tensor]] = {
    "plain": lambda x, projection: linear(x, projection.weight, projection.bias)
}


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [T, hidden], weight [hidden] -> weight * x / sqrt(mean(x**2) + eps), computed in float32."""
    if not _has_kernels(x):
        return portable.rms_norm(x, weight, eps)
    out = torch.empty_like(x)
    kernels.rms_norm(x.numpy(), weight.numpy(), np.float32(eps), out.numpy())
    return out


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """gate_up [T, 2 * size] -> silu(gate_up[:, :size]) * gate_up[:, size:]."""
    if not _has_kernels(gate_up):
        return portable.silu_and_mul(gate_up)
    out = gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)
    kernels.silu_and_mul(gate_up.numpy(), out.numpy())
    return out


def norm_linear(x: Tensor, norm: Tensor, eps: float, projection: Linear) -> Tensor:
    """RMS norm of x [T, in] with weights norm [in], through the projection -> [T, out]."""
    return PRODUCTS[projection.scheme.name](rms_norm(x, norm, eps), projection)


def norm_gated_linear(x: Tensor, norm: Tensor, eps: float, gate_up: Linear) -> Tensor:
    """RMS norm of x [T, in], through the projection [T, 2 * size]: silu(gate) * up [T, size]."""
    return silu_and_mul(PRODUCTS[gate_up.scheme.name](rms_norm(x, norm, eps), gate_up))


def add_linear(x: Tensor, projection: Linear, residual: Tensor) -> None:
    """residual [T, out] += x [T, in] through the projection."""
    residual.add_(PRODUCTS[projection.scheme.name](x, projection))


def rotary_and_store(
    qkv: Tensor,  # [T, (num_heads + 2 * num_kv_heads) * head_dim]
    positions: Tensor,  # [T] int64
    slot_mapping: Tensor,  # [T] int64
    kv: Tensor,
    layer: int,
    spec: AttentionSpec,
    q_norm: Tensor | None = None,  # [head_dim], RMS norm of each query head before it is rotated
    k_norm: Tensor | None = None,  # [head_dim]
    eps: float = 1e-6,
) -> Tensor:
    """Rotates Q and K (Su et al., RoFormer, arXiv:2104.09864; halves as in Llama), stores K and V in their slots.

    Returns Q [T, num_heads, head_dim].
    """
    num_kv_heads, head_dim = spec.layout.num_kv_heads, spec.layout.head_dim
    if not _has_kernels(qkv):
        return portable.rotary_and_store(qkv, positions, slot_mapping, kv[:, layer], spec, (q_norm, k_norm), eps)
    q = qkv.new_empty(qkv.shape[0], qkv.shape[1] // head_dim - 2 * num_kv_heads, head_dim)
    inputs = qkv.numpy(), positions.numpy(), slot_mapping.numpy(), spec.cos_sin.numpy(), kv.numpy(), layer
    kernels.rotary_and_store(*inputs, _numpy(q_norm), _numpy(k_norm), np.float32(eps), q.numpy())
    return q


def paged_decode_attention(
    q: Tensor, kv: Tensor, layer: int, spec: AttentionSpec, block_tables: Tensor, seq_lens: Tensor, out: Tensor
) -> None:
    """Attention of one token per sequence over its cached K and V, its own included.

    q and out [num_rows, num_heads, head_dim]; block_tables [num_rows, max_blocks] int32, or [1, max_blocks] where all
    tokens are of one sequence; seq_lens [num_rows] int32, context lengths including the token itself.
    """
    if _has_kernels(q):
        arrays = q.numpy(), kv.numpy(), layer, block_tables.numpy(), seq_lens.numpy()
        kernels.paged_attention(*arrays, np.float32(spec.scale), out.numpy())
    else:
        portable.paged_attention(q, kv[:, layer], spec, block_tables, seq_lens, out)


def prefill_attention(q: Tensor, kv: Tensor, layer: int, spec: AttentionSpec, rows: Sequence[PrefillRow]) -> Tensor:
    """Causal attention of the rows over their histories and themselves, all already stored in the cache.

    q [T, num_heads, head_dim] is of all tokens of the step, and so is the result; what it holds for tokens of no row
    is undefined.
    """
    out = torch.empty_like(q)
    for row in rows:
        tokens, first = slice(row.start, row.end), row.num_cached + 1
        context_lens = torch.arange(first, first + row.end - row.start, dtype=torch.int32, device=q.device)
        paged_decode_attention(q[tokens], kv, layer, spec, row.block_table.unsqueeze(0), context_lens, out[tokens])
    return out


def copy_blocks(kv: Tensor, src_ids: Tensor, dst_ids: Tensor) -> None:
    """Copies whole blocks (all layers) `src_ids[i]` to `dst_ids[i]`, [n] int64; all are read before any is written."""
    kv.index_copy_(0, dst_ids, kv.index_select(0, src_ids))


def _has_kernels(x: Tensor) -> bool:
    return x.dtype == torch.float32 and not x.is_cuda


def _numpy(tensor: Tensor | None) -> np.ndarray | None:
    return None if tensor is None else tensor.numpy()

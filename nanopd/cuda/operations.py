"""The operations of one model on one GPU, and what they keep between calls: `nanopd.models.Operations` of a GPU.

A step is a chain of small kernels where all rows decode: each of them then starts while the one before it ends.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from nanopd.cuda import elementwise, linear, warp
from nanopd.cuda.attention import HEAD_DIMS, WARP_TILE, PagedDecodeAttention
from nanopd.cuda.blocks import copy_blocks
from nanopd.cuda.prefill import PrefillAttention
from nanopd.models.operations import Operations


class CudaOperations:
    """Operations are attributes, so that those that a step overlaps are bound once a step and not at each launch."""

    def __init__(
        self,
        others: Operations,  # for any type and size: these take the place of kernels that do not exist
        decode_attention: PagedDecodeAttention | None,  # None: the model's types and sizes have no kernels
        prefill_attention: PrefillAttention | None,
    ) -> None:
        self._decode_attention, self._prefill_attention = decode_attention, prefill_attention
        self.embedding = others.embedding
        self.norm_linear: Callable[..., Tensor] = others.norm_linear
        self.norm_gated_linear: Callable[..., Tensor] = others.norm_gated_linear
        self.add_linear: Callable[..., None] = others.add_linear
        self.rotary_and_store: Callable[..., Tensor] = others.rotary_and_store
        self.paged_decode_attention: Callable[..., None] = others.paged_decode_attention
        self.prefill_attention: Callable[..., Tensor] = prefill_attention or others.prefill_attention
        self.copy_blocks = copy_blocks

    def begin_step(self, decode_seq_lens: Tensor, slot_mapping: Tensor, is_decode_only: bool) -> None:
        """Comes before the first operation of a step; decode_seq_lens [num_rows] int32, slot_mapping [T] int64."""
        if self._prefill_attention:
            self._prefill_attention.begin_step(slot_mapping)
        if self._decode_attention is None:
            return
        if len(decode_seq_lens):
            self._decode_attention.begin_step(decode_seq_lens)
        self.norm_linear = partial(linear.norm_linear, overlap=is_decode_only)
        self.norm_gated_linear = partial(linear.norm_gated_linear, overlap=is_decode_only)
        self.add_linear = partial(linear.add_linear, overlap=is_decode_only)
        self.rotary_and_store = partial(elementwise.rotary_and_store, overlap=is_decode_only)
        self.paged_decode_attention = partial(self._decode_attention, overlap=is_decode_only)


def has_kernels(dtype: torch.dtype, head_dim: int, block_size: int, *row_sizes: int) -> bool:
    """Whether a model's decode steps are made of this package's kernels; row_sizes of what norms and SiLU take."""
    is_power = block_size >= WARP_TILE and block_size.bit_count() == 1
    return dtype in warp.NAMES and head_dim in HEAD_DIMS and is_power and not any(size % 8 for size in row_sizes)

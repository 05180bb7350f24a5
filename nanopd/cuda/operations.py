"""The operations of one model on one GPU, and what they keep between calls: the decoder's `ops`.

A step is a chain of small kernels where all rows decode: each then starts while the one before it ends.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from nanopd.cuda import warp
from nanopd.cuda.attention import HEAD_DIMS, WARP_TILE, PagedDecodeAttention
from nanopd.cuda.blocks import copy_blocks
from nanopd.cuda.elementwise import rotary_and_store
from nanopd.cuda.linear import add_linear, norm_gated_linear, norm_linear
from nanopd.cuda.prefill import PrefillAttention


class Operations:
    """Signatures are those of `nanopd.cpu.ops`."""

    def __init__(
        self,
        others: Any,  # has the same functions, for any type and size: they take the place of kernels that there are not
        decode_attention: PagedDecodeAttention | None,  # None: there are no kernels
        prefill_attention: PrefillAttention | None,
    ) -> None:
        self._others, self._decode_attention = others, decode_attention
        self._prefill_attention = prefill_attention
        self.prefill_attention = prefill_attention or others.prefill_attention
        self.copy_blocks = copy_blocks

    def __getattr__(self, name: str) -> Any:
        return getattr(self._others, name)

    def begin_step(self, decode_seq_lens: Tensor, slot_mapping: Tensor, is_decode_only: bool) -> None:
        """Before the first operation of a step; decode_seq_lens [num_rows] int32, slot_mapping [T] int64."""
        if self._prefill_attention:
            self._prefill_attention.begin_step(slot_mapping)
        if self._decode_attention is None:
            return
        if len(decode_seq_lens):
            self._decode_attention.begin_step(decode_seq_lens)
        for operation in (norm_linear, norm_gated_linear, add_linear, rotary_and_store):
            setattr(self, operation.__name__, partial(operation, overlap=is_decode_only))
        self.paged_decode_attention = partial(self._decode_attention, overlap=is_decode_only)


def has_kernels(dtype: torch.dtype, head_dim: int, block_size: int, *row_sizes: int) -> bool:
    """Whether a model's decode steps are made of this package's kernels; row_sizes of what norms and SiLU take."""
    is_power = block_size >= WARP_TILE and block_size.bit_count() == 1
    return dtype in warp.NAMES and head_dim in HEAD_DIMS and is_power and not any(size % 8 for size in row_sizes)

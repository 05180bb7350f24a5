"""The operations of one model on one GPU, and what they keep between calls: the decoder's `ops`, as `nanopd.cpu` is."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from nanopd.cuda.attention import PagedDecodeAttention
from nanopd.cuda.blocks import copy_blocks
from nanopd.cuda.elementwise import rotary_and_store
from nanopd.cuda.linear import add_linear, norm_gated_linear, norm_linear
from nanopd.cuda.prefill import PrefillAttention


class Operations:
    """Signatures are those of `nanopd.cpu`."""

    def __init__(self, decode_attention: PagedDecodeAttention, max_num_batched_tokens: int) -> None:
        self._decode_attention = decode_attention
        self.prefill_attention = PrefillAttention(max_num_batched_tokens)
        self.copy_blocks = copy_blocks

    def begin_step(self, decode_seq_lens: Tensor, slot_mapping: Tensor, is_decode_only: bool) -> None:
        """Before the first operation of a step; decode_seq_lens [num_rows] int32, slot_mapping [T] int64."""
        self.prefill_attention.begin_step(slot_mapping)
        if len(decode_seq_lens):
            self._decode_attention.begin_step(decode_seq_lens)
        overlap = is_decode_only  # a chain of small kernels: each starts while the one before it ends
        self.norm_linear = partial(norm_linear, overlap=overlap)
        self.norm_gated_linear = partial(norm_gated_linear, overlap=overlap)
        self.add_linear = partial(add_linear, overlap=overlap)
        self.rotary_and_store = partial(rotary_and_store, overlap=overlap)
        self.paged_decode_attention = partial(self._decode_attention, overlap=overlap)

    def embedding(self, token_ids: Tensor, weight: Tensor) -> Tensor:
        """token_ids [T] int64, weight [vocab, hidden] -> [T, hidden]."""
        return weight.index_select(0, token_ids)

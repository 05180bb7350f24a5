"""The operations of one model on one GPU, with what they keep between calls: the decoder's `ops`, as `nanopd.cpu` is.

Prefill attention is torch's: cuDNN where it can (twice as fast as flash on Hopper), flash, or whatever is left, for a
prompt's first chunk; the same with a causal mask aligned at the end (flash has it) behind cached history.
"""

from __future__ import annotations

from functools import partial

import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from nanopd.cuda.attention import PagedDecodeAttention
from nanopd.cuda.blocks import copy_blocks
from nanopd.cuda.elementwise import add_rms_norm, rms_norm, rotary_and_store, silu_and_mul
from nanopd.cuda.linear import linear

BACKENDS = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


class Operations:
    """Signatures are those of `nanopd.cpu`."""

    def __init__(self, decode_attention: PagedDecodeAttention) -> None:
        self._decode_attention = decode_attention
        self.copy_blocks = copy_blocks

    def begin_step(self, decode_seq_lens: Tensor, is_decode_only: bool) -> None:
        """Before the first operation of a step; decode_seq_lens [num_rows] int32."""
        if len(decode_seq_lens):
            self._decode_attention.begin_step(decode_seq_lens)
        overlap = is_decode_only  # a chain of small kernels: each starts while the one before it ends
        self.rms_norm = partial(rms_norm, overlap=overlap)
        self.add_rms_norm = partial(add_rms_norm, overlap=overlap)
        self.silu_and_mul = partial(silu_and_mul, overlap=overlap)
        self.rotary_and_store = partial(rotary_and_store, overlap=overlap)
        self.linear = partial(linear, overlap=overlap)
        self.paged_decode_attention = partial(self._decode_attention, overlap=overlap)

    def embedding(self, token_ids: Tensor, weight: Tensor) -> Tensor:
        """token_ids [T] int64, weight [vocab, hidden] -> [T, hidden]."""
        return weight.index_select(0, token_ids)

    def prefill_attention(
        self,
        q: Tensor,  # [num_tokens, num_heads, head_dim], a chunk of one sequence
        kv: Tensor,  # KV storage
        layer: int,
        block_table: Tensor,  # [blocks of the sequence] int32
        num_cached: int,  # tokens of the sequence before the chunk
        out: Tensor,  # as q
    ) -> None:
        """Causal attention of a chunk over its history and itself, both already stored in the cache."""
        num_tokens, num_kv_heads, head_dim = num_cached + q.shape[0], kv.shape[3], kv.shape[5]
        blocks = kv[block_table, layer]  # [num_blocks, 2, num_kv_heads, block_size, head_dim]
        flat = blocks.permute(1, 2, 0, 3, 4).reshape(2, 1, num_kv_heads, -1, head_dim)
        keys, values = flat[0, :, :, :num_tokens], flat[1, :, :, :num_tokens]
        queries = q.transpose(0, 1).unsqueeze(0)  # [1, num_heads, chunk, head_dim]
        mask = causal_lower_right(q.shape[0], num_tokens) if num_cached else None
        with sdpa_kernel(BACKENDS, set_priority=True):
            y = F.scaled_dot_product_attention(
                queries, keys, values, attn_mask=mask, is_causal=mask is None, enable_gqa=True
            )
        out.copy_(y[0].transpose(0, 1))

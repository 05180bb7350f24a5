"""The layout of a KV cache: alone in knowing how K and V lie in memory, and how many bytes they take. Knows no tensors.

A cache is block-major, so that a block of all layers is one run of bytes and moves as one piece:

    [num_blocks, num_layers, 2 (K, V), num_kv_heads, block_size, head_dim]

Token i of a sequence lies in block `block_table[i // block_size]` at offset `i % block_size`, and its slot is
`block_id * block_size + offset`. Block 0 is the null block: padding points at it, and no sequence owns it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from nanopd.config.model_config import ITEMSIZES, ModelConfig


@dataclass(frozen=True)
class KVLayout:
    """The layout of the caches of one model with blocks of one size."""

    num_layers: int
    num_kv_heads: int
    block_size: int  # tokens of a block
    head_dim: int
    dtype: str  # of ITEMSIZES

    @classmethod
    def of(cls, model: ModelConfig, block_size: int) -> KVLayout:
        return cls(model.num_layers, model.num_kv_heads, block_size, model.head_dim, model.dtype)

    def shape(self, num_blocks: int) -> tuple[int, ...]:
        return (num_blocks, self.num_layers, 2, self.num_kv_heads, self.block_size, self.head_dim)

    def view(self, elements: Any) -> Any:
        """A cache of `shape` in the memory of `elements`, a tensor [num_blocks * elements of a block] of the dtype."""
        return elements.view(self.shape(-1))

    @cached_property
    def strides(self) -> tuple[int, int, int]:
        """Bytes to the next block, to the next KV head, and from K to V, as the CUDA kernels take them."""
        head = self.block_size * self.head_dim * ITEMSIZES[self.dtype]
        return 2 * self.num_layers * self.num_kv_heads * head, head, self.num_kv_heads * head

    @cached_property
    def layer_bytes(self) -> int:
        """K and V of a block's tokens in one layer; also the distance from a layer of a block to the next."""
        return self.bytes_per_block // self.num_layers

    @property
    def bytes_per_block(self) -> int:
        """K and V of a block's tokens over all layers."""
        return self.strides[0]

    @property
    def bytes_per_token(self) -> int:
        """K and V of one token over all layers."""
        return self.bytes_per_block // self.block_size

"""Moves KV blocks as runs of bytes: within a cache, to and from a contiguous buffer, and between GPUs.

A side is an address, the bytes from one block to the next, and the ids of the blocks there; without ids the blocks lie
one after the other. Addresses may be another GPU's that this one can reach. A bounded number of CTAs leaves the rest of
the GPU to whoever computes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from numba.cuda.types import int32 as i32
from torch import Tensor

from nanopd.cuda import warp
from nanopd.cuda.launch import Spec, address_of, kernel_of
from nanopd.cuda.ptx import macro

THREADS = 256
IN_FLIGHT = 8  # 16-byte loads that a thread has under way, as the memory of a peer takes microseconds to answer
PIECE = 16 * THREADS * IN_FLIGHT


@dataclass(frozen=True)
class Side:
    """The place where blocks are read or written."""

    address: int
    stride: int  # bytes from a block to the next, a multiple of 16
    ids: Tensor | None = None  # [n] int32 or int64, on the device that moves

    @classmethod
    def of(cls, blocks: Tensor, ids: Tensor | None = None) -> Side:
        """blocks [num_blocks, ...], each of them contiguous."""
        assert blocks[:1].is_contiguous()  # the tensor may hold no block at all
        return cls(blocks.data_ptr(), blocks.stride(0) * blocks.element_size(), ids)


def move_kernel() -> Callable[..., None]:
    @macro
    def load(emit: Any, address: Any, offset: Any, end: Any) -> list[Any]:
        """Loads this thread's 16 bytes of each row of the piece; past the end of the block, the block's last 16."""
        rows = [emit(warp.min_i32, emit(warp.add_i32, offset, 16 * THREADS * i), end) for i in range(IN_FLIGHT)]
        return [r for row in rows for r in emit(warp.load_16_bytes, emit(warp.mad_wide, address, row, 1))]

    @macro
    def store(emit: Any, address: Any, offset: Any, end: Any, values: Any) -> None:
        for i in range(IN_FLIGHT):
            row = emit(warp.min_i32, emit(warp.add_i32, offset, 16 * THREADS * i), end)
            emit(warp.store_16_bytes, emit(warp.mad_wide, address, row, 1), *values[4 * i : 4 * i + 4])

    def kernel(  # type: ignore[no-untyped-def]
        src, dst, src_ids, dst_ids, src_stride, dst_stride, src_id_size, dst_id_size, num_blocks, block_bytes
    ):
        """Ids [num_blocks], where address 0 stands for 0, 1, 2, ...; strides and sizes in bytes."""
        pieces = i32((block_bytes + PIECE - 1) // PIECE)  # in a block
        piece = warp.cta_index()
        lane_offset = i32(16 * warp.thread_index())
        warp.wait_for_predecessor()
        while piece < num_blocks * pieces:
            block = warp.div_u32(piece, pieces)
            src_id = dst_id = block
            if src_ids != 0:  # an id of 64 bits fits its low word
                src_id = warp.load_i32(src_ids + warp.wide(block) * src_id_size)
            if dst_ids != 0:
                dst_id = warp.load_i32(dst_ids + warp.wide(block) * dst_id_size)
            offset = i32((piece - block * pieces) * PIECE + lane_offset)
            values = load(src + warp.wide(src_id) * src_stride, offset, block_bytes - 16)
            store(dst + warp.wide(dst_id) * dst_stride, offset, block_bytes - 16, values)
            piece = i32(piece + warp.num_ctas())

    return kernel


def move_spec() -> Spec:
    return Spec(move_kernel, (), "llllllrrrr", THREADS)


def move_blocks(src: Side, dst: Side, num_blocks: int, block_bytes: int, device: int, max_ctas: int = 1 << 16) -> None:
    """Copies `num_blocks` blocks on `device`'s current stream. No block may be both source and destination."""
    assert block_bytes % 16 == src.stride % 16 == dst.stride % 16 == 0
    if num_blocks:
        addresses = src.address, dst.address, address_of(src.ids), address_of(dst.ids)
        id_sizes = [8 if side.ids is None else side.ids.element_size() for side in (src, dst)]
        num_ctas = min(max_ctas, num_blocks * -(-block_bytes // PIECE))
        kernel = kernel_of(move_spec, device)
        kernel(num_ctas, *addresses, src.stride, dst.stride, *id_sizes, num_blocks, block_bytes)


def copy_blocks(kv: Tensor, src_ids: Tensor, dst_ids: Tensor) -> None:
    """Copies whole blocks (all layers) `src_ids[i]` to `dst_ids[i]`, [n] int64; all are read before any is written."""
    num_blocks, block_bytes = src_ids.shape[0], kv[0].numel() * kv.element_size()
    # The copies go through a buffer, as a block that this step freed may be both a source and a destination.
    buffer = kv.new_empty(num_blocks, *kv.shape[1:])
    move_blocks(Side.of(kv, src_ids), Side.of(buffer), num_blocks, block_bytes, kv.get_device())
    move_blocks(Side.of(buffer), Side.of(kv, dst_ids), num_blocks, block_bytes, kv.get_device())

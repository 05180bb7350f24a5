"""Products of up to 16 rows with a weight matrix, which cost what reading the weights costs: y = x W^T + bias.

W [out, in] streams from global memory straight into operand registers of the tensor cores: y^T [16 rows of W, 8 rows
of x] += W x^T, where the order of the contraction index is free as long as both operands agree. The warps of a CTA
split the contraction and add up in shared memory, so that x is read once per CTA, through L1. A launch that overlaps
its predecessor has its first weights under way before it waits for x. More rows go to torch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from numba.cuda.types import float32 as f32
from numba.cuda.types import int32 as i32
from torch import Tensor
from torch.nn import functional as F

from nanopd.cuda import warp
from nanopd.cuda.launch import Kernel, Spec, kernel_for
from nanopd.cuda.ptx import macro, shared_memory

ROW_TILES = 2  # mma tiles of 16 rows of W in a CTA
TILE_ROWS = 16 * ROW_TILES
NUM_WARPS = 16
PITCH = TILE_ROWS + 4  # of the sums of one row of x in shared memory: spreads a warp over all banks
SKINNY_ARGUMENTS = "llllrrrrr"
MAX_ROWS = 16


def skinny_kernel(dtype: str, x_tiles: int) -> Callable[..., None]:
    """For up to 8 * x_tiles rows of x; rows past the last repeat it and are not stored."""
    UNROLL = 4 // x_tiles  # keeps what is in flight within the registers
    UNIT = 64 * UNROLL  # bytes of a row of W that a warp takes at a time
    SUMS_OF_WARP = 4 * 8 * x_tiles * PITCH
    PAIRS = 8 * x_tiles * TILE_ROWS // 2
    MMA = warp.MMA[dtype]
    pack, unpack = warp.function(warp.PACK[dtype]), warp.function(warp.UNPACK[dtype])
    no_sums = warp.zeros(4 * ROW_TILES * x_tiles)

    @macro
    def load_weights(emit: Any, address: Any, eight_rows: Any) -> list[Any]:
        """[UNROLL][rows g, g + 8, g + 16, ...] 16 bytes each; `eight_rows` in bytes."""
        rows = [address]
        for _ in range(2 * ROW_TILES - 1):
            rows.append(emit(warp.MAD_WIDE, rows[-1], eight_rows, 1))
        return [r for u in range(UNROLL) for row in rows for r in emit(warp.LOAD_WEIGHTS.at(64 * u), row)]

    @macro
    def load_x(emit: Any, row0: Any, row1: Any) -> list[Any]:
        """[UNROLL][x tile] 16 bytes of this lane's rows g and g + 8."""
        rows = (row0, row1)[:x_tiles]
        return [r for u in range(UNROLL) for row in rows for r in emit(warp.LOAD_X.at(64 * u), row)]

    @macro
    def multiply(emit: Any, sums: Any, w: Any, x: Any) -> list[Any]:
        """sums [row tile][x tile] += W x^T over 32 * UNROLL of the contraction."""
        out = list(sums)
        for u in range(UNROLL):
            for half in (0, 2):
                for tile in range(ROW_TILES):
                    low = 8 * (u * ROW_TILES + tile) + half
                    a = (w[low], w[low + 4], w[low + 1], w[low + 5])
                    for x_tile in range(x_tiles):
                        b, c = 4 * (u * x_tiles + x_tile) + half, 4 * (tile * x_tiles + x_tile)
                        out[c : c + 4] = emit(MMA, *a, x[b], x[b + 1], *out[c : c + 4])
        return out

    @macro
    def store_sums(emit: Any, address: Any, sums: Any) -> None:
        """Shared [row of x][row of W] = this warp's sums."""
        for n, value in enumerate(sums):
            tile, x_tile, high, column = n // 4 // x_tiles, n // 4 % x_tiles, n // 2 % 2, n % 2
            offset = 4 * ((8 * x_tile + column) * PITCH + 16 * tile + 8 * high)
            emit(warp.STORE_F32_OF_CTA.at(offset), address, value)

    def kernel(  # type: ignore[no-untyped-def]
        weights,  # [num_tiles * TILE_ROWS, in]
        x,  # [num_rows, in]
        bias,  # [num_tiles * TILE_ROWS] or address 0
        y,  # [num_rows, num_tiles * TILE_ROWS]
        num_rows,
        num_tiles,
        w_stride,  # bytes of a row, here and below
        x_stride,
        y_stride,
    ):
        thread = warp.thread_index()
        lane = thread & 31
        wid = i32(thread >> 5)
        g = lane >> 2
        t = lane & 3
        shared = shared_memory()
        tile = warp.cta_index()
        last_row = i32(num_rows - 1)
        lane_w = weights + (warp.wide(g) * w_stride + 16 * t)
        row0 = x + warp.wide(warp.min_i32(g, last_row)) * x_stride + 16 * t
        row1 = x + warp.wide(warp.min_i32(g + 8, last_row)) * x_stride + 16 * t
        eight_rows = i32(8 * w_stride)
        begin = i32(wid * UNIT)  # of this warp's part of a row; then every NUM_WARPS-th
        start = warp.min_i32(begin, w_stride - UNIT)  # a warp without a part loads, and does not add
        address = lane_w + warp.wide(tile) * TILE_ROWS * w_stride + start
        w = load_weights(address, eight_rows)
        if num_rows > 0:  # always; but ptxas would move the loads behind a wait in the same basic block
            warp.wait_for_predecessor()
        warp.let_successor_start()
        xs = load_x(row0 + start, row1 + start)
        while tile < num_tiles:
            sums = no_sums()
            at = begin
            next_tile = i32(tile + warp.num_ctas())
            while at < w_stride:
                sums = multiply(sums, w, xs)
                at = i32(at + NUM_WARPS * UNIT)
                if at < w_stride:
                    address = address + NUM_WARPS * UNIT
                    w = load_weights(address, eight_rows)
                    xs = load_x(row0 + at, row1 + at)
            if next_tile < num_tiles:  # loads stay in flight while this tile is added up
                address = lane_w + warp.wide(next_tile) * TILE_ROWS * w_stride + start
                w = load_weights(address, eight_rows)
                xs = load_x(row0 + start, row1 + start)
            store_sums(shared + wid * SUMS_OF_WARP + 4 * (2 * t * PITCH + g), sums)
            warp.sync_cta()
            pair = thread  # of neighbours in y
            while pair < PAIRS:
                row = i32(pair // (TILE_ROWS // 2))
                column = i32(pair % (TILE_ROWS // 2) * 2)
                y0 = y1 = f32(0.0)
                for other in range(NUM_WARPS):
                    place = i32(shared + other * SUMS_OF_WARP + 4 * (row * PITCH + column))
                    y0 = y0 + warp.load_f32_of_cta(place)
                    y1 = y1 + warp.load_f32_of_cta(place + 4)
                column = i32(tile * TILE_ROWS + column)
                if bias != 0:
                    b0, b1 = unpack(warp.load_constant_i32(bias + 2 * warp.wide(column)))
                    y0 = y0 + b0
                    y1 = y1 + b1
                warp.store_i32_if(y + warp.wide(row) * y_stride + 2 * column, pack(y0, y1), row < num_rows)
                pair = i32(pair + 32 * NUM_WARPS)
            warp.sync_cta()
            tile = next_tile

    return kernel


def skinny_spec(dtype: str, x_tiles: int) -> Spec:
    shared_bytes = NUM_WARPS * 4 * 8 * x_tiles * PITCH
    return Spec(skinny_kernel, (dtype, x_tiles), SKINNY_ARGUMENTS, 32 * NUM_WARPS, shared_bytes)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, overlap: bool = False) -> Tensor:
    """x [T, in], weight [out, in], bias [out] -> [T, out]."""
    if not is_skinny(x, weight):
        return F.linear(x, weight, bias)
    y = x.new_empty(x.shape[0], weight.shape[0])
    kernel, num_sms = _kernel(x.dtype, -(-x.shape[0] // 8), x.get_device())
    num_tiles = weight.shape[0] // TILE_ROWS
    kernel(
        min(num_tiles, num_sms),
        weight.data_ptr(),
        x.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        y.data_ptr(),
        x.shape[0],
        num_tiles,
        2 * weight.stride(0),
        2 * x.stride(0),
        2 * y.stride(0),
        overlap=overlap,
    )
    return y


def is_skinny(x: Tensor, weight: Tensor) -> bool:
    """Whether `linear` has a kernel for it."""
    fits = 0 < x.shape[0] <= MAX_ROWS and weight.shape[0] % TILE_ROWS == 0 and weight.shape[1] % 128 == 0
    return fits and x.dtype in warp.NAMES and x.stride(1) == 1 and weight.is_contiguous()


@functools.cache
def _kernel(dtype: torch.dtype, x_tiles: int, device: int) -> tuple[Kernel, int]:
    num_sms = torch.cuda.get_device_properties(device).multi_processor_count
    return kernel_for(skinny_spec(warp.NAMES[dtype], x_tiles), device), num_sms

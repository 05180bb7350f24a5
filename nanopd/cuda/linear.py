"""Products with projections, and the operations fused to them: norm, bias, residual, SiLU.

For up to 16 rows one kernel does all of it and costs what reading the weights costs. W [out, in] streams from global
memory straight into operand registers of the tensor cores: y^T [16 rows of W, 8 rows of x] += W x^T, where the order
of the contraction index is free as long as both operands agree. The warps of a CTA split the contraction and add up in
shared memory, so that x is read once per CTA, through L1. A launch that overlaps its predecessor has its first weights
under way before it waits for x. A norm costs next to nothing: x passes through registers anyway, so each CTA adds up
the squares on the way, and y is divided by the rms at the end. More rows, and schemes without a kernel, go to the
function that PRODUCTS has for the projection's scheme.
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
from nanopd.cuda.elementwise import LOG2_E, eight_at_a_time, rms_norm, silu_and_mul
from nanopd.cuda.launch import Kernel, Spec, address_of, kernel_of
from nanopd.cuda.ptx import inlined, macro, shared_memory
from nanopd.models.weights import PLAIN, Linear

MMA_ROWS = 16  # rows of W in an mma tile
ROW_TILES = 2  # mma tiles in a CTA: neighbours, or rows of the gate and the same rows of the up projection
TILE_ROWS = MMA_ROWS * ROW_TILES
NUM_WARPS = 16
THREADS = 32 * NUM_WARPS
PITCH = TILE_ROWS + 4  # floats from one row of x to the next in shared memory, which spreads a warp over all banks
STORE, ADD, GATE = 0, 1, 2  # of a product p: y = p, y += p, or y = silu(p of the first tile) * p of the second
MAX_ROWS = 16
MUCH_SHARED_BYTES = 128 << 10
# The product of x and norm, which is not divided by the rms yet, is multiplied by this, so that float16 can hold it.
PRESCALE = {"bf16": 1.0, "f16": 2.0**-4}
PRESCALE_BITS = {"bf16": None, "f16": 0x2C002C00}  # the same as a pair of elements
# The part of L1 that a CTA needs as shared memory. The loads under way take room in the rest: without this hint,
# multiprocessors kept the division of attention, which leaves L1 little, and products took twice as long.
SHARED_PERCENT = 20


def skinny_kernel(dtype: str, x_tiles: int, unroll: int) -> Callable[..., None]:
    """The kernel for up to 8 * x_tiles rows of x. Rows past the last one repeat it, and are not stored."""
    ROWS = 8 * x_tiles
    UNROLL = unroll
    UNIT = 64 * UNROLL  # a warp takes as many bytes of a row of W at a time
    SUMS_OF_WARP = 4 * ROWS * PITCH
    SQUARES = NUM_WARPS * SUMS_OF_WARP  # offset in shared memory of sums of squares, [NUM_WARPS, ROWS] float32
    mma, mul_pair = warp.MMA[dtype], warp.MUL_PAIR[dtype]
    PRESCALE_PAIR, UNSCALE = PRESCALE_BITS[dtype], 1 / PRESCALE[dtype]
    pack, unpack = warp.PACK[dtype], warp.UNPACK[dtype]
    no_sums, no_squares = warp.zeros(4 * ROW_TILES * x_tiles), warp.zeros(x_tiles)
    square, _ = eight_at_a_time(dtype)

    @macro
    def load_weights(emit: Any, address: Any, eight_rows: Any, second_tile: Any) -> list[Any]:
        """Loads [UNROLL][rows g and g + 8 of each mma tile] pieces of 16 bytes; distances are in bytes."""
        tiles = [address, emit(warp.mad_wide, address, second_tile, 1)]
        rows = [row for tile in tiles for row in (tile, emit(warp.mad_wide, tile, eight_rows, 1))]
        return [r for u in range(UNROLL) for row in rows for r in emit(warp.load_weights.at(64 * u), row)]

    @macro
    def load_x(emit: Any, row0: Any, row1: Any) -> list[Any]:
        """Loads [UNROLL][x tile] pieces of 16 bytes of this lane's rows g and g + 8."""
        rows = (row0, row1)[:x_tiles]
        return [r for u in range(UNROLL) for row in rows for r in emit(warp.load_x.at(64 * u), row)]

    @macro
    def times_norm(emit: Any, x: Any, address: Any) -> list[Any]:
        """The elements that `load_x` loaded, times the weights of the norm at `address`."""
        out = []
        for u in range(UNROLL):
            weights = emit(warp.load_x.at(64 * u), address)
            if PRESCALE_PAIR is not None:
                weights = [emit(mul_pair, weight, PRESCALE_PAIR) for weight in weights]
            for register in range(4 * u * x_tiles, 4 * (u + 1) * x_tiles):
                out.append(emit(mul_pair, x[register], weights[register % 4]))
        return out

    @macro
    def add_squares(emit: Any, totals: Any, x: Any) -> list[Any]:
        """The totals [x tile], plus this lane's squares."""
        out = list(totals)
        for i in range(0, len(x), 4):
            row = i // 4 % x_tiles
            out[row] = emit(square, out[row], x[i : i + 4])
        return out

    @macro
    def store_squares(emit: Any, address: Any, totals: Any, is_first: Any) -> None:
        """Stores the sums of squares of rows g and g + 8, which the 4 lanes with the same g have together."""
        for x_tile, total in enumerate(totals):
            emit(warp.store_f32_of_cta_if.at(32 * x_tile), address, warp.add_lanes(emit, total, 4), is_first)

    @macro
    def factor_of(emit: Any, squares: Any, lane: Any, row_bytes: Any, eps: Any) -> Any:
        """1 / rms of the row whose sums of squares begin at `squares`; 8 neighbouring lanes must ask for one row."""
        mine = emit(warp.mad_i32, lane, 4 * ROWS * NUM_WARPS // 8, squares)
        loads = [emit(warp.load_f32_of_cta.at(4 * ROWS * i), mine) for i in range(NUM_WARPS // 8)]
        total = warp.add_lanes(emit, functools.reduce(functools.partial(emit, warp.add_f32), loads), 8)
        mean = emit(warp.mul_f32, total, emit(warp.reciprocal, emit(warp.f32_of_i32, row_bytes)))
        return emit(warp.mul_f32, emit(warp.rsqrt, emit(warp.fma_f32, mean, 2.0, eps)), UNSCALE)

    @macro
    def multiply(emit: Any, sums: Any, w: Any, x: Any) -> list[Any]:
        """The sums [row tile][x tile], plus W x^T over 32 * UNROLL of the contraction."""
        out = list(sums)
        for u in range(UNROLL):
            for half in (0, 2):
                for tile in range(ROW_TILES):
                    low = 8 * (u * ROW_TILES + tile) + half
                    a = (w[low], w[low + 4], w[low + 1], w[low + 5])
                    for x_tile in range(x_tiles):
                        b, c = 4 * (u * x_tiles + x_tile) + half, 4 * (tile * x_tiles + x_tile)
                        out[c : c + 4] = emit(mma, *a, x[b], x[b + 1], *out[c : c + 4])
        return out

    @macro
    def store_sums(emit: Any, address: Any, sums: Any) -> None:
        """Stores this warp's sums in shared memory as [row of x][row of W]."""
        for n, value in enumerate(sums):
            tile, x_tile, high, column = n // 4 // x_tiles, n // 4 % x_tiles, n // 2 % 2, n % 2
            offset = 4 * ((8 * x_tile + column) * PITCH + 16 * tile + 8 * high)
            emit(warp.store_f32_of_cta.at(offset), address, value)

    @inlined
    def sum_of_warps(shared, row, column):  # type: ignore[no-untyped-def]
        """Two neighbours in a row of the tile's product, summed over the warps."""
        y0 = y1 = f32(0.0)
        for w in range(NUM_WARPS):
            place = i32(shared + w * SUMS_OF_WARP + 4 * (row * PITCH + column))
            y0, y1 = y0 + warp.load_f32_of_cta(place), y1 + warp.load_f32_of_cta(place + 4)
        return y0, y1

    @inlined
    def silu(x):  # type: ignore[no-untyped-def]
        return x * warp.reciprocal(f32(1.0) + warp.exp2(x * f32(-LOG2_E)))

    def kernel(  # type: ignore[no-untyped-def]
        weights, x, norm, bias, y, num_rows, num_tiles, row_bytes, y_stride, second_tile, result, eps
    ):
        """weights [num_tiles * TILE_ROWS, in], x [num_rows, in] -> y.

        y [num_rows, num_tiles * (MMA_ROWS for GATE, else TILE_ROWS)]; `result` is STORE, ADD or GATE. Address 0 stands
        for none: norm [in], where x is not normed, and bias [num_tiles * TILE_ROWS]. In bytes: a row of W and of x, a
        row of y, and the way from the first mma tile of a CTA to its second.
        """
        thread = warp.thread_index()
        lane, wid = thread & 31, i32(thread >> 5)
        g, t = lane >> 2, lane & 3
        shared = shared_memory()
        tile = warp.cta_index()
        last_row = i32(num_rows - 1)
        columns = i32(TILE_ROWS)  # the columns of y that a tile has
        if result == GATE:
            columns = i32(MMA_ROWS)
        tile_bytes = warp.wide(columns) * row_bytes
        lane_w = weights + (warp.wide(g) * row_bytes + 16 * t)
        row0 = x + warp.wide(warp.min_i32(g, last_row)) * row_bytes + 16 * t
        row1 = x + warp.wide(warp.min_i32(g + 8, last_row)) * row_bytes + 16 * t
        lane_norm = norm + 16 * t
        eight_rows = i32(8 * row_bytes)
        begin = i32(wid * UNIT)  # this warp takes the unit here of a row, and every NUM_WARPS-th after it
        start = warp.min_i32(begin, row_bytes - UNIT)  # a warp without a unit loads one too, and does not add it
        address = lane_w + warp.wide(tile) * tile_bytes + start
        w = load_weights(address, eight_rows, second_tile)
        if num_rows > 0:  # always true; ptxas would move the loads behind a wait in the same basic block
            warp.wait_for_predecessor()
        warp.let_successor_start()
        xs = load_x(row0 + start, row1 + start)
        while tile < num_tiles:
            sums = no_sums()
            squares = no_squares()
            at = begin
            next_tile = i32(tile + warp.num_ctas())
            while at < row_bytes:
                if norm != 0:
                    squares = add_squares(squares, xs)
                    xs = times_norm(xs, lane_norm + at)
                sums = multiply(sums, w, xs)
                at = i32(at + NUM_WARPS * UNIT)
                if at < row_bytes:
                    address = address + NUM_WARPS * UNIT
                    w = load_weights(address, eight_rows, second_tile)
                    xs = load_x(row0 + at, row1 + at)
            if next_tile < num_tiles:  # its loads stay in flight while this tile is added up
                address = lane_w + warp.wide(next_tile) * tile_bytes + start
                w = load_weights(address, eight_rows, second_tile)
                xs = load_x(row0 + start, row1 + start)
            store_sums(shared + wid * SUMS_OF_WARP + 4 * (2 * t * PITCH + g), sums)
            if norm != 0:
                store_squares(shared + SQUARES + 4 * (wid * ROWS + g), squares, t == 0)
            warp.sync_cta()
            pair = thread  # each thread computes pairs of neighbours in y
            while pair < ROWS * columns // 2:
                row = warp.div_u32(pair, columns // 2)
                column = i32(2 * (pair - row * (columns // 2)))
                to = y + warp.wide(warp.min_i32(row, last_row)) * y_stride + 2 * warp.wide(tile * columns + column)
                y0, y1 = sum_of_warps(shared, row, column)
                factor = f32(1.0)
                if norm != 0:
                    factor = factor_of(shared + SQUARES + 4 * row, thread & 7, row_bytes, eps)
                    y0 = y0 * factor
                    y1 = y1 * factor
                if bias != 0:
                    b0, b1 = unpack(warp.load_constant_i32(bias + 2 * warp.wide(tile * columns + column)))
                    y0, y1 = y0 + b0, y1 + b1
                if result == ADD:
                    r0, r1 = unpack(warp.load_i32(to))
                    y0, y1 = y0 + r0, y1 + r1
                if result == GATE:
                    up0, up1 = sum_of_warps(shared, row, column + MMA_ROWS)
                    y0, y1 = silu(y0) * (up0 * factor), silu(y1) * (up1 * factor)
                warp.store_i32_if(to, pack(y0, y1), row < num_rows)
                pair = i32(pair + THREADS)
            warp.sync_cta()
            tile = next_tile

    return kernel


def skinny_spec(dtype: str, x_tiles: int, shared_limit: int) -> Spec:
    """The variant for a device whose CTAs may have `shared_limit` bytes of shared memory: Hopper 227 KiB, Ada 99.

    A lane has as many loads in flight as its registers hold. On Ada it has fewer: memory a fifth as fast needs fewer,
    and the compiler for Ada more registers.
    """
    unroll = (4 if shared_limit > MUCH_SHARED_BYTES else 2) // x_tiles
    shared_bytes = 4 * NUM_WARPS * 8 * x_tiles * (PITCH + 1)
    return Spec(skinny_kernel, (dtype, x_tiles, unroll), "lllllrrrrrrf", THREADS, shared_bytes, SHARED_PERCENT)


def norm_linear(x: Tensor, norm: Tensor, eps: float, linear: Linear, overlap: bool = False) -> Tensor:
    """RMS norm of x [T, in] with weights norm [in], through the projection -> [T, out]."""
    if not is_skinny(x, linear):
        return PRODUCTS[linear.scheme.name](rms_norm(x, norm, eps, overlap), linear)
    y = x.new_empty(x.shape[0], linear.weight.shape[0])
    _skinny(y, x, linear, STORE, overlap, norm, eps)
    return y


def norm_gated_linear(x: Tensor, norm: Tensor, eps: float, gate_up: Linear, overlap: bool = False) -> Tensor:
    """RMS norm of x [T, in], through the projection [T, 2 * size]: silu(gate) * up [T, size]."""
    if gate_up.bias is not None or not is_skinny(x, gate_up):
        return silu_and_mul(PRODUCTS[gate_up.scheme.name](rms_norm(x, norm, eps, overlap), gate_up), overlap)
    y = x.new_empty(x.shape[0], gate_up.weight.shape[0] // 2)
    _skinny(y, x, gate_up, GATE, overlap, norm, eps)
    return y


def add_linear(x: Tensor, linear: Linear, residual: Tensor, overlap: bool = False) -> None:
    """residual [T, out] += x [T, in] through the projection."""
    if is_skinny(x, linear):
        _skinny(residual, x, linear, ADD, overlap)
    else:
        PRODUCTS[linear.scheme.name](x, linear, residual)


def plain_product(x: Tensor, linear: Linear, residual: Tensor | None = None) -> Tensor:
    """x [T, in] through the projection -> [T, out], or added to residual [T, out], which then is returned."""
    if residual is None:
        return F.linear(x, linear.weight, linear.bias)
    residual.addmm_(x, linear.weight.T)
    return residual if linear.bias is None else residual.add_(linear.bias)


# By the name of a scheme: the product of many rows, or of any where there is no kernel.
PRODUCTS: dict[str, Callable[..., Tensor]] = {PLAIN.name: plain_product}


def _skinny(
    y: Tensor, x: Tensor, linear: Linear, result: int, overlap: bool, norm: Tensor | None = None, eps: float = 0.0
) -> None:
    weight = linear.weight
    num_tiles, row_bytes = weight.shape[0] // TILE_ROWS, 2 * weight.shape[1]
    second_tile = row_bytes * (weight.shape[0] // 2 if result == GATE else MMA_ROWS)
    addresses = weight.data_ptr(), x.data_ptr(), address_of(norm), address_of(linear.bias), y.data_ptr()
    sizes = x.shape[0], num_tiles, row_bytes, 2 * y.stride(0), second_tile
    kernel, num_sms = _kernel(x.dtype, -(-x.shape[0] // 8), x.get_device())
    kernel(min(num_tiles, num_sms), *addresses, *sizes, result, eps, overlap=overlap)


def is_skinny(x: Tensor, linear: Linear) -> bool:
    """Whether there is a kernel for the product."""
    weight = linear.weight
    fits = 0 < x.shape[0] <= MAX_ROWS and weight.shape[0] % TILE_ROWS == 0 and weight.shape[1] % 128 == 0
    is_known = linear.scheme is PLAIN and x.dtype in warp.NAMES
    return fits and is_known and x.is_contiguous() and weight.is_contiguous()


@functools.cache
def _kernel(dtype: torch.dtype, x_tiles: int, device: int) -> tuple[Kernel, int]:
    properties = torch.cuda.get_device_properties(device)
    shared_limit: int = properties.shared_memory_per_block_optin  # type: ignore[attr-defined]
    kernel = kernel_of(skinny_spec, device, warp.NAMES[dtype], x_tiles, shared_limit)
    return kernel, properties.multi_processor_count

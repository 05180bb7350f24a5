"""The inner loop of `kernels.linear`: a tile of dot products held in vector registers, as LLVM instructions.

It is written out because the order of summation must not depend on the tile's shape: every dot product adds its
products lane by lane, k ascending, then the lanes in one fixed tree. LLVM's vectoriser gives no such promise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

ROWS = 4  # rows of the weight in a tile
# The sums of a tile fit the vector registers: 4 x 4 of 16 lanes in the 32 of AVX-512, 4 x 3 of 8 in the 16 of AVX2.
LANES, COLUMNS = (16, 4) if binding.get_host_cpu_features().get("avx512f") else (8, 3)

FLOAT = ir.FloatType()
VECTOR = ir.VectorType(FLOAT, LANES)
BYTES = ir.IntType(8).as_pointer()
INT32 = ir.IntType(32)
INT64 = ir.IntType(64)


def make_dot_tile(num_columns: int, prefetch: bool) -> Callable[..., None]:
    """tile(weight, row, x, column, out): out[column + j, row + i] = weight[row + i] . x[column + j].

    For i < ROWS, j < num_columns; weight [N, K], x [M, K], out [M, N], float32 and contiguous. Sums the first
    K // LANES * LANES products only. With `prefetch`, the tile asks for the next ROWS rows of the weight on the way.
    """

    @intrinsic
    def tile(typing_context: Any, weight: Any, row: Any, x: Any, column: Any, out: Any) -> Any:
        def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Sequence[ir.Value]) -> Any:
            w, vectors, sums = (context.make_array(ty)(context, builder, args[i]) for i, ty in arrays)
            first = {i: context.cast(builder, args[i], signature.args[i], types.int64) for i in (1, 3)}
            k_size, n_size = builder.extract_value(w.shape, 1), builder.extract_value(sums.shape, 1)
            w_rows = _row_pointers(builder, w.data, first[1], k_size, ROWS)
            x_rows = _row_pointers(builder, vectors.data, first[3], k_size, num_columns)
            outputs = _row_pointers(builder, sums.data, first[3], n_size, num_columns)
            accumulators = _dot_loop(builder, w_rows, x_rows, k_size, prefetch)
            for pointer, column_sums in zip(outputs, accumulators, strict=True):
                total = _sum_lanes(builder, column_sums)
                target = builder.gep(pointer, [first[1]])
                builder.store(total, builder.bitcast(target, total.type.as_pointer()), align=4)
            return context.get_dummy_value()

        arrays = ((0, weight), (2, x), (4, out))
        return types.void(weight, row, x, column, out), codegen

    return tile


def _row_pointers(builder: ir.IRBuilder, data: ir.Value, first: ir.Value, size: ir.Value, count: int) -> list[ir.Value]:
    return [builder.gep(data, [builder.mul(builder.add(first, INT64(i)), size)]) for i in range(count)]


def _dot_loop(
    builder: ir.IRBuilder, w_rows: Sequence[ir.Value], x_rows: Sequence[ir.Value], k_size: ir.Value, prefetch: bool
) -> list[list[ir.Value]]:
    """The sums of LANES partial products for each column and row."""
    next_rows = builder.mul(k_size, INT64(ROWS))  # elements from these rows of the weight to the next ones
    zero = ir.Constant(VECTOR, [ir.Constant(FLOAT, 0.0)] * LANES)
    sums = [[cgutils.alloca_once_value(builder, zero) for _ in w_rows] for _ in x_rows]
    fma = cgutils.get_or_insert_function(builder.module, ir.FunctionType(VECTOR, [VECTOR] * 3), f"llvm.fma.v{LANES}f32")
    end = builder.and_(k_size, INT64(-LANES))
    with cgutils.for_range_slice(builder, INT64(0), end, INT64(LANES), intp=INT64) as (k, _):
        for pointer in w_rows if prefetch else ():
            _prefetch(builder, builder.gep(pointer, [builder.add(k, next_rows)]))
        rows = [_load(builder, pointer, k) for pointer in w_rows]
        for pointer, column_sums in zip(x_rows, sums, strict=True):
            values = _load(builder, pointer, k)
            for row, total in zip(rows, column_sums, strict=True):
                builder.store(builder.call(fma, [row, values, builder.load(total)]), total)
    return [[builder.load(total) for total in column_sums] for column_sums in sums]


def _load(builder: ir.IRBuilder, pointer: ir.Value, index: ir.Value) -> ir.Value:
    address = builder.bitcast(builder.gep(pointer, [index]), VECTOR.as_pointer())
    return builder.load(address, align=4)


def _prefetch(builder: ir.IRBuilder, address: ir.Value) -> None:
    """Asks for memory to be read into caches of all levels; an address beyond the end of the array does no harm."""
    signature = ir.FunctionType(ir.VoidType(), [BYTES, INT32, INT32, INT32])
    function = cgutils.get_or_insert_function(builder.module, signature, "llvm.prefetch.p0")
    builder.call(function, [builder.bitcast(address, BYTES), INT32(0), INT32(3), INT32(1)])


def _sum_lanes(builder: ir.IRBuilder, vectors: Sequence[ir.Value]) -> ir.Value:
    """One vector of the four sums of four vectors of LANES, by folding and interleaving, which takes few shuffles."""

    def fold(a: ir.Value, b: ir.Value, lanes: list[int], distance: int) -> ir.Value:
        """The lanes of a and b in this order, each plus the lane that far behind it."""
        behind = [lane + distance for lane in lanes]
        return builder.fadd(_shuffle(builder, a, b, lanes), _shuffle(builder, a, b, behind))

    a, b, c, d = vectors
    pairs = [lane for i in range(0, LANES, 2) for lane in (i, i + LANES)]  # a0 b0 a2 b2 ...
    fours = [lane for i in range(0, LANES, 4) for lane in (i, i + 1, i + LANES, i + 1 + LANES)]
    ab, cd = fold(a, b, pairs, 1), fold(c, d, pairs, 1)  # a b a b ..., c d c d ...
    total = fold(ab, cd, fours, 2)  # a b c d a b c d ...
    size = LANES
    while size > len(vectors):
        size //= 2
        total = fold(total, total, list(range(size)), size)
    return total


def _shuffle(builder: ir.IRBuilder, a: ir.Value, b: ir.Value, lanes: list[int]) -> ir.Value:
    mask = ir.Constant(ir.VectorType(INT32, len(lanes)), [INT32(lane) for lane in lanes])
    return builder.shuffle_vector(a, b, mask)

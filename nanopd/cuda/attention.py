"""Attention of a few query tokens per sequence over its paged KV cache, split evenly over the GPU.

    kv  [num_blocks, num_layers, 2 (K, V), num_kv_heads, block_size, head_dim], one layer of it at a time
    q   [num_rows * num_queries, num_heads, head_dim]; query i of row r is its token seq_lens[r] - num_queries + i

A column is a pair of query token and query head; 8 columns that read the same KV head are a head unit. Work is cut
into units of (row, head unit, TILE tokens). Laid end to end, with a gap of SEGMENT_COST where a head unit starts, each
unit has its place, and a fixed number of CTAs shares the places evenly (stream-K, Osama et al., arXiv:2301.03598; for
decoding LeanAttention, Sanovar et al., arXiv:2405.10480), so that one captured graph serves any lengths. Each warp of
a CTA takes 16 tokens of a unit. Their K and V pass through a ring of the warp's own in shared memory, some tiles ahead
of the arithmetic and across the borders of sequences. What one CTA covers alone is written out; else partial results
go to a workspace, and the last CTA to arrive merges them by their log-sum-exp.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from numba.cuda.types import float32 as f32
from numba.cuda.types import int32 as i32
from torch import Tensor

from nanopd.config import KVLayout
from nanopd.cuda import warp
from nanopd.cuda.elementwise import LOG2_E
from nanopd.cuda.launch import Spec, kernel_of
from nanopd.cuda.ptx import inlined, instruction, macro, shared_memory
from nanopd.models.operations import AttentionSpec

NUM_WARPS = 4  # warps of a CTA
WARP_TILE = 16  # tokens of a warp: the rows of an mma
COLUMNS = 8  # columns of a head unit: those of an mma
NO_SCORE = -1.0e30  # the maximum of no scores at all
MASKED = -3.0e38  # the score of a masked token weighs 0 beside NO_SCORE too; fast math does not take infinities
MIN_PLACES = 2  # a CTA has no fewer places: smaller parts of short contexts would cost more to merge than to read
SEGMENT_COST = 1  # starting and ending a head unit costs as many units: CTAs with short sequences would finish last
TINY = 1.0e-30  # keeps the result of a column without tokens finite; it weighs nothing in the merge
MERGED = 8  # a thread loads as many partial results at a time
RESERVED_SHARED_BYTES = 1024  # the system takes as much shared memory of each CTA
HEAD_DIMS = (64, 128)
DECODE_ARGUMENTS = "llllllllllllrrrrrrf"

# ((x + 1) * n - 1) // total is the CTA that has place x, when n CTAs share all places and CTA i starts at
# i * total // n.
owner = instruction(
    "{.reg .b64 a, b; .reg .b32 x; add.u32 x, $1, 1; mul.wide.u32 a, x, $2; sub.u64 a, a, 1; cvt.u64.u32 b, $3; "
    "div.u64 a, a, b; cvt.u32.u64 $0, a;}",
    "r",
    "rrr",
)


class SharedLayout:
    """Shared memory of a CTA, in bytes: the warps' rings, then what the warps exchange at the end of a segment."""

    def __init__(self, head_dim: int, num_warps: int, num_stages: int) -> None:
        self.stage = 2 * WARP_TILE * 2 * head_dim  # K and V [WARP_TILE, head_dim], 16 bits
        self.ring = num_stages * self.stage
        self.out_row = 4 * (head_dim + 4)  # [head_dim] float32, padded against bank conflicts
        self.out_warp = COLUMNS * self.out_row
        self.outputs = num_warps * self.ring  # [num_warps, COLUMNS, head_dim + 4] float32
        self.maxima = self.outputs + num_warps * self.out_warp  # [num_warps, COLUMNS] float32
        self.sums = self.maxima + num_warps * COLUMNS * 4  # [num_warps, COLUMNS] float32
        self.size = self.sums + num_warps * COLUMNS * 4


@inlined
def row_of(place, plan, num_rows, lane):  # type: ignore[no-untyped-def]
    """The row that a place belongs to: the last one with plan[row] <= place. The warp tries 32 rows at a time."""
    row = i32(0)
    step = i32(num_rows)
    while step > 1:
        step = i32((step + 31) >> 5)
        tried = warp.min_i32(row + (lane + 1) * step, num_rows)
        row = i32(row + step * warp.count_lanes(warp.load_constant_i32(plan + 4 * warp.wide(tried)) <= place))
    return row


@inlined
def next_unit(place, row, head, token, context, tile, seq_lens, num_rows, num_heads):  # type: ignore[no-untyped-def]
    """The unit after (row, head unit, first token), its place, and its row's context; undefined after the last unit."""
    place = i32(place + 1)
    token = i32(token + tile)
    if token >= context:
        place = i32(place + SEGMENT_COST)
        token = i32(0)
        head = i32(head + 1)
        if head == num_heads:
            head = context = i32(0)
            while context == 0 and row + 1 < num_rows:
                row = i32(row + 1)
                context = warp.load_constant_i32(seq_lens + 4 * warp.wide(row))
    return place, row, head, token, context


@inlined
def query_of(column, columns, group):  # type: ignore[no-untyped-def]
    """The query token that a column belongs to. Columns that only fill up an mma repeat the last real one."""
    return warp.div_u32(warp.min_i32(column, columns - 1), group)


@inlined
def q_row(row, kv_head, column, num_kv_heads, group, num_queries):  # type: ignore[no-untyped-def]
    """The index in q [num_rows * num_queries * num_heads] of a column of a KV head."""
    column = warp.min_i32(column, group * num_queries - 1)
    query = warp.div_u32(column, group)
    return ((warp.wide(row) * num_queries + query) * num_kv_heads + kv_head) * group + (column - query * group)


def decode_kernel(head_dim: int, dtype: str, num_warps: int, num_stages: int) -> Callable[..., None]:
    """The kernel for blocks of 16 tokens and more (a power of two).

    S^T [16 tokens, 8 columns] = K Q^T and O^T [16 dims, 8 columns] += V^T P^T on the tensor cores. The order of the
    contraction index is free as long as both operands agree, so that a lane reads 16 bytes of a row at a time and no
    fragment is shuffled: lane 4g + t takes dims 32j + 8t .. + 7 of tokens g and g + 8 of K, and dims 64j + 8g .. + 7
    of tokens 2t, 2t + 1, 2t + 8, 2t + 9 of V.
    """
    layout = SharedLayout(head_dim, num_warps, num_stages)
    TILE = WARP_TILE * num_warps
    ROW = 2 * head_dim  # bytes of a token of one head
    CHUNKS = ROW // 16  # pieces of 16 bytes in a row
    ROWS_PER_COPY = 32 // CHUNKS
    V = WARP_TILE * ROW  # where V begins in a stage, behind K
    STAGE, RING, AHEAD = layout.stage, layout.ring, num_stages - 1
    OUT_ROW, OUT_WARP, OUTPUTS = layout.out_row, layout.out_warp, layout.outputs
    MAXIMA, SUMS = layout.maxima, layout.sums
    QUADS = head_dim // 4
    mma, pack = warp.MMA[dtype], warp.PACK[dtype]
    wait_for_tile = warp.wait_for_copies(AHEAD)
    no_sums = warp.zeros(head_dim // 4)

    # The 16-byte chunk c of row r lies at c ^ swizzle(r) in the ring, so that a warp's reads spread over all banks.
    # The swizzle(r) is 4 * (r & 1) for K and r & 6 for V.

    @macro
    def copy_tile(emit: Any, ring_k: Any, ring_v: Any, k: Any, v: Any, lane_row: Any, last_row: Any) -> None:
        """Copies 16 rows of K and V. Rows past the last one repeat it, because the memory there may hold NaN."""
        rows = [(i, emit(warp.min_i32, emit(warp.add_i32, lane_row, i), last_row)) for i in range(0, 16, ROWS_PER_COPY)]
        for source, ring, swizzles in (
            (k, ring_k, [4 * (i & 1) for i, _ in rows]),
            (v, ring_v, [i & 6 for i, _ in rows]),
        ):
            for (i, row), swizzle in zip(rows, swizzles):
                to = emit(warp.xor_b32, ring, 16 * swizzle)
                emit(warp.copy_async.at(i * ROW), to, emit(warp.mad_wide, source, row, ROW))

    @macro
    def load_query(emit: Any, address: Any) -> list[Any]:
        """Loads dims 32j + 8t .. + 7 of one column, into registers in the order of those of K."""
        return [r for j in range(head_dim // 32) for r in emit(warp.load_16_bytes.at(64 * j), address)]

    @macro
    def score(emit: Any, k_even: Any, k_odd: Any, q: Any) -> list[Any]:
        """The scores of token g for two columns, then those of token g + 8."""
        even, odd = [0.0] * 4, [0.0] * 4  # two chains of mma instructions, each half as long as one would be
        for j in range(head_dim // 32):
            k = k_odd if j % 2 else k_even
            low, high = emit(warp.load_tile.at(64 * j), k), emit(warp.load_tile.at(64 * j + 8 * ROW), k)
            even = emit(mma, low[0], high[0], low[1], high[1], q[4 * j], q[4 * j + 1], *even)
            odd = emit(mma, low[2], high[2], low[3], high[3], q[4 * j + 2], q[4 * j + 3], *odd)
        return [emit(warp.add_f32, a, b) for a, b in zip(even, odd)]

    @macro
    def accumulate(emit: Any, sums: Any, v: Any, decay0: Any, decay1: Any, p_low: Any, p_high: Any) -> list[Any]:
        """The sums [dims, columns], times the decay of their columns, plus V^T P^T."""
        out = []
        for j in range(head_dim // 64):
            rows = [emit(warp.load_tile.at(128 * j + row * ROW), v) for row in (0, 1, 8, 9)]
            for i in range(4):
                low = [emit(half, rows[0][i], rows[1][i]) for half in (warp.permute_low, warp.permute_high)]
                high = [emit(half, rows[2][i], rows[3][i]) for half in (warp.permute_low, warp.permute_high)]
                old = sums[16 * j + 4 * i : 16 * j + 4 * i + 4]
                decayed = [emit(warp.mul_f32, x, decay) for x, decay in zip(old, (decay0, decay1, decay0, decay1))]
                out += emit(mma, *low, *high, p_low, p_high, *decayed)
        return out

    @macro
    def store_sums(emit: Any, address: Any, sums: Any, factor0: Any, factor1: Any) -> None:
        """Stores dims 64j + 8g .. + 7 of two columns, times the factors of the columns, in shared memory."""
        for n, x in enumerate(sums):
            j, i, dim, column = n // 16, n // 4 % 4, n // 2 % 2, n % 2
            offset = column * OUT_ROW + 4 * (64 * j + 2 * i + dim)
            emit(warp.store_f32_of_cta.at(offset), address, emit(warp.mul_f32, x, factor1 if column else factor0))

    @inlined
    def publish(shared, wid, lane, max0, max1, sum0, sum1, sums):  # type: ignore[no-untyped-def]
        """Stores a warp's sums, relative to the maximum of all warps, and its maxima and sums of weights."""
        t = lane & 3
        mine = i32(shared + 4 * (wid * COLUMNS + 2 * t))
        warp.store_f32_of_cta_if(mine + MAXIMA, max0, lane < 4)
        warp.store_f32_of_cta_if(mine + MAXIMA + 4, max1, lane < 4)
        warp.store_f32_of_cta_if(mine + SUMS, sum0, lane < 4)
        warp.store_f32_of_cta_if(mine + SUMS + 4, sum1, lane < 4)
        warp.sync_cta()
        top0 = top1 = f32(NO_SCORE)
        for w in range(num_warps):
            theirs = i32(shared + MAXIMA + 4 * (w * COLUMNS + 2 * t))
            top0 = warp.max_f32(top0, warp.load_f32_of_cta(theirs))
            top1 = warp.max_f32(top1, warp.load_f32_of_cta(theirs + 4))
        mine = i32(shared + OUTPUTS + wid * OUT_WARP + 2 * t * OUT_ROW + 32 * (lane >> 2))
        store_sums(mine, sums, warp.exp2(max0 - top0), warp.exp2(max1 - top1))

    @inlined
    def merge_warps(shared, column, dim):  # type: ignore[no-untyped-def]
        """Four dims of a column, from the sums of all warps, and the column's log-sum-exp (base 2)."""
        top = f32(NO_SCORE)
        for w in range(num_warps):
            top = warp.max_f32(top, warp.load_f32_of_cta(shared + MAXIMA + 4 * (w * COLUMNS + column)))
        weight = f32(TINY)
        y0 = y1 = y2 = y3 = f32(0.0)
        for w in range(num_warps):
            decay = warp.exp2(warp.load_f32_of_cta(shared + MAXIMA + 4 * (w * COLUMNS + column)) - top)
            weight = weight + decay * warp.load_f32_of_cta(shared + SUMS + 4 * (w * COLUMNS + column))
            x = warp.load_4_f32_of_cta(shared + OUTPUTS + w * OUT_WARP + column * OUT_ROW + 4 * dim)
            y0, y1, y2, y3 = y0 + x[0], y1 + x[1], y2 + x[2], y3 + x[3]
        norm = warp.reciprocal(weight)
        return y0 * norm, y1 * norm, y2 * norm, y3 * norm, top + warp.log2(weight)

    @macro
    def merge_some(
        emit: Any, merged: Any, partials: Any, partial_lse: Any, cta: Any, last: Any, column: Any, dim: Any
    ) -> Any:
        """Adds the results of CTAs cta .. cta + MERGED - 1, none past the last; all are loaded before any is used."""
        top, weight, *y = merged
        loaded = []
        for i in range(MERGED):
            slot = emit(warp.mad_i32, emit(warp.min_i32, emit(warp.add_i32, cta, i), last), 2 * COLUMNS, column)
            lse = emit(warp.load_shared_f32, emit(warp.mad_wide, partial_lse, slot, 4))
            address = emit(warp.mad_wide, emit(warp.mad_wide, partials, slot, 4 * head_dim), dim, 4)
            # The number of results that follow this one is negative past the last one.
            rest = emit(warp.mad_i32, emit(warp.add_i32, cta, i), -1, last)
            loaded.append((emit(warp.select, lse, MASKED, rest), emit(warp.load_shared_4_f32, address)))
        higher = functools.reduce(functools.partial(emit, warp.max_f32), [lse for lse, _ in loaded], top)
        factor = emit(warp.exp2, emit(warp.fma_f32, higher, -1.0, top))
        weight, y = emit(warp.mul_f32, weight, factor), [emit(warp.mul_f32, v, factor) for v in y]
        for lse, x in loaded:
            factor = emit(warp.exp2, emit(warp.fma_f32, higher, -1.0, lse))
            weight = emit(warp.add_f32, weight, factor)
            y = [emit(warp.fma_f32, u, factor, v) for u, v in zip(x, y)]
        return [higher, weight, *y]

    @inlined
    def merge_ctas(partials, partial_lse, first, last, column, dim):  # type: ignore[no-untyped-def]
        """Four dims of a column from the results of CTAs first .. last, which had a head unit together."""
        slot = warp.wide((2 * first + 1) * COLUMNS + column)
        x = warp.load_shared_4_f32(partials + 4 * (slot * head_dim + dim))
        merged = (warp.load_shared_f32(partial_lse + 4 * slot), f32(1.0), x[0], x[1], x[2], x[3])
        cta = i32(first + 1)
        while cta <= last:
            merged = merge_some(merged, partials, partial_lse, cta, last, column, dim)
            cta = i32(cta + MERGED)
        norm = warp.reciprocal(merged[1])
        return merged[2] * norm, merged[3] * norm, merged[4] * norm, merged[5] * norm

    def kernel(  # type: ignore[no-untyped-def]
        q,  # [num_rows * num_queries, num_kv_heads * group, head_dim]
        kv,  # K of block 0
        block_tables,  # int32 [num_rows, table_stride]
        seq_lens,  # int32 [num_rows]
        plan,  # int32 [num_rows + 1]: the places where rows start
        out,  # the shape of q
        partials,  # float32 [2 * num_ctas, COLUMNS, head_dim]: results of a CTA's first segment, and of its last
        partial_lse,  # float32 [2 * num_ctas, COLUMNS], base 2
        arrivals,  # int32 [num_rows, head units], all 0 before the launch and after it
        block_stride,  # bytes
        head_stride,  # bytes
        value_offset,  # bytes from K to V
        num_rows,
        num_kv_heads,
        group,  # number of query heads of a KV head
        num_queries,
        block_shift,  # log2 of the block size
        table_stride,
        scale,  # that of the scores, times log2(e)
    ):
        thread = warp.thread_index()
        lane, wid = thread & 31, i32(thread >> 5)
        g, t = lane >> 2, lane & 3
        cta = warp.cta_index()
        shared = shared_memory()
        columns = i32(group * num_queries)
        column_tiles = i32((columns + COLUMNS - 1) // COLUMNS)
        num_heads = i32(num_kv_heads * column_tiles)

        # ---- The units of this CTA: the first one, and the place where they end.
        total = warp.load_constant_i32(plan + 4 * warp.wide(num_rows))
        active = warp.min_i32(warp.num_ctas(), (total + MIN_PLACES - 1) // MIN_PLACES)
        place = end = i32(0)
        row = head = token = context = i32(0)
        if cta < active:
            place, end = warp.mul_div(cta, total, active), warp.mul_div(cta + 1, total, active)
            row = row_of(place, plan, num_rows, lane)
            context = warp.load_constant_i32(seq_lens + 4 * warp.wide(row))
            cost = i32((context + TILE - 1) // TILE + SEGMENT_COST)
            row_place = warp.load_constant_i32(plan + 4 * warp.wide(row))
            head = warp.div_u32(place - row_place, cost)
            head_place = i32(row_place + head * cost + SEGMENT_COST)
            place = warp.max_i32(place, head_place)
            token = i32((place - head_place) * TILE)

        # ---- The unit whose tiles are read, AHEAD units before the one that is computed.
        ring = i32(shared + wid * RING)
        lane_row, chunk = i32(lane // CHUNKS), i32((lane % CHUNKS) * 16)
        to_k = i32(lane_row * ROW + (chunk ^ ((lane_row & 1) << 6)))
        to_v = i32(V + lane_row * ROW + (chunk ^ ((lane_row & 6) << 4)))
        in_stage = ring
        in_place, in_row, in_head, in_token, in_context = place, row, head, token, context

        # ---- The arithmetic.
        stage = ring
        k_even = i32(g * ROW + 16 * t + 64 * (g & 1))
        k_odd = i32(g * ROW + 16 * t - 64 * (g & 1))
        v_lane = i32(V + 2 * t * ROW + ((g ^ (2 * t)) << 4))
        segment = token  # the first token of a segment, which is the part of one head unit that this CTA has
        kv_head = column0 = limit0 = limit1 = i32(0)
        query = load_query(q + 16 * t)
        sums = no_sums()
        max0 = max1 = f32(NO_SCORE)
        sum0 = sum1 = f32(0.0)
        lead = i32(AHEAD)
        while place < end:
            warp.sync_warp()  # all lanes have read the tile that is overwritten now
            if in_place < end:
                tile_token = i32(in_token + WARP_TILE * wid)
                if tile_token < in_context:
                    entry = block_tables + 4 * (warp.wide(in_row) * table_stride + (tile_token >> block_shift))
                    in_block = tile_token & ((1 << block_shift) - 1)
                    k = kv + warp.wide(warp.load_constant_i32(entry)) * block_stride
                    k = k + warp.div_u32(in_head, column_tiles) * head_stride + (in_block * ROW + chunk)
                    if tile_token + WARP_TILE > in_context - num_queries:  # others are older than the kernels in flight
                        warp.wait_for_predecessor()
                    last_row = warp.min_i32(in_context - 1 - tile_token, WARP_TILE - 1)
                    copy_tile(in_stage + to_k, in_stage + to_v, k, k + value_offset, lane_row, last_row)
                in_place, in_row, in_head, in_token, in_context = next_unit(
                    in_place, in_row, in_head, in_token, in_context, TILE, seq_lens, num_rows, num_heads
                )
                in_stage = i32(in_stage + STAGE)
                if in_stage == ring + RING:
                    in_stage = ring
            warp.copies_issued()
            if lead > 0:
                lead = i32(lead - 1)
                if lead == 0:
                    warp.wait_for_predecessor()
                    warp.let_successor_start()
            else:
                if token == segment:
                    kv_head = warp.div_u32(head, column_tiles)
                    column0 = i32((head - kv_head * column_tiles) * COLUMNS)
                    from_row = q_row(row, kv_head, column0 + g, num_kv_heads, group, num_queries)
                    query = load_query(q + from_row * ROW + 16 * t)
                    limit = i32(context - num_queries + 1)  # tokens that the first query sees
                    limit0 = i32(limit + query_of(column0 + 2 * t, columns, group))
                    limit1 = i32(limit + query_of(column0 + 2 * t + 1, columns, group))
                wait_for_tile()
                warp.sync_warp()  # all lanes' copies have arrived
                tile_token = i32(token + WARP_TILE * wid)
                if tile_token < context:
                    s = score(stage + k_even, stage + k_odd, query)
                    s0 = s[0] * scale  # token g, column 2t
                    s1 = s[1] * scale  # token g, column 2t + 1
                    s2 = s[2] * scale  # token g + 8
                    s3 = s[3] * scale
                    if tile_token + WARP_TILE > context - num_queries + 1:
                        s0 = warp.select(s0, f32(MASKED), limit0 - 1 - (tile_token + g))
                        s1 = warp.select(s1, f32(MASKED), limit1 - 1 - (tile_token + g))
                        s2 = warp.select(s2, f32(MASKED), limit0 - 9 - (tile_token + g))
                        s3 = warp.select(s3, f32(MASKED), limit1 - 9 - (tile_token + g))
                    new0 = warp.max_f32(max0, warp.group_max(warp.max_f32(s0, s2)))
                    new1 = warp.max_f32(max1, warp.group_max(warp.max_f32(s1, s3)))
                    decay0, decay1 = warp.exp2(max0 - new0), warp.exp2(max1 - new1)
                    max0, max1 = new0, new1
                    s0, s1 = warp.exp2(s0 - new0), warp.exp2(s1 - new1)
                    s2, s3 = warp.exp2(s2 - new0), warp.exp2(s3 - new1)
                    sum0, sum1 = sum0 * decay0 + (s0 + s2), sum1 * decay1 + (s1 + s3)  # of this lane's tokens
                    p_low, p_high = warp.transpose_8x8(pack(s0, s1)), warp.transpose_8x8(pack(s2, s3))
                    sums = accumulate(sums, stage + v_lane, decay0, decay1, p_low, p_high)
                stage = i32(stage + STAGE)
                if stage == ring + RING:
                    stage = ring

                if token + TILE >= context or place + 1 == end:  # the segment ends here
                    publish(shared, wid, lane, max0, max1, warp.group_sum(sum0), warp.group_sum(sum1), sums)
                    sums = no_sums()
                    max0 = max1 = f32(NO_SCORE)
                    sum0 = sum1 = f32(0.0)
                    warp.sync_cta()

                    alone = segment == 0 and token + TILE >= context
                    # A task is four dims of a column. An odd number of columns is rounded up, to fill whole warps.
                    tasks = i32((warp.min_i32(columns - column0, COLUMNS) + 1) // 2 * 2 * QUADS)
                    task = thread
                    while task < tasks:
                        column, dim = i32(task // QUADS), i32((task % QUADS) * 4)
                        y0, y1, y2, y3, lse = merge_warps(shared, column, dim)
                        if alone:
                            to = q_row(row, kv_head, column0 + column, num_kv_heads, group, num_queries)
                            warp.store_8_bytes(out + to * ROW + 2 * dim, pack(y0, y1), pack(y2, y3))
                        else:
                            slot = warp.wide((2 * cta + (segment == 0)) * COLUMNS + column)
                            warp.store_4_f32(partials + 4 * (slot * head_dim + dim), y0, y1, y2, y3)
                            warp.store_f32_if(partial_lse + 4 * slot, lse, dim == 0)
                        task = i32(task + 32 * num_warps)
                    warp.sync_cta()  # now shared memory may be written again, and all stores precede the count
                    if not alone:
                        tiles = i32((context + TILE - 1) // TILE)
                        head_place = i32(place - (token // TILE))
                        first_cta = owner(head_place, active, total)
                        last_cta = owner(head_place + tiles - 1, active, total)
                        arrived = arrivals + 4 * (warp.wide(row) * num_heads + head)
                        count = warp.count_arrival(arrived, thread == 0)
                        if warp.any_of_cta(count == last_cta - first_cta) != 0:
                            warp.store_i32_if(arrived, i32(0), thread == 0)
                            task = thread
                            while task < tasks:
                                column, dim = i32(task // QUADS), i32((task % QUADS) * 4)
                                y0, y1, y2, y3 = merge_ctas(partials, partial_lse, first_cta, last_cta, column, dim)
                                to = q_row(row, kv_head, column0 + column, num_kv_heads, group, num_queries)
                                warp.store_8_bytes(out + to * ROW + 2 * dim, pack(y0, y1), pack(y2, y3))
                                task = i32(task + 32 * num_warps)
                    segment = i32(0)
                place, row, head, token, context = next_unit(
                    place, row, head, token, context, TILE, seq_lens, num_rows, num_heads
                )
        warp.wait_for_predecessor()  # so that a kernel which waits for this one waits for those before it too

    return kernel


def plan_kernel(tile: int) -> Callable[..., None]:
    """One warp sums up the places where the rows start."""

    def kernel(seq_lens, plan, num_rows, num_heads):  # type: ignore[no-untyped-def]
        lane = warp.thread_index()
        warp.wait_for_predecessor()
        before = start = i32(0)
        warp.store_i32_if(plan, i32(0), lane == 0)
        while start < num_rows:
            row = i32(start + lane)
            context = warp.load_i32(seq_lens + 4 * warp.wide(warp.min_i32(row, num_rows - 1)))
            cost = i32((context + tile - 1) // tile + SEGMENT_COST) * num_heads
            until = i32(before + warp.prefix_sum(cost * (context > 0) * (row < num_rows)))
            warp.store_i32_if(plan + 4 * warp.wide(row + 1), until, row < num_rows)
            before = warp.lane_value(until, i32(31))
            start = i32(start + 32)

    return kernel


def decode_spec(head_dim: int, dtype: str, shared_limit: int) -> Spec:
    """The variant for a device whose CTAs may have `shared_limit` bytes of shared memory: Hopper 227 KiB, Ada 99.

    Four warps leave room for two CTAs on a multiprocessor of an H200. That is 2 to 9 % faster there than one CTA of
    eight warps, whose loads stop at the end of each segment.
    """
    for num_stages in (3, 2):
        stages = num_stages * 128 // head_dim
        layout = SharedLayout(head_dim, NUM_WARPS, stages)
        if layout.size <= shared_limit:
            break
    return Spec(decode_kernel, (head_dim, dtype, NUM_WARPS, stages), DECODE_ARGUMENTS, 32 * NUM_WARPS, layout.size)


def plan_spec(num_warps: int = NUM_WARPS) -> Spec:
    return Spec(plan_kernel, (num_warps * WARP_TILE,), "llrr", 32)


class PagedDecodeAttention:
    """Decode attention of one model on one device, with a workspace that serves one launch at a time, on one stream.

    `begin_step` comes before the first layer of a step, then each layer calls the object. Lengths, tables and
    addresses are read on the device, so that a step can be captured and replayed with other contents.
    """

    def __init__(
        self,
        max_rows: int,
        num_heads: int,
        layout: KVLayout,  # head_dim one of HEAD_DIMS; block_size a power of two, at least WARP_TILE
        dtype: torch.dtype,  # one of warp.NAMES
        device: torch.device,
        max_queries: int = 1,
    ) -> None:
        assert layout.block_size >= WARP_TILE and layout.block_size.bit_count() == 1
        properties = torch.cuda.get_device_properties(device)
        shared_limit: int = properties.shared_memory_per_block_optin  # type: ignore[attr-defined]
        index = torch.device(device).index or 0
        self._plan_kernel = kernel_of(plan_spec, index)
        self._kernel = kernel_of(decode_spec, index, layout.head_dim, warp.NAMES[dtype], shared_limit)
        shared_bytes = self._kernel.spec.shared_bytes + RESERVED_SHARED_BYTES
        ctas_per_sm = properties.shared_memory_per_multiprocessor // shared_bytes
        self._num_ctas = properties.multi_processor_count * ctas_per_sm
        self._num_kv_heads, self._group = layout.num_kv_heads, num_heads // layout.num_kv_heads
        self._block_shift = layout.block_size.bit_length() - 1
        empty = functools.partial(torch.empty, device=device)
        self._plan = empty(max_rows + 1, dtype=torch.int32)
        self._partials = empty(2 * self._num_ctas, COLUMNS, layout.head_dim, dtype=torch.float32)
        self._partial_lse = empty(2 * self._num_ctas, COLUMNS, dtype=torch.float32)
        self._arrivals = torch.zeros(max_rows, self._head_units(max_queries), dtype=torch.int32, device=device)

    def begin_step(self, seq_lens: Tensor, num_queries: int = 1) -> None:
        """Divides the step's work: seq_lens [num_rows] int32 are the tokens of each row, its queries included."""
        sizes = seq_lens.shape[0], self._head_units(num_queries)
        self._plan_kernel(1, seq_lens.data_ptr(), self._plan.data_ptr(), *sizes)

    def __call__(
        self,
        q: Tensor,  # [num_rows * num_queries, num_heads, head_dim]
        kv: Tensor,
        layer: int,
        spec: AttentionSpec,
        block_tables: Tensor,  # [num_rows, max_blocks] int32
        seq_lens: Tensor,  # [num_rows] int32; a row of length 0 is left as it is
        out: Tensor,  # the shape of q
        overlap: bool = False,
    ) -> None:
        """Computes one layer.

        With `overlap` it must not be the first launch after `begin_step`: the plan is read before the predecessor ends.
        """
        num_rows, layout = seq_lens.shape[0], spec.layout
        assert q.is_contiguous() and out.is_contiguous() and block_tables.stride(1) == 1
        first_key = kv.data_ptr() + layer * layout.layer_bytes
        inputs = q.data_ptr(), first_key, block_tables.data_ptr(), seq_lens.data_ptr(), self._plan.data_ptr()
        workspace = self._partials.data_ptr(), self._partial_lse.data_ptr(), self._arrivals.data_ptr()
        sizes = num_rows, self._num_kv_heads, self._group, q.shape[0] // num_rows
        tables = self._block_shift, block_tables.stride(0)
        scale = spec.scale * LOG2_E
        addresses = *inputs, out.data_ptr(), *workspace
        self._kernel(self._num_ctas, *addresses, *layout.strides, *sizes, *tables, scale, overlap=overlap)

    def _head_units(self, num_queries: int) -> int:
        return self._num_kv_heads * -(-self._group * num_queries // COLUMNS)

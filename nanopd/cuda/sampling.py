"""The next token of every row, drawn by temperature, min-p, top-k and top-p: one launch, no sort, no sync.

A token's likelihood is exp(logit / temperature) relative to the best token's: a float32 in [0, 1], whose bits, read as
an integer, are its *key*. Its weight is the likelihood in multiples of 2**-40, so that sums are exact in any order and
a row's token depends on nothing but the row. Thresholds are found by radix select: a histogram of the keys' upper bits,
then of the next bits within the bin that holds the threshold. All tokens as likely as the last one kept are kept.

One CTA takes a row and reads it several times, from L2 but for the first time. Logits are bfloat16, float16 or float32.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from numba.cuda.types import float32 as f32
from numba.cuda.types import int32 as i32
from numba.cuda.types import int64 as i64
from torch import Tensor

from nanopd.cuda import warp
from nanopd.cuda.launch import Spec, kernel_of
from nanopd.cuda.ptx import inlined, instruction, macro, shared_memory

THREADS = 1024  # 32 warps, so that a lane can stand for a warp; a histogram has as many bins
LEVEL_BITS = 10  # bits of a key that choose its bin in a histogram
BEST_KEY = 0x3F800000  # the key of 1.0
LEAST_KEY = BEST_KEY - (40 << 23)  # the key of 2**-40, the least likelihood that has a weight
KEY_BITS = 30
MINUS_INFINITY = -math.inf
# Offsets in shared memory, in bytes: the bins, int64 [THREADS], lie at 0.
TOTALS = 8 * THREADS  # the totals of the warps, int64 [32]
FOUND = TOTALS + 8 * 32  # int64 [3]: a bin, the amount in the bins before it, and the amount in it
MAXIMA = FOUND + 8 * 4  # the maxima of the warps, float32 [32]
SHARED_BYTES = MAXIMA + 4 * 32
ROW_BYTES = 32  # the parameters of a row

# The weight of the first key, or 0 where it is below the second: the mantissa of its float32 as a multiple of 2**-40.
weight_of = instruction(
    "{.reg .pred p; .reg .b32 x; .reg .b64 y; and.b32 x, $1, 0x7fffff; or.b32 x, x, 0x800000; cvt.u64.u32 y, x; "
    "shl.b64 y, y, 17; shr.u32 x, $1, 23; sub.u32 x, 127, x; shr.u64 y, y, x; setp.ge.s32 p, $1, $2; "
    "selp.b64 $0, y, 0, p;}",
    "l",
    "rr",
)


@inlined
def sums_of_warps(x, totals, thread):  # type: ignore[no-untyped-def]
    """The sum of x over the warp's lanes up to this one; in lane w the sum of warp w, and that of the warps up to w."""
    up_to_lane = warp.prefix_sum_i64(x)
    warp.store_i64_of_cta_if(totals + 8 * (thread >> 5), up_to_lane, thread & 31 == 31)
    warp.sync_cta()
    of_warp = warp.load_i64_of_cta(totals + 8 * (thread & 31))
    return up_to_lane, of_warp, warp.prefix_sum_i64(of_warp)


def sampling_kernel(dtype: str) -> Callable[..., None]:
    """One CTA takes a row. A chunk is 16 bytes of the row, and each warp has a run of chunks."""
    PER_CHUNK = 4 if dtype == "f32" else 8

    @macro
    def load(emit: Any, row: Any, chunk: Any, last: Any) -> list[Any]:
        """Loads a chunk; past the end of the row, the row's last one."""
        return emit(warp.load_16_bytes, emit(warp.mad_wide, row, emit(warp.min_i32, chunk, last), 16))

    @macro
    def largest(emit: Any, best: Any, registers: Any) -> Any:
        for x in warp.values_of(emit, dtype, registers):
            best = emit(warp.max_f32, best, x)
        return best

    @macro
    def keys_of(emit: Any, registers: Any, chunk: Any, end: Any, best: Any, scale: Any) -> list[Any]:
        """The keys of a chunk, all 0 from chunk `end` on. A logit that is NaN counts as the best token."""
        keys, offset = [], emit(warp.select, math.inf, best, emit(warp.sub_i32, chunk, end))
        for x in warp.values_of(emit, dtype, registers):
            likelihood = emit(warp.exp2, emit(warp.mul_f32, emit(warp.sub_f32, x, offset), scale))
            keys.append(emit(warp.bits_of_f32, emit(warp.min_f32, likelihood, 1.0)))
        return keys

    largest_key = macro(lambda emit, keys: functools.reduce(functools.partial(emit, warp.max_i32), keys))

    @macro
    def count(emit: Any, bins: Any, keys: Any, first: Any, span: Any, shift: Any, by_mass: Any) -> None:
        """Adds the keys from `first` down to `first - span + 1` to their bins, as a count or by their weights."""
        for key in keys:
            below = emit(warp.sub_i32, first, key)
            amount = emit(warp.select_i64, emit(weight_of, key, 0), 1, emit(warp.sub_i32, by_mass, 1))
            to = emit(warp.mad_i32, emit(warp.shift_right, below, shift), 8, bins)
            emit(warp.add_to_i64_of_cta_if, to, amount, emit(warp.is_below_u32, below, span))

    @macro
    def add_weights(emit: Any, total: Any, keys: Any, floor: Any) -> Any:
        for key in keys:
            total = emit(warp.add_i64, total, emit(weight_of, key, floor))
        return total

    @macro
    def index_at(emit: Any, keys: Any, floor: Any, target: Any) -> Any:
        """The first key at which the running sum of weights passes `target`."""
        index, total = 0, 0
        for key in keys:
            total = emit(warp.add_i64, total, emit(weight_of, key, floor))
            index = emit(warp.sub_i32, index, emit(warp.is_at_most_i64, total, target))
        return index

    def kernel(logits, params, tokens, num_chunks, vocab_size):  # type: ignore[no-untyped-def]
        """logits [num_rows, PER_CHUNK * num_chunks], params [num_rows] records as in `draw_tokens` -> tokens int64."""
        thread = warp.thread_index()
        lane, wid = thread & 31, i32(thread >> 5)
        bins = shared_memory()
        totals, found = i32(bins + TOTALS), i32(bins + FOUND)
        row = logits + warp.wide(warp.cta_index()) * num_chunks * 16
        param = params + warp.wide(warp.cta_index()) * ROW_BYTES
        last = i32(num_chunks - 1)
        part = i32((num_chunks + 31) >> 5)  # chunks of a warp
        begin = i32(wid * part)
        end = warp.min_i32(begin + part, num_chunks)
        warp.wait_for_predecessor()
        scale = warp.load_f32(param + 20)

        best = f32(MINUS_INFINITY)
        base = begin
        following = load(row, base + lane, last)  # a load is always under way while the one before is computed
        while base < end:
            registers = following
            following = load(row, base + 32 + lane, last)
            best = largest(best, registers)
            base = i32(base + 32)
        warp.store_f32_of_cta_if(bins + MAXIMA + 4 * wid, warp.warp_max(best), lane == 0)
        warp.sync_cta()
        best = warp.warp_max(warp.load_f32_of_cta(bins + MAXIMA + 4 * lane))

        floor = warp.max_i32(LEAST_KEY, warp.load_i32(param + 24))  # the least key that is kept
        by_mass = i32(0)
        while by_mass < 2:  # first top-k, which counts tokens, then top-p, by the mass of those left
            limit = warp.wide(warp.load_i32(param + 16))
            if by_mass == 1:
                limit = warp.load_i64(param + 8)
            if limit != 0:
                first = i32(BEST_KEY)  # the largest key of the first bin
                shift = i32(KEY_BITS)  # a bin has 2**shift keys
                wanted = i64(0)  # the amount that is wanted beside that of earlier bins
                inside = i64(-1)
                while shift > 0 and inside != wanted:
                    shift = i32(shift - LEVEL_BITS)
                    span = warp.min_i32(first - floor + 1, THREADS << shift)
                    warp.store_i64_of_cta(bins + 8 * thread, 0)
                    warp.sync_cta()
                    base = begin
                    following = load(row, base + lane, last)
                    while base < end:
                        registers = following
                        following = load(row, base + 32 + lane, last)
                        keys = keys_of(registers, base + lane, end, best, scale)
                        if warp.count_lanes(largest_key(keys) > first - span) > 0:
                            count(bins, keys, first, span, shift, by_mass)
                        base = i32(base + 32)
                    warp.sync_cta()
                    amount = warp.load_i64_of_cta(bins + 8 * thread)
                    up_to_lane, of_warp, through = sums_of_warps(amount, totals, thread)
                    before = up_to_lane - amount + warp.lane_value_i64(through - of_warp, wid)
                    if shift == KEY_BITS - LEVEL_BITS:
                        total = warp.lane_value_i64(through, 31)
                        wanted = min(limit, total)
                        if by_mass == 1:  # total * top_p, rounded up
                            wanted = warp.mul_high_u64(total, limit) + (total * limit != 0)
                    is_here = (before < wanted) & (before + amount >= wanted)
                    warp.store_i64_of_cta_if(found, thread, is_here)
                    warp.store_i64_of_cta_if(found + 8, before, is_here)
                    warp.store_i64_of_cta_if(found + 16, amount, is_here)
                    warp.sync_cta()
                    first = i32(first - (warp.load_i64_of_cta(found) << shift))
                    wanted = wanted - warp.load_i64_of_cta(found + 8)
                    inside = warp.load_i64_of_cta(found + 16)
                floor = warp.max_i32(floor, first - (1 << shift) + 1)
            by_mass = i32(by_mass + 1)

        # The token is where the cumulative weight, in the order of the vocabulary, passes the target. Each warp sums a
        # part of the chunks, and the part that has the target is divided in turn, until it is one chunk.
        start = i32(0)
        part = num_chunks
        target = i64(-1)
        while part > 1 or target < 0:
            end = warp.min_i32(start + part, num_chunks)
            part = i32((part + 31) >> 5)
            base = i32(start + wid * part)
            end = warp.min_i32(base + part, end)
            mass = i64(0)
            following = load(row, base + lane, last)
            while base < end:
                registers = following
                following = load(row, base + 32 + lane, last)
                keys = keys_of(registers, base + lane, end, best, scale)
                if warp.count_lanes(largest_key(keys) >= floor) > 0:
                    mass = add_weights(mass, keys, floor)
                base = i32(base + 32)
            up_to_lane, of_warp, through = sums_of_warps(mass, totals, thread)
            if target < 0:
                target = warp.mul_high_u64(warp.lane_value_i64(through, 31), warp.load_i64(param))
            hit = warp.count_lanes(through <= target)
            target = target - warp.lane_value_i64(through - of_warp, hit)
            start = i32(start + hit * part)
            warp.sync_cta()
        keys = keys_of(load(row, start, last), start, start + 1, best, scale)
        token = warp.min_i32(start * PER_CHUNK + index_at(keys, floor, target), vocab_size - 1)
        to = tokens + 8 * warp.wide(warp.cta_index())
        warp.store_i32_if(to, token, thread == 0)
        warp.store_i32_if(to + 4, 0, thread == 0)

    return kernel


def sampling_spec(dtype: str) -> Spec:
    return Spec(sampling_kernel, (dtype,), "lllrr", THREADS, SHARED_BYTES)


def draw_tokens(logits: Tensor, params: Tensor) -> Tensor:
    """A token for each row, [num_rows] int64.

    logits [num_rows, vocab_size], bfloat16, float16 or float32, contiguous; params [num_rows * 4] int64, a record of 32
    bytes for each row: a random number and top-p (0: off), both uint64 in multiples of 2**-64; top-k (0: off), int32;
    log2(e) / temperature and min-p, float32.
    """
    num_rows, vocab_size = logits.shape
    logits, num_chunks = in_chunks(logits)
    tokens = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    if num_rows:
        addresses = logits.data_ptr(), params.data_ptr(), tokens.data_ptr()
        kernel = kernel_of(sampling_spec, logits.get_device(), warp.NAMES_OF_LOGITS[logits.dtype])
        kernel(num_rows, *addresses, num_chunks, vocab_size)
    return tokens


def in_chunks(logits: Tensor) -> tuple[Tensor, int]:
    """Logits [num_rows, vocab_size], filled with -inf to whole chunks of 16 bytes; the number of chunks of a row."""
    assert logits.is_contiguous()
    per_chunk = 16 // logits.element_size()
    rest = -logits.shape[1] % per_chunk
    logits = F.pad(logits, (0, rest), value=-math.inf) if rest else logits
    return logits, logits.shape[1] // per_chunk

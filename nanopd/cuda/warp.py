"""The instructions that kernels call and macros emit; in UPPER case, tables of them by the type of the elements.

Fragment layouts are those of the PTX manual for m16n8k16: lane = 4 * g + t holds, of A [16, 16], the pairs of columns
2t and 2t + 8 of rows g and g + 8; of B [16, 8] the pairs of rows 2t and 2t + 8 of column g; of the accumulator
[16, 8] columns 2t and 2t + 1 of rows g and g + 8.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial, reduce
from typing import Any

import torch

from nanopd.cuda.ptx import instruction, macro

NAMES = {torch.bfloat16: "bf16", torch.float16: "f16"}  # the types of activations as PTX names them
NAMES_OF_LOGITS = {**NAMES, torch.float32: "f32"}

access = partial(instruction, effect=True)  # accesses to memory stay in the order of the kernel
collective = partial(instruction, effect=True, warp=True)

# ---- The place of a lane.
thread_index = instruction("mov.u32 $0, %tid.x;", "r")
cta_index = instruction("mov.u32 $0, %ctaid.x;", "r")
num_ctas = instruction("mov.u32 $0, %nctaid.x;", "r")

# ---- Integers of 32 bits. Python's operators would give 64 bits and guard against division by zero.
add_i32 = instruction("add.s32 $0, $1, $2;", "r", "rr")
min_i32 = instruction("min.s32 $0, $1, $2;", "r", "rr")
sub_i32 = instruction("sub.s32 $0, $1, $2;", "r", "rr")
max_i32 = instruction("max.s32 $0, $1, $2;", "r", "rr")
shift_right = instruction("shr.u32 $0, $1, $2;", "r", "rr")
is_below_u32 = instruction("set.lt.u32.u32 $0, $1, $2;", "r", "rr")  # -1 or 0
mad_i32 = instruction("mad.lo.s32 $0, $1, $2, $3;", "r", "rrr")
xor_b32 = instruction("xor.b32 $0, $1, $2;", "r", "rr")
# Computes a + int64(b) * c.
mad_wide = instruction("mad.wide.s32 $0, $2, $3, $1;", "l", "lrr")
permute_low = instruction("prmt.b32 $0, $1, $2, 0x5410;", "r", "rr")  # the low halves of two registers
permute_high = instruction("prmt.b32 $0, $1, $2, 0x7632;", "r", "rr")  # the high halves of two registers
div_u32 = instruction("div.u32 $0, $1, $2;", "r", "rr")
wide = instruction("cvt.s64.s32 $0, $1;", "l", "r")  # to 64 bits
# Computes x * y // z, of numbers that are not negative, with 64 bits in between.
mul_div = instruction(
    "{.reg .b64 a, b; mul.wide.u32 a, $1, $2; cvt.u64.u32 b, $3; div.u64 a, a, b; cvt.u32.u64 $0, a;}", "r", "rrr"
)

# ---- Integers of 64 bits.
add_i64 = instruction("add.s64 $0, $1, $2;", "l", "ll")
select_i64 = instruction("slct.b64.s32 $0, $1, $2, $3;", "l", "llr")  # c >= 0 ? a : b
is_at_most_i64 = instruction("set.le.s32.s64 $0, $1, $2;", "r", "ll")  # -1 or 0
mul_high_u64 = instruction("mul.hi.u64 $0, $1, $2;", "l", "ll")  # the upper half of the product

# ---- Numbers of type float32.
add_f32 = instruction("add.f32 $0, $1, $2;", "f", "ff")
mul_f32 = instruction("mul.f32 $0, $1, $2;", "f", "ff")
fma_f32 = instruction("fma.rn.f32 $0, $1, $2, $3;", "f", "fff")
sub_f32 = instruction("sub.f32 $0, $1, $2;", "f", "ff")
min_f32 = instruction("min.f32 $0, $1, $2;", "f", "ff")
max_f32 = instruction("max.f32 $0, $1, $2;", "f", "ff")
exp2 = instruction("ex2.approx.ftz.f32 $0, $1;", "f", "f")
reciprocal = instruction("rcp.approx.ftz.f32 $0, $1;", "f", "f")
rsqrt = instruction("rsqrt.approx.ftz.f32 $0, $1;", "f", "f")
f32_of_i32 = instruction("cvt.rn.f32.s32 $0, $1;", "f", "r")
# Chooses a where the number is >= 0, else b. A choice in each lane is no branch.
select = instruction("slct.f32.s32 $0, $1, $2, $3;", "f", "ffr")
bits_of_f32 = instruction("mov.b32 $0, $1;", "r", "f")
f32_of_bits = instruction("mov.b32 $0, $1;", "f", "r")
log2 = instruction("lg2.approx.ftz.f32 $0, $1;", "f", "f")

# ---- Types of 16 bits. A register holds two elements, the first in its low half.
PACK = {dtype: instruction(f"cvt.rn.{dtype}x2.f32 $0, $2, $1;", "r", "ff") for dtype in NAMES.values()}
UNPACK = {
    # A bf16 is the upper half of the float32 of the same value.
    "bf16": instruction("{shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;}", "ff", "r"),
    "f16": instruction("{.reg .b16 x, y; mov.b32 {x, y}, $2; cvt.f32.f16 $0, x; cvt.f32.f16 $1, y;}", "ff", "r"),
}
# Computes two products, each rounded. Ada has no mul of bf16, and x * y + -0 is x * y.
MUL_PAIR = {
    "bf16": instruction("{.reg .b32 z; mov.b32 z, 0x80008000; fma.rn.bf16x2 $0, $1, $2, z;}", "r", "rr"),
    "f16": instruction("mul.rn.f16x2 $0, $1, $2;", "r", "rr"),
}
MMA = {
    dtype: instruction(
        f"mma.sync.aligned.m16n8k16.row.col.f32.{dtype}.{dtype}.f32 "
        "{$0,$1,$2,$3}, {$4,$5,$6,$7}, {$8,$9}, {$10,$11,$12,$13};",
        "ffff",
        "rrrrrrffff",
        warp=True,
    )
    for dtype in NAMES.values()
}

# ---- Global memory.
# These load data that no earlier kernel in the stream wrote: weights, and tables copied from the host. Fetching 128
# bytes at a time from memory to L2 is 6 % faster on an H200 than 256 bytes, and 16 % faster than no hint. `access`
# keeps the order of the loads.
load_weights = access("ld.global.nc.L1::no_allocate.L2::128B.v4.b32 {$0,$1,$2,$3}, [$4];", "rrrr", "l")
load_constant_i32 = instruction("ld.global.nc.b32 $0, [$1];", "r", "l")
# These load data that kernels write.
load_16_bytes = access("ld.global.v4.b32 {$0,$1,$2,$3}, [$4];", "rrrr", "l")
load_x = access("ld.global.L1::evict_last.v4.b32 {$0,$1,$2,$3}, [$4];", "rrrr", "l")  # x is read again
load_i32 = access("ld.global.b32 $0, [$1];", "r", "l")
load_i64 = access("ld.global.b64 $0, [$1];", "l", "l")
load_f32 = access("ld.global.f32 $0, [$1];", "f", "l")
# These pass L1 by, which does not see what other CTAs write.
load_shared_f32 = access("ld.global.cg.f32 $0, [$1];", "f", "l")
load_shared_4_f32 = access("ld.global.cg.v4.f32 {$0,$1,$2,$3}, [$4];", "ffff", "l")
store_i32 = access("st.global.b32 [$0], $1;", "", "lr")
store_i32_if = access("st.global.b32 [$0], $1;", "", "lrr", predicated=True)
store_f32_if = access("st.global.f32 [$0], $1;", "", "lfr", predicated=True)
store_8_bytes = access("st.global.v2.b32 [$0], {$1,$2};", "", "lrr")
store_16_bytes = access("st.global.v4.b32 [$0], {$1,$2,$3,$4};", "", "lrrrr")
store_4_f32 = access("st.global.v4.f32 [$0], {$1,$2,$3,$4};", "", "lffff")
# The count before this arrival; -1 in lanes that do not take part. A CTA that counts later sees what this one wrote.
count_arrival = access("atom.acq_rel.gpu.global.add.s32 $0, [$1], 1;", "r", "lr", predicated=True)

# ---- Shared memory.
load_tile = access("ld.shared.v4.b32 {$0,$1,$2,$3}, [$4];", "rrrr", "r")
load_4_f32_of_cta = access("ld.shared.v4.f32 {$0,$1,$2,$3}, [$4];", "ffff", "r")
load_f32_of_cta = access("ld.shared.f32 $0, [$1];", "f", "r")
store_f32_of_cta = access("st.shared.f32 [$0], $1;", "", "rf")
store_f32_of_cta_if = access("st.shared.f32 [$0], $1;", "", "rfr", predicated=True)
load_i64_of_cta = access("ld.shared.b64 $0, [$1];", "l", "r")
store_i64_of_cta = access("st.shared.b64 [$0], $1;", "", "rl")
store_i64_of_cta_if = access("st.shared.b64 [$0], $1;", "", "rlr", predicated=True)
# Adds atomically where the third operand is not 0. It adds two words, as 64 bits at once are a compare-and-swap loop.
add_to_i64_of_cta_if = access(
    "{.reg .pred p, q; .reg .b32 low, high, old, next; mov.b64 {low, high}, $1; setp.ne.s32 p, $2, 0; mov.b32 old, 0; "
    "@p atom.shared.add.u32 old, [$0], low; add.cc.u32 old, old, low; addc.u32 high, high, 0; add.u32 next, $0, 4; "
    "setp.ne.and.u32 q, high, 0, p; @q red.shared.add.u32 [next], high;}",
    "",
    "rlr",
)
# Copies 16 bytes from global to shared memory without passing through registers.
copy_async = access("cp.async.cg.shared.global [$0], [$1], 16;", "", "rl")
copies_issued = access("cp.async.commit_group;")


def wait_for_copies(newer: int) -> Any:
    """Waits until all groups of this lane's copies but the `newer` last ones have arrived."""
    return access(f"cp.async.wait_group {newer};")


# ---- Lanes and threads together.
shuffle_xor = collective("shfl.sync.bfly.b32 $0, $1, $2, 0x1f, 0xffffffff;", "f", "fr")
# Computes x plus the x of the lane that many below, if there is such a lane.
add_shuffled_up = collective(
    "{.reg .pred p; .reg .b32 y; shfl.sync.up.b32 y|p, $1, $2, 0x0, 0xffffffff; mov.b32 $0, $1; @p add.s32 $0, $0, y;}",
    "r",
    "rr",
)
add_shuffled_up_i64 = collective(
    "{.reg .pred p; .reg .b32 low, high; .reg .b64 y; mov.b64 {low, high}, $1; "
    "shfl.sync.up.b32 low|p, low, $2, 0x0, 0xffffffff; shfl.sync.up.b32 high, high, $2, 0x0, 0xffffffff; "
    "mov.b64 y, {low, high}; mov.b64 $0, $1; @p add.s64 $0, $0, y;}",
    "l",
    "lr",
)
lane_value = collective("shfl.sync.idx.b32 $0, $1, $2, 0x1f, 0xffffffff;", "r", "rr")
# Transposes a matrix of 16-bit elements, of which lane 4g + t has (g, 2t) and (g, 2t + 1).
transpose_8x8 = instruction("movmatrix.sync.aligned.m8n8.trans.b16 $0, $1;", "r", "r", warp=True)
lane_value_i64 = collective(
    "{.reg .b32 low, high; mov.b64 {low, high}, $1; shfl.sync.idx.b32 low, low, $2, 0x1f, 0xffffffff; "
    "shfl.sync.idx.b32 high, high, $2, 0x1f, 0xffffffff; mov.b64 $0, {low, high};}",
    "l",
    "lr",
)
count_lanes = collective(
    "{.reg .pred p; .reg .b32 x; setp.ne.s32 p, $1, 0; vote.sync.ballot.b32 x, p, 0xffffffff; popc.b32 $0, x;}",
    "r",
    "r",
)
sync_warp = collective("bar.warp.sync 0xffffffff;")
sync_cta = collective("bar.sync 0;")
# Gives 1 if any thread of the CTA passes a number other than 0. It is a barrier too.
any_of_cta = collective(
    "{.reg .pred p, q; setp.ne.s32 p, $1, 0; bar.red.or.pred q, 0, p; selp.s32 $0, 1, 0, q;}", "r", "r"
)

# ---- Programmatic dependent launch. Both of these do nothing in a kernel that is launched without it.
# Waits for the kernels before this one. Earlier, nothing that they wrote may be read, and nothing may be written.
wait_for_predecessor = access("griddepcontrol.wait;")
# Lets the next kernel start as soon as there is room. It belongs after the wait: what the next kernel reads before its
# own wait may then come from any kernel but this one.
let_successor_start = access("griddepcontrol.launch_dependents;")


def combine(emit: Any, x: Any, operation: Any, distances: Sequence[int]) -> Any:
    """For macros: the x of lanes at these distances from each other, combined in this order."""
    for distance in distances:
        x = emit(operation, x, emit(shuffle_xor, x, distance))
    return x


def add_lanes(emit: Any, x: Any, num_lanes: int) -> Any:
    """For macros: the sum over `num_lanes` neighbouring lanes, a power of two."""
    return combine(emit, x, add_f32, [num_lanes >> i for i in range(1, num_lanes.bit_length())])


GROUP = (4, 8, 16)  # distances between the 8 lanes with the same t
warp_sum = macro(lambda emit, x: add_lanes(emit, x, 32))
warp_max = macro(lambda emit, x: combine(emit, x, max_f32, (16, 8, 4, 2, 1)))
group_sum = macro(lambda emit, x: combine(emit, x, add_f32, GROUP))
group_max = macro(lambda emit, x: combine(emit, x, max_f32, GROUP))
# The sum over the lanes up to and including this one.
prefix_sum = macro(lambda emit, x: reduce(partial(emit, add_shuffled_up), (1, 2, 4, 8, 16), x))
prefix_sum_i64 = macro(lambda emit, x: reduce(partial(emit, add_shuffled_up_i64), (1, 2, 4, 8, 16), x))


def zeros(count: int) -> Any:
    """A function that returns `count` float32 registers of 0."""
    return macro(lambda _emit: [0.0] * count)


def values_of(emit: Any, dtype: str, registers: Sequence[Any]) -> list[Any]:
    """For macros: the elements of registers as float32; dtype is a value of NAMES_OF_LOGITS."""
    if dtype == "f32":
        return [emit(f32_of_bits, register) for register in registers]
    return [x for register in registers for x in emit(UNPACK[dtype], register)]

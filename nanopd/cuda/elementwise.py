"""What lies between the matrix products: RMS norm, SiLU-and-multiply, rotary embedding with the KV store.

All compute in float32 and round once. Tensors are contiguous, rows are multiples of 16 bytes, and the types are
bfloat16 and float16; anything else is computed by torch. With `overlap` a kernel may start while its predecessor, one
of this package, still runs.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from numba.cuda.types import float32 as f32
from numba.cuda.types import int32 as i32
from torch import Tensor

from nanopd.cuda import warp
from nanopd.cuda.launch import Kernel, Spec, kernel_for
from nanopd.cuda.ptx import macro, shared_memory

THREADS = 256
NUM_WARPS = THREADS // 32
LOG2_E = 1.4426950408889634
HEAD_DIMS = (64, 128)
MANY_TOKENS = 512
NORM_ARGUMENTS = "lllrf"
SILU_ARGUMENTS = "llrr"
ROTARY_ARGUMENTS = "llllllll" + "lll" + "rrrrr" + "f"


def norm_kernel(dtype: str) -> Callable[..., None]:
    """One CTA per row: out = weight * x / rms(x)."""
    SQUARE, SCALE = eight_at_a_time(dtype)

    def kernel(  # type: ignore[no-untyped-def]
        x,  # [num_rows, hidden]
        weight,  # [hidden]
        out,  # [num_rows, hidden]
        num_chunks,  # of 8 elements, in a row
        eps,
    ):
        thread = warp.thread_index()
        shared = shared_memory()
        row = warp.wide(warp.cta_index()) * num_chunks * 16
        warp.wait_for_predecessor()
        warp.let_successor_start()
        squares = f32(0.0)
        chunk = thread
        while chunk < num_chunks:
            squares = SQUARE(squares, warp.load_16_bytes(x + row + 16 * chunk))
            chunk = i32(chunk + THREADS)
        warp.store_f32_of_cta_if(shared + 4 * (thread >> 5), warp.warp_sum(squares), thread & 31 == 0)
        warp.sync_cta()
        squares = f32(0.0)
        for w in range(NUM_WARPS):
            squares = squares + warp.load_f32_of_cta(shared + 4 * w)
        factor = warp.rsqrt(squares / f32(8 * num_chunks) + eps)
        chunk = thread
        while chunk < num_chunks:
            at = row + 16 * chunk
            values = SCALE(warp.load_16_bytes(x + at), warp.load_16_bytes(weight + 16 * chunk), factor)
            warp.store_16_bytes(out + at, values[0], values[1], values[2], values[3])
            chunk = i32(chunk + THREADS)

    return kernel


def eight_at_a_time(dtype: str) -> tuple[Any, Any]:
    """Functions of 8 elements in four registers: the sum of squares added to a total; a * weights * factor."""
    PACK, UNPACK = warp.PACK[dtype], warp.UNPACK[dtype]

    @macro
    def square(emit: Any, total: Any, a: Any) -> Any:
        for value in [x for register in a for x in emit(UNPACK, register)]:
            total = emit(warp.FMA_F32, value, value, total)
        return total

    @macro
    def scale(emit: Any, a: Any, weights: Any, factor: Any) -> list[Any]:
        out = []
        for register, weight in zip(a, weights):
            pairs = zip(emit(UNPACK, register), emit(UNPACK, weight))
            out.append(emit(PACK, *[emit(warp.MUL_F32, emit(warp.MUL_F32, x, factor), w) for x, w in pairs]))
        return out

    return square, scale


def silu_kernel(dtype: str) -> Callable[..., None]:
    """8 elements a thread."""
    PACK, UNPACK = warp.PACK[dtype], warp.UNPACK[dtype]

    @macro
    def silu_times(emit: Any, gate: Any, up: Any) -> list[Any]:
        out = []
        for g, u in zip(gate, up):
            products = []
            for x, y in zip(emit(UNPACK, g), emit(UNPACK, u)):
                grown = emit(warp.EXP2, emit(warp.MUL_F32, x, -LOG2_E))
                sigmoid = emit(warp.RECIPROCAL, emit(warp.ADD_F32, grown, 1.0))
                products.append(emit(warp.MUL_F32, emit(warp.MUL_F32, x, sigmoid), y))
            out.append(emit(PACK, *products))
        return out

    def kernel(gate_up, out, num_rows, num_chunks):  # type: ignore[no-untyped-def]
        """gate_up [num_rows, 2, 8 * num_chunks] -> out [num_rows, 8 * num_chunks]."""
        item = i32(warp.cta_index() * THREADS + warp.thread_index())
        row = warp.div_u32(item, num_chunks)
        chunk = i32(item - row * num_chunks)
        warp.wait_for_predecessor()
        warp.let_successor_start()
        if row < num_rows:
            gate = gate_up + 16 * (warp.wide(row) * 2 * num_chunks + chunk)
            y = silu_times(warp.load_16_bytes(gate), warp.load_16_bytes(gate + 16 * warp.wide(num_chunks)))
            warp.store_16_bytes(out + 16 * warp.wide(item), y[0], y[1], y[2], y[3])

    return kernel


def rotary_kernel(head_dim: int, dtype: str) -> Callable[..., None]:
    """A lane has two elements of a head's first half and the two that are rotated with them, of the second half.

    A warp takes some heads of one token, or of two neighbouring tokens where a head fills half a warp.
    """
    LANES = head_dim // 4
    TOKENS = 32 // LANES
    HALF = head_dim  # bytes of half a head
    PACK, UNPACK = warp.PACK[dtype], warp.UNPACK[dtype]
    pack, unpack = warp.function(PACK), warp.function(UNPACK)

    @macro
    def head_sum(emit: Any, x: Any) -> Any:
        return warp.add_lanes(emit, x, LANES)

    def kernel(  # type: ignore[no-untyped-def]
        qkv,  # [num_tokens, num_heads + 2 * num_kv_heads, head_dim]
        positions,  # int64 [num_tokens]
        slots,  # int64 [num_tokens]
        cos_sin,  # float32 [max_positions, head_dim]: cosines, then sines
        kv,  # K of block 0
        q_norm,  # [head_dim] or address 0
        k_norm,  # likewise
        q_out,  # [num_tokens, num_heads, head_dim]
        block_stride,  # bytes, here and below
        head_stride,
        value_offset,
        num_tokens,
        num_heads,
        num_kv_heads,
        block_size,
        heads_per_warp,
        eps,
    ):
        thread = warp.thread_index()
        lane = thread & 31
        heads = i32(num_heads + 2 * num_kv_heads)
        parts = i32((heads + heads_per_warp - 1) // heads_per_warp)
        item = i32(warp.cta_index() * NUM_WARPS + (thread >> 5))
        first = warp.div_u32(item, parts)
        head = i32((item - first * parts) * heads_per_warp)
        end = warp.min_i32(head + heads_per_warp, heads)
        token = warp.min_i32(first * TOKENS + lane // LANES, num_tokens - 1)
        pair = i32(lane % LANES)  # of elements 2 * pair and 2 * pair + 1
        # the low words of int64, which are the whole of them
        position = warp.load_i32(positions + 8 * warp.wide(token))
        slot = warp.load_i32(slots + 8 * warp.wide(token))
        angles = cos_sin + 4 * (warp.wide(position) * head_dim + 2 * pair)
        cos0 = warp.load_f32(angles)
        cos1 = warp.load_f32(angles + 4)
        sin0 = warp.load_f32(angles + 2 * head_dim)
        sin1 = warp.load_f32(angles + 2 * head_dim + 4)
        block = warp.div_u32(slot, block_size)
        to_k = kv + warp.wide(block) * block_stride + 2 * (slot - block * block_size) * head_dim
        warp.let_successor_start()  # so early, as attention reads nothing of the predecessor before its own wait
        warp.wait_for_predecessor()
        if first * TOKENS >= num_tokens:
            end = head
        source = qkv + 2 * (warp.wide(token) * heads + head) * head_dim + 4 * pair
        next_low = warp.load_i32(source)
        next_high = warp.load_i32(source + HALF)
        while head < end:
            low = next_low
            high = next_high
            source = source + 2 * head_dim * (head + 1 < end)  # the next head is read while this one is computed
            next_low = warp.load_i32(source)
            next_high = warp.load_i32(source + HALF)
            kv_head = i32(head - num_heads)  # of K, then of V
            if kv_head < num_kv_heads:
                x0, x1 = unpack(low)
                y0, y1 = unpack(high)
                norm = q_norm
                if kv_head >= 0:
                    norm = k_norm
                if norm != 0:
                    squares = head_sum(x0 * x0 + x1 * x1 + (y0 * y0 + y1 * y1))
                    factor = warp.rsqrt(squares / f32(head_dim) + eps)
                    w0, w1 = unpack(warp.load_i32(norm + 4 * pair))
                    x0 = x0 * factor * w0
                    x1 = x1 * factor * w1
                    w0, w1 = unpack(warp.load_i32(norm + HALF + 4 * pair))
                    y0 = y0 * factor * w0
                    y1 = y1 * factor * w1
                low = pack(x0 * cos0 - y0 * sin0, x1 * cos1 - y1 * sin1)
                high = pack(y0 * cos0 + x0 * sin0, y1 * cos1 + x1 * sin1)
            if kv_head < 0:
                to = q_out + 2 * (warp.wide(token) * num_heads + head) * head_dim
            elif kv_head < num_kv_heads:
                to = to_k + kv_head * head_stride
            else:
                to = to_k + value_offset + (kv_head - num_kv_heads) * head_stride
            warp.store_i32(to + 4 * pair, low)
            warp.store_i32(to + 4 * pair + HALF, high)
            head = i32(head + 1)

    return kernel


def norm_spec(dtype: str) -> Spec:
    return Spec(norm_kernel, (dtype,), NORM_ARGUMENTS, THREADS, 4 * NUM_WARPS)


def silu_spec(dtype: str) -> Spec:
    return Spec(silu_kernel, (dtype,), SILU_ARGUMENTS, THREADS)


def rotary_spec(head_dim: int, dtype: str) -> Spec:
    return Spec(rotary_kernel, (head_dim, dtype), ROTARY_ARGUMENTS, THREADS)


def rms_norm(x: Tensor, weight: Tensor, eps: float, overlap: bool = False) -> Tensor:
    """x [T, hidden], weight [hidden] -> weight * x / sqrt(mean(x**2) + eps)."""
    if x.dtype not in warp.NAMES or x.shape[1] % 8:
        return torch.nn.functional.rms_norm(x.float(), weight.shape, weight.float(), eps).to(x.dtype)
    out = torch.empty_like(x)
    if x.shape[0]:
        kernel, addresses = _kernel(norm_spec, x.dtype, x.get_device()), (x.data_ptr(), weight.data_ptr())
        kernel(x.shape[0], *addresses, out.data_ptr(), x.shape[1] // 8, eps, overlap=overlap)
    return out


def silu_and_mul(gate_up: Tensor, overlap: bool = False) -> Tensor:
    """gate_up [T, 2 * size] -> silu(gate_up[:, :size]) * gate_up[:, size:]."""
    num_rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    if gate_up.dtype not in warp.NAMES or size % 8:
        gate, up = gate_up.float().chunk(2, dim=1)
        return (torch.nn.functional.silu(gate) * up).to(gate_up.dtype)
    out = gate_up.new_empty(num_rows, size)
    if num_rows:
        kernel = _kernel(silu_spec, gate_up.dtype, gate_up.get_device())
        num_ctas = -(-num_rows * size // (8 * THREADS))
        kernel(num_ctas, gate_up.data_ptr(), out.data_ptr(), num_rows, size // 8, overlap=overlap)
    return out


def rotary_and_store(
    qkv: Tensor,  # [T, (num_heads + 2 * num_kv_heads) * head_dim]
    positions: Tensor,  # [T] int64
    slot_mapping: Tensor,  # [T] int64
    cos_sin: Tensor,  # [max_positions, head_dim] float32: cosines of the head_dim / 2 frequencies, then sines
    kv: Tensor,  # KV storage
    layer: int,
    q_norm: Tensor | None = None,  # [head_dim], RMS norm of each query head before rotation
    k_norm: Tensor | None = None,  # [head_dim]
    eps: float = 1e-6,
    overlap: bool = False,
) -> Tensor:
    """Rotates Q and K (Su et al., RoFormer, arXiv:2104.09864; halves as in Llama), stores K and V in their slots.

    Returns Q [T, num_heads, head_dim]. With `overlap`, positions must be older than the predecessor.
    """
    num_kv_heads, block_size, head_dim = kv.shape[3:]
    num_heads = qkv.shape[1] // head_dim - 2 * num_kv_heads
    if qkv.dtype not in warp.NAMES or head_dim not in HEAD_DIMS:
        return _rotary_and_store_in_torch(qkv, positions, slot_mapping, cos_sin, kv, layer, q_norm, k_norm, eps)
    q = qkv.new_empty(qkv.shape[0], num_heads, head_dim)
    size = kv.element_size()
    # few tokens: a warp for each head; many: angles and slots are read once for several heads
    heads_per_warp = 1 if qkv.shape[0] < MANY_TOKENS else 8
    num_warps = math.ceil((num_heads + 2 * num_kv_heads) / heads_per_warp) * math.ceil(qkv.shape[0] * head_dim / 128)
    if qkv.shape[0]:
        _rotary(head_dim, qkv.dtype, qkv.get_device())(
            math.ceil(num_warps / NUM_WARPS),
            qkv.data_ptr(),
            positions.data_ptr(),
            slot_mapping.data_ptr(),
            cos_sin.data_ptr(),
            kv.data_ptr() + layer * kv.stride(1) * size,
            0 if q_norm is None else q_norm.data_ptr(),
            0 if k_norm is None else k_norm.data_ptr(),
            q.data_ptr(),
            kv.stride(0) * size,
            kv.stride(3) * size,
            kv.stride(2) * size,
            qkv.shape[0],
            num_heads,
            num_kv_heads,
            block_size,
            heads_per_warp,
            eps,
            overlap=overlap,
        )
    return q


def _rotary_and_store_in_torch(
    qkv: Tensor,
    positions: Tensor,
    slot_mapping: Tensor,
    cos_sin: Tensor,
    kv: Tensor,
    layer: int,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
) -> Tensor:
    """The same for other head sizes and types."""
    num_kv_heads, block_size, head_dim = kv.shape[3:]
    num_heads = qkv.shape[1] // head_dim - 2 * num_kv_heads
    heads = qkv.view(qkv.shape[0], -1, head_dim).split((num_heads, num_kv_heads, num_kv_heads), dim=1)
    cos, sin = cos_sin.index_select(0, positions).unsqueeze(1).chunk(2, dim=2)
    rotated = []
    for x, norm in ((heads[0], q_norm), (heads[1], k_norm)):
        x = x.float()
        if norm is not None:
            x = torch.nn.functional.rms_norm(x, norm.shape, norm.float(), eps)
        first, second = x.chunk(2, dim=2)
        rotated.append(torch.cat((first * cos - second * sin, second * cos + first * sin), dim=2).to(qkv.dtype))
    blocks, offsets = slot_mapping // block_size, slot_mapping % block_size
    layer_kv = kv[:, layer]
    layer_kv[blocks, 0, :, offsets] = rotated[1]
    layer_kv[blocks, 1, :, offsets] = heads[2]
    return rotated[0]


@functools.cache
def _kernel(spec: Callable[[str], Spec], dtype: torch.dtype, device: int) -> Kernel:
    return kernel_for(spec(warp.NAMES[dtype]), device)


@functools.cache
def _rotary(head_dim: int, dtype: torch.dtype, device: int) -> Kernel:
    return kernel_for(rotary_spec(head_dim, warp.NAMES[dtype]), device)

"""The kernels between the matrix products: RMS norm, SiLU-and-multiply, rotary embedding with the KV store.

All of them compute in float32 and round once. Tensors are contiguous, rows are multiples of 16 bytes, and the types are
bfloat16 and float16. With `overlap` a kernel may start while its predecessor, one of this package, still runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from numba.cuda.types import float32 as f32
from numba.cuda.types import int32 as i32
from torch import Tensor

from nanopd.cuda import warp
from nanopd.cuda.launch import Kernel, Spec, address_of, kernel_of
from nanopd.cuda.ptx import macro, shared_memory
from nanopd.models.operations import AttentionSpec

THREADS = 256
NUM_WARPS = THREADS // 32
LOG2_E = 1.4426950408889634
HEAD_DIMS = (64, 128)
MANY_TOKENS = 512


def norm_kernel(dtype: str) -> Callable[..., None]:
    """One CTA per row: out = weight * x / rms(x)."""
    square, scale = eight_at_a_time(dtype)

    def kernel(x, weight, out, num_chunks, eps):  # type: ignore[no-untyped-def]
        """x [num_rows, 8 * num_chunks], weight [8 * num_chunks] -> out, the shape of x."""
        thread = warp.thread_index()
        shared = shared_memory()
        row = warp.wide(warp.cta_index()) * num_chunks * 16
        warp.wait_for_predecessor()
        warp.let_successor_start()
        squares = f32(0.0)
        chunk = thread
        while chunk < num_chunks:
            squares = square(squares, warp.load_16_bytes(x + row + 16 * chunk))
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
            values = scale(warp.load_16_bytes(x + at), warp.load_16_bytes(weight + 16 * chunk), factor)
            warp.store_16_bytes(out + at, values[0], values[1], values[2], values[3])
            chunk = i32(chunk + THREADS)

    return kernel


def eight_at_a_time(dtype: str) -> tuple[Any, Any]:
    """Two macros of 8 elements in four registers: one adds their squares to a total, one is a * weights * factor."""
    pack, unpack = warp.PACK[dtype], warp.UNPACK[dtype]

    @macro
    def square(emit: Any, total: Any, a: Any) -> Any:
        for value in warp.values_of(emit, dtype, a):
            total = emit(warp.fma_f32, value, value, total)
        return total

    @macro
    def scale(emit: Any, a: Any, weights: Any, factor: Any) -> list[Any]:
        out = []
        for register, weight in zip(a, weights):
            pairs = zip(emit(unpack, register), emit(unpack, weight))
            out.append(emit(pack, *[emit(warp.mul_f32, emit(warp.mul_f32, x, factor), w) for x, w in pairs]))
        return out

    return square, scale


def silu_kernel(dtype: str) -> Callable[..., None]:
    """Each thread computes 8 elements."""
    pack, unpack = warp.PACK[dtype], warp.UNPACK[dtype]

    @macro
    def silu_times(emit: Any, gate: Any, up: Any) -> list[Any]:
        out = []
        for g, u in zip(gate, up):
            products = []
            for x, y in zip(emit(unpack, g), emit(unpack, u)):
                grown = emit(warp.exp2, emit(warp.mul_f32, x, -LOG2_E))
                sigmoid = emit(warp.reciprocal, emit(warp.add_f32, grown, 1.0))
                products.append(emit(warp.mul_f32, emit(warp.mul_f32, x, sigmoid), y))
            out.append(emit(pack, *products))
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
    """A lane has two elements of a head's first half, and the two of its second half that are rotated with them.

    A warp takes some heads of one token, or of two neighbouring tokens where a head fills half a warp.
    """
    LANES = head_dim // 4
    TOKENS = 32 // LANES
    HALF = head_dim  # bytes of half a head
    pack, unpack = warp.PACK[dtype], warp.UNPACK[dtype]

    head_sum = macro(lambda emit, x: warp.add_lanes(emit, x, LANES))

    def kernel(  # type: ignore[no-untyped-def]
        qkv,  # [num_tokens, num_heads + 2 * num_kv_heads, head_dim]
        positions,  # int64 [num_tokens]
        slots,  # int64 [num_tokens]
        cos_sin,  # float32 [max_positions, head_dim]: cosines, then sines
        kv,  # the layer's K of block 0
        q_norm,  # [head_dim] or address 0
        k_norm,  # [head_dim] or address 0
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
        # Positions and slots are int64 whose values fit the low word.
        position = warp.load_i32(positions + 8 * warp.wide(token))
        slot = warp.load_i32(slots + 8 * warp.wide(token))
        angles = cos_sin + 4 * (warp.wide(position) * head_dim + 2 * pair)
        cos0, cos1 = warp.load_f32(angles), warp.load_f32(angles + 4)
        sin0, sin1 = warp.load_f32(angles + 2 * head_dim), warp.load_f32(angles + 2 * head_dim + 4)
        block = warp.div_u32(slot, block_size)
        to_k = kv + warp.wide(block) * block_stride + 2 * (slot - block * block_size) * head_dim
        warp.let_successor_start()  # the successor, attention, reads nothing of the predecessor before its own wait
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
            next_low, next_high = warp.load_i32(source), warp.load_i32(source + HALF)
            kv_head = i32(head - num_heads)  # negative for Q; a head of K; from num_kv_heads on, a head of V
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
                    x0, x1 = x0 * factor * w0, x1 * factor * w1
                    w0, w1 = unpack(warp.load_i32(norm + HALF + 4 * pair))
                    y0, y1 = y0 * factor * w0, y1 * factor * w1
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
    return Spec(norm_kernel, (dtype,), "lllrf", THREADS, 4 * NUM_WARPS)


def silu_spec(dtype: str) -> Spec:
    return Spec(silu_kernel, (dtype,), "llrr", THREADS)


def rotary_spec(head_dim: int, dtype: str) -> Spec:
    return Spec(rotary_kernel, (head_dim, dtype), "lllllllllllrrrrrf", THREADS)


def rms_norm(x: Tensor, weight: Tensor, eps: float, overlap: bool = False) -> Tensor:
    """x [T, hidden], weight [hidden] -> weight * x / sqrt(mean(x**2) + eps)."""
    assert x.shape[1] % 8 == 0
    out = torch.empty_like(x)
    if x.shape[0]:
        kernel, addresses = _kernel(norm_spec, x), (x.data_ptr(), weight.data_ptr(), out.data_ptr())
        kernel(x.shape[0], *addresses, x.shape[1] // 8, eps, overlap=overlap)
    return out


def silu_and_mul(gate_up: Tensor, overlap: bool = False) -> Tensor:
    """gate_up [T, 2 * size] -> silu(gate_up[:, :size]) * gate_up[:, size:]."""
    num_rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    assert size % 8 == 0
    out = gate_up.new_empty(num_rows, size)
    if num_rows:
        num_ctas = -(-num_rows * size // (8 * THREADS))
        kernel = _kernel(silu_spec, gate_up)
        kernel(num_ctas, gate_up.data_ptr(), out.data_ptr(), num_rows, size // 8, overlap=overlap)
    return out


def rotary_and_store(
    qkv: Tensor,  # [T, (num_heads + 2 * num_kv_heads) * head_dim]
    positions: Tensor,  # [T] int64
    slot_mapping: Tensor,  # [T] int64
    kv: Tensor,
    layer: int,
    spec: AttentionSpec,
    q_norm: Tensor | None = None,  # [head_dim], RMS norm of each query head before rotation
    k_norm: Tensor | None = None,  # [head_dim]
    eps: float = 1e-6,
    overlap: bool = False,
) -> Tensor:
    """Rotates Q and K (Su et al., RoFormer, arXiv:2104.09864; halves as in Llama), stores K and V in their slots.

    Returns Q [T, num_heads, head_dim]. With `overlap`, positions and slots must be older than the predecessor.
    """
    num_tokens, layout = qkv.shape[0], spec.layout
    num_kv_heads, head_dim = layout.num_kv_heads, layout.head_dim
    num_heads = qkv.shape[1] // head_dim - 2 * num_kv_heads
    q = qkv.new_empty(num_tokens, num_heads, head_dim)
    if num_tokens:
        # With few tokens each head has a warp; with many, a warp reads angles and slots once for several heads.
        heads_per_warp = 1 if num_tokens < MANY_TOKENS else 8
        warps_per_token = math.ceil((num_heads + 2 * num_kv_heads) / heads_per_warp)
        num_warps = warps_per_token * math.ceil(num_tokens * head_dim / 128)
        first_key = kv.data_ptr() + layer * layout.layer_bytes
        inputs = qkv.data_ptr(), positions.data_ptr(), slot_mapping.data_ptr(), spec.cos_sin.data_ptr()
        sizes = num_tokens, num_heads, num_kv_heads, layout.block_size, heads_per_warp
        norms = address_of(q_norm), address_of(k_norm)
        kernel = _kernel(rotary_spec, qkv, head_dim)
        num_ctas = math.ceil(num_warps / NUM_WARPS)
        kernel(num_ctas, *inputs, first_key, *norms, q.data_ptr(), *layout.strides, *sizes, eps, overlap=overlap)
    return q


def _kernel(make_spec: Callable[..., Spec], x: Tensor, *parameters: int) -> Kernel:
    return kernel_of(make_spec, x.get_device(), *parameters, warp.NAMES[x.dtype])

"""Penalties and biases on the logits of rows whose sequences ask for them: one launch, which also makes them float32.

A row of logits reads a row of a table of counts, and one of a table of biases where any sequence has biases; row 0 of
both tables is of zeros and changes nothing. The arithmetic is that of `nanopd.worker.adjustments.adjust_logits`,
operation by operation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from numba.cuda.types import int32 as i32
from torch import Tensor

from nanopd.cuda import warp
from nanopd.cuda.launch import Spec, address_of, kernel_of
from nanopd.cuda.ptx import instruction, macro
from nanopd.cuda.sampling import in_chunks

THREADS = 256
ROW_BYTES = 24  # the parameters of a row

# How often a token was generated, from a count, which also holds the mark that the token is in the prompt.
times_generated = instruction("{.reg .b32 x; and.b32 x, $1, 0xffffff; cvt.rn.f32.s32 $0, x;}", "f", "r")
mul_rounded = instruction("mul.rn.f32 $0, $1, $2;", "f", "ff")  # a product that is never fused with the sum after it


def adjusting_kernel(dtype: str) -> Callable[..., None]:
    """Each thread computes 16 bytes of logits."""
    PER_CHUNK = 4 if dtype == "f32" else 8

    unpack = macro(lambda emit, registers: warp.values_of(emit, dtype, registers))

    @macro
    def add(emit: Any, values: Any, biases: Any) -> list[Any]:
        """The values, plus the biases at an address."""
        added = [b for i in range(0, PER_CHUNK, 4) for b in emit(warp.load_16_bytes.at(4 * i), biases)]
        return [emit(warp.add_f32, x, emit(warp.f32_of_bits, bias)) for x, bias in zip(values, added)]

    @macro
    def adjust(emit: Any, values: Any, counts: Any, out: Any, penalties: Any) -> None:
        """Stores the adjusted values at `out`, by the counts at an address, four at a time."""
        presence, frequency, repetition, inverse = penalties
        for i in range(0, PER_CHUNK, 4):
            adjusted = []
            for x, count in zip(values[i : i + 4], emit(warp.load_16_bytes.at(4 * i), counts)):
                is_positive = emit(warp.sub_i32, emit(warp.bits_of_f32, x), 1)
                scale = emit(warp.select, inverse, repetition, is_positive)
                scale = emit(warp.select, scale, 1.0, emit(warp.sub_i32, count, 1))
                generated = emit(times_generated, count)
                x = emit(warp.sub_f32, emit(mul_rounded, x, scale), emit(mul_rounded, generated, frequency))
                x = emit(warp.sub_f32, x, emit(mul_rounded, emit(warp.min_f32, generated, 1.0), presence))
                adjusted.append(emit(warp.bits_of_f32, x))
            emit(warp.store_16_bytes.at(4 * i), out, *adjusted)

    def kernel(logits, counts, biases, params, out, num_rows, num_chunks, table_width):  # type: ignore[no-untyped-def]
        """logits [num_rows, PER_CHUNK * num_chunks] -> out float32, the same shape.

        counts [num_table_rows, table_width] int32; biases float32, the same shape, or address 0; params [num_rows]
        records, see `adjust_logits`.
        """
        item = i32(warp.cta_index() * THREADS + warp.thread_index())
        row = warp.div_u32(item, num_chunks)
        chunk = i32(item - row * num_chunks)
        warp.wait_for_predecessor()
        if row < num_rows:
            param = params + warp.wide(row) * ROW_BYTES
            cell = 4 * (warp.wide(warp.load_i32(param)) * table_width + PER_CHUNK * chunk)
            presence, frequency = warp.load_f32(param + 4), warp.load_f32(param + 8)
            repetition, inverse = warp.load_f32(param + 12), warp.load_f32(param + 16)
            values = unpack(warp.load_16_bytes(logits + 16 * warp.wide(item)))
            if biases != 0:
                values = add(values, biases + cell)
            to = out + 4 * PER_CHUNK * warp.wide(item)
            adjust(values, counts + cell, to, (presence, frequency, repetition, inverse))

    return kernel


def adjusting_spec(dtype: str) -> Spec:
    return Spec(adjusting_kernel, (dtype,), "lllllrrr", THREADS, shared_percent=0)


def adjust_logits(logits: Tensor, counts: Tensor, biases: Tensor | None, params: Tensor) -> Tensor:
    """New logits, [num_rows, vocab_size] float32, contiguous.

    logits [num_rows, vocab_size], bfloat16, float16 or float32, contiguous; counts [num_table_rows, table_width] int32,
    where table_width is a multiple of 8, and at least vocab_size; biases of the same shape, float32, where there are
    any; params [num_rows * 3] int64, a record of 24 bytes for each row: row of the tables, int32; presence and
    frequency penalty, repetition penalty and its inverse, float32.
    """
    num_rows, vocab_size = logits.shape
    logits, num_chunks = in_chunks(logits)
    out = torch.empty(logits.shape, device=logits.device)
    addresses = logits.data_ptr(), counts.data_ptr(), address_of(biases), params.data_ptr(), out.data_ptr()
    kernel = kernel_of(adjusting_spec, logits.get_device(), warp.NAMES_OF_LOGITS[logits.dtype])
    kernel(-(-num_rows * num_chunks // THREADS), *addresses, num_rows, num_chunks, counts.shape[1])
    return out[:, :vocab_size].contiguous()

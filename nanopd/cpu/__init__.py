"""The operations of a decoder on CPU tensors. `nanopd.cuda` has the same functions with the same signatures."""

from nanopd.cpu.ops import (
    add_rms_norm,
    begin_step,
    copy_blocks,
    embedding,
    linear,
    paged_decode_attention,
    prefill_attention,
    prepare_thread,
    rms_norm,
    rotary_and_store,
    silu_and_mul,
)

__all__ = [
    "add_rms_norm",
    "begin_step",
    "copy_blocks",
    "embedding",
    "linear",
    "paged_decode_attention",
    "prefill_attention",
    "prepare_thread",
    "rms_norm",
    "rotary_and_store",
    "silu_and_mul",
]

"""The operations of a decoder on CPU tensors. `nanopd.cuda` has the same functions with the same signatures."""

from nanopd.cpu.ops import (
    add_linear,
    begin_step,
    copy_blocks,
    embedding,
    norm_gated_linear,
    norm_linear,
    paged_decode_attention,
    prefill_attention,
    prepare_thread,
    rotary_and_store,
)

__all__ = [
    "add_linear",
    "begin_step",
    "copy_blocks",
    "embedding",
    "norm_gated_linear",
    "norm_linear",
    "paged_decode_attention",
    "prefill_attention",
    "prepare_thread",
    "rotary_and_store",
]

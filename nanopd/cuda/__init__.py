"""The operations of a decoder on a GPU, in numba kernels, with the signatures of `nanopd.cpu.ops`.

What has no kernel, the embedding and attention of a prompt, is missing.

Operations take `overlap=True` where a step is a chain of these kernels alone: a kernel then starts while its
predecessor ends (programmatic dependent launch). They launch on torch's current stream and can be captured into a CUDA
graph, once each has been called before. Decode attention is an object, as it has a workspace. Matrix products are in
`linear`.
"""

from nanopd.cuda.attention import PagedDecodeAttention
from nanopd.cuda.blocks import Side, copy_blocks, move_blocks
from nanopd.cuda.elementwise import rms_norm, rotary_and_store, silu_and_mul

__all__ = [
    "PagedDecodeAttention",
    "Side",
    "copy_blocks",
    "move_blocks",
    "rms_norm",
    "rotary_and_store",
    "silu_and_mul",
]

"""The operations of a decoder on a GPU, in numba kernels. The functions have the signatures of `nanopd.cpu`; what has
no kernel (the embedding, attention of a prompt) is missing.

Operations take `overlap=True` where a step is a chain of these kernels alone: a kernel then starts while its
predecessor ends (programmatic dependent launch). They launch on torch's current stream and can be captured into a CUDA
graph, once each has been called before. Decode attention is an object, as it has a workspace. `linear` is in the module
of that name.
"""

from nanopd.cuda.attention import PagedDecodeAttention
from nanopd.cuda.blocks import Side, copy_blocks, move_blocks
from nanopd.cuda.elementwise import add_rms_norm, rms_norm, rotary_and_store, silu_and_mul

__all__ = [
    "PagedDecodeAttention",
    "Side",
    "add_rms_norm",
    "copy_blocks",
    "move_blocks",
    "rms_norm",
    "rotary_and_store",
    "silu_and_mul",
]

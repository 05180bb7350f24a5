"""The operations of a decoder on a GPU, in numba kernels, with the signatures of `nanopd.models.Operations`.

The embedding and the attention of prompts have no kernel here: torch computes them.

Operations take `overlap=True` where a step is a chain of these kernels alone: a kernel then starts while its
predecessor ends (programmatic dependent launch). Kernels launch on torch's current stream and can be captured into a
CUDA graph once each has been called before. Decode attention is an object because it has a workspace. Products with
projections are in `linear`, and `operations` puts all of it together for one model.
"""

from nanopd.cuda.attention import PagedDecodeAttention
from nanopd.cuda.blocks import Side, copy_blocks, move_blocks
from nanopd.cuda.elementwise import rms_norm, rotary_and_store, silu_and_mul

__all__ = ["PagedDecodeAttention", "Side", "copy_blocks", "move_blocks", "rms_norm", "rotary_and_store", "silu_and_mul"]

"""Every variant of every kernel that a device of some size uses: what there is to compile ahead of time."""

from __future__ import annotations

from nanopd.cuda import adjusting, attention, blocks, elementwise, sampling, warp
from nanopd.cuda.launch import Spec
from nanopd.cuda.linear import skinny_spec


def all_variants(shared_limit: int) -> list[Spec]:
    """For a device whose CTAs may have `shared_limit` bytes of shared memory."""
    specs = [blocks.move_spec(), attention.plan_spec()]
    specs += [sampling.sampling_spec(dtype) for dtype in sampling.NAMES.values()]
    specs += [adjusting.adjusting_spec(dtype) for dtype in sampling.NAMES.values()]
    for dtype in warp.NAMES.values():
        specs += [attention.decode_spec(head_dim, dtype, shared_limit) for head_dim in attention.HEAD_DIMS]
        specs += [elementwise.rotary_spec(head_dim, dtype) for head_dim in elementwise.HEAD_DIMS]
        specs += [elementwise.norm_spec(dtype), elementwise.silu_spec(dtype)]
        specs += [skinny_spec(dtype, x_tiles, shared_limit) for x_tiles in (1, 2)]
    return specs

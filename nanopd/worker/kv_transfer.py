"""Moves KV blocks between workers. The destination pulls: it reads the source's cache and writes its own.

A peer's cache stays readable after the peer has died, so a plan can always be carried out; whether its data are still
wanted is the parent's to know. On CPU workers the caches are shared memory and a plan is one gather and one scatter.
"""

from __future__ import annotations

import hashlib
import time

import numpy as np
import torch
from torch import Tensor

from nanopd.messages import TransferAck, TransferPlan


class DigestMismatch(RuntimeError):
    """Blocks that were moved differ from their source."""


class KVTransfer:
    """Carries out the plans whose destination this worker is."""

    def __init__(self, worker: int, kv: Tensor, verify: bool) -> None:
        self._worker = worker
        self._kv = kv  # [num_blocks, ...]
        self._verify = verify
        self._peers: dict[tuple[int, int], Tensor] = {}  # (worker, generation) -> its cache

    def connect(self, worker: int, generation: int, kv: Tensor) -> None:
        """Open the cache of a peer."""
        self._peers[worker, generation] = kv

    def execute(self, plan: TransferPlan) -> TransferAck:
        """Copy the plan's blocks.

        Raises:
            DigestMismatch: `verify` is on and a block did not arrive as it was.
        """
        assert plan.dst_worker == self._worker
        start = time.perf_counter()
        src_kv = self._peers[plan.src_worker, plan.src_generation]
        src, dst = torch.from_numpy(plan.src_blocks.copy()), torch.from_numpy(plan.dst_blocks.copy())
        blocks = src_kv.index_select(0, src)
        self._kv.index_copy_(0, dst.long(), blocks)
        if self._verify and _digest(src_kv[src.long()]) != _digest(self._kv[dst.long()]):
            raise DigestMismatch(f"plan {plan.plan_id}: blocks {plan.src_blocks} of worker {plan.src_worker}")
        num_bytes = blocks.numel() * blocks.element_size()
        return TransferAck(plan.plan_id, int((time.perf_counter() - start) * 1e6), num_bytes)


def _digest(blocks: Tensor) -> bytes:
    return hashlib.blake2b(blocks.view(torch.uint8).numpy().astype(np.uint8, copy=False).tobytes()).digest()

"""The entry of a worker of bench/micro/transfer.py: a KV cache and its transfers, without a model."""

from __future__ import annotations

from typing import Any

from nanopd.config import WorkerSpec
from nanopd.ipc.shared_memory import Memories
from nanopd.messages import TransferPlan
from nanopd.worker import main as real
from nanopd.worker.kv_cache import allocate_kv
from nanopd.worker.kv_transfer import KVTransfer
from nanopd.worker.pending import Pending
from nanopd.worker.worker import Worker, use_device

MAX_CTAS = 1024


class PoolTransfer(KVTransfer):
    """The number of CTAs of a copy is the remainder of the plan's id."""

    def launch(self, plan: TransferPlan) -> Pending:
        for mover in (self._incoming, self._outgoing):
            mover.max_ctas = plan.plan_id % MAX_CTAS
        return super().launch(plan)


def load(spec: WorkerSpec, memories: Memories, _: Any) -> Worker:
    """A worker that moves blocks and takes no steps; its configuration says how many blocks it has."""
    index, config = spec.index, spec.config
    assert config.num_blocks is not None
    device = use_device(config.workers[index].device)
    kv = allocate_kv(memories.caches[index], config.num_blocks, config.kv_layout(spec.model), device)
    transfer = PoolTransfer(index, kv, memories.relays, config.verify_transfers)
    return Worker(spec, memories, kv, None, transfer)


def main(*args: Any) -> None:
    """Run the real worker with these parts in place of its own."""
    real.main(*args, load=load)

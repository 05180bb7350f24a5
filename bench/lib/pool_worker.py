"""The entry of a worker of bench/micro/transfer.py: a KV cache and its transfers, without a model."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from nanopd.messages import TransferPlan
from nanopd.worker import main as real
from nanopd.worker import worker
from nanopd.worker.kv_transfer import KVTransfer
from nanopd.worker.launched import Launched

MAX_CTAS = 1024


class PoolTransfer(KVTransfer):
    """The number of CTAs of a copy is the remainder of the plan's id."""

    def launch(self, plan: TransferPlan) -> Launched:
        for mover in (self._incoming, self._outgoing):
            mover.max_ctas = plan.plan_id % MAX_CTAS
        return super().launch(plan)


def main(*args: Any) -> None:
    """Run the real worker with these parts in place of its own."""
    worker.KVTransfer = PoolTransfer
    worker.load_model = worker.cuda_operations = worker.ModelRunner = lambda *_: SimpleNamespace()
    real.main(*args)

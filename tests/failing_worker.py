"""A worker's entry for tests: the real worker, but a step with an unlucky token raises."""

from __future__ import annotations

from typing import Any

from nanopd.messages import StepBatch, TransferPlan
from nanopd.worker import main as real
from nanopd.worker.pending import Pending
from nanopd.worker.worker import Worker

UNLUCKY = 13


class FailingWorker(Worker):
    def launch(self, message: StepBatch | TransferPlan) -> Pending:
        if isinstance(message, StepBatch) and UNLUCKY in message.token_ids:
            raise ValueError("an unlucky token")
        return super().launch(message)


def main(*args: Any) -> None:
    real.main(*args, load=FailingWorker.load)

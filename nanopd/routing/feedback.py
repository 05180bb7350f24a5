"""What workers have been told to do, until they say how long it took, which corrects the cost model."""

from __future__ import annotations

from collections import deque

from nanopd.messages import StepBatch, StepResult, TransferAck, TransferPlan
from nanopd.routing.cost_model import CostModel, MoveSample, StepSample, rows_of


class Feedback:
    """Pairs the messages of each worker, whose steps come back in order, with their times."""

    def __init__(self, costs: CostModel | None, num_workers: int) -> None:
        """`costs`: None: nothing is kept."""
        self._costs = costs
        self._steps: list[deque[StepBatch]] = [deque() for _ in range(num_workers)]
        self._plans: dict[int, TransferPlan] = {}

    def sent(self, worker: int, message: StepBatch | TransferPlan) -> None:
        if self._costs is None:
            return
        if isinstance(message, StepBatch):
            self._steps[worker].append(message)
        else:
            self._plans[message.plan_id] = message

    def done(self, worker: int, message: StepResult | TransferAck) -> None:
        if self._costs is None:
            return
        ms = message.duration_us / 1e3
        if isinstance(message, StepResult):
            self._costs.observe(StepSample(*rows_of(self._steps[worker].popleft()), ms))
        elif (plan := self._plans.pop(message.plan_id, None)) and message.num_bytes:  # else it was given up
            self._costs.observe(MoveSample(message.num_bytes, ms), (plan.src_worker, plan.dst_worker))

    def forget(self, worker: int) -> None:
        """It has died, and so will answer nothing."""
        self._steps[worker].clear()
        self._plans = {number: plan for number, plan in self._plans.items() if plan.dst_worker != worker}

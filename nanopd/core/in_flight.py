"""What workers have been sent and have not answered: since when, until when, and how long their steps take.

A worker answers steps in the order in which they were sent, and plans in theirs, so each answer starts the time of the
next one. From the same pairs of message and answer the ledger knows which worker is overdue, when a worker needs its
next step, how long it was busy, and what a measured duration belongs to.
Parent process, one thread; is told the time with each message and has no clock.
"""

from __future__ import annotations

import math
from collections import deque

from nanopd.messages import StepBatch, StepResult, TransferAck, TransferPlan

LEAD_S = 2.5e-3  # for scheduling, sending and launching a step, and for a wake-up that comes a millisecond late
# After so long without a look this process was stopped (Ctrl-Z, a debugger), and the workers perhaps too.
MAX_GAP_S = 5.0


class WorkerLedger:
    """What one worker has to answer. A ledger of a worker that is replaced starts anew with `forget`."""

    def __init__(self) -> None:
        self.busy_us = 0  # spent on steps, since `reset_busy`
        self._steps: deque[StepBatch] = deque()
        self._plans: dict[int, TransferPlan] = {}
        self._steps_since_s = self._plans_since_s = math.inf  # the oldest unanswered one's time; inf: nothing is out
        self._started_s = self._duration_s = 0.0  # of the step under way; of the last step that was answered

    def sent(self, message: StepBatch | TransferPlan, now_s: float) -> None:
        if isinstance(message, TransferPlan):
            self._plans[message.plan_id] = message
            self._plans_since_s = min(self._plans_since_s, now_s)
            return
        if not self._steps:  # the worker was idle: its step begins now
            self._started_s = now_s
        self._steps.append(message)
        self._steps_since_s = min(self._steps_since_s, now_s)

    def answered(self, answer: StepResult | TransferAck, now_s: float) -> StepBatch | TransferPlan | None:
        """The message that `answer` is about; None: a plan that was forgotten."""
        if isinstance(answer, TransferAck):
            plan = self._plans.pop(answer.plan_id, None)
            self._plans_since_s = now_s if self._plans else math.inf
            return plan
        step = self._steps.popleft()
        self.busy_us += answer.duration_us
        self._started_s, self._duration_s = now_s, answer.duration_us / 1e6
        self._steps_since_s = now_s if self._steps else math.inf
        return step

    def forget(self) -> None:
        """The worker is dead: nothing that it was sent will be answered."""
        self._steps.clear()
        self._plans.clear()
        self._steps_since_s = self._plans_since_s = math.inf

    def restart(self, now_s: float) -> None:
        """Count time from now on."""
        self._steps_since_s = max(self._steps_since_s, now_s)
        self._plans_since_s = max(self._plans_since_s, now_s)

    def reset_busy(self) -> None:
        self.busy_us = 0

    @property
    def since_s(self) -> float:
        """Since when an answer has been owed; inf: none is."""
        return min(self._steps_since_s, self._plans_since_s)

    @property
    def next_step_s(self) -> float:
        """When the next step has to be sent, lest the worker should wait for it.

        The step under way is expected to take as long as the last one: decode steps grow slowly.
        """
        return self._started_s + self._duration_s - LEAD_S


class Ledger:
    """The ledgers of all workers, and which of them is overdue."""

    def __init__(self, num_workers: int, timeout_s: float) -> None:
        self.of_worker = [WorkerLedger() for _ in range(num_workers)]
        self._timeout_s = timeout_s
        self._looked_s = -math.inf

    def next_due_s(self) -> float:
        return min(ledger.since_s for ledger in self.of_worker) + self._timeout_s

    def overdue(self, now_s: float) -> list[int]:
        """Workers that have owed an answer for too long; to be asked in each step, after answers were taken."""
        if now_s - self._looked_s > MAX_GAP_S:
            for ledger in self.of_worker:
                ledger.restart(now_s)
        self._looked_s = now_s
        return [w for w, ledger in enumerate(self.of_worker) if now_s >= ledger.since_s + self._timeout_s]

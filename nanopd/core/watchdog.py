"""Notices workers that have something to do and do not answer.

A worker answers steps in the order they were sent, and plans in theirs, so each answer starts the time of the next
one. Parent process, one thread; counts messages and is told the time.
"""

from __future__ import annotations

import math

MAX_GAP_S = 5.0  # after so long without a look this process was held (Ctrl-Z, a debugger), the workers perhaps too


class Watchdog:
    """Times the oldest unanswered message of each lane; a worker has one lane for steps and one for plans."""

    def __init__(self, num_workers: int, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._num_out = [0] * (2 * num_workers)  # per lane: 2 * worker + is_plan
        self._since_s = [math.inf] * (2 * num_workers)  # inf: nothing is out
        self._looked_s = -math.inf

    def sent(self, worker: int, is_plan: bool, now_s: float) -> None:
        lane = 2 * worker + is_plan
        self._num_out[lane] += 1
        self._since_s[lane] = min(self._since_s[lane], now_s)

    def answered(self, worker: int, is_plan: bool, now_s: float) -> None:
        lane = 2 * worker + is_plan
        self._num_out[lane] -= 1
        self._since_s[lane] = now_s if self._num_out[lane] else math.inf

    def forget(self, worker: int) -> None:
        """The worker is dead: nothing it was sent will be answered."""
        for lane in (2 * worker, 2 * worker + 1):
            self._num_out[lane], self._since_s[lane] = 0, math.inf

    def next_due_s(self) -> float:
        return min(self._since_s) + self._timeout_s

    def overdue(self, now_s: float) -> list[int]:
        """Workers that have owed an answer for too long; to be called again and again, after answers were taken."""
        if now_s - self._looked_s > MAX_GAP_S:
            self._since_s = [max(since_s, now_s) for since_s in self._since_s]
        self._looked_s = now_s
        if now_s < self.next_due_s():
            return []
        late = [lane // 2 for lane, since_s in enumerate(self._since_s) if now_s >= since_s + self._timeout_s]
        return sorted({*late})

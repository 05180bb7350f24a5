"""How long a worker's next step may be held back while one is under way, so that sequences on their way still join it.

A step that is sent as soon as there is room queues behind the one under way, and whoever arrives meanwhile misses both.
Parent process, one thread; is told when steps begin and end, and knows the time only from that.
"""

from __future__ import annotations

LEAD_S = 2.5e-3  # for scheduling, sending and launching, and for a wake-up that comes a millisecond late


class Pacer:
    """Expects of a step what the worker's last one took: decode steps grow slowly."""

    def __init__(self, num_workers: int) -> None:
        self._started_s = [0.0] * num_workers  # the step under way
        self._duration_s = [0.0] * num_workers  # of the last one

    def started(self, worker: int, now_s: float) -> None:
        """A worker that was idle has got a step."""
        self._started_s[worker] = now_s

    def ended(self, worker: int, duration_s: float, now_s: float) -> None:
        """Another step, if one was sent, begins now."""
        self._started_s[worker], self._duration_s[worker] = now_s, duration_s

    def due_s(self, worker: int) -> float:
        """When the next step has to be sent, lest the worker should wait for it."""
        return self._started_s[worker] + self._duration_s[worker] - LEAD_S

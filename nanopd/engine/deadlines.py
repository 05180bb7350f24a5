"""When requests have to have ended, or to have started. Engine's thread; has no clock of its own."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator

from nanopd.core.sequence import Sequence


class Deadlines:
    """Time limits of unfinished sequences, the earliest first."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, str, Sequence]] = []  # time, seq_id, name of the limit

    def add(self, seq: Sequence) -> None:
        """Keep an eye on the limits that the sequence's request has."""
        for name, limit_s in seq.request.limits_s.items():
            heapq.heappush(self._heap, (seq.request.arrival_s + limit_s, seq.seq_id, name, seq))

    def next_s(self) -> float:
        """inf: there is none."""
        while self._heap and self._heap[0][-1].status.is_finished:
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else math.inf

    def passed(self, now_s: float) -> Iterator[tuple[Sequence, str]]:
        """Unfinished sequences with a limit that has passed, and its name, each once."""
        while self._heap and self._heap[0][0] <= now_s:
            *_, name, seq = heapq.heappop(self._heap)
            if not seq.status.is_finished:
                yield seq, name

"""Work that a worker has begun, whose loop asks whether it is done, and marks that say how far a device has come."""

from __future__ import annotations

import time
from typing import Any, Protocol

import torch

from nanopd.messages import FromWorker


class Pending(Protocol):
    """Work under way."""

    def is_done(self) -> bool:
        """Asked again and again until it is true. The work may use each call to go on."""

    def result(self) -> FromWorker | None:
        """To be called once, when the work is done; None: the parent need not be told."""


class Done:
    """Work that was done at once."""

    def __init__(self, result: FromWorker | None) -> None:
        self._result = result

    def is_done(self) -> bool:
        return True

    def result(self) -> FromWorker | None:
        return self._result


class Mark(Protocol):
    """A moment in a device's work."""

    def query(self) -> bool:
        """Whether all work that was queued before this mark has been done."""

    def elapsed_time(self, end: Any) -> float:
        """Milliseconds from this mark to `end`; all work before both must have been done."""


class HostMark:
    """A moment of the CPU, which does everything at once."""

    def __init__(self) -> None:
        self._time_s = time.perf_counter()

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: HostMark) -> float:
        return (end._time_s - self._time_s) * 1e3


def mark(device: torch.device, stream: torch.cuda.Stream | None = None) -> Mark:
    """A mark behind what has been queued on a device; `stream` is torch's current one by default."""
    if device.type == "cpu":
        return HostMark()
    event = torch.cuda.Event(enable_timing=True)
    event.record(stream)
    return event

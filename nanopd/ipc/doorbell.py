"""Waking another process, and waiting for several things at once: eventfd and epoll.

A doorbell says "look again", not what happened or how often. The order that loses nothing: the one side changes
shared memory, then rings; the other side waits, then looks at the memory until there is nothing new.
"""

from __future__ import annotations

import os
import select
import time
from typing import Protocol

from nanopd.ipc.descriptor import Descriptor


class HasFileno(Protocol):
    def fileno(self) -> int: ...


class Doorbell(Descriptor):
    """An eventfd. Handed to another process as an argument when that is spawned; any number may ring or wait."""

    def __init__(self) -> None:
        super().__init__(os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC))

    def ring(self) -> None:
        os.eventfd_write(self._fd, 1)


class Waiter:
    """Waits until one of its sources is ready: a doorbell rung, a pipe readable or at its end, a process ended.

    A doorbell is reported once for what was rung since it was last reported, and is never read back (its counter
    runs on: 2**64 rings). Everything else is reported for as long as it is readable, or once if `add` was told so.
    """

    def __init__(self, spin_s: float = 0.0) -> None:
        """`spin_s`: seconds to ask again and again before sleeping, which burns a core to save the wake-up.

        Spinning pays only where the other side has a core of its own: on a shared one it delays what it waits for.
        """
        self._epoll = select.epoll()
        self._sources: dict[int, HasFileno] = {}  # by descriptor
        self._spin_s = spin_s

    def add(self, source: HasFileno, once: bool = False) -> None:
        """`once`: report the source once for what came since its last report, as a doorbell always is."""
        fd = source.fileno()
        # Edge-triggered saves the system call that would read the eventfd back to zero: each write is an edge.
        is_edge = once or isinstance(source, Doorbell)
        self._epoll.register(fd, select.EPOLLIN | (select.EPOLLET if is_edge else 0))
        self._sources[fd] = source

    def remove(self, source: HasFileno) -> None:
        """To be called before the source is closed."""
        fd = source.fileno()
        self._epoll.unregister(fd)
        del self._sources[fd]

    def wait(self, timeout_s: float) -> list[HasFileno]:
        """The sources that are ready, in no particular order; none after `timeout_s` (to a millisecond)."""
        events = self._spin(min(self._spin_s, timeout_s)) if self._spin_s else None
        ready = []
        for fd, _ in events or self._epoll.poll(timeout_s):
            ready.append(self._sources[fd])  # a comprehension is one more call before Python 3.12
        return ready

    def close(self) -> None:
        self._epoll.close()

    def _spin(self, duration_s: float) -> list[tuple[int, int]]:
        end = time.perf_counter() + duration_s
        while not (events := self._epoll.poll(0)) and time.perf_counter() < end:
            pass
        return events

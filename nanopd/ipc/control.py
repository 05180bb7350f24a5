"""The counters that the two ends of a ring share: the first words of its memory, and the order of accesses to them.

Each counter is written by one of the two ends alone, and is one aligned 64-bit word, which x86-64 and arm64 load and
store as a whole. Knows neither messages nor buffers.
"""

from __future__ import annotations

import platform
import threading

from nanopd.ipc.shared_memory import SharedMemory

WORD = 8  # bytes
LINE = 64  # bytes of a cache line
CONTROL_NBYTES = 4 * LINE  # the counters lie two lines apart, as processors prefetch lines in pairs
TAIL, HEAD = 0, 2 * LINE // WORD  # words: how much was written, and how much was read


class Control:
    """The counters of one ring as one of its two ends sees them."""

    def __init__(self, memory: SharedMemory) -> None:
        self.words = memory.map()[:CONTROL_NBYTES].cast("q")  # each assignment is one store of 8 bytes
        self._needs_fence = platform.machine() != "x86_64"
        self._lock = threading.Lock()
        self._lock.acquire()

    def fence(self) -> None:
        """Loads and stores before this call happen, for the other side too, before those behind it.

        x86-64 keeps loads in order, stores in order, and stores behind earlier loads: all that a ring needs. arm64
        does not. Python has no fence, but the release of a lock and an acquire behind it are one there (stlr, ldar).
        """
        if self._needs_fence:
            self._lock.release()
            self._lock.acquire()

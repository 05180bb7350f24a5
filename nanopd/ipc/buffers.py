"""A ring of buffers of one size in shared memory: one process fills them, one empties them, neither waits here.

Either side may have several buffers in hand, while a device copies. The counters never go back: both ends start at
their *epoch*, which grows when either process is replaced, so that what was there before counts as nothing.

    memory:   | tail, notes | head | buffer 0 | buffer 1 | ...   tail, head: epoch << 32, + buffers filled, emptied
"""

from __future__ import annotations

from nanopd.ipc.control import CONTROL_NBYTES, HEAD, TAIL, Control
from nanopd.ipc.shared_memory import SharedMemory

MAX_BUFFERS = HEAD - TAIL - 1  # the words between the counters hold a note for each buffer


def buffers_nbytes(buffer_nbytes: int, num_buffers: int) -> int:
    """The size of a memory for that many buffers, which begin at CONTROL_NBYTES."""
    assert num_buffers <= MAX_BUFFERS
    return CONTROL_NBYTES + num_buffers * buffer_nbytes


class BufferWriter:
    """The filling end; there may be only one."""

    def __init__(self, memory: SharedMemory, num_buffers: int, epoch: int) -> None:
        self._control, self._num_buffers = Control(memory), num_buffers
        self._start = self._claimed = self._published = epoch << 32

    def claim(self) -> int | None:
        """The index of a buffer to fill; None: not now."""
        if self._claimed - max(self._control.words[HEAD], self._start) >= self._num_buffers:
            return None
        self._claimed += 1
        return (self._claimed - 1) % self._num_buffers

    def publish(self, note: int) -> None:
        """The oldest claimed buffer is filled; `note` (64 bits, signed) goes with it."""
        assert self._published < self._claimed
        self._control.words[TAIL + 1 + self._published % self._num_buffers] = note
        self._published += 1
        self._control.fence()  # buffer and note are there before the tail that publishes them
        self._control.words[TAIL] = self._published


class BufferReader:
    """The emptying end; there may be only one."""

    def __init__(self, memory: SharedMemory, num_buffers: int, epoch: int) -> None:
        self._control, self._num_buffers = Control(memory), num_buffers
        self._taken = self._released = epoch << 32

    def take(self) -> int | None:
        """The index of the next filled buffer; None: there is none yet."""
        if self._control.words[TAIL] <= self._taken:
            return None
        self._control.fence()  # the tail is read before what it publishes
        self._taken += 1
        return (self._taken - 1) % self._num_buffers

    def release(self) -> int:
        """Give the oldest taken buffer back; returns its note."""
        assert self._released < self._taken
        note: int = self._control.words[TAIL + 1 + self._released % self._num_buffers]
        self._released += 1
        self._control.fence()  # the buffer has been read before the head that lets it be overwritten
        self._control.words[HEAD] = self._released
        return note

"""A ring of messages of any size in shared memory: one process writes, one reads, neither waits here.

A message is contiguous, starts at a multiple of 64 bytes and stays in place until the reader releases it, so that
a GPU may copy it straight from there. Messages are released in the order they were written.

    memory:   | tail | head | message | message | ... free ... |    tail, head: bytes ever written, ever released
    message:  | length, padded to 64 bytes | payload, padded to 64 bytes |

A message that does not fit before the end of the memory starts at its beginning; length SKIP marks the gap.
Each counter has one writer and is one aligned 64-bit word, which x86-64 and arm64 load and store as a whole.
"""

from __future__ import annotations

import platform
import threading
from collections import deque

from nanopd.ipc.shared_memory import SharedMemory

LINE = 64  # bytes of a cache line: the alignment of messages
CONTROL_NBYTES = 4 * LINE  # the counters lie two lines apart, as processors prefetch lines in pairs
TAIL, HEAD = 0, 2 * LINE // 8  # words of the control area
SKIP = -1


class RingFull(Exception):
    """There is no room until the reader releases a message; try again later."""


def ring_memory(max_message_nbytes: int, num_messages: int, name: str = "ring") -> SharedMemory:
    """Memory for a ring with room for any `num_messages` messages of up to `max_message_nbytes` each at a time."""
    # The gap before the end is shorter than the message that did not fit there, hence one message more.
    return SharedMemory(CONTROL_NBYTES + (num_messages + 1) * _footprint(max_message_nbytes), name)


class _RingEnd:
    """A ring's memory as one of its two ends sees it."""

    def __init__(self, memory: SharedMemory) -> None:
        mapped = memory.map()
        self._capacity = (len(mapped) - CONTROL_NBYTES) // LINE * LINE
        assert self._capacity >= 2 * LINE, f"{len(mapped)} bytes are too few for a ring"
        self._data = mapped[CONTROL_NBYTES : CONTROL_NBYTES + self._capacity]
        self._lengths = self._data.cast("q")
        self._control = mapped[:CONTROL_NBYTES].cast("q")  # each assignment is one store of 8 bytes
        self._needs_fence = platform.machine() != "x86_64"
        self._lock = threading.Lock()
        self._lock.acquire()

    def _fence(self) -> None:
        """Loads and stores before this call happen, for the other side too, before those behind it.

        x86-64 keeps loads in order, stores in order, and stores behind earlier loads: all that a ring needs. arm64
        does not. Python has no fence, but the release of a lock and an acquire behind it are one there (stlr, ldar).
        """
        self._lock.release()
        self._lock.acquire()


class RingWriter(_RingEnd):
    """The writing end; there may be only one."""

    def __init__(self, memory: SharedMemory) -> None:
        super().__init__(memory)
        self._tail: int = self._control[TAIL]
        self._reserved = -1  # bytes; -1: none are reserved
        # The gap is shorter than the message behind it: up to this size, both fit into an empty ring.
        self.max_message_nbytes = self._capacity // 2 // LINE * LINE - LINE

    def reserve(self, nbytes: int) -> memoryview:
        """Room for a message, [nbytes] uint8, to be filled before `commit`; a second call replaces the first.

        Raises:
            RingFull: not now.
            ValueError: never, the message is too large for the ring.
        """
        if nbytes > self.max_message_nbytes:
            raise ValueError(f"a message of {nbytes} bytes; this ring takes up to {self.max_message_nbytes} bytes")
        tail, capacity = self._tail, self._capacity
        start = tail % capacity
        needed = _footprint(nbytes)
        gap = capacity - start if start + needed > capacity else 0
        if tail + gap + needed - self._control[HEAD] > capacity:
            raise RingFull(f"no room for {nbytes} bytes: {tail - self._control[HEAD]} of {capacity} are unreleased")
        if gap:
            self._lengths[start // 8] = SKIP
            self._tail += gap  # the next `commit` publishes it
            start = 0
        self._reserved = nbytes
        start += LINE
        return self._data[start : start + nbytes]

    def commit(self, nbytes: int) -> None:
        """Publish the first `nbytes` of the reserved message."""
        assert 0 <= nbytes <= self._reserved, f"commit of {nbytes} bytes, {self._reserved} reserved"
        self._reserved = -1
        self._lengths[self._tail % self._capacity // 8] = nbytes
        self._tail = tail = self._tail + _footprint(nbytes)
        if self._needs_fence:
            self._fence()  # payload and length before the tail that publishes them
        self._control[TAIL] = tail


class RingReader(_RingEnd):
    """The reading end; there may be only one."""

    def __init__(self, memory: SharedMemory) -> None:
        super().__init__(memory)
        self._next: int = self._control[HEAD]  # what was read, released or not
        self._unreleased: deque[int] = deque()  # where each message that was read and not released ends

    def read(self) -> memoryview | None:
        """The next message, [nbytes] uint8, in place and valid until its `release`; None if there is none yet."""
        position = self._next
        if position == self._control[TAIL]:
            return None
        if self._needs_fence:
            self._fence()  # the tail before what it publishes
        start = position % self._capacity
        nbytes = self._lengths[start // 8]
        if nbytes == SKIP:  # a message always follows
            position += self._capacity - start
            start, nbytes = 0, self._lengths[0]
        self._next = position = position + _footprint(nbytes)
        self._unreleased.append(position)
        start += LINE
        return self._data[start : start + nbytes]

    def release(self) -> None:
        """Give the room of the oldest unreleased message back to the writer; its view must not be used any more."""
        assert self._unreleased, "release without a message that was read"
        if self._needs_fence:
            self._fence()  # all reads of the message before the head that lets it be overwritten
        self._control[HEAD] = self._unreleased.popleft()


def _footprint(nbytes: int) -> int:
    """Bytes that a message of `nbytes` takes in the ring: the line of its length, and those of its payload."""
    return LINE + (nbytes + LINE - 1) // LINE * LINE

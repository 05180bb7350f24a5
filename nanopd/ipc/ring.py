"""A ring of messages of any size in shared memory: one process writes, one reads, neither waits here.

A message is copied in and copied out as a whole, so what was read stays as it is whatever is written afterwards.

    memory:   | tail | head | ... messages ... |    tail, head: bytes ever written, ever read
    message:  | length | payload, padded to 8 bytes |    a message that reaches the end goes on at the beginning

The counters only grow, so a full ring is never taken for an empty one.
"""

from __future__ import annotations

from nanopd.ipc.control import CONTROL_NBYTES, HEAD, TAIL, WORD, Control
from nanopd.ipc.shared_memory import SharedMemory


class RingFull(Exception):
    """There is no room until the reader has read; try again later."""


def ring_memory(max_message_nbytes: int, num_messages: int, name: str = "ring") -> SharedMemory:
    """Memory for a ring with room for any `num_messages` messages of up to `max_message_nbytes` each at a time."""
    return SharedMemory(CONTROL_NBYTES + num_messages * _footprint(max_message_nbytes), name)


class RingWriter:
    """The writing end; there may be only one."""

    def __init__(self, memory: SharedMemory) -> None:
        self._control, self._data = Control(memory), _data_of(memory)
        self._words, self._lengths = self._control.words, self._data.cast("q")
        self._tail: int = self._words[TAIL]

    def write(self, message: bytes | memoryview) -> None:
        """Put a message behind those before.

        Raises:
            RingFull: the reader is behind.
            ValueError: the message is too large for the ring, however empty.
        """
        nbytes, capacity, tail = len(message), len(self._data), self._tail
        end = tail + _footprint(nbytes)
        if end - tail > capacity:
            raise ValueError(f"a message of {nbytes} bytes; this ring takes up to {capacity - WORD} bytes")
        if end - self._words[HEAD] > capacity:
            raise RingFull(f"no room for {nbytes} bytes: {tail - self._words[HEAD]} of {capacity} are unread")
        self._lengths[tail % capacity // WORD] = nbytes
        start = (tail + WORD) % capacity
        if start + nbytes <= capacity:
            self._data[start : start + nbytes] = message
        else:
            self._data[start:] = message[: capacity - start]
            self._data[: start + nbytes - capacity] = message[capacity - start :]
        self._control.fence()  # the message is there before the tail that publishes it
        self._words[TAIL] = self._tail = end


class RingReader:
    """The reading end; there may be only one."""

    def __init__(self, memory: SharedMemory) -> None:
        self._control, self._data = Control(memory), _data_of(memory)
        self._words, self._lengths = self._control.words, self._data.cast("q")
        self._head: int = self._words[HEAD]

    def read(self) -> bytes | None:
        """The next message; None: there is none yet."""
        capacity, head = len(self._data), self._head
        if head == self._words[TAIL]:
            return None
        self._control.fence()  # the tail is read before what it publishes
        nbytes = self._lengths[head % capacity // WORD]
        start = (head + WORD) % capacity
        message = bytes(self._data[start : start + nbytes])
        if len(message) < nbytes:
            message += self._data[: nbytes - len(message)]
        self._head = head + _footprint(nbytes)
        self._control.fence()  # the message has been copied before the head that lets it be overwritten
        self._words[HEAD] = self._head
        return message


def _data_of(memory: SharedMemory) -> memoryview:
    """The whole words of a ring's memory behind its counters."""
    data = memory.map()[CONTROL_NBYTES:]
    assert len(data) >= WORD, f"{CONTROL_NBYTES + len(data)} bytes are too few for a ring"
    return data[: len(data) // WORD * WORD]


def _footprint(nbytes: int) -> int:
    """Bytes that a message of `nbytes` takes in the ring: the word of its length, and those of its payload."""
    return WORD + (nbytes + WORD - 1) // WORD * WORD

"""Messages of bytes between two processes: what an end of a channel is, and the one made of rings and doorbells."""

from __future__ import annotations

from typing import Protocol

from nanopd.ipc.doorbell import Doorbell
from nanopd.ipc.ring import RingReader, RingWriter, ring_memory
from nanopd.ipc.shared_memory import SharedMemory


class Endpoint(Protocol):
    """One end of a channel: whole messages, in order. Nothing here waits; a `Waiter` does, for its descriptor."""

    def send(self, message: bytes) -> None:
        """Give the other side a message and wake it. Raises ring.ChannelFull: not now."""

    def receive(self) -> bytes | None:
        """The next message from the other side; None: there is none yet."""

    def fileno(self) -> int:
        """The descriptor to wait for: readable since something came. Who is woken receives until there is nothing."""

    def close(self) -> None: ...


class RingEndpoint:
    """An end of two rings in shared memory. May be an argument of a process that is about to be spawned."""

    def __init__(self, outgoing: SharedMemory, outgoing_bell: Doorbell, incoming: SharedMemory, bell: Doorbell) -> None:
        self._parts = outgoing, outgoing_bell, incoming, bell
        self._writer, self._reader = RingWriter(outgoing), RingReader(incoming)
        self._outgoing_bell, self._bell = outgoing_bell, bell

    def send(self, message: bytes) -> None:
        self._writer.write(message)
        self._outgoing_bell.ring()

    def receive(self) -> bytes | None:
        return self._reader.read()

    def fileno(self) -> int:
        return self._bell.fileno()

    def close(self) -> None:
        for part in self._parts:
            part.close()

    def __reduce__(self) -> tuple:
        return type(self), self._parts


def channel(max_message_nbytes: int, num_messages: int) -> tuple[Endpoint, Endpoint]:
    """The two ends of a channel with room for `num_messages` of `max_message_nbytes` each way."""
    there, back = (ring_memory(max_message_nbytes, num_messages) for _ in range(2))
    bell_there, bell_back = Doorbell(), Doorbell()
    return RingEndpoint(there, bell_there, back, bell_back), RingEndpoint(back, bell_back, there, bell_there)

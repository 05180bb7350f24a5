"""A two-way channel between two processes: a ring and a doorbell in either direction."""

from __future__ import annotations

from nanopd.ipc.doorbell import Doorbell
from nanopd.ipc.ring import RingReader, RingWriter, ring_memory
from nanopd.ipc.shared_memory import SharedMemory


class Endpoint:
    """One side of a channel; may be handed to a process that is about to be spawned until it is opened."""

    def __init__(self, outgoing: SharedMemory, outgoing_bell: Doorbell, incoming: SharedMemory, bell: Doorbell) -> None:
        self._outgoing, self._outgoing_bell, self._incoming = outgoing, outgoing_bell, incoming
        self.bell = bell  # rung when there is something to read

    def open(self) -> None:
        self.writer = RingWriter(self._outgoing)
        self.reader = RingReader(self._incoming)

    def commit(self, nbytes: int) -> None:
        """Publish what was written to `writer.reserve(nbytes)`, and wake the other side."""
        self.writer.commit(nbytes)
        self._outgoing_bell.ring()

    def close(self) -> None:
        for part in (self._outgoing, self._outgoing_bell, self._incoming, self.bell):
            part.close()


def channel(max_message_nbytes: int, num_messages: int) -> tuple[Endpoint, Endpoint]:
    """The two sides of a channel with room for `num_messages` of `max_message_nbytes` each way."""
    there, back = (ring_memory(max_message_nbytes, num_messages) for _ in range(2))
    bell_there, bell_back = Doorbell(), Doorbell()
    return Endpoint(there, bell_there, back, bell_back), Endpoint(back, bell_back, there, bell_there)

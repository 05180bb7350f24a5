"""Messages of bytes between two processes, by way of rings and doorbells."""

from __future__ import annotations

from collections import deque

from nanopd.ipc.doorbell import Doorbell
from nanopd.ipc.ring import RingFull, RingReader, RingWriter, ring_memory
from nanopd.ipc.shared_memory import SharedMemory


class Endpoint:
    """One end of a channel: whole messages, in order. Nothing here waits; a `Waiter` does, for its descriptor.

    May be an argument of a process that is about to be spawned.
    """

    def __init__(self, outgoing: SharedMemory, outgoing_bell: Doorbell, incoming: SharedMemory, bell: Doorbell) -> None:
        self._parts = outgoing, outgoing_bell, incoming, bell
        self._writer, self._reader = RingWriter(outgoing), RingReader(incoming)
        self._outgoing_bell, self._bell = outgoing_bell, bell
        self._backlog: deque[bytes] = deque()
        self.has_backlog = False  # whether there is no room yet for some of what was sent

    def send(self, message: bytes) -> None:
        """Give the other side a message and wake it. Never fails: what there is no room for goes at a later call."""
        self._backlog.append(message)
        self._flush()

    def receive(self) -> bytes | None:
        """The next message from the other side, after another try with the backlog; None: there is none yet."""
        if self.has_backlog:
            self._flush()
        return self._reader.read()

    def fileno(self) -> int:
        """The descriptor to wait for: readable since something came. Who is woken receives until there is nothing."""
        return self._bell.fileno()

    def close(self) -> None:
        for part in self._parts:
            part.close()

    def __reduce__(self) -> tuple:
        return type(self), self._parts

    def _flush(self) -> None:
        try:
            while self._backlog:
                self._writer.write(self._backlog[0])
                self._backlog.popleft()
                self._outgoing_bell.ring()
        except RingFull:
            pass
        self.has_backlog = bool(self._backlog)


def channel(max_message_nbytes: int, num_messages: int) -> tuple[Endpoint, Endpoint]:
    """The two ends of a channel with room for `num_messages` of `max_message_nbytes` each way."""
    there, back = (ring_memory(max_message_nbytes, num_messages) for _ in range(2))
    bell_there, bell_back = Doorbell(), Doorbell()
    return Endpoint(there, bell_there, back, bell_back), Endpoint(back, bell_back, there, bell_there)

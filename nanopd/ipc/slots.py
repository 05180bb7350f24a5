"""A ring of slots of one size in shared memory: one process fills them, one empties them, neither waits here.

Either side may have several slots in hand, while a device copies. The counters never go back: both ends start at their
*epoch*, which grows when either process is replaced, so that what was there before counts as nothing.

    memory:   | tail, notes | head | slot 0 | slot 1 | ...     tail, head: epoch << 32, + slots filled, emptied
"""

from __future__ import annotations

from nanopd.ipc.ring import CONTROL_NBYTES, HEAD, TAIL, _RingEnd
from nanopd.ipc.shared_memory import SharedMemory

MAX_SLOTS = HEAD - TAIL - 1  # that there is room for the notes of


def slots_nbytes(slot_nbytes: int, num_slots: int) -> int:
    """Of the memory for that many slots, which begin at CONTROL_NBYTES."""
    assert num_slots <= MAX_SLOTS
    return CONTROL_NBYTES + num_slots * slot_nbytes


class _SlotEnd(_RingEnd):
    """The slots as one of the two ends sees them."""

    def __init__(self, memory: SharedMemory, num_slots: int, epoch: int) -> None:
        super().__init__(memory)
        self._num_slots = num_slots
        self._start = self._in_hand = self._done = epoch << 32  # at first, claimed or taken, published or released


class SlotWriter(_SlotEnd):
    """The filling end; there may be only one."""

    def claim(self) -> int | None:
        """The index of a slot to fill; None: not now."""
        if self._in_hand - max(self._control[HEAD], self._start) >= self._num_slots:
            return None
        self._in_hand += 1
        return (self._in_hand - 1) % self._num_slots

    def publish(self, note: int) -> None:
        """The oldest claimed slot is filled; `note` (64 bits, signed) goes with it."""
        assert self._done < self._in_hand
        self._control[TAIL + 1 + self._done % self._num_slots] = note
        self._done += 1
        if self._needs_fence:
            self._fence()  # slot and note before the tail that publishes them
        self._control[TAIL] = self._done


class SlotReader(_SlotEnd):
    """The emptying end; there may be only one."""

    def take(self) -> int | None:
        """The index of the next filled slot; None: there is none yet."""
        if self._control[TAIL] <= self._in_hand:
            return None
        if self._needs_fence:
            self._fence()  # the tail before what it publishes
        self._in_hand += 1
        return (self._in_hand - 1) % self._num_slots

    def release(self) -> int:
        """Give the oldest taken slot back; returns its note."""
        assert self._done < self._in_hand
        note: int = self._control[TAIL + 1 + self._done % self._num_slots]
        self._done += 1
        if self._needs_fence:
            self._fence()  # all reads of the slot before the head that lets it be overwritten
        self._control[HEAD] = self._done
        return note

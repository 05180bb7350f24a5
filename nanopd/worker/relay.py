"""Blocks by way of pinned host memory, for two workers of which one cannot read the other's cache.

Both get the plan. The source packs blocks into slots of a ring in shared memory, the destination unpacks them; each
half is a small state machine that its worker's loop polls, and neither ever waits. Plans from one worker to another
are carried out one after the other, in their order, by both.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import deque
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from nanopd.ipc.ring import CONTROL_NBYTES
from nanopd.ipc.shared_memory import SharedMemory
from nanopd.ipc.slots import SlotReader, SlotWriter, slots_nbytes
from nanopd.messages import TransferAck
from nanopd.worker.block_mover import DigestMismatch, Mark, Mover

SLOT_BYTES = 8 << 20  # a copy of 150 us; a larger block has a slot for itself
NUM_SLOTS = 8


class RelayMemory:
    """The slots between two workers, in one direction, as one of the two sees them."""

    def __init__(self, memory: SharedMemory, block_bytes: int, is_pinned: bool) -> None:
        """Whoever comes first gives `memory` its size. `is_pinned`: a GPU copies from or to it."""
        self.block_bytes = block_bytes
        self.blocks_per_slot = max(1, SLOT_BYTES // block_bytes)
        slot_bytes = self.blocks_per_slot * block_bytes
        memory.resize(slots_nbytes(slot_bytes, NUM_SLOTS))
        mapped = torch.frombuffer(memory.map(), dtype=torch.uint8)
        if is_pinned:
            torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(mapped.data_ptr(), len(mapped), 0))
        self.slots = mapped[CONTROL_NBYTES:].view(NUM_SLOTS, slot_bytes)


End = TypeVar("End", SlotReader, SlotWriter)


@dataclass(slots=True, eq=False)
class RelayLink(Generic[End]):
    """One direction to or from a peer of one generation."""

    memory: RelayMemory
    slots: End
    mover: Mover
    verify: bool
    is_gone: bool = False  # the peer


class _Half(ABC, Generic[End]):
    """One worker's part in a plan."""

    def __init__(self, link: RelayLink[End], ids: Tensor) -> None:
        """ids [num_blocks], from `link.mover.ids`."""
        self._link: RelayLink[End] = link
        self._chunks = deque(ids.split(link.memory.blocks_per_slot))  # not begun
        self._queued: deque[tuple[Mark, Tensor]] = deque()  # being copied

    def is_done(self) -> bool:
        """Goes on as far as it can. When the peer is gone, only what is being copied is still waited for."""
        link = self._link
        while self._chunks and not link.is_gone and (index := self._next_slot()) is not None:
            ids = self._chunks.popleft()
            self._copy(ids, link.memory.slots[index])
            self._queued.append((link.mover.mark(), ids))
        while self._queued and self._queued[0][0].query():
            self._copied(self._queued.popleft()[1])
        return not self._queued and (not self._chunks or link.is_gone)

    @abstractmethod
    def _next_slot(self) -> int | None: ...

    @abstractmethod
    def _copy(self, ids: Tensor, slot: Tensor) -> None: ...

    @abstractmethod
    def _copied(self, ids: Tensor) -> None:
        """The oldest slot in hand is done with."""


class Sending(_Half[SlotWriter]):
    """The source's half; the destination acknowledges for both."""

    def _next_slot(self) -> int | None:
        return self._link.slots.claim()

    def _copy(self, ids: Tensor, slot: Tensor) -> None:
        self._link.mover.pack(ids, slot)

    def _copied(self, ids: Tensor) -> None:
        self._link.slots.publish(self._link.mover.digest(ids) if self._link.verify else 0)

    def result(self) -> None:
        return None


class Receiving(_Half[SlotReader]):
    """The destination's half."""

    def __init__(self, link: RelayLink[SlotReader], ids: Tensor, plan_id: int) -> None:
        super().__init__(link, ids)
        self._plan_id, self._num_bytes = plan_id, len(ids) * link.memory.block_bytes
        self._started_s = time.perf_counter()

    def _next_slot(self) -> int | None:
        return self._link.slots.take()

    def _copy(self, ids: Tensor, slot: Tensor) -> None:
        self._link.mover.unpack(slot, ids)

    def _copied(self, ids: Tensor) -> None:
        digest = self._link.slots.release()
        if self._link.verify and self._link.mover.digest(ids) != digest:
            raise DigestMismatch(f"plan {self._plan_id}: blocks that came through the relay")

    def result(self) -> TransferAck:
        duration_us = int((time.perf_counter() - self._started_s) * 1e6)
        return TransferAck(self._plan_id, duration_us, 0 if self._chunks else self._num_bytes)

"""KV blocks by way of pinned host memory, for two workers of which one cannot read the other's cache.

Both get the plan. The source packs blocks into buffers in shared memory, the destination unpacks them. Each half of a
plan is a small state machine that its worker's loop polls, and neither ever waits. Plans from one worker to another
are carried out one after the other, in their order, by both.
"""

from __future__ import annotations

import time
from collections import deque

import torch
from torch import Tensor

from nanopd.ipc.buffers import BufferReader, BufferWriter, buffers_nbytes
from nanopd.ipc.control import CONTROL_NBYTES
from nanopd.ipc.shared_memory import SharedMemory
from nanopd.messages import TransferAck
from nanopd.worker.block_mover import DigestMismatch, Mover
from nanopd.worker.pending import Mark

BUFFER_BYTES = 8 << 20  # a copy of 150 us; a larger block has a buffer for itself
NUM_BUFFERS = 8


class RelayMemory:
    """The buffers between two workers, in one direction, as one of the two sees them."""

    def __init__(self, shared: SharedMemory, block_bytes: int, is_pinned: bool) -> None:
        """Whoever comes first gives `shared` its size. `is_pinned`: a GPU copies from or to it."""
        self.shared, self.block_bytes = shared, block_bytes
        self.blocks_per_buffer = max(1, BUFFER_BYTES // block_bytes)
        buffer_bytes = self.blocks_per_buffer * block_bytes
        shared.resize(buffers_nbytes(buffer_bytes, NUM_BUFFERS))
        mapped = torch.frombuffer(shared.map(), dtype=torch.uint8)
        if is_pinned:
            torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(mapped.data_ptr(), len(mapped), 0))
        self.buffers = mapped[CONTROL_NBYTES:].view(NUM_BUFFERS, buffer_bytes)


class RelayLink:
    """One direction to or from a peer of one generation: of the two ends this worker uses the one that is its own."""

    def __init__(self, memory: RelayMemory, epoch: int, mover: Mover, verify: bool) -> None:
        self.memory, self.mover, self.verify = memory, mover, verify
        self.writer = BufferWriter(memory.shared, NUM_BUFFERS, epoch)
        self.reader = BufferReader(memory.shared, NUM_BUFFERS, epoch)
        self.is_gone = False  # whether the peer is dead or has been replaced


class Sending:
    """The source's half of a plan. The destination acknowledges for both."""

    def __init__(self, link: RelayLink, ids: Tensor) -> None:
        """ids [num_blocks], from `link.mover.ids`."""
        self._link = link
        self._chunks = deque(ids.split(link.memory.blocks_per_buffer))  # ids whose copy has not begun
        self._copying: deque[tuple[Mark, Tensor]] = deque()

    def is_done(self) -> bool:
        """Goes on as far as it can. When the peer is gone, only what is being copied is still waited for."""
        link = self._link
        while self._chunks and not link.is_gone and (index := link.writer.claim()) is not None:
            ids = self._chunks.popleft()
            link.mover.pack(ids, link.memory.buffers[index])
            self._copying.append((link.mover.mark(), ids))
        while self._copying and self._copying[0][0].query():
            _, ids = self._copying.popleft()
            link.writer.publish(link.mover.digest(ids) if link.verify else 0)
        return not self._copying and (not self._chunks or link.is_gone)

    def result(self) -> None:
        return None


class Receiving:
    """The destination's half of a plan."""

    def __init__(self, link: RelayLink, ids: Tensor, plan_id: int) -> None:
        """ids [num_blocks], from `link.mover.ids`."""
        self._link, self._plan_id = link, plan_id
        self._num_bytes = len(ids) * link.memory.block_bytes
        self._chunks = deque(ids.split(link.memory.blocks_per_buffer))  # ids whose copy has not begun
        self._copying: deque[tuple[Mark, Tensor]] = deque()
        self._started_s = time.perf_counter()

    def is_done(self) -> bool:
        """As `Sending.is_done`. Raises DigestMismatch where blocks differ from what was sent."""
        link = self._link
        while self._chunks and not link.is_gone and (index := link.reader.take()) is not None:
            ids = self._chunks.popleft()
            link.mover.unpack(link.memory.buffers[index], ids)
            self._copying.append((link.mover.mark(), ids))
        while self._copying and self._copying[0][0].query():
            _, ids = self._copying.popleft()
            digest = link.reader.release()
            if link.verify and link.mover.digest(ids) != digest:
                raise DigestMismatch(f"plan {self._plan_id}: blocks that came through the relay")
        return not self._copying and (not self._chunks or link.is_gone)

    def result(self) -> TransferAck:
        duration_us = int((time.perf_counter() - self._started_s) * 1e6)
        return TransferAck(self._plan_id, duration_us, 0 if self._chunks else self._num_bytes)

"""Reads and writes whole blocks of a worker's own KV cache, on its device: `HostMover` and `CudaMover`, one interface.

A mover queues what it is told and says through a `Mark` when that is done; the CPU's does it at once. On a GPU each
mover has a stream of its own beside that of the steps, and nothing but `digest` waits for the device.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from nanopd.worker.pending import Mark, mark

if TYPE_CHECKING:
    from nanopd.cuda.peer_memory import PeerMemory

# A copy of 64 CTAs reaches 370 GB/s over NVLink, as with any higher number (32 reach 357), on half of the processors.
MAX_CTAS = 64
HOST_CTAS = 16  # a copy to or from host memory fills the bus with as many CTAs
PRIORITY = -1  # of the stream, so that blocks that a sequence waits for go before the rest of a running step
HOST_CHUNK_BYTES = 1 << 20  # a copy on the CPU takes as much at a time, which stays in the processor's cache
NUM_STAGED_IDS = 4096  # pinned memory is asked for in this one size, so that torch can use it again


class DigestMismatch(RuntimeError):
    """Blocks that were moved differ from their source."""


class Mover(Protocol):
    """Ids are those that `ids` gave. A buffer is host memory, [*] uint8, that holds the blocks one after the other."""

    def ids(self, *columns: np.ndarray) -> list[Tensor]:
        """Brings columns of block ids, each [num_blocks] int32, to the device."""

    def pull(self, peer: Any, src_ids: Tensor, dst_ids: Tensor) -> None:
        """Copies blocks of a peer's cache (a `Tensor` on the CPU, a `PeerMemory` on a GPU) into this one."""

    def pack(self, ids: Tensor, buffer: Tensor) -> None: ...

    def unpack(self, buffer: Tensor, ids: Tensor) -> None: ...

    def mark(self) -> Mark: ...

    def digest(self, ids: Tensor, peer: Any = None) -> int:
        """A signed hash of 64 bits of blocks, of this cache or a peer's. For debugging, it waits for the device."""


class HostMover:
    def __init__(self, kv: Tensor) -> None:
        self._kv = _rows(kv)
        self._chunk = max(1, HOST_CHUNK_BYTES // self._kv[0].nbytes)

    def ids(self, *columns: np.ndarray) -> list[Tensor]:
        return [torch.from_numpy(column.astype(np.int64)) for column in columns]

    def pull(self, peer: Tensor, src_ids: Tensor, dst_ids: Tensor) -> None:
        for src, dst in zip(src_ids.split(self._chunk), dst_ids.split(self._chunk)):
            self._kv.index_copy_(0, dst, _rows(peer).index_select(0, src))

    def pack(self, ids: Tensor, buffer: Tensor) -> None:
        torch.index_select(self._kv, 0, ids, out=self._blocks_of(buffer, len(ids)))

    def unpack(self, buffer: Tensor, ids: Tensor) -> None:
        self._kv.index_copy_(0, ids, self._blocks_of(buffer, len(ids)))

    def mark(self) -> Mark:
        return mark(self._kv.device)

    def digest(self, ids: Tensor, peer: Tensor | None = None) -> int:
        return _digest((self._kv if peer is None else _rows(peer)).index_select(0, ids))

    def _blocks_of(self, buffer: Tensor, num_blocks: int) -> Tensor:
        size = self._kv.shape[1]
        return buffer.view(self._kv.dtype)[: num_blocks * size].view(num_blocks, size)


class CudaMover:
    """The mover of a GPU, for the thread that computes on it."""

    def __init__(self, kv: Tensor) -> None:
        from nanopd.cuda import Side, move_blocks  # imported here, as CPU workers load nothing of CUDA

        self._side, self._move_blocks = Side, move_blocks
        self._kv, self._device = _rows(kv), kv.get_device()
        self._block_bytes = self._kv.shape[1] * kv.element_size()
        self._stream = torch.cuda.Stream(kv.device, priority=PRIORITY)
        self.max_ctas = MAX_CTAS

    def ids(self, *columns: np.ndarray) -> list[Tensor]:
        num_ids = sum(map(len, columns))
        staging = torch.empty(max(num_ids, NUM_STAGED_IDS), dtype=torch.int32, pin_memory=True)[:num_ids]
        np.concatenate(columns, out=staging.numpy())
        with torch.cuda.stream(self._stream):
            on_device = staging.to(self._kv.device, non_blocking=True)
        return list(on_device.split([len(column) for column in columns]))

    def pull(self, peer: PeerMemory, src_ids: Tensor, dst_ids: Tensor) -> None:
        src, dst = self._side(peer.address, self._block_bytes, src_ids), self._side.of(self._kv, dst_ids)
        self._move(src, dst, len(dst_ids), self.max_ctas)

    def pack(self, ids: Tensor, buffer: Tensor) -> None:
        self._move(self._side.of(self._kv, ids), self._side(buffer.data_ptr(), self._block_bytes), len(ids), HOST_CTAS)

    def unpack(self, buffer: Tensor, ids: Tensor) -> None:
        self._move(self._side(buffer.data_ptr(), self._block_bytes), self._side.of(self._kv, ids), len(ids), HOST_CTAS)

    def mark(self) -> Mark:
        return mark(self._kv.device, self._stream)

    def digest(self, ids: Tensor, peer: PeerMemory | None = None) -> int:
        with torch.cuda.stream(self._stream):
            blocks = torch.empty(len(ids), self._block_bytes, dtype=torch.uint8, device=self._kv.device)
            address = self._kv.data_ptr() if peer is None else peer.address
            self._move(self._side(address, self._block_bytes, ids), self._side.of(blocks), len(ids), self.max_ctas)
            return _digest(blocks.cpu())

    def _move(self, src: Any, dst: Any, num_blocks: int, max_ctas: int) -> None:
        with torch.cuda.stream(self._stream):
            self._move_blocks(src, dst, num_blocks, self._block_bytes, self._device, max_ctas)


def copy_blocks(src: Tensor, src_ids: Tensor, dst: Tensor, dst_ids: Tensor) -> None:
    """Copies blocks from one cache to another of the same layout, in the order of the current stream; ids [n] int64.

    On a GPU either cache may lie in host memory that the GPU can address; the ids are on the device.
    """
    if not src_ids.is_cuda:
        HostMover(dst).pull(src, src_ids, dst_ids)
        return
    from nanopd.cuda import Side, move_blocks  # imported here, as CPU workers load nothing of CUDA

    sides = Side.of(src, src_ids), Side.of(dst, dst_ids)
    move_blocks(*sides, len(src_ids), src[0].nbytes, src_ids.get_device(), HOST_CTAS)


def mover_for(kv: Tensor) -> Mover:
    """The mover of a cache kv [num_blocks, ...], which is contiguous."""
    return CudaMover(kv) if kv.is_cuda else HostMover(kv)


def _rows(kv: Tensor) -> Tensor:
    return kv.view(len(kv), -1)


def _digest(blocks: Tensor) -> int:
    data = blocks.contiguous().view(torch.uint8).numpy().tobytes()
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little", signed=True)

"""Moves KV blocks between workers: carries out this worker's part in the plans that name it.

Where the destination can read the source's cache (shared memory; the memory of a GPU, through CUDA IPC), it pulls
alone: one copy, on a stream of its own, that no step waits for and that waits for no step. The copy needs no event of
the source: the parent sends a plan when it has seen the end of the step that wrote the blocks, and nobody reads the
destination's blocks before the acknowledgement. Elsewhere both workers take part, by way of the relay.

A peer is known by its generation. When it is dead or replaced, plans that wait for it are given up; copies from its
memory, which stays mapped and readable after its death, are finished first.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from nanopd.config import EngineConfig
from nanopd.errors import ConfigError
from nanopd.ipc.shared_memory import SharedMemory
from nanopd.messages import TransferAck, TransferPath, TransferPlan
from nanopd.worker.block_mover import DigestMismatch, Mover, mover_for
from nanopd.worker.pending import Done, Pending
from nanopd.worker.relay import Receiving, RelayLink, RelayMemory, Sending

Pair = tuple[int, int]  # source, destination


def path_between(src: int, dst: int, config: EngineConfig) -> TransferPath:
    """How blocks get from worker `src` to worker `dst`. The GPUs of both must be in the machine that this runs on.

    Raises:
        ConfigError: they cannot get there as `transfer` says.
    """
    src_gpu, dst_gpu = config.workers[src].cuda_index, config.workers[dst].cuda_index
    if config.transfer == TransferPath.RELAY or (src_gpu is None) != (dst_gpu is None):
        return TransferPath.RELAY
    if src_gpu is None or dst_gpu is None:
        return TransferPath.SHM
    if src_gpu == dst_gpu or torch.cuda.can_device_access_peer(dst_gpu, src_gpu):
        return TransferPath.IPC
    if config.transfer == TransferPath.IPC:
        raise ConfigError("transfer", config.transfer, f"auto or relay, as cuda:{dst_gpu} cannot read cuda:{src_gpu}")
    return TransferPath.RELAY


def paths_to(dst: int, config: EngineConfig) -> dict[int, TransferPath]:
    """By source, how blocks get to worker `dst`; asked and raises as `path_between`."""
    return {src: path_between(src, dst, config) for src in range(len(config.workers)) if src != dst}


@dataclass(slots=True, eq=False)
class _Peer:
    generation: int
    cache: Any  # what `Mover.pull` reads; None: blocks go through the relay, or the peer is gone
    is_gone: bool = False
    links: dict[Pair, RelayLink] = field(default_factory=dict)


class _Pull:
    """A plan that the destination carries out alone."""

    def __init__(self, plan: TransferPlan, cache: Any, mover: Mover, num_bytes: int, verify: bool) -> None:
        self._plan, self._num_bytes, self._verify = plan, num_bytes, verify
        self._mover, self._cache = mover, cache  # held so that it stays open until the copy is done
        self._src_ids, self._dst_ids = mover.ids(plan.src_blocks, plan.dst_blocks)
        self._start = mover.mark()
        mover.pull(cache, self._src_ids, self._dst_ids)
        self._end = mover.mark()

    def is_done(self) -> bool:
        return self._end.query()

    def result(self) -> TransferAck:
        mover = self._mover
        if self._verify and mover.digest(self._src_ids, self._cache) != mover.digest(self._dst_ids):
            raise DigestMismatch(f"plan {self._plan.plan_id}: blocks pulled from worker {self._plan.src_worker}")
        return TransferAck(self._plan.plan_id, int(self._start.elapsed_time(self._end) * 1e3), self._num_bytes)


class KVTransfer:
    """Carries out the plans that have this worker as their destination, or as the source of a relay."""

    def __init__(self, worker: int, kv: Tensor, relays: dict[Pair, SharedMemory], verify: bool) -> None:
        """kv [num_blocks, ...] is contiguous. With `verify`, polling a plan may raise DigestMismatch."""
        self._worker = worker
        self._kv = kv
        self._block_bytes = kv[0].nbytes
        self._verify = verify
        self._incoming, self._outgoing = mover_for(kv), mover_for(kv)  # two streams, as a link carries both directions
        self._relays, self._relay_memories = relays, dict[Pair, RelayMemory]()
        self._peers: dict[int, _Peer] = {}

    def connect(self, worker: int, generation: int, cache: Any) -> None:
        """A peer lives; `cache` is what `Mover.pull` reads, or None where blocks go through the relay."""
        self.disconnect(worker)
        self._peers[worker] = _Peer(generation, cache)

    def disconnect(self, worker: int) -> None:
        """Takes note that a peer is dead, or about to be replaced."""
        if peer := self._peers.get(worker):
            peer.is_gone, peer.cache = True, None
            for link in peer.links.values():
                link.is_gone = True

    def knows(self, plan: TransferPlan) -> bool:
        """Whether the plan's peer is known; if not, a `connect` is under way that was sent before the plan."""
        worker, generation = self._peer_of(plan)
        return worker in self._peers and self._peers[worker].generation >= generation

    def launch(self, plan: TransferPlan) -> Pending:
        """Begin a plan; those from one worker to another are to be polled one after the other."""
        worker, generation = self._peer_of(plan)
        peer, is_source = self._peers[worker], plan.src_worker == self._worker
        if peer.is_gone or peer.generation != generation:
            return Done(None if is_source else TransferAck(plan.plan_id, 0, 0))
        if is_source:
            (ids,) = self._outgoing.ids(plan.src_blocks)
            return Sending(self._link(plan, peer), ids)
        if peer.cache is None:
            (ids,) = self._incoming.ids(plan.dst_blocks)
            return Receiving(self._link(plan, peer), ids, plan.plan_id)
        num_bytes = len(plan.dst_blocks) * self._block_bytes
        return _Pull(plan, peer.cache, self._incoming, num_bytes, self._verify)

    def _peer_of(self, plan: TransferPlan) -> tuple[int, int]:
        if plan.src_worker == self._worker:
            return plan.dst_worker, plan.dst_generation
        return plan.src_worker, plan.src_generation

    def _link(self, plan: TransferPlan, peer: _Peer) -> RelayLink:
        pair = plan.src_worker, plan.dst_worker
        if pair not in self._relay_memories:
            self._relay_memories[pair] = RelayMemory(self._relays[pair], self._block_bytes, self._kv.is_cuda)
        if pair not in peer.links:
            mover = self._outgoing if plan.src_worker == self._worker else self._incoming
            epoch = plan.src_generation + plan.dst_generation
            peer.links[pair] = RelayLink(self._relay_memories[pair], epoch, mover, self._verify)
        return peer.links[pair]

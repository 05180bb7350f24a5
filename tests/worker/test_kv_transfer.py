"""Plans against a copy of the caches that numpy moves: by shared memory and by the relay, peers that die and return.

Workers are in the test's process; their halves of a plan are polled in any order.
"""

from __future__ import annotations

from collections import defaultdict, deque
from random import Random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanopd.config import EngineConfig
from nanopd.errors import ConfigError
from nanopd.ipc.shared_memory import Memories
from nanopd.messages import TransferAck, TransferPath, TransferPlan
from nanopd.worker import block_mover, relay
from nanopd.worker.block_mover import DigestMismatch, HostMover
from nanopd.worker.kv_cache import export_kv
from nanopd.worker.kv_transfer import KVTransfer, path_between
from nanopd.worker.pending import Pending

NUM_BLOCKS = 40
SHAPE = (NUM_BLOCKS, 2, 2, 3, 4)
BLOCK_BYTES = 48 * 4


@pytest.fixture(autouse=True)
def small_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay, "BUFFER_BYTES", 3 * BLOCK_BYTES)
    monkeypatch.setattr(relay, "NUM_BUFFERS", 2)
    monkeypatch.setattr(block_mover, "HOST_CHUNK_BYTES", 5 * BLOCK_BYTES)


class Workers:
    """Some workers and the queues of their loops."""

    def __init__(self, count: int, is_relayed: bool, verify: bool = True) -> None:
        self.memories = Memories.of(count, with_relays=True)
        self.is_relayed, self.verify = is_relayed, verify
        self.generations = [0] * count
        self.kv = [self._new_cache() for _ in range(count)]
        self.transfers = [self._new_transfer(worker) for worker in range(count)]
        self.lanes: list[defaultdict[tuple[int, int], deque[Pending]]] = [defaultdict(deque) for _ in range(count)]
        self.num_plans = 0
        for worker in range(count):
            self.announce(worker)

    def _new_cache(self) -> torch.Tensor:
        return torch.randn(SHAPE)

    def _new_transfer(self, worker: int) -> KVTransfer:
        return KVTransfer(worker, self.kv[worker], self.memories.relays, self.verify)

    def announce(self, worker: int) -> None:
        """Connect a worker, of its present generation, with all others."""
        for other, transfer in enumerate(self.transfers):
            if other != worker:
                transfer.connect(worker, self.generations[worker], None if self.is_relayed else self.kv[worker])
                self.transfers[worker].connect(
                    other, self.generations[other], None if self.is_relayed else self.kv[other]
                )

    def die(self, worker: int) -> None:
        for transfer in self.transfers:
            transfer.disconnect(worker)
        self.lanes[worker].clear()

    def revive(self, worker: int) -> None:
        self.generations[worker] += 1
        self.kv[worker] = self._new_cache()
        self.transfers[worker] = self._new_transfer(worker)
        self.announce(worker)

    def send(self, src: int, dst: int, src_blocks: np.ndarray, dst_blocks: np.ndarray) -> int:
        self.num_plans += 1
        generations = self.generations[src], self.generations[dst]
        plan = TransferPlan(self.num_plans, src, generations[0], dst, generations[1], src_blocks, dst_blocks)
        for worker in (src, dst) if self.is_relayed else (dst,):
            assert self.transfers[worker].knows(plan)
            self.lanes[worker][src, dst].append(self.transfers[worker].launch(plan))
        return self.num_plans

    def poll(self, worker: int) -> list[TransferAck]:
        results = []
        for lane in self.lanes[worker].values():
            while lane and lane[0].is_done():
                results.append(lane.popleft().result())
        return [result for result in results if result is not None]

    def poll_all(self) -> list[TransferAck]:
        return [ack for _ in range(200) for worker in range(len(self.kv)) for ack in self.poll(worker)]

    @property
    def is_idle(self) -> bool:
        return not any(lane for lanes in self.lanes for lane in lanes.values())


def some_blocks(rng: Random, count: int) -> np.ndarray:
    return np.array(rng.sample(range(NUM_BLOCKS), count), np.int32)


def take_some(rng: Random, free: list[int], count: int) -> np.ndarray:
    return np.array([free.pop(rng.randrange(len(free))) for _ in range(count)], np.int32)


@settings(max_examples=60)
@given(st.booleans(), st.integers(2, 3), st.integers(1, 12), st.randoms(use_true_random=False))
def test_any_plans(is_relayed: bool, count: int, num_plans: int, rng: Random) -> None:
    """Destinations of plans under way do not overlap, nor with their sources, as pinned blocks never do."""
    workers = Workers(count, is_relayed)
    expected = [kv.clone() for kv in workers.kv]
    free = [list(range(NUM_BLOCKS)) for _ in range(count)]
    acks = []
    for _ in range(num_plans):
        src, dst = rng.sample(range(count), 2)
        size = rng.randint(1, min(9, max(1, len(free[src]) // 2), max(1, len(free[dst]) // 2)))
        if min(len(free[src]), len(free[dst])) < size:
            continue
        blocks = [
            np.array([free[w].pop(rng.randrange(len(free[w]))) for _ in range(size)], np.int32) for w in (src, dst)
        ]
        expected[dst][blocks[1]] = expected[src][blocks[0]]
        workers.send(src, dst, *blocks)
        if rng.random() < 0.5:
            acks += workers.poll(rng.randrange(count))
    acks += workers.poll_all()
    assert workers.is_idle
    assert sorted(ack.plan_id for ack in acks) == list(range(1, workers.num_plans + 1))
    assert all(ack.num_bytes % BLOCK_BYTES == 0 < ack.num_bytes for ack in acks)
    for kv, want in zip(workers.kv, expected, strict=True):
        torch.testing.assert_close(kv, want, rtol=0, atol=0)


def test_relayed_plans_are_longer_than_the_ring() -> None:
    workers = Workers(2, is_relayed=True)
    rng = Random(0)
    src, dst = some_blocks(rng, 30), some_blocks(rng, 30)
    workers.send(0, 1, src, dst)
    assert workers.poll(1) == []
    for _ in range(3):
        assert workers.poll(0) == []  # two buffers of three blocks are full
    (ack,) = workers.poll_all()
    assert ack.num_bytes == 30 * BLOCK_BYTES
    torch.testing.assert_close(workers.kv[1][dst], workers.kv[0][src], rtol=0, atol=0)


@pytest.mark.parametrize("dead", [0, 1])
@pytest.mark.parametrize("is_relayed", [False, True])
def test_a_worker_dies_and_returns(is_relayed: bool, dead: int) -> None:
    """Plans that wait for it are given up; those of its next generation work; old ones that come late are given up."""
    workers = Workers(2, is_relayed)
    rng = Random(1)
    for dst in np.arange(40, dtype=np.int32).reshape(2, 20):
        workers.send(0, 1, some_blocks(rng, 20), dst)
    if is_relayed:
        assert workers.poll(0) == workers.poll(1) == workers.poll(0) == []
    workers.die(dead)
    acks = workers.poll_all()
    assert workers.is_idle
    if dead == 0:
        assert [ack.num_bytes for ack in acks] == [0 if is_relayed else 20 * BLOCK_BYTES] * 2
    workers.revive(dead)
    src, dst = some_blocks(rng, 20), some_blocks(rng, 20)
    workers.send(0, 1, src, dst)
    workers.generations[dead] -= 1
    late = TransferPlan(99, 0, workers.generations[0], 1, workers.generations[1], src, dst)
    survivor = 1 - dead
    workers.lanes[survivor][0, 1].append(workers.transfers[survivor].launch(late))
    acks = workers.poll_all()
    assert workers.is_idle
    assert [(ack.plan_id, ack.num_bytes) for ack in acks][:1] == [(3, 20 * BLOCK_BYTES)]
    assert [ack.num_bytes for ack in acks[1:]] == ([0] if dead == 0 else [])
    torch.testing.assert_close(workers.kv[1][dst], workers.kv[0][src], rtol=0, atol=0)


def test_plan_of_a_generation_to_come_is_not_known() -> None:
    workers = Workers(2, is_relayed=False)
    none = np.empty(0, np.int32)
    assert not workers.transfers[1].knows(TransferPlan(1, 0, 1, 1, 0, none, none))
    assert workers.transfers[0].knows(TransferPlan(1, 0, 1, 1, 0, none, none)), "its own generation is not its concern"


@pytest.mark.parametrize("is_relayed", [False, True])
def test_damage_is_noticed(is_relayed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    workers = Workers(2, is_relayed)

    def spoil(name: str) -> None:
        sound = getattr(HostMover, name)

        def damaged(self: HostMover, *args: torch.Tensor) -> None:
            sound(self, *args)
            self._kv[args[-1][-1], -1] += 1

        monkeypatch.setattr(HostMover, name, damaged)

    spoil("unpack" if is_relayed else "pull")
    blocks = np.arange(5, dtype=np.int32)
    workers.send(0, 1, blocks, blocks)
    with pytest.raises(DigestMismatch, match="plan 1"):
        workers.poll_all()


def test_memory_that_cannot_be_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "garbage_collection_threshold:0.6,expandable_segments:True")
    with pytest.raises(ConfigError, match="PYTORCH_CUDA_ALLOC_CONF=.* no expandable_segments"):
        export_kv(torch.zeros(1))


def config_of(transfer: str, *devices: str) -> EngineConfig:
    entries = [{"device": device} for device in devices]
    return EngineConfig.from_dict({"model": "m", "workers": entries, "transfer": transfer})


@pytest.mark.parametrize(
    ("transfer", "devices", "has_access", "path"),
    [
        ("auto", ("cpu", "cpu"), True, "shm"),
        ("shm", ("cpu", "cpu"), True, "shm"),
        ("relay", ("cpu", "cpu"), True, "relay"),
        ("auto", ("cpu", "cuda:0"), True, "relay"),
        ("auto", ("cuda:0", "cpu"), True, "relay"),
        ("auto", ("cuda:0", "cuda:0"), False, "ipc"),
        ("auto", ("cuda:0", "cuda:1"), True, "ipc"),
        ("auto", ("cuda:0", "cuda:1"), False, "relay"),
        ("ipc", ("cuda:0", "cuda:1"), True, "ipc"),
        ("relay", ("cuda:0", "cuda:0"), True, "relay"),
        ("ipc", ("cuda:0", "cuda:1"), False, None),
    ],
)
def test_path(
    transfer: str, devices: tuple[str, str], has_access: bool, path: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda device, peer: has_access)
    config = config_of(transfer, *devices)
    if path is None:
        with pytest.raises(ConfigError, match="transfer='ipc' .* auto or relay"):
            path_between(0, 1, config)
    else:
        assert path_between(0, 1, config) is TransferPath(path)

"""The shared memory that the workers of an engine exchange blocks through; handed to each when it is spawned."""

from __future__ import annotations

from dataclasses import dataclass

from nanopd.ipc.shared_memory import SharedMemory


@dataclass(frozen=True, slots=True)
class Memories:
    """All empty at first: who uses one gives it its size."""

    caches: list[SharedMemory]  # by worker: what others can read of it, where that lies in the host's memory
    relays: dict[tuple[int, int], SharedMemory]  # by source and destination

    @classmethod
    def of(cls, num_workers: int, with_relays: bool) -> Memories:
        workers = range(num_workers)
        pairs = [(src, dst) for src in workers for dst in workers if src != dst and with_relays]
        caches = [SharedMemory(name="kv") for _ in workers]
        return cls(caches, {pair: SharedMemory(name="relay") for pair in pairs})

"""Anonymous memory that several processes map: a memfd, handed over as an argument of a spawned process.

Owns the descriptor and at most one mapping of it. Has no name, so there is nothing to unlink: the pages are freed
with the last descriptor or mapping, however its process ended. Knows nothing of what is stored.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from dataclasses import dataclass

from nanopd.ipc.descriptor import Descriptor


class SharedMemory:
    """Zeroed bytes, shared by all processes that were given this object when they were spawned.

    It may grow after the hand-over: one process calls `resize`, says so to the others, and they map the new size.
    """

    def __init__(self, nbytes: int = 0, name: str = "shared") -> None:
        """`name` is for people: it shows in /proc/PID/maps, and need not be unique."""
        self._descriptor = Descriptor(os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING))
        # Shrinking would turn an access of the others into SIGBUS; the kernel refuses it from here on.
        fcntl.fcntl(self._descriptor.fileno(), fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
        self._mapping: mmap.mmap | None = None
        self.resize(nbytes)

    @property
    def nbytes(self) -> int:
        """The size now, whichever process set it."""
        return os.fstat(self._descriptor.fileno()).st_size

    def resize(self, nbytes: int) -> None:
        """Grow to `nbytes`. Pages take memory when they are first touched. Raises PermissionError on shrinking."""
        os.ftruncate(self._descriptor.fileno(), nbytes)

    def map(self, nbytes: int | None = None) -> memoryview:
        """The first `nbytes` (None: all there are now) as writable bytes, for np.frombuffer or torch.frombuffer.

        Mapped at the first call, and again only if that mapping is too short; views of the shorter one stay valid
        and show the same memory at another address. Raises ValueError for more bytes than there are, or none.
        """
        size = self.nbytes
        wanted = size if nbytes is None else nbytes
        if not 0 < wanted <= size:
            raise ValueError(f"cannot map {wanted} bytes of a shared memory of {size} bytes")
        if self._mapping is None or len(self._mapping) < wanted:
            self._mapping = mmap.mmap(self._descriptor.fileno(), wanted)
        return memoryview(self._mapping)[:wanted]

    def close(self) -> None:
        """Give up the descriptor and the mapping. Views stay valid: the last one to go takes the mapping with it."""
        self._mapping = None
        self._descriptor.close()

    def __getstate__(self) -> Descriptor:
        return self._descriptor

    def __setstate__(self, descriptor: Descriptor) -> None:
        self._descriptor = descriptor
        self._mapping = None


@dataclass(frozen=True, slots=True)
class Memories:
    """What the workers of an engine exchange blocks through. All empty at first: who uses one gives it its size."""

    caches: list[SharedMemory]  # by worker: what others can read of it, where that lies in the host's memory
    relays: dict[tuple[int, int], SharedMemory]  # by source and destination

    @classmethod
    def of(cls, num_workers: int, with_relays: bool) -> Memories:
        workers = range(num_workers)
        pairs = [(src, dst) for src in workers for dst in workers if src != dst and with_relays]
        caches = [SharedMemory(name="kv") for _ in workers]
        return cls(caches, {pair: SharedMemory(name="relay") for pair in pairs})

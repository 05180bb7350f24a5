"""A file descriptor with an owner, which a process about to be spawned can take along.

The one place that knows how multiprocessing hands over descriptors. Linux; start methods spawn and forkserver.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from multiprocessing import reduction
from multiprocessing.context import assert_spawning
from typing import Any


class Descriptor:
    """Owns `fd`, and closes it at the latest when it is collected.

    Pickles only as (part of) an argument of a Process that is being started, as multiprocessing's own objects do;
    elsewhere pickling raises RuntimeError. The child gets a descriptor of its own of the same open file.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        os.set_inheritable(fd, False)  # it arrives inheritable in a spawned child

    def fileno(self) -> int:
        """Raises ValueError once closed, so that a reused number is never taken for this file."""
        if self._fd < 0:
            raise ValueError("the descriptor is closed")
        return self._fd

    def close(self, _close: Callable[[int], None] = os.close) -> None:  # bound early: `os` may be gone at exit
        fd, self._fd = self._fd, -1
        if fd >= 0:
            _close(fd)

    def __del__(self) -> None:
        self.close()

    def __reduce__(self) -> tuple:
        assert_spawning(self)
        return _receive, (type(self), reduction.DupFd(self.fileno()))


def _receive(cls: type[Descriptor], in_transit: Any) -> Descriptor:
    """`in_transit` is what multiprocessing puts in place of a descriptor in a pickle."""
    received = cls.__new__(cls)
    Descriptor.__init__(received, in_transit.detach())
    return received

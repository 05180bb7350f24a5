"""The one protocol of a worker as the parent sees it: messages go to it, results come back, and nothing here waits.

A worker process is one implementation; workers of the simulator and of tests, which live in the parent, are others.
The engine and whoever sends plans know a worker by this protocol alone.
"""

from __future__ import annotations

from typing import Protocol

from nanopd.messages import FromWorker, ToWorker, TransferPath


class WorkerClient(Protocol):
    """A worker as the parent sees it."""

    num_blocks: int  # of its KV cache, the null block included
    num_host_blocks: int  # of its host memory for sequences that are swapped out, the null block included
    paths: dict[int, TransferPath]  # by source worker: how KV blocks get from there to this worker

    def send(self, message: ToWorker) -> None:
        """Give the worker something to do. It does steps in the order of the calls. Never waits and never fails."""

    def poll(self) -> list[FromWorker]:
        """What the worker has done since the last call. Never waits. Raises WorkerError when the worker is gone."""

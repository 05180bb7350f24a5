"""All worker processes of an engine: starts them, wakes the engine's thread for them, replaces those that die.

The processes must be spawned by the thread that goes on to drive them (see process.py). Once all have started, nothing
here waits but `wait` and `close`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path

from nanopd.config import EngineConfig, ModelConfig, WorkerSpec, routes_for_policy
from nanopd.errors import NanopdError, WorkerError
from nanopd.ipc.doorbell import Doorbell, Waiter
from nanopd.ipc.shared_memory import Memories
from nanopd.messages import Peers, Ready, Shutdown
from nanopd.workers.paths import warm_up
from nanopd.workers.process import WorkerProcess

SHUTDOWN_TIMEOUT_S = 5.0
LOADING_POLL_S = 0.1
END_POLL_S = 0.02  # between looks whether killed processes have ended; one with a GPU takes a while

logger = logging.getLogger(__name__)


class WorkerSupervisor:
    """Starts, connects, replaces and ends the worker processes of an engine."""

    def __init__(self, config: EngineConfig, model: ModelConfig, path: Path, bell: Doorbell) -> None:
        """`bell` wakes up the engine's thread too; rung before all workers have started, it cancels the start."""
        self._config, self._model, self._path, self._bell = config, model, path, bell
        self._memories = Memories.of(len(config.workers), with_relays=config.may_relay)
        self._waiter = Waiter()
        self._waiter.add(bell)
        self._serving: dict[int, WorkerProcess] = {}
        self._loading: dict[int, WorkerProcess] = {}
        self._ending: list[WorkerProcess] = []  # processes that were killed and have not ended yet
        self._num_blocks: dict[int, int] = {}  # by worker that was ready once; its replacements get as many
        self._due_s: dict[int, float] = {}  # by worker that is to serve: when its start has taken too long
        self.num_restarts = [0] * len(config.workers)

    def start(self, on_progress: Callable[[float], None] | None = None) -> list[WorkerProcess]:
        """Spawn all workers, wait until they have loaded, and connect them.

        Args:
            on_progress: called with the share of all weights that has been loaded, 0 to 1.

        Raises:
            WorkerError: a worker failed, or took longer than `start_timeout_s`.
            NanopdError: `bell` was rung.
        """
        num_workers = len(self._config.workers)
        for worker in range(num_workers):
            self._due_s[worker] = time.monotonic() + self._config.start_timeout_s
            self._spawn(worker)
        while self._loading:
            if self.wait(LOADING_POLL_S):
                raise NanopdError("the start was cancelled")
            for worker in list(self._loading):
                self._advance(worker)
            if on_progress is not None:
                loading = self._loading.values()
                on_progress(1 - sum(1 - process.share_loaded for process in loading) / num_workers)
        workers = [self._serving[worker] for worker in range(num_workers)]
        warm_up(workers, routes_for_policy(self._config.policy, self._config.roles))
        return workers

    def wait(self, timeout_s: float) -> bool:
        """Sleep until a worker or the bell has something to say; whether the bell has."""
        return self._bell in self._waiter.wait(min(timeout_s, END_POLL_S) if self._ending else timeout_s)

    def replace(self, worker: int) -> bool:
        """End a worker that has died or hangs. Returns whether `replaced` will tell of another one in its place."""
        process = self._serving.pop(worker)
        self._discard(process)
        for other in self._serving.values():
            other.tell(Peers({worker: None}))  # the others' mappings of its cache keep memory that the next one needs
        return self._try_restart(worker)

    def replaced(self) -> list[WorkerProcess | WorkerError]:
        """Go on with replacements. Returns those that serve from now on, and the errors that made one impossible."""
        if not (self._ending or self._due_s):
            return []
        for process in [p for p in self._ending if p.has_ended]:
            self._ending.remove(process)
            process.close(0.0)
        outcomes = [self._go_on_with(worker) for worker in list(self._due_s)]
        return [outcome for outcome in outcomes if outcome is not None]

    def close(self, timeout_s: float = SHUTDOWN_TIMEOUT_S) -> None:
        """Tell all workers to stop, then wait for each, killing those that have not ended after `timeout_s`."""
        for process in self._loading.values():  # A process that loads does not listen.
            process.kill()
        processes = [*self._serving.values(), *self._loading.values(), *self._ending]
        for process in processes:
            process.tell(Shutdown())
        deadline_s = time.monotonic() + timeout_s
        for process in processes:
            process.close(deadline_s)
        for memory in (*self._memories.caches, *self._memories.relays.values()):
            memory.close()
        self._waiter.close()

    def _spawn(self, worker: int) -> None:
        config = self._config
        if worker in self._num_blocks:
            config = config.replace(num_blocks=self._num_blocks[worker])
        spec = WorkerSpec(worker, config, self._model, self._path)
        try:
            self._loading[worker] = WorkerProcess(spec, self.num_restarts[worker], self._memories, self._waiter)
        except OSError as error:
            raise WorkerError(worker, f"could not be spawned: {error}") from error

    def _go_on_with(self, worker: int) -> WorkerProcess | WorkerError | None:
        try:
            return self._advance(worker)
        except WorkerError as error:
            if worker in self._loading:
                self._discard(self._loading.pop(worker))
            if self._try_restart(worker):
                logger.error("%s", str(error))
                return None
            del self._due_s[worker]
            return error

    def _advance(self, worker: int) -> WorkerProcess | None:
        """Go on with a worker that is to serve by `_due_s`. Returns its process once all workers have heard of it."""
        if time.monotonic() >= self._due_s[worker]:
            raise WorkerError(worker, "has not loaded within start_timeout_s")
        process = self._loading.get(worker)
        if process is None:
            if not any(ending.index == worker for ending in self._ending):  # then its device's memory is free
                self._spawn(worker)
            return None
        while (message := process.receive()) is not None:
            if isinstance(message, Ready):
                del self._due_s[worker], self._loading[worker]
                self._num_blocks[worker] = process.num_blocks
                for other in self._serving.values():
                    other.tell(Peers({worker: process.peer}))
                self._serving[worker] = process
                process.tell(Peers({index: other.peer for index, other in self._serving.items()}))
                if process.generation > 0:
                    logger.warning("worker %d: has been replaced, restart %d", worker, process.generation)
                return process
        return None

    def _discard(self, process: WorkerProcess) -> None:
        process.kill()
        self._ending.append(process)

    def _try_restart(self, worker: int) -> bool:
        if self.num_restarts[worker] >= self._config.max_restarts:
            return False
        self.num_restarts[worker] += 1
        self._due_s[worker] = time.monotonic() + self._config.start_timeout_s
        return True

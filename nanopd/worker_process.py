"""The parent's side of worker processes: spawns them, talks to them, notices their end.

Knows the entry of a worker by name only, so that the parent imports no model code. The processes must be spawned by
the thread that goes on to drive them: Linux ends them with that thread (see ipc/process.py).
"""

from __future__ import annotations

import importlib
import time
from collections import deque
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path

import torch.multiprocessing as mp

from nanopd.config import EngineConfig, ModelConfig
from nanopd.errors import WorkerError
from nanopd.ipc.channel import channel
from nanopd.ipc.doorbell import Waiter
from nanopd.ipc.ring import RingFull
from nanopd.ipc.shared_memory import SharedMemory
from nanopd.messages import (
    TABLE_UPDATE,
    Failed,
    Peers,
    Progress,
    Ready,
    Shutdown,
    StepBatch,
    StepResult,
    TransferAck,
    TransferPlan,
)
from nanopd.wire import decode, encode, encoded_size

WORKER_ENTRY = "nanopd.worker.main"  # a module with a function main
SHUTDOWN_TIMEOUT_S = 5.0
NUM_RING_MESSAGES = 8


def _run_entry(module: str, *args: object) -> None:
    importlib.import_module(module).main(*args)


class WorkerProcess:
    """One spawned worker, as the engine sees it."""

    def __init__(
        self, index: int, config: EngineConfig, model: ModelConfig, path: Path, kv_memories: list[SharedMemory]
    ) -> None:
        self.index = index
        self.num_blocks = 0  # known once it is ready
        self._backlog: deque[StepBatch | TransferPlan] = deque()  # what did not fit into the ring yet
        self._endpoint, theirs = channel(_max_message_nbytes(config, model), NUM_RING_MESSAGES)
        self._endpoint.open()
        context = mp.get_context("spawn")
        self.control, their_control = context.Pipe()
        args = (WORKER_ENTRY, index, config, model, path, theirs, their_control, kv_memories)
        self._process = context.Process(target=_run_entry, args=args, name=f"nanopd-worker-{index}", daemon=True)
        self._process.start()
        their_control.close()

    def register(self, waiter: Waiter) -> None:
        """Let `waiter` wake up for results, control messages and the end of the process."""
        for source in (self._endpoint.bell, self._process.sentinel):
            waiter.add(source)

    def unregister(self, waiter: Waiter) -> None:
        for source in (self._endpoint.bell, self._process.sentinel):
            waiter.remove(source)

    def send(self, message: StepBatch | TransferPlan) -> None:
        self._backlog.append(message)
        self._flush()

    def poll(self) -> list[StepResult | TransferAck]:
        """Results since the last call.

        Raises:
            WorkerError: the process has ended and everything it said has been read; with its traceback if it left one.
        """
        is_alive = self._process.is_alive()  # before reading, so that nothing said before the end is missed
        results: list[StepResult | TransferAck] = []
        while (view := self._endpoint.reader.read()) is not None:
            results.append(decode(bytes(view)))
            self._endpoint.reader.release()
        if not results and not is_alive:
            raise self._cause_of_death()
        if self._backlog:
            self._flush()
        return results

    def receive_control(self) -> Progress | Ready:
        """The next control message of a worker that is loading.

        Raises:
            WorkerError: it failed.
        """
        try:
            message = self.control.recv()
        except (EOFError, ConnectionResetError):
            raise self._cause_of_death() from None
        if isinstance(message, Failed):
            raise WorkerError(self.index, message.reason, message.traceback)
        return message

    def close(self, deadline_s: float) -> None:
        """Wait until the process has ended, which it was told to; kill it at `deadline_s` (time.monotonic)."""
        self._process.join(max(0.0, deadline_s - time.monotonic()))
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._process.close()
        self.control.close()
        self._endpoint.close()

    def shutdown(self) -> None:
        try:
            self.control.send(Shutdown())
        except (BrokenPipeError, ConnectionResetError):
            pass  # it has ended already

    def _flush(self) -> None:
        while self._backlog:
            message = self._backlog[0]
            nbytes = encoded_size(message)
            try:
                out = self._endpoint.writer.reserve(nbytes)
            except RingFull:
                return  # tried again at the next poll
            encode(message, out)
            self._endpoint.commit(nbytes)
            self._backlog.popleft()

    def _cause_of_death(self) -> WorkerError:
        self._process.join(SHUTDOWN_TIMEOUT_S)
        try:
            while self.control.poll():
                message = self.control.recv()
                if isinstance(message, Failed):
                    return WorkerError(self.index, message.reason, message.traceback)
        except (EOFError, ConnectionResetError):
            pass
        return WorkerError(self.index, f"ended with exit code {self._process.exitcode}")


def start_workers(
    config: EngineConfig, model: ModelConfig, path: Path, on_progress: Callable[[float], None] | None = None
) -> list[WorkerProcess]:
    """Spawn all workers of `config`, wait until they have loaded, and connect them.

    Args:
        on_progress: hears of the share of all weights that has been loaded, 0 to 1.

    Raises:
        WorkerError: one failed, or took longer than `start_timeout_s`; the others have been stopped.
    """
    kv_memories = [SharedMemory(name="kv") for _ in config.workers]
    workers: list[WorkerProcess] = []
    try:
        for index in range(len(config.workers)):
            workers.append(WorkerProcess(index, config, model, path, kv_memories))
        _await_ready(workers, time.monotonic() + config.start_timeout_s, on_progress)
    except BaseException:
        stop_workers(workers)
        raise
    for worker in workers:
        worker.control.send(Peers({w.index: (0, w.num_blocks) for w in workers}))
    return workers


def stop_workers(workers: list[WorkerProcess]) -> None:
    """Tell all to stop, then wait for each, killing those that do not."""
    for worker in workers:
        worker.shutdown()
    deadline_s = time.monotonic() + SHUTDOWN_TIMEOUT_S
    for worker in workers:
        worker.close(deadline_s)


def _await_ready(
    workers: list[WorkerProcess], deadline_s: float, on_progress: Callable[[float], None] | None
) -> None:
    loading: dict[Connection, WorkerProcess] = {worker.control: worker for worker in workers}
    shares = dict.fromkeys(range(len(workers)), 0.0)
    while loading:
        ready = wait(list(loading), timeout=max(0.0, deadline_s - time.monotonic()))
        if not ready:
            late = next(iter(loading.values())).index
            raise WorkerError(late, "has not loaded within start_timeout_s")
        for control in ready:
            worker = loading[control]
            message = worker.receive_control()
            if isinstance(message, Ready):
                worker.num_blocks = message.num_blocks
                del loading[control]
                shares[worker.index] = 1.0
            else:
                shares[worker.index] = message.done_bytes / max(1, message.total_bytes)
            if on_progress is not None:
                on_progress(sum(shares.values()) / len(workers))


def _max_message_nbytes(config: EngineConfig, model: ModelConfig) -> int:
    """An upper bound: each running sequence's whole block table anew, a full chunk budget, and the rows."""
    max_len = config.max_model_len or model.max_position_embeddings
    blocks = config.max_num_seqs * (-(-max_len // config.block_size) + 1)
    return blocks * TABLE_UPDATE.itemsize + 4 * config.max_num_batched_tokens + 1024 * config.max_num_seqs + 65536

"""The parent's side of worker processes: spawns them, talks to them, notices their end.

Knows the entry of a worker by name only, so that the parent imports no model code. The processes must be spawned by
the thread that goes on to drive them: Linux ends them with that thread (see ipc/process.py).
"""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, cast

from nanopd.config import EngineConfig, ModelConfig
from nanopd.errors import NanopdError, WorkerError
from nanopd.ipc.channel import channel
from nanopd.ipc.doorbell import Doorbell, Waiter
from nanopd.ipc.process import die_with_parent
from nanopd.ipc.ring import RingFull
from nanopd.ipc.shared_memory import SharedMemory
from nanopd.messages import (
    MAX_STOP_TOKEN_IDS,
    SLOT_INIT,
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
NUM_RING_MESSAGES = 4
SPIN_COUNT = "3000"  # OpenMP's own 300,000 waste whole time slices on shared cores: 26 tokens/s instead of 128
LOADING_HINT = ' while loading; does the script that made the LLM have its `if __name__ == "__main__":`?'


def _run_entry(module: str, *args: object) -> None:
    die_with_parent()  # before the long import
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
        import torch.multiprocessing  # not at the top, where the child would import it before `die_with_parent`

        context = torch.multiprocessing.get_context("spawn")
        self.control, their_control = context.Pipe()
        args = (WORKER_ENTRY, index, config, model, path, theirs, their_control, kv_memories)
        self._process = context.Process(target=_run_entry, args=args, name=f"nanopd-worker-{index}", daemon=True)
        self._process.start()
        their_control.close()
        self._end = Waiter()  # for last words, or the end of the pipe: it says nothing else while it serves
        self._end.add(self.control)
        self._waiter: Waiter | None = None

    def register(self, waiter: Waiter) -> None:
        """Let `waiter` wake up for results and for the end, for as long as the worker lives."""
        self._waiter = waiter
        for source in (self._endpoint.bell, self.control):
            waiter.add(source)

    def connect(self, peers: Peers) -> None:
        """Tell it of the KV caches of all workers. Raises WorkerError if it has ended."""
        try:
            self.control.send(peers)
        except OSError:
            raise self._cause_of_death() from None

    def send(self, message: StepBatch | TransferPlan) -> None:
        self._backlog.append(message)
        self._flush()

    def poll(self) -> list[StepResult | TransferAck]:
        """Results since the last call.

        Raises:
            WorkerError: it has failed or its process has ended, and all results have been read; with its traceback
                if it left one.
        """
        has_ended = bool(self._end.wait(0.0))  # before reading, so that nothing said before the end is missed
        results: list[StepResult | TransferAck] = []
        while (view := self._endpoint.reader.read()) is not None:
            results.append(cast("StepResult | TransferAck", decode(bytes(view))))
            self._endpoint.reader.release()
        if has_ended and not results:
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
        except (EOFError, OSError):
            raise self._cause_of_death(LOADING_HINT) from None
        if isinstance(message, Failed):
            raise WorkerError(self.index, message.reason, message.traceback)
        return message

    def tell_to_stop(self) -> None:
        with contextlib.suppress(OSError):  # it has ended already
            self.control.send(Shutdown())

    def close(self, deadline_s: float) -> None:
        """Wait until the process has ended, which it was told to; kill it at `deadline_s` (time.monotonic)."""
        self._process.join(max(0.0, deadline_s - time.monotonic()))
        self._process.kill()
        self._process.join()
        self._process.close()
        self._end.close()
        self.control.close()
        self._endpoint.close()

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

    def _cause_of_death(self, hint: str = "") -> WorkerError:
        """What to tell of a worker that is gone; sees to it that it is."""
        if self._waiter is not None:
            for source in (self._endpoint.bell, self.control):
                self._waiter.remove(source)
        failed = self._last_words()
        if failed is None:
            self._process.join(SHUTDOWN_TIMEOUT_S)
        self._process.kill()
        self._process.join()
        if failed is not None:
            return WorkerError(self.index, failed.reason, failed.traceback)
        return WorkerError(self.index, _describe_exit(self._process.exitcode) + hint)

    def _last_words(self) -> Failed | None:
        with contextlib.suppress(EOFError, OSError):
            while self.control.poll():
                message = self.control.recv()
                if isinstance(message, Failed):
                    return message
        return None


def _describe_exit(exit_code: int | None) -> str:
    assert exit_code is not None
    if exit_code < 0:
        return f"was killed by {signal.Signals(-exit_code).name}"
    return f"ended with exit code {exit_code}"


def start_workers(
    config: EngineConfig,
    model: ModelConfig,
    path: Path,
    cancel: Doorbell,
    on_progress: Callable[[float], None] | None = None,
) -> list[WorkerProcess]:
    """Spawn all workers of `config`, wait until they have loaded, and connect them.

    Args:
        cancel: rung by another thread to give up.
        on_progress: hears of the share of all weights that has been loaded, 0 to 1.

    Raises:
        WorkerError: one failed, or took longer than `start_timeout_s`; the others have been stopped.
        NanopdError: cancelled; all have been stopped.
    """
    kv_memories = [SharedMemory(name="kv") for _ in config.workers]
    workers: list[WorkerProcess] = []
    try:
        with _spawning():
            for index in range(len(config.workers)):
                workers.append(WorkerProcess(index, config, model, path, kv_memories))
        _await_ready(workers, time.monotonic() + config.start_timeout_s, cancel, on_progress)
        for worker in workers:
            worker.connect(Peers({w.index: (0, w.num_blocks) for w in workers}))
    except BaseException:
        stop_workers(workers, timeout_s=0.0)
        raise
    return workers


@contextlib.contextmanager
def _spawning() -> Iterator[None]:
    """What processes spawned inside inherit.

    The signal mask: Ctrl-C is for the parent. The environment: OpenMP reads it when torch is imported, which may be at
    the top of the user's script, before any code of ours runs in the child.
    """
    resource_tracker.ensure_running()  # multiprocessing's helper; its start would unblock SIGINT again
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    is_set = "GOMP_SPINCOUNT" in os.environ or "OMP_WAIT_POLICY" in os.environ
    if not is_set:
        os.environ["GOMP_SPINCOUNT"] = SPIN_COUNT
    try:
        yield
    finally:
        if not is_set:
            del os.environ["GOMP_SPINCOUNT"]
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def stop_workers(workers: list[WorkerProcess], timeout_s: float = SHUTDOWN_TIMEOUT_S) -> None:
    """Tell all to stop, then wait for each, killing those that have not after `timeout_s`."""
    for worker in workers:
        worker.tell_to_stop()
    deadline_s = time.monotonic() + timeout_s
    for worker in workers:
        worker.close(deadline_s)


def _await_ready(
    workers: list[WorkerProcess], deadline_s: float, cancel: Doorbell, on_progress: Callable[[float], None] | None
) -> None:
    loading: dict[Connection, WorkerProcess] = {worker.control: worker for worker in workers}
    shares = dict.fromkeys(range(len(workers)), 0.0)
    while loading:
        sources: list[Any] = [cancel, *loading]
        ready: list[Any] = wait(sources, timeout=max(0.0, deadline_s - time.monotonic()))
        if not ready:
            late = next(iter(loading.values())).index
            raise WorkerError(late, "has not loaded within start_timeout_s")
        if cancel in ready:
            raise NanopdError("the start was cancelled")
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
    """An upper bound: each running sequence's whole block table and parameters anew, a full chunk budget, the rows."""
    max_len = config.max_len_of(model)
    blocks_per_seq = -(-max_len // config.block_size) + 1
    per_seq = (
        blocks_per_seq * TABLE_UPDATE.itemsize
        + 4 * (MAX_STOP_TOKEN_IDS + len(model.eos_token_ids))
        + SLOT_INIT.itemsize
        + 64
    )
    return config.max_num_seqs * per_seq + 4 * config.max_num_batched_tokens + 4096

"""The parent's side of worker processes: spawns them, talks to them, notices their end, replaces them.

Knows the entry of a worker by name only, so that the parent imports no model code. The processes must be spawned by
the thread that goes on to drive them: Linux ends them with that thread (see ipc/process.py). Once all have started,
nothing here waits.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator
from multiprocessing import resource_tracker
from pathlib import Path
from typing import cast

from nanopd.config import EngineConfig, ModelConfig, routes_for_policy
from nanopd.errors import NanopdError, WorkerError
from nanopd.ipc.channel import channel
from nanopd.ipc.descriptor import Descriptor
from nanopd.ipc.doorbell import Doorbell, HasFileno, Waiter
from nanopd.ipc.process import die_with_parent
from nanopd.ipc.ring import RingFull
from nanopd.ipc.shared_memory import Memories
from nanopd.messages import (
    BLOCK_COPY,
    MAX_BAD_WORD_TOKENS,
    MAX_BAD_WORDS,
    MAX_LOGPROBS,
    MAX_PROCESSOR_BYTES,
    MAX_STOP_TOKEN_IDS,
    SLOT_INIT,
    TABLE_UPDATE,
    Failed,
    Peer,
    Peers,
    Progress,
    Ready,
    Shutdown,
    SlotExtras,
    StepBatch,
    StepResult,
    TransferAck,
    TransferPath,
    TransferPlan,
)
from nanopd.wire import decode, encode, encoded_size
from nanopd.workers.paths import measure

WORKER_ENTRY = "nanopd.worker.main"  # a module with a function main
SHUTDOWN_TIMEOUT_S = 5.0
LOADING_POLL_S = 0.1
END_POLL_S = 0.02  # between looks whether killed processes have ended; one with a GPU takes a while
NUM_RING_MESSAGES = 4
SPIN_COUNT = "3000"  # OpenMP's own 300,000 waste whole time slices on shared cores: 26 tokens/s instead of 128
LOADING_HINT = ' while loading; does the script that made the LLM have its `if __name__ == "__main__":`?'

logger = logging.getLogger(__name__)


def _run_entry(module: str, *args: object) -> None:
    die_with_parent()  # before the long import
    importlib.import_module(module).main(*args)


class WorkerProcess:
    """One spawned worker, as the engine sees it."""

    def __init__(
        self,
        index: int,
        generation: int,
        config: EngineConfig,
        model: ModelConfig,
        path: Path,
        memories: Memories,
        waiter: Waiter,
    ) -> None:
        """`waiter` wakes up for what the process says, and for its end, until it is killed."""
        self.index = index
        self.generation = generation
        self.share_loaded = 0.0
        self.num_blocks = 0  # these three are known once it is ready
        self.paths: dict[int, TransferPath] = {}  # by source: how it gets blocks
        self.kv_handle: object = None
        self._backlog: deque[SlotExtras | StepBatch | TransferPlan] = deque()  # what did not fit into the ring yet
        self._endpoint, theirs = channel(_max_message_nbytes(config, model), NUM_RING_MESSAGES)
        self._endpoint.open()
        import torch.multiprocessing  # not at the top, where the child would import it before `die_with_parent`

        context = torch.multiprocessing.get_context("spawn")
        self._control, their_control = context.Pipe()
        args = (WORKER_ENTRY, index, config, model, path, theirs, their_control, memories)
        self._process = context.Process(target=_run_entry, args=args, name=f"nanopd-worker-{index}", daemon=True)
        self._process.start()
        their_control.close()
        assert self._process.pid is not None
        self._exit = Descriptor(os.pidfd_open(self._process.pid))  # ready when the process has ended
        self._news = Waiter()  # for last words and the end: a process that serves says nothing else
        self._watched: dict[HasFileno, tuple[Waiter, ...]] = {
            self._endpoint.bell: (waiter,),
            self._control: (waiter, self._news),
            self._exit: (waiter, self._news),
        }
        for source, waiters in self._watched.items():
            for each in waiters:
                each.add(source)

    def tell(self, message: Peers | Shutdown) -> None:
        with contextlib.suppress(OSError):  # it has ended, which will be noticed
            self._control.send(message)

    def send(self, message: SlotExtras | StepBatch | TransferPlan) -> None:
        self._backlog.append(message)
        self._flush()

    def poll(self) -> list[StepResult | TransferAck]:
        """Results since the last call.

        Raises:
            WorkerError: it has failed or its process has ended, and all results have been read; with its traceback
                if it left one.
        """
        has_news = bool(self._news.wait(0.0))  # before reading, so that nothing said before the end is missed
        results: list[StepResult | TransferAck] = []
        while (view := self._endpoint.reader.read()) is not None:
            results.append(cast("StepResult | TransferAck", decode(bytes(view))))
            self._endpoint.reader.release()
        if has_news and not results:
            self.receive()
        if self._backlog:
            self._flush()
        return results

    def receive(self) -> Progress | Ready | None:
        """The next control message; None: there is none now.

        Raises:
            WorkerError: it has failed or its process has ended.
        """
        message = self._next_control()
        if isinstance(message, Failed):
            raise WorkerError(self.index, message.reason, message.traceback)
        if isinstance(message, Progress):
            self.share_loaded = message.done_bytes / max(1, message.total_bytes)
        if isinstance(message, Ready):
            self.num_blocks, self.paths, self.kv_handle = message.num_blocks, message.paths, message.kv_handle
        if message is None and (exit_code := self._process.exitcode) is not None:
            how = f"ended with exit code {exit_code}"
            if exit_code < 0:
                how = f"was killed by {signal.Signals(-exit_code).name}"
            raise WorkerError(self.index, how + ("" if self.num_blocks else LOADING_HINT))
        return message

    @property
    def peer(self) -> Peer:
        return Peer(self.generation, self.num_blocks, self.kv_handle)

    @property
    def has_ended(self) -> bool:
        return self._process.exitcode is not None

    def kill(self) -> None:
        """End the process; nobody wakes up for it any more."""
        self._process.kill()
        for source in list(self._watched):
            self._unwatch(source)

    def close(self, deadline_s: float) -> None:
        """Wait until the process has ended, which it was told to; kill it at `deadline_s` (time.monotonic)."""
        self._process.join(max(0.0, deadline_s - time.monotonic()))
        self.kill()
        self._process.join()
        self._process.close()
        for part in (self._news, self._control, self._exit, self._endpoint):
            part.close()

    def _unwatch(self, source: HasFileno) -> None:
        for waiter in self._watched.pop(source):
            waiter.remove(source)

    def _next_control(self) -> Progress | Ready | Failed | None:
        try:
            if self._control in self._watched and self._control.poll():
                return self._control.recv()
        except (EOFError, OSError):  # the process is about to end; the end of a pipe would be news for ever
            self._unwatch(self._control)
        return None

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


class WorkerProcesses:
    """All workers of an engine: starts them, wakes the engine's thread for them, and replaces those that die."""

    def __init__(self, config: EngineConfig, model: ModelConfig, path: Path, bell: Doorbell) -> None:
        """`bell`: wakes up the engine's thread too, and gives up the start."""
        self._config, self._model, self._path, self._bell = config, model, path, bell
        self._memories = Memories.of(len(config.workers), with_relays=config.may_relay)
        self._waiter = Waiter()
        self._waiter.add(bell)
        self._serving: dict[int, WorkerProcess] = {}
        self._loading: dict[int, WorkerProcess] = {}
        self._ending: list[WorkerProcess] = []  # killed, until they have ended
        self._num_blocks: dict[int, int] = {}  # once known: peers map as many of a replacement
        self._due_s: dict[int, float] = {}  # of workers that are to serve: when it has taken too long
        self.num_restarts = [0] * len(config.workers)

    def start(self, on_progress: Callable[[float], None] | None = None) -> list[WorkerProcess]:
        """Spawn all workers, wait until they have loaded, and connect them.

        Args:
            on_progress: hears of the share of all weights that has been loaded, 0 to 1.

        Raises:
            WorkerError: one failed, or took longer than `start_timeout_s`.
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
        max_blocks = -(-self._config.max_len_of(self._model) // self._config.block_size)
        block_bytes = self._config.kv_layout(self._model).bytes_per_block
        measure(workers, routes_for_policy(self._config.policy, self._config.roles), block_bytes, max_blocks)
        return workers

    def wait(self, timeout_s: float) -> bool:
        """Sleep until a worker or the bell has something to say; whether the bell has."""
        return self._bell in self._waiter.wait(min(timeout_s, END_POLL_S) if self._ending else timeout_s)

    def replace(self, worker: int) -> bool:
        """End a worker that has died or hangs; whether there will be another one, see `replaced`."""
        process = self._serving.pop(worker)
        self._discard(process)
        for other in self._serving.values():
            other.tell(Peers({worker: None}))  # their mappings of its cache keep memory that the next one needs
        return self._try_restart(worker)

    def replaced(self) -> list[WorkerProcess | WorkerError]:
        """Go on with replacements; those that serve from now on, and what made one impossible."""
        if not (self._ending or self._due_s):
            return []
        for process in [p for p in self._ending if p.has_ended]:
            self._ending.remove(process)
            process.close(0.0)
        outcomes = [self._go_on_with(worker) for worker in list(self._due_s)]
        for outcome in outcomes:
            if isinstance(outcome, WorkerProcess):
                logger.warning("worker %d: has been replaced, restart %d", outcome.index, outcome.generation)
        return [outcome for outcome in outcomes if outcome is not None]

    def close(self, timeout_s: float = SHUTDOWN_TIMEOUT_S) -> None:
        """Tell all to stop, then wait for each, killing those that have not after `timeout_s`."""
        for process in self._loading.values():  # they do not listen
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
        args = worker, self.num_restarts[worker], config, self._model, self._path, self._memories, self._waiter
        try:
            with _spawning():
                self._loading[worker] = WorkerProcess(*args)
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
        """Go on with a worker that is to serve by `_due_s`; the process once it does, which all have heard of then."""
        if time.monotonic() >= self._due_s[worker]:
            raise WorkerError(worker, "has not loaded within start_timeout_s")
        process = self._loading.get(worker)
        if process is None:
            if not any(ending.index == worker for ending in self._ending):  # its device's memory is free again
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


def _max_message_nbytes(config: EngineConfig, model: ModelConfig) -> int:
    """An upper bound: of all that run whole tables, parameters and rows, all blocks out and in; a full chunk budget.

    Or the extras of one sequence, or logprobs of everything.
    """
    max_len = config.max_len_of(model)
    blocks_per_seq = -(-max_len // config.block_size) + 1
    per_seq = (
        blocks_per_seq * (TABLE_UPDATE.itemsize + 2 * BLOCK_COPY.itemsize)
        + 4 * (MAX_STOP_TOKEN_IDS + len(model.eos_token_ids))
        + SLOT_INIT.itemsize
        + 64
    )
    step = config.max_num_seqs * per_seq + 4 * config.max_num_batched_tokens
    extras = 4 * (max_len + 3 * model.vocab_size + MAX_BAD_WORDS * MAX_BAD_WORD_TOKENS) + MAX_PROCESSOR_BYTES
    result = 8 * (1 + MAX_LOGPROBS) * (config.max_num_seqs + config.max_num_batched_tokens)
    return max(step, extras, result) + 4096

"""One worker process as the parent sees it: spawns it, talks to it, notices its end.

Implements the protocol of client.py. Knows the entry of a worker by name only, so that the parent imports no model
code. The process must be spawned by the thread that goes on to drive it: Linux ends it with that thread (see
ipc/process.py). Nothing but `close` waits.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import time
from collections.abc import Iterator
from multiprocessing import resource_tracker
from typing import cast

from nanopd import messages
from nanopd.config import EngineConfig, ModelConfig, WorkerSpec
from nanopd.errors import WorkerError
from nanopd.ipc.channel import channel
from nanopd.ipc.descriptor import Descriptor
from nanopd.ipc.doorbell import HasFileno, Waiter
from nanopd.ipc.process import die_with_parent
from nanopd.ipc.shared_memory import Memories
from nanopd.messages import Failed, FromWorker, Peer, Peers, Progress, Ready, Shutdown, ToWorker
from nanopd.wire import decode, encode
from nanopd.workers.client import WorkerClient

WORKER_ENTRY = "nanopd.worker.main"  # a module with a function main
NUM_MESSAGES = 4  # of the largest size that a channel has room for
SPIN_COUNT = "3000"  # OpenMP's own 300,000 waste whole time slices on shared cores: 26 tokens/s instead of 128
LOADING_HINT = ' while loading; does the script that made the LLM have its `if __name__ == "__main__":`?'


def _run_entry(module: str, *args: object) -> None:
    die_with_parent()  # before the long import
    importlib.import_module(module).main(*args)


class WorkerProcess(WorkerClient):
    """A worker that is a spawned process."""

    def __init__(self, spec: WorkerSpec, generation: int, memories: Memories, waiter: Waiter) -> None:
        """Spawn the process. `waiter` wakes up for what it says, and for its end, until it is killed.

        Raises:
            OSError: the system refuses a process, a descriptor or memory.
        """
        self.index = spec.index
        self.generation = generation
        self.share_loaded = 0.0
        self.num_blocks = self.num_host_blocks = 0  # these and the following two are known once the worker is ready
        self.paths = {}
        self.kv_handle: object = None
        self._endpoint, theirs = channel(_max_message_nbytes(spec.config, spec.model), NUM_MESSAGES)
        import torch.multiprocessing  # not at the top, where the child would import it before `die_with_parent`

        context = torch.multiprocessing.get_context("spawn")
        self._control, their_control = context.Pipe()
        args = (WORKER_ENTRY, spec, memories, theirs, their_control)
        self._process = context.Process(target=_run_entry, args=args, name=f"nanopd-worker-{self.index}", daemon=True)
        with _spawning():
            self._process.start()
        their_control.close()
        assert self._process.pid is not None
        self._exit = Descriptor(os.pidfd_open(self._process.pid))  # ready when the process has ended
        self._news = Waiter()  # for last words and the end: a process that serves says nothing else
        self._watched: dict[HasFileno, tuple[Waiter, ...]] = {
            self._endpoint: (waiter,),
            self._control: (waiter, self._news),
            self._exit: (waiter, self._news),
        }
        for source, waiters in self._watched.items():
            for each in waiters:
                each.add(source, once=source is self._endpoint)

    def tell(self, message: Peers | Shutdown) -> None:
        with contextlib.suppress(OSError):  # the process has ended, which will be noticed
            self._control.send(message)

    def send(self, message: ToWorker) -> None:
        self._endpoint.send(encode(message))

    def poll(self) -> list[FromWorker]:
        """Results since the last call.

        Raises:
            WorkerError: the worker has failed or its process has ended, and all results have been read; with the
                traceback that the worker left, if any.
        """
        has_news = bool(self._news.wait(0.0))  # asked before reading, so that nothing said before the end is missed
        results: list[FromWorker] = []
        while (message := self._endpoint.receive()) is not None:
            results.append(cast("FromWorker", decode(message)))
        if has_news and not results:
            self.receive()
        return results

    def receive(self) -> Progress | Ready | None:
        """The next control message; None: there is none now.

        Raises:
            WorkerError: the worker has failed or its process has ended.
        """
        message = self._next_control()
        if isinstance(message, Failed):
            raise WorkerError(self.index, message.reason, message.traceback)
        if isinstance(message, Progress):
            self.share_loaded = message.done_bytes / max(1, message.total_bytes)
        if isinstance(message, Ready):
            self.num_blocks, self.num_host_blocks = message.num_blocks, message.num_host_blocks
            self.paths, self.kv_handle = message.paths, message.kv_handle
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
        """End the process. No waiter wakes up for it any more."""
        self._process.kill()
        for source in list(self._watched):
            self._unwatch(source)

    def close(self, deadline_s: float) -> None:
        """Wait until the process, which was told to, has ended; kill it at `deadline_s` (time.monotonic)."""
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
        except (EOFError, OSError):  # The process is about to end. The end of a pipe would be news for ever.
            self._unwatch(self._control)
        return None


@contextlib.contextmanager
def _spawning() -> Iterator[None]:
    """What processes spawned inside inherit: a signal mask and an environment.

    The mask blocks SIGINT, as Ctrl-C is for the parent. OpenMP reads the environment when torch is imported, which may
    be at the top of the user's script, before any code of this package runs in the child.
    """
    resource_tracker.ensure_running()  # The start of this helper of multiprocessing would unblock SIGINT again.
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
    """An upper bound of the size of any message.

    The largest step has, for all running sequences, whole block tables, sampling parameters and rows, and copies all
    blocks out and in, beside a full chunk budget. Larger still may be the extras of one sequence, or the logprobs of
    all rows and all tokens of prompts.
    """
    max_len = config.max_len_of(model)
    blocks_per_seq = -(-max_len // config.block_size) + 1
    per_seq = blocks_per_seq * (messages.TABLE_UPDATE.itemsize + 2 * messages.BLOCK_COPY.itemsize)
    per_seq += messages.SLOT_INIT.itemsize + 4 * (messages.MAX_STOP_TOKEN_IDS + len(model.eos_token_ids)) + 64
    step = config.max_num_seqs * per_seq + 4 * config.max_num_batched_tokens
    bad_words = messages.MAX_BAD_WORDS * messages.MAX_BAD_WORD_TOKENS
    extras = 4 * (max_len + 3 * model.vocab_size + bad_words) + messages.MAX_PROCESSOR_BYTES
    result = 8 * (1 + messages.MAX_LOGPROBS) * (config.max_num_seqs + config.max_num_batched_tokens)
    return max(step, extras, result) + 4096

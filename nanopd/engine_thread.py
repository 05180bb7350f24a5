"""The thread that runs an engine and its worker processes, and what other threads hold of their requests.

`EngineThread` is the only thread that changes the engine or spawns a worker; others hand it commands and wait on
`RequestHandle`s. Knows neither prompts nor outputs of the library's face (llm.py).
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from nanopd.config import EngineConfig, ModelConfig
from nanopd.core.sequence import FINISH_REASONS, Sequence, SequenceStatus
from nanopd.detokenizer import StoppableText, TokenPieces
from nanopd.engine import Engine, Update
from nanopd.errors import NanopdError, RequestError, WorkerError
from nanopd.ipc.doorbell import Doorbell
from nanopd.messages import FinishReason, RequestLog, Route, SamplingParams
from nanopd.outputs import BlockStats, RequestOutput, RequestOutputDelta
from nanopd.worker_process import WorkerProcesses

MAX_WAIT_S = 1.0
MAX_COMMANDS_S = 0.002  # between steps: workers go on while thousands of requests come in
MAX_LOGS = 100_000  # of the latest finished requests

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class EngineStats:
    """Of an engine since it started, or where it says so since `LLM.stats(reset=True)`."""

    blocks: list[BlockStats]  # per worker; peaks since the reset
    logs: list[RequestLog]  # of requests finished since the reset, the latest 100,000
    busy_s: list[float]  # per worker, spent on steps since the reset
    num_preemptions: int
    num_restarts: list[int]  # per worker, begun after it died
    num_running: int  # requests
    num_waiting: int  # requests, for a first or, preempted, another turn


class RequestHandle:
    """A submitted request. Iterate over it for increments, if it was submitted with stream=True."""

    def __init__(
        self,
        request_id: str,
        is_streamed: bool,
        make_output: Callable[[Sequence], RequestOutput],
        abort: Callable[[str], None],
        on_delta: Callable[[RequestOutputDelta], None] | None = None,
    ) -> None:
        self.request_id = request_id
        self.is_streamed = is_streamed
        self._make_output = make_output
        self._abort = abort
        self._deltas: SimpleQueue[RequestOutputDelta] = SimpleQueue()
        self._put = on_delta or self._deltas.put
        self._num_given_out = 0  # tokens
        self._is_exhausted = False
        self._done = threading.Event()
        self._seq: Sequence | None = None  # once finished
        self._failure: NanopdError | None = None  # of the engine

    def done(self) -> bool:
        return self._done.is_set()

    def result(self, timeout: float | None = None) -> RequestOutput:
        """Wait for the end of the request.

        Raises:
            TimeoutError: not finished within `timeout` seconds; the request goes on.
            NanopdError: the engine itself has failed, or was shut down.
        """
        if not self._done.wait(timeout):
            raise TimeoutError(f"request {self.request_id} has not finished within {timeout} s")
        if self._seq is None:
            raise NanopdError(f"request {self.request_id}: {self._failure}") from self._failure
        return self._make_output(self._seq)

    def abort(self) -> None:
        self._abort(self.request_id)

    def __iter__(self) -> Iterator[RequestOutputDelta]:
        """Increments as they come, each handed out once."""
        if not self.is_streamed:
            raise RequestError("stream", False, "True at submission, for increments")
        while not self._is_exhausted:
            delta = self._deltas.get()
            self._is_exhausted = delta.finish_reason is not None
            yield delta

    def _update(self, update: Update) -> None:
        seq, start = update.seq, self._num_given_out
        self._num_given_out = end = start + len(update.token_ids)
        reason = FINISH_REASONS[seq.status].value if update.is_finished else None
        if update.is_finished:
            self._seq = seq
            self._done.set()
        logprobs = None if seq.logprobs is None else seq.logprobs[start:end]
        self._put(RequestOutputDelta(update.text, update.token_ids, reason, seq.error, logprobs))

    def _fail(self, failure: NanopdError) -> None:
        self._failure = failure
        self._done.set()
        self._put(RequestOutputDelta("", [], FinishReason.ERROR.value, str(failure)))


@dataclass(slots=True)
class Submission:
    handle: RequestHandle
    prompt_token_ids: list[int]
    params: SamplingParams
    arrival_s: float
    deadline_s: float | None = None
    route: Route | None = None


class EngineThread(threading.Thread):
    """Spawns the workers, runs the engine, and is the only thread that changes either.

    Other threads append commands and ring. A command that fails ends the engine, unless somebody waits for it.
    """

    def __init__(
        self, config: EngineConfig, model: ModelConfig, path: Path, tokenizer: Any, on_progress: Callable | None
    ) -> None:
        super().__init__(name="nanopd-engine", daemon=True)
        self._config, self._model, self._tokenizer = config, model, tokenizer
        self._on_progress = on_progress
        self._bell = Doorbell()
        self._processes = WorkerProcesses(config, model, path, self._bell)
        self._lock = threading.Lock()  # of the following three
        self._commands: deque[tuple[Callable[[Engine], Any], Future | None]] = deque()
        self._handles: dict[str, RequestHandle] = {}  # of unfinished requests
        self._end: NanopdError | None = None  # why it has ended
        self._logs: deque[RequestLog] = deque(maxlen=MAX_LOGS)
        self._is_stopping = False
        self.started: Future[Engine] = Future()

    def call(self, command: Callable[[Engine], Any]) -> Any:
        """Run `command(engine)` in this thread and return what it returns or raises."""
        future: Future[Any] = Future()
        with self._lock:
            self._check_running()
            self._commands.append((command, future))
        self._bell.ring()
        return future.result()

    def stop(self) -> None:
        """End the thread and its workers; what is unfinished fails. Takes no lock: a garbage collector may call."""
        self._is_stopping = True
        self._bell.ring()

    def submit_all(self, submissions: list[Submission]) -> None:
        """Queue all, or none if one cannot be served; does not wait for the engine.

        Raises:
            RequestError: one cannot be served.
            NanopdError: the engine has ended.
        """
        engine = self.started.result()
        for s in submissions:
            engine.check(s.handle.request_id, s.prompt_token_ids, s.params, deadline_s=s.deadline_s, route=s.route)
        new = {s.handle.request_id: s.handle for s in submissions}
        with self._lock:
            self._check_running()
            for request_id in new.keys() & self._handles.keys():
                raise RequestError("request_id", request_id, "an id that no unfinished request has")
            self._handles.update(new)
            for submission in submissions:
                self._commands.append((partial(self._submit, submission), None))
        self._bell.ring()

    def abort_all(self, request_ids: list[str]) -> None:
        """Does not wait; a thread that has ended has nothing to abort."""
        for request_id in request_ids:
            self._commands.append((partial(Engine.abort, request_id=request_id), None))
        self._bell.ring()

    def take_stats(self, engine: Engine, reset: bool) -> EngineStats:
        waiting = (SequenceStatus.WAITING, SequenceStatus.PREEMPTED)
        num_waiting = sum(seq.status in waiting for seq in engine.seqs.values())
        pools = [scheduler.blocks for scheduler in engine.schedulers]
        blocks = [
            BlockStats(pool.num_usable - pool.num_free, peak, pool.num_usable)
            for pool, peak in zip(pools, engine.peak_blocks, strict=True)
        ]
        stats = EngineStats(
            blocks,
            list(self._logs),
            [busy_us / 1e6 for busy_us in engine.busy_us],
            sum(scheduler.num_preemptions for scheduler in engine.schedulers),
            list(self._processes.num_restarts),
            len(engine.seqs) - num_waiting,
            num_waiting,
        )
        if reset:
            self._logs.clear()
            engine.peak_blocks = [0] * len(pools)
            engine.busy_us = [0] * len(pools)
        return stats

    def run(self) -> None:
        end = NanopdError("the engine was shut down")
        try:
            workers = self._processes.start(self._on_progress)
            engine = Engine(
                self._config,
                self._model,
                list(workers),
                time.monotonic,
                make_text=self._make_text(),
                replace=self._processes.replace,
            )
            self.started.set_result(engine)
            self._loop(engine)
        except BaseException as error:
            end = NanopdError(f"the engine has failed: {error!r}")
            end.__cause__ = error
            if not self.started.done():
                self.started.set_exception(error)
            else:
                logger.exception("the engine has failed")
        finally:
            self._finish(end)
            self._processes.close()

    def _loop(self, engine: Engine) -> None:
        while not self._is_stopping:
            until_s = time.monotonic() + MAX_COMMANDS_S
            while self._commands and time.monotonic() < until_s:
                _run_command(engine, *self._commands.popleft())
            for outcome in self._processes.replaced():
                if isinstance(outcome, WorkerError):
                    engine.give_up(outcome.worker, outcome)
                else:
                    engine.revive(outcome.index, outcome, outcome.generation)
            for update in engine.step():
                self._deliver(update)
            if not self._commands:
                self._processes.wait(_wait_s(engine))

    def _submit(self, submission: Submission, engine: Engine) -> None:
        handle = submission.handle
        try:
            engine.submit(
                handle.request_id,
                submission.prompt_token_ids,
                submission.params,
                arrival_s=submission.arrival_s,
                deadline_s=submission.deadline_s,
                is_streamed=handle.is_streamed,
                route=submission.route,
            )
        except RequestError as error:  # a role has changed since it was checked
            with self._lock:
                del self._handles[handle.request_id]
            handle._fail(error)

    def _deliver(self, update: Update) -> None:
        handle = self._handles[update.seq.request_id]
        if update.is_finished:
            self._logs.append(update.seq.log())
            with self._lock:
                del self._handles[handle.request_id]
        handle._update(update)

    def _finish(self, end: NanopdError) -> None:
        """Answer everybody who waits."""
        with self._lock:
            self._end = end
        for handle in self._handles.values():
            handle._fail(end)
        self._handles.clear()
        while self._commands:
            _, future = self._commands.popleft()
            if future is not None:
                future.set_exception(end)

    def _check_running(self) -> None:
        if self._end is not None:
            raise NanopdError(str(self._end)) from self._end.__cause__

    def _make_text(self) -> Callable[[list[int], tuple[str, ...]], StoppableText] | None:
        if self._tokenizer is None:
            return None
        pieces = TokenPieces(self._tokenizer)  # one cache for all requests
        return lambda prompt_token_ids, stop: StoppableText(pieces, prompt_token_ids, stop)


def _wait_s(engine: Engine) -> float:
    """How long the engine has nothing to do unless something happens."""
    return min(MAX_WAIT_S, max(0.0, engine.next_wakeup_s() - time.monotonic()))


def _run_command(engine: Engine, command: Callable[[Engine], Any], future: Future | None) -> None:
    try:
        value = command(engine)
        if future is not None:
            future.set_result(value)
    except Exception as error:
        if future is None:
            raise
        future.set_exception(error)

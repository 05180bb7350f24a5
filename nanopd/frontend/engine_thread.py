"""The thread that runs an engine and its worker processes.

`EngineThread` is the only thread that changes the engine or spawns a worker; others hand it commands and wait on
`RequestHandle`s. Knows neither prompts nor outputs of the library's face (llm.py).
"""

from __future__ import annotations

import gc
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from nanopd.config import EngineConfig, ModelConfig
from nanopd.core.sequence import SequenceStatus
from nanopd.engine.beam_search import BeamSearch
from nanopd.engine.engine import Engine, Update
from nanopd.errors import NanopdError, RequestError, WorkerError
from nanopd.frontend.detokenizer import StoppableText, TokenPieces
from nanopd.frontend.handle import RequestHandle
from nanopd.frontend.outputs import BlockStats, EngineStats
from nanopd.ipc.doorbell import Doorbell
from nanopd.messages import FinishReason, RequestLog
from nanopd.request import SamplingParams
from nanopd.routing.policy import Policy
from nanopd.workers.client import WorkerClient
from nanopd.workers.supervisor import WorkerSupervisor

MAX_WAIT_S = 1.0
MAX_COMMANDS_S = 0.002  # between steps: workers go on while thousands of requests come in
MAX_LOGS = 100_000  # of the latest finished requests
MAX_OBSERVED_LOGS = 1000  # where somebody hears of each

logger = logging.getLogger(__name__)


class EngineThread(threading.Thread):
    """Spawns the workers, runs the engine, and is the only thread that changes either.

    Other threads append commands and ring. A command that fails ends the engine, unless somebody waits for it.
    """

    def __init__(
        self, config: EngineConfig, model: ModelConfig, path: Path, tokenizer: Any, policy: Policy, progress: Callable
    ) -> None:
        """`progress` is called with the share of the weights that is loaded; the others are what `Engine` needs."""
        super().__init__(name="nanopd-engine", daemon=True)
        self._config, self._model, self._tokenizer = config, model, tokenizer
        self._policy, self._progress = policy, progress
        self._bell = Doorbell()
        self._processes = WorkerSupervisor(config, model, path, self._bell)
        self._lock = threading.Lock()  # of the following three
        self._commands: deque[tuple[Callable[[Engine], Any], Future | None]] = deque()
        self._handles: dict[str, RequestHandle] = {}  # of unfinished requests
        self._handle_of: dict[int, RequestHandle] = {}  # by seq_id; the engine's thread alone
        self._end: NanopdError | None = None  # why it has ended
        self._logs: deque[RequestLog] = deque(maxlen=MAX_LOGS)
        self._on_log: Callable[[RequestLog], None] | None = None
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

    def submit_all(self, handles: list[RequestHandle]) -> None:
        """Queue all, or none if one cannot be served; does not wait for the engine.

        Raises:
            RequestError: one cannot be served.
            NanopdError: the engine has ended.
        """
        engine = self.started.result()
        for handle in handles:
            engine.check(handle.request)
        new = {handle.request_id: handle for handle in handles}
        with self._lock:
            self._check_running()
            for request_id in new.keys() & self._handles.keys():
                raise RequestError("request_id", request_id, "an id that no unfinished request has")
            self._handles.update(new)
            self._commands.extend((partial(self._submit, handle), None) for handle in handles)
        self._bell.ring()

    def abort_all(self, request_ids: list[str]) -> None:
        """Does not wait; a thread that has ended has nothing to abort."""
        for request_id in request_ids:
            self._commands.append((partial(self._abort, request_id), None))
        self._bell.ring()

    def observe_logs(self, on_log: Callable[[RequestLog], None]) -> None:
        self._logs = deque(self._logs, MAX_OBSERVED_LOGS)
        self._on_log = on_log

    def take_stats(self, engine: Engine, reset: bool) -> EngineStats:
        waiting = (SequenceStatus.WAITING, SequenceStatus.PREEMPTED)
        num_waiting = sum(seq.status in waiting for seq in engine.seqs.values())
        fleet = engine.fleet
        pools = zip((scheduler.residency.blocks for scheduler in fleet.schedulers), fleet.peak_blocks, strict=True)
        blocks = [BlockStats(pool.num_usable - pool.num_free, peak, pool.num_usable) for pool, peak in pools]
        busy_s = [ledger.busy_us / 1e6 for ledger in fleet.ledger.of_worker]
        drift = costs.drift.copy() if (costs := engine.policy.costs) else {}
        num_preemptions = sum(scheduler.num_preemptions for scheduler in fleet.schedulers)
        counts = num_preemptions, list(self._processes.num_restarts), len(engine.seqs) - num_waiting, num_waiting
        stats = EngineStats(blocks, list(self._logs), busy_s, fleet.roles, drift, *counts)
        if reset:
            self._logs.clear()
            fleet.reset_statistics()
        return stats

    def run(self) -> None:
        end = NanopdError("the engine was shut down")
        try:
            workers: list[WorkerClient] = [*self._processes.start(self._progress)]
            # One cache of tokens' texts serves all requests.
            make_text = None if self._tokenizer is None else partial(StoppableText, TokenPieces(self._tokenizer))
            rest = make_text, self._processes.replace, self._policy
            engine = Engine(self._config, self._model, workers, time.monotonic, *rest)
            gc.collect()
            gc.freeze()  # to walk through all that libraries have made takes 0.25 s, in which nobody would be served
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
            gc.unfreeze()
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
                idle_s = engine.next_wakeup_s() - time.monotonic()
                self._processes.wait(min(MAX_WAIT_S, max(0.0, idle_s)))

    def _submit(self, handle: RequestHandle, engine: Engine) -> None:
        request = handle.request
        try:
            if request.beams is not None:
                handle.begin(BeamSearch(engine, request, self._deliver_beams))
                return
            for params in request.params.split():
                self._submit_one(handle, params, engine)
        except RequestError as error:  # a role has changed since it was checked
            self._forget(handle)
            handle.fail(error)

    def _submit_one(self, handle: RequestHandle, params: SamplingParams, engine: Engine) -> None:
        """The next answer of a request; the first one computes the prompt for all."""
        name = handle.request_id
        while handle.seqs and name in engine.seqs:
            name = f"{name}/{len(handle.seqs)}"
        request = replace(handle.request, request_id=name, params=params)
        seq = engine.submit(request, parent=handle.seqs[0] if handle.seqs else None, is_checked=True)
        handle.add(seq)
        self._handle_of[seq.seq_id] = handle

    def _abort(self, request_id: str, engine: Engine) -> None:
        if (handle := self._handles.get(request_id)) is None:
            return
        if handle.search is not None:
            handle.search.end(FinishReason.ABORT)
        for seq in reversed(handle.seqs):  # else a follower would be computed from the beginning as its parent ends
            engine.abort(seq.request_id)

    def _deliver(self, update: Update) -> None:
        seq = update.seq
        handle = self._handle_of[seq.seq_id]
        if update.is_finished:
            self._keep(seq.log())
            del self._handle_of[seq.seq_id]
            if handle.ended():
                self._forget(handle)
        handle.update(update)

    def _deliver_beams(self, search: BeamSearch) -> None:
        handle = self._handles[search.first.request_id]
        self._keep(search.log())
        self._forget(handle)
        handle.answer(search)

    def _keep(self, log: RequestLog) -> None:
        self._logs.append(log)
        if self._on_log is not None:
            self._on_log(log)

    def _forget(self, handle: RequestHandle) -> None:
        with self._lock:
            del self._handles[handle.request_id]

    def _finish(self, end: NanopdError) -> None:
        """Answer everybody who waits."""
        with self._lock:
            self._end = end
        for handle in self._handles.values():
            handle.fail(end)
        self._handles.clear()
        while self._commands:
            _, future = self._commands.popleft()
            if future is not None:
                future.set_exception(end)

    def _check_running(self) -> None:
        if self._end is not None:
            raise NanopdError(str(self._end)) from self._end.__cause__


def _run_command(engine: Engine, command: Callable[[Engine], Any], future: Future | None) -> None:
    try:
        value = command(engine)
        if future is not None:
            future.set_result(value)
    except Exception as error:
        if future is None:
            raise
        future.set_exception(error)

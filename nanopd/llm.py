"""`LLM`: nanopd as a library. Owns a background thread that runs the engine and its worker processes.

Any thread may submit, abort and wait. Nothing global is touched: no signal handlers, no environment, several LLMs may
live side by side. Worker processes are spawned, so a script that makes an LLM needs the usual guard:

    if __name__ == "__main__":
        main()
"""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from collections.abc import Sequence as SequenceOf
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from tqdm import tqdm

from nanopd.config import EngineConfig, ModelConfig, check_devices, load_config
from nanopd.core.metrics import RequestMetrics
from nanopd.core.sequence import FINISH_REASONS, Sequence
from nanopd.detokenizer import StoppableText
from nanopd.engine import Engine, Update
from nanopd.errors import ConfigError, NanopdError, RequestError, WorkerError
from nanopd.ipc.doorbell import Doorbell, Waiter
from nanopd.messages import RequestLog, Route, SamplingParams
from nanopd.model_files import load_tokenizer, read_model_config, resolve
from nanopd.outputs import BlockStats, CompletionOutput, RequestOutput, RequestOutputDelta
from nanopd.worker_process import WorkerProcess, start_workers, stop_workers

Prompt = str | list[int]

MAX_WAIT_S = 1.0
SHUTDOWN_TIMEOUT_S = 30.0

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class EngineStats:
    """Of an engine since it started, or since `LLM.reset_stats`."""

    blocks: list[BlockStats]  # per worker
    logs: list[RequestLog]  # of finished requests
    num_preemptions: int


class RequestHandle:
    """A submitted request. Iterate over it for increments, if it was submitted with stream=True."""

    def __init__(self, request_id: str, prompt: str | None, llm: LLM) -> None:
        self.request_id = request_id
        self._prompt = prompt
        self._llm = llm
        self._deltas: SimpleQueue[RequestOutputDelta] = SimpleQueue()
        self._done = threading.Event()
        self._seq: Sequence | None = None  # once finished
        self._failure: str | None = None

    def done(self) -> bool:
        return self._done.is_set()

    def result(self, timeout: float | None = None) -> RequestOutput:
        """Wait for the end of the request.

        Raises:
            TimeoutError: not finished within `timeout` seconds; the request goes on.
            NanopdError: the engine itself has failed.
        """
        if not self._done.wait(timeout):
            raise TimeoutError(f"request {self.request_id} has not finished within {timeout} s")
        if self._seq is None:
            raise NanopdError(f"request {self.request_id}: {self._failure}")
        return self._llm._output(self._seq, self._prompt)

    def abort(self) -> None:
        self._llm.abort(self.request_id)

    def __iter__(self) -> Iterator[RequestOutputDelta]:
        while True:
            delta = self._deltas.get()
            yield delta
            if delta.finish_reason is not None:
                return

    def _update(self, update: Update) -> None:
        reason = FINISH_REASONS[update.seq.status].value if update.is_finished else None
        if update.seq.is_streamed:
            self._deltas.put(RequestOutputDelta(update.text, update.token_ids, reason))
        if update.is_finished:
            self._seq = update.seq
            self._done.set()

    def _fail(self, reason: str) -> None:
        self._failure = reason
        self._deltas.put(RequestOutputDelta("", [], "error"))
        self._done.set()


@dataclass(slots=True)
class _Submission:
    handle: RequestHandle
    prompt_token_ids: list[int]
    params: SamplingParams
    options: dict[str, Any] = field(default_factory=dict)  # keywords of Engine.submit


class _EngineThread(threading.Thread):
    """Spawns the workers, runs the engine, and is the only thread that touches either."""

    def __init__(
        self, config: EngineConfig, model: ModelConfig, path: Path, tokenizer: Any, on_progress: Callable | None
    ) -> None:
        super().__init__(name="nanopd-engine", daemon=True)
        self._config, self._model, self._path, self._tokenizer = config, model, path, tokenizer
        self._on_progress = on_progress
        self._commands: deque[tuple[Callable[[Engine], Any], Future]] = deque()
        self._bell = Doorbell()
        self._handles: dict[str, RequestHandle] = {}
        self._logs: list[RequestLog] = []
        self._is_stopping = False
        self._failure: BaseException | None = None
        self.started: Future[None] = Future()

    def call(self, command: Callable[[Engine], Any]) -> Any:
        """Run `command(engine)` in this thread and return what it returns or raises."""
        future: Future[Any] = Future()
        self._commands.append((command, future))
        self._bell.ring()
        if not self.is_alive():  # it may have ended before it saw the command
            self._refuse_commands()
        return future.result()

    def stop(self) -> None:
        """End the thread and its workers; what is unfinished fails."""
        self._is_stopping = True
        self._bell.ring()

    def submit_all(self, engine: Engine, submissions: list[_Submission]) -> None:
        """Submit all, or none if one cannot be served. Raises RequestError."""
        submitted: list[_Submission] = []
        try:
            for submission in submissions:
                handle = submission.handle
                engine.submit(handle.request_id, submission.prompt_token_ids, submission.params, **submission.options)
                self._handles[handle.request_id] = handle
                submitted.append(submission)
        except RequestError:
            for submission in submitted:
                engine.abort(submission.handle.request_id)
            raise

    def take_stats(self, engine: Engine, reset: bool) -> EngineStats:
        pools = [scheduler.blocks for scheduler in engine.schedulers]
        blocks = [
            BlockStats(pool.num_usable - pool.num_free, peak, pool.num_usable)
            for pool, peak in zip(pools, engine.peak_blocks, strict=True)
        ]
        stats = EngineStats(blocks, list(self._logs), sum(s.num_preemptions for s in engine.schedulers))
        if reset:
            self._logs.clear()
            engine.peak_blocks = [0] * len(pools)
        return stats

    def run(self) -> None:
        workers: list[WorkerProcess] = []
        try:
            workers = start_workers(self._config, self._model, self._path, self._on_progress)
            engine = Engine(self._config, self._model, list(workers), time.monotonic, self._make_text())
            self.started.set_result(None)
            self._loop(engine, workers)
        except BaseException as error:
            self._failure = error
            if not self.started.done():
                self.started.set_exception(error)
            else:
                logger.exception("the engine has failed")
        finally:
            stop_workers(workers)
            reason = "the engine was shut down" if self._failure is None else f"the engine has failed: {self._failure!r}"
            for handle in list(self._handles.values()):
                handle._fail(reason)
            self._refuse_commands()

    def _loop(self, engine: Engine, workers: list[WorkerProcess]) -> None:
        waiter = Waiter()
        waiter.add(self._bell)
        for worker in workers:
            worker.register(waiter)
        while not self._is_stopping:
            while self._commands:
                self._run_command(engine, *self._commands.popleft())
            for update in engine.step():
                self._deliver(update)
            if not self._commands:
                self._wait(engine, waiter, workers)
        waiter.close()

    def _wait(self, engine: Engine, waiter: Waiter, workers: list[WorkerProcess]) -> None:
        wakeup_s = engine.next_wakeup_s()
        timeout_s = MAX_WAIT_S if wakeup_s is None else min(MAX_WAIT_S, max(0.0, wakeup_s - time.monotonic()))
        waiter.wait(timeout_s)

    def _run_command(self, engine: Engine, command: Callable[[Engine], Any], future: Future) -> None:
        try:
            future.set_result(command(engine))
        except Exception as error:
            future.set_exception(error)

    def _deliver(self, update: Update) -> None:
        request_id = update.seq.request_id
        handle = self._handles.get(request_id)
        if update.is_finished:
            self._logs.append(update.seq.log())
            self._handles.pop(request_id, None)
        if handle is not None:
            handle._update(update)

    def _refuse_commands(self) -> None:
        while self._commands:
            _, future = self._commands.popleft()
            future.set_exception(NanopdError("the engine has ended") if self._failure is None else self._failure)

    def _make_text(self) -> Callable[[list[int], tuple[str, ...]], StoppableText] | None:
        if self._tokenizer is None:
            return None
        return lambda prompt_token_ids, stop: StoppableText(self._tokenizer, prompt_token_ids, stop)


class LLM:
    """A model served by the workers of a configuration.

    Use it as a context manager, or call `shutdown`; workers end with this process in any case.
    """

    def __init__(
        self,
        model: str | None = None,
        *,
        config: str | Path | EngineConfig | None = None,
        show_progress: bool = False,
        **overrides: Any,
    ) -> None:
        """Load the model on every worker.

        Args:
            model: overrides the configuration's: a local directory, a hub id, or a built-in name.
            config: name or path of a YAML file, or a configuration; None: the defaults.
            show_progress: a progress bar on stderr while loading.
            overrides: any keys of EngineConfig.

        Raises:
            ConfigError: a key, value or device that is not allowed; nothing was spawned.
            UnsupportedModelError: the model is of a kind that nanopd does not run.
            WorkerError: a worker failed to load, with its traceback.
        """
        settings = _settings(config, overrides if model is None else {**overrides, "model": model})
        self._start(settings, show_progress)

    def _start(self, config: EngineConfig, show_progress: bool) -> None:
        if any(worker.device != "cpu" for worker in config.workers):
            import torch

            check_devices(config, torch.cuda.device_count())
        path = resolve(config.model, load_format=config.load_format)
        on_cpu = all(worker.device == "cpu" for worker in config.workers)
        self.model_config = read_model_config(path, config.dtype, on_cpu)
        self.config = _with_max_model_len(config, self.model_config)
        self.tokenizer = load_tokenizer(config.tokenizer or path)
        self._num_requests = 0
        self._lock = threading.Lock()
        with tqdm(total=100, desc="loading", unit="%", disable=not show_progress) as bar:
            report = _bar_updater(bar) if show_progress else None
            self._thread = _EngineThread(self.config, self.model_config, path, self.tokenizer, report)
            self._thread.start()
            self._stop = weakref.finalize(self, _end_thread, self._thread)
            self._thread.started.result()

    # ------------------------------------------------------------------------------------------------- requests

    def generate(
        self,
        prompts: Prompt | SequenceOf[Prompt],
        sampling_params: SamplingParams | SequenceOf[SamplingParams] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Continue one prompt, or each of many; results are in the order of the prompts.

        Args:
            prompts: text, or a list of token ids; or a list of these.
            sampling_params: for all, or one for each.

        Raises:
            RequestError: one of them cannot be served; none was started.
        """
        prompt_list = _as_list(prompts)
        params_list = _as_params(sampling_params, len(prompt_list))
        submissions = [self._submission(p, s, None) for p, s in zip(prompt_list, params_list, strict=True)]
        self._thread.call(lambda engine: self._thread.submit_all(engine, submissions))
        return self._results([s.handle for s in submissions], use_tqdm)

    def chat(
        self,
        messages: list[dict] | list[list[dict]],
        sampling_params: SamplingParams | SequenceOf[SamplingParams] | None = None,
        use_tqdm: bool = True,
        **template_args: Any,
    ) -> list[RequestOutput]:
        """Answer one conversation, or each of many, through the model's chat template.

        `messages` are dictionaries with `role` and `content`; `template_args` go to the template.
        """
        conversations = messages if messages and isinstance(messages[0], list) else [messages]
        prompts = [self.encode_chat(conversation, **template_args) for conversation in conversations]
        return self.generate(prompts, sampling_params, use_tqdm)

    def submit(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        deadline_s: float | None = None,
        arrival_time_s: float | None = None,
        route: Route | None = None,
        stream: bool = False,
    ) -> RequestHandle:
        """Queue one request and return at once.

        Args:
            request_id: unique among unfinished requests; None: one is made up.
            deadline_s: seconds after which it is aborted.
            arrival_time_s: when it was due (time.monotonic), for metrics; None: now.
            route: serve it on this route.
            stream: hand out tokens as they come, by iterating over the handle.

        Raises:
            RequestError: it can never be served.
        """
        options = {"deadline_s": deadline_s, "arrival_s": arrival_time_s, "route": route, "is_streamed": stream}
        submission = self._submission(prompt, sampling_params or SamplingParams(), request_id, options)
        self._thread.call(lambda engine: self._thread.submit_all(engine, [submission]))
        return submission.handle

    def stream(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None, **submit_args: Any
    ) -> Iterator[RequestOutputDelta]:
        """Increments of one answer as they come; leaving the iterator early aborts the request."""
        handle = self.submit(prompt, sampling_params, stream=True, **submit_args)
        try:
            yield from handle
        finally:
            if not handle.done():
                handle.abort()

    def abort(self, request_id: str) -> None:
        """End a request with what it has; unknown and finished ones are left alone."""
        self._thread.call(lambda engine: engine.abort(request_id))

    def encode_chat(self, messages: list[dict], **template_args: Any) -> list[int]:
        """Token ids of a conversation, ready for the model's answer."""
        if self.tokenizer is None or self.tokenizer.chat_template is None:
            raise RequestError("messages", messages, "a prompt or token ids, as the model has no chat template")
        text = self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=False, **template_args
        )
        return self.tokenizer.encode(text, add_special_tokens=False)

    # ---------------------------------------------------------------------------------------------------- state

    def stats(self, reset: bool = False) -> EngineStats:
        """Blocks in use and the logs of finished requests; `reset` forgets the logs and peaks."""
        return self._thread.call(lambda engine: self._thread.take_stats(engine, reset))

    def shutdown(self) -> None:
        """End the workers; unfinished requests fail. May be called twice."""
        self._stop()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()

    # --------------------------------------------------------------------------------------------------- pieces

    def _submission(
        self, prompt: Prompt, params: SamplingParams, request_id: str | None, options: dict | None = None
    ) -> _Submission:
        if not isinstance(params, SamplingParams):
            raise RequestError("sampling_params", params, "a SamplingParams")
        with self._lock:
            number, self._num_requests = self._num_requests, self._num_requests + 1
        text = prompt if isinstance(prompt, str) else None
        handle = RequestHandle(f"request-{number}" if request_id is None else request_id, text, self)
        return _Submission(handle, self._encode(prompt), params, options or {})

    def _encode(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise RequestError("prompt", prompt, "a list of token ids, as the model has no tokenizer")
            return self.tokenizer.encode(prompt)
        if not all(isinstance(token, int) for token in prompt):
            raise RequestError("prompt", prompt, "text, or a list of token ids")
        return list(prompt)

    def _results(self, handles: list[RequestHandle], use_tqdm: bool) -> list[RequestOutput]:
        try:
            return [h.result() for h in tqdm(handles, desc="generating", unit="req", disable=not use_tqdm)]
        except BaseException:
            for handle in handles:
                if not handle.done() and self._thread.is_alive():
                    handle.abort()
            raise

    def _output(self, seq: Sequence, prompt: str | None) -> RequestOutput:
        completion = CompletionOutput(
            0, self._text(seq), seq.output_token_ids, FINISH_REASONS[seq.status].value, seq.stop_reason, seq.logprobs
        )
        return RequestOutput(
            seq.request_id,
            prompt,
            seq.token_ids[: seq.num_prompt_tokens],
            [completion],
            RequestMetrics.from_log(seq.log()),
            seq.route,
            seq.error,
        )

    def _text(self, seq: Sequence) -> str:
        if isinstance(seq.text, StoppableText):
            return seq.text.text
        if self.tokenizer is None:
            return ""
        return self.tokenizer.decode(seq.output_token_ids, skip_special_tokens=True)


def _end_thread(thread: _EngineThread) -> None:
    thread.stop()
    if thread is not threading.current_thread():  # the garbage collector may call from anywhere
        thread.join(SHUTDOWN_TIMEOUT_S)


def _settings(config: str | Path | EngineConfig | None, overrides: dict[str, Any]) -> EngineConfig:
    if config is None:
        return EngineConfig.from_dict(overrides)
    if isinstance(config, EngineConfig):
        return config.replace(**overrides)
    return load_config(config).replace(**overrides)


def _with_max_model_len(config: EngineConfig, model: ModelConfig) -> EngineConfig:
    longest = model.max_position_embeddings
    if config.max_model_len is not None and config.max_model_len > longest:
        raise ConfigError("max_model_len", config.max_model_len, f"at most {longest}, the model's limit")
    return config.replace(max_model_len=config.max_model_len or longest)


def _as_list(prompts: Prompt | SequenceOf[Prompt]) -> list[Prompt]:
    is_one = isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int))
    return [prompts] if is_one else list(prompts)  # type: ignore[list-item]


def _as_params(params: SamplingParams | SequenceOf[SamplingParams] | None, count: int) -> list[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
    if len(params) != count:
        raise RequestError("sampling_params", f"{len(params)} of them", f"one for all, or one for each of {count} prompts")
    return list(params)


def _bar_updater(bar: tqdm) -> Callable[[float], None]:
    def update(share: float) -> None:
        bar.n = round(100 * share)
        bar.refresh()

    return update

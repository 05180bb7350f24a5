"""`LLM`: nanopd as a library. Owns a background thread that runs the engine and its worker processes.

Any thread may submit, abort and wait. Nothing global is changed: no signal handlers, and the environment only for the
moment in which workers are spawned; several LLMs may live side by side. Worker processes are spawned, so a script that
makes an LLM needs the usual guard:

    if __name__ == "__main__":
        main()
"""

from __future__ import annotations

import itertools
import multiprocessing
import threading
import time
import weakref
from collections.abc import Callable, Collection, Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

from jinja2 import TemplateError  # comes with transformers' chat templates
from tqdm import tqdm

from nanopd.checkpoints.model_files import load_tokenizer, read_model_config, resolve
from nanopd.config import PREDICTING, EngineConfig, ModelConfig, check_devices, load_config
from nanopd.core.sequence import FINISH_REASONS, Sequence
from nanopd.engine.beam_search import BeamSearch, sampling_params
from nanopd.errors import ConfigError, RequestError
from nanopd.frontend.detokenizer import StoppableText
from nanopd.frontend.engine_thread import EngineThread
from nanopd.frontend.handle import RequestHandle
from nanopd.frontend.outputs import CompletionOutput, EngineStats, RequestOutput, RequestOutputDelta
from nanopd.lab.profiler import cache_file
from nanopd.messages import FinishReason, RequestLog, Route, Work
from nanopd.metrics import RequestMetrics
from nanopd.request import BeamSearchParams, Request, SamplingParams
from nanopd.routing.factory import find_parameters, keep_lengths, make_policy
from nanopd.routing.policy import Policy

Prompt = str | list[int]
Prompts = Prompt | SequenceOf[Prompt]  # one, or many
Chat = list[dict]  # messages
Sampling = SamplingParams | SequenceOf[SamplingParams] | None  # for all, or one for each; None: the defaults
Settings = str | Path | EngineConfig | None  # name or path of a YAML file, or a configuration; None: the defaults

SHUTDOWN_TIMEOUT_S = 30.0


class LLM:
    """A model served by the workers of a configuration.

    Use it as a context manager, or call `shutdown`; workers end with this process in any case.
    """

    def __init__(
        self, model: str | None = None, *, config: Settings = None, show_progress: bool = False, **overrides: Any
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
        _check_main_guard()
        settings = _settings(config, overrides if model is None else {**overrides, "model": model})
        self.config, self.model_config, path = load_settings(settings)
        self.tokenizer = load_tokenizer(settings.tokenizer or path)
        policy = _policy(self.config, self.model_config)
        self._numbers = itertools.count()
        with tqdm(total=100, desc="loading", unit="%", disable=not show_progress) as bar:

            def on_progress(share: float) -> None:
                bar.update(round(100 * share) - bar.n)

            self._thread = EngineThread(self.config, self.model_config, path, self.tokenizer, policy, on_progress)
            self._thread.start()
            keep = partial(keep_lengths, policy, self.config.answer_lengths)
            self._stop = weakref.finalize(self, _end_thread, self._thread, keep)
            try:
                self._thread.started.result()
            except BaseException:  # Ctrl-C too
                self.shutdown()
                raise

    # ------------------------------------------------------------------------------------------------- requests

    def generate(
        self, prompts: Prompts, sampling_params: Sampling = None, use_tqdm: bool = True
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
        return self._results([self._request(p, s) for p, s in zip(prompt_list, params_list, strict=True)], use_tqdm)

    def beam_search(
        self, prompts: Prompts, params: BeamSearchParams | None = None, use_tqdm: bool = True
    ) -> list[RequestOutput]:
        """The `num_beams` likeliest continuations that a search finds of each prompt, with their scores, best first.

        Raises:
            RequestError: one of them cannot be served; none was started.
        """
        beams = params or BeamSearchParams()
        sampling = sampling_params(beams, () if beams.ignore_eos else self.model_config.eos_token_ids)
        return self._results([self._request(p, sampling, beams=beams) for p in _as_list(prompts)], use_tqdm)

    def chat(
        self, messages: Chat | list[Chat], sampling_params: Sampling = None, use_tqdm: bool = True, **template_args: Any
    ) -> list[RequestOutput]:
        """Answer one conversation, or each of many, through the model's chat template.

        `messages` are dictionaries with `role` and `content`; `template_args` go to the template.
        """
        conversations: list[Any] = messages if messages and isinstance(messages[0], list) else [messages]
        prompts = [self.encode_chat(conversation, **template_args) for conversation in conversations]
        return self.generate(prompts, sampling_params, use_tqdm)

    def submit(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        deadline_s: float | None = None,
        queue_timeout_s: float | None = None,
        priority: int = 0,
        arrival_time_s: float | None = None,
        route: Route | None = None,
        stream: bool = False,
        on_delta: Callable[[RequestOutputDelta], None] | None = None,
    ) -> RequestHandle:
        """Queue one request and return at once.

        Args:
            request_id: unique among unfinished requests; None: one is made up.
            deadline_s: seconds after which it is aborted.
            queue_timeout_s: seconds after which it is aborted if it still waits for its turn.
            priority: lower goes first; among equals, who was submitted first.
            arrival_time_s: when it was due (time.monotonic), for metrics; None: now.
            route: serve it on this route.
            stream: hand out tokens as they come, by iterating over the handle.
            on_delta: called by the engine's thread with each increment (without `stream` the last one alone) in place
                of iterating; must neither wait nor raise.

        Raises:
            RequestError: it can never be served.
        """
        wishes = {"deadline_s": deadline_s, "queue_timeout_s": queue_timeout_s, "priority": priority, "route": route}
        params = sampling_params or SamplingParams()
        request = self._request(prompt, params, request_id, arrival_time_s, is_streamed=stream, **wishes)
        handle = RequestHandle(request, self._output, self.abort, on_delta)
        self._thread.submit_all([handle])
        return handle

    def stream(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None, **submit_args: Any
    ) -> Iterator[RequestOutputDelta]:
        """Increments of one answer as they come; leaving the iterator early aborts the request.

        `submit_args` and what is raised are those of `submit`.
        """
        return _increments(self.submit(prompt, sampling_params, stream=True, **submit_args))

    def abort(self, request_id: str) -> None:
        """End a request with what it has; unknown and finished ones are left alone."""
        self._thread.abort_all([request_id])

    def encode_chat(self, messages: Chat, **template_args: Any) -> list[int]:
        """Token ids of a conversation, ready for the model's answer.

        Raises:
            RequestError: the model has no chat template, or it does not take these messages.
        """
        if self.tokenizer is None or self.tokenizer.chat_template is None:
            raise RequestError("messages", messages, "a prompt or token ids, as the model has no chat template")
        if not (messages and all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in messages)):
            raise RequestError("messages", messages, "mappings with role and content")
        try:
            how = {**template_args, "add_generation_prompt": True, "tokenize": False}
            text = self.tokenizer.apply_chat_template(messages, **how)
        except (TypeError, ValueError, TemplateError) as error:
            raise RequestError("messages", messages, f"what the chat template takes ({error})") from error
        return self.tokenizer.encode(text, add_special_tokens=False)

    # ---------------------------------------------------------------------------------------------------- state

    def stats(self, reset: bool = False) -> EngineStats:
        """Blocks in use, the logs of finished requests, busy times, restarts; `reset` forgets what says so."""
        return self._thread.call(lambda engine: self._thread.take_stats(engine, reset))

    def observe(self, on_work: Callable[[Work], None] | None) -> None:
        """Call `on_work`, which must neither wait nor raise, in the engine's thread with all that workers have done."""
        self._thread.call(lambda engine: engine.fleet.observe(on_work))

    def observe_logs(self, on_log: Callable[[RequestLog], None]) -> None:
        """Likewise, with the log of each request that ends from now on; `stats` then keeps the latest 1,000 only."""
        self._thread.call(lambda _: self._thread.observe_logs(on_log))

    def shutdown(self) -> None:
        """End the workers; unfinished requests fail. Returns when they have ended; may be called twice."""
        self._stop()
        _end_thread(self._thread)  # who called before, in another thread, may still be at it

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()

    # --------------------------------------------------------------------------------------------------- pieces

    def _request(
        self, prompt: Prompt, params: SamplingParams, name: str | None = None, due_s: float | None = None, **more: Any
    ) -> Request:
        """`due_s` is its `arrival_s`, None: now; `more` fields of Request."""
        arrival_s = time.monotonic() if due_s is None else due_s
        if not isinstance(params, SamplingParams):
            raise RequestError("sampling_params", params, "a SamplingParams")
        if self.tokenizer is not None and params.bad_words:
            words = (ids for word in params.bad_words for ids in _ids_of_word(word, self.tokenizer))
            params = replace(params, bad_words=tuple(words))
        if more.get("is_streamed") and params.best_of not in (None, params.n):
            raise RequestError("best_of", params.best_of, "None or n, for a stream")
        name = f"request-{next(self._numbers)}" if name is None else name
        text = prompt if isinstance(prompt, str) else None
        return Request(name, self._encode(prompt), params, arrival_s, text, **more)

    def _encode(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise RequestError("prompt", prompt, "a list of token ids, as the model has no tokenizer")
            return self.tokenizer.encode(prompt)
        if not isinstance(prompt, (list, tuple)) or not all(isinstance(token, int) for token in prompt):
            raise RequestError("prompt", prompt, "text, or a list of token ids")
        return list(prompt)

    def _results(self, requests: list[Request], use_tqdm: bool) -> list[RequestOutput]:
        handles = [RequestHandle(request, self._output, self.abort) for request in requests]
        self._thread.submit_all(handles)
        try:
            return [h.result() for h in tqdm(handles, desc="generating", unit="req", disable=not use_tqdm)]
        except BaseException:
            self._thread.abort_all([handle.request_id for handle in handles if not handle.done()])
            raise

    def _output(self, handle: RequestHandle) -> RequestOutput:
        seqs, search, params = handle.seqs, handle.search, handle.request.params
        if search is not None:
            first, log, error = search.first, search.log(), search.error
            completions = self._beams(search)
        else:
            first, log = seqs[0], seqs[0].log()
            error = next((seq.error for seq in seqs if seq.error is not None), None)
            completions = self._completions(seqs, params)
        asked = first.request_id, handle.request.prompt, list(handle.request.prompt_token_ids)
        more: dict[str, Any] = {"decision": first.decision, "num_cached_tokens": first.num_cached_tokens or 0}
        if params.prompt_logprobs is not None:
            more["prompt_logprobs"] = first.prompt_logprobs
        return RequestOutput(*asked, completions, RequestMetrics.from_log(log), first.route, error, **more)

    def _completions(self, seqs: list[Sequence], params: SamplingParams) -> list[CompletionOutput]:
        if len(seqs) > params.n:
            seqs = sorted(seqs, key=lambda seq: -cast(float, _logprob(seq)))[: params.n]
        completions = []
        for index, seq in enumerate(seqs):
            logprobs = None if params.logprobs is None else seq.logprobs
            end = FINISH_REASONS[seq.status].value, seq.stop_reason, logprobs, _logprob(seq)
            completions.append(CompletionOutput(index, self._text(seq), seq.output_token_ids, *end))
        return completions

    def _beams(self, search: BeamSearch) -> list[CompletionOutput]:
        """All that are complete, or else as far as they got."""
        beams, completions = search.beams, []
        for index, beam in enumerate(beams.complete or beams.running):
            text_ids = _without_end(beam.token_ids, beams.eos_token_ids)
            end = FinishReason.STOP if len(text_ids) < len(beam.token_ids) else FinishReason.LENGTH
            answer = index, self._decode(text_ids), beam.token_ids, (search.reason or end).value
            completions.append(CompletionOutput(*answer, cumulative_logprob=beam.logprob, score=beam.score))
        return completions

    def _text(self, seq: Sequence) -> str:
        if isinstance(seq.text, StoppableText):
            return seq.text.text
        return self._decode(_without_end(seq.output_token_ids, seq.stop_ids))

    def _decode(self, token_ids: list[int]) -> str:
        return "" if self.tokenizer is None else self.tokenizer.decode(token_ids, skip_special_tokens=True)


def _logprob(seq: Sequence) -> float | None:
    """Of the whole answer; None: it has no log probabilities."""
    rows = zip(seq.logprobs or (), seq.output_token_ids, strict=False)
    return None if seq.logprobs is None else sum(row[token] for row, token in rows)


def _without_end(token_ids: list[int], end_ids: Collection[int]) -> list[int]:
    """The tokens of the text; one that ended it is no part of it."""
    return token_ids[:-1] if token_ids and token_ids[-1] in end_ids else token_ids


def _ids_of_word(word: str | tuple[int, ...], tokenizer: Any) -> list[tuple[int, ...]]:
    """As tokens in the midst of a word; and, where that begins with another token, behind a space (vLLM's rule)."""
    if not isinstance(word, str):
        return [word]
    alone, spaced = (tuple(tokenizer.encode(s + word.lstrip(), add_special_tokens=False)) for s in ("", " "))
    return [alone, spaced] if spaced[:1] != alone[:1] and len(spaced) == len(alone) else [alone]


def _increments(handle: RequestHandle) -> Iterator[RequestOutputDelta]:
    try:
        yield from handle
    finally:
        if not handle.done():
            handle.abort()


def _end_thread(thread: EngineThread, keep: Callable[[], None] = lambda: None) -> None:
    thread.stop()
    if thread is not threading.current_thread():  # the garbage collector may call from anywhere
        thread.join(SHUTDOWN_TIMEOUT_S)
    keep()


def _check_main_guard() -> None:
    # multiprocessing's own mark of a process that is still importing the script which started it
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise RuntimeError('a worker imports this script, which makes an LLM: it needs `if __name__ == "__main__":`')


def _settings(config: Settings, overrides: dict[str, Any]) -> EngineConfig:
    if config is None:
        return EngineConfig.from_dict(overrides)
    return config.replace(**overrides) if isinstance(config, EngineConfig) else load_config(config, **overrides)


def load_settings(config: EngineConfig) -> tuple[EngineConfig, ModelConfig, Path]:
    """The configuration with its model's own length, the model, and where its files are.

    Raises:
        ConfigError: a device that is not there, no such model, or more than its length.
        UnsupportedModelError: the model is of a kind that nanopd does not run.
    """
    on_cpu = all(worker.device == "cpu" for worker in config.workers)
    if not on_cpu:
        import torch

        check_devices(config, torch.cuda.device_count())
    path = resolve(config.model, load_format=config.load_format)
    model = read_model_config(path, config.dtype, on_cpu)
    longest = model.max_position_embeddings
    if config.max_model_len is not None and config.max_model_len > longest:
        raise ConfigError("max_model_len", config.max_model_len, f"at most {longest}, the model's limit")
    return config.replace(max_model_len=config.max_model_len or longest), model, path


def _policy(config: EngineConfig, model: ModelConfig) -> Policy:
    """The configured policy, with the parameters of this machine where it needs any."""
    if config.policy not in PREDICTING:
        return make_policy(config)
    parameters = find_parameters(config.params, cache_file(config, model))
    num_bytes = config.kv_layout(model).bytes_per_token
    if parameters.kv_bytes_per_token != num_bytes:
        what = f"{config.params}: {parameters.model}, {parameters.kv_bytes_per_token} bytes per token"
        raise ConfigError("params", what, f"those of a model with {num_bytes} bytes of KV cache per token")
    return make_policy(config, parameters)


def _as_list(prompts: Prompts) -> list[Prompt]:
    is_one = isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int))
    return [cast(Prompt, prompts)] if is_one else list(cast(SequenceOf[Prompt], prompts))


def _as_params(params: Sampling, count: int) -> list[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
    if len(params) != count:
        raise RequestError("sampling_params", f"{len(params)} of them", f"one, or one for each of {count} prompts")
    return list(params)

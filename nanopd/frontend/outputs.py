"""What callers get back; the shapes are vLLM's."""

from __future__ import annotations

from dataclasses import dataclass

from nanopd.messages import RequestLog, Role, Route
from nanopd.metrics import RequestMetrics
from nanopd.routing.policy import Decision


@dataclass(slots=True)
class CompletionOutput:
    """One generated continuation of a prompt."""

    index: int
    text: str  # "" where the model has no tokenizer
    token_ids: list[int]
    finish_reason: str | None  # a value of messages.FinishReason
    stop_reason: int | str | None = None  # the stop token id or stop string asked for that was found
    logprobs: list[dict[int, float]] | None = None  # per token: token id -> log probability, the chosen one first
    cumulative_logprob: float | None = None  # of all tokens; None: they have no logprobs
    score: float | None = None  # of a beam search: cumulative_logprob / length ** length_penalty


@dataclass(slots=True)
class RequestOutput:
    """A request's result."""

    request_id: str
    prompt: str | None  # None where token ids were given
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    metrics: RequestMetrics
    route: Route | None
    error: str | None = None  # why, where finish_reason is "error", or "abort" by a deadline
    finished: bool = True
    decision: Decision | None = None  # the router's last one before the first token, with what it predicted
    num_cached_tokens: int = 0  # of the prompt, found in the prefix cache of the worker that computed the rest
    prompt_logprobs: list[dict[int, float] | None] | None = None  # as logprobs, per token of the prompt; first None


@dataclass(slots=True)
class RequestOutputDelta:
    """The next piece of a streamed answer."""

    text: str
    token_ids: list[int]
    finish_reason: str | None = None  # set in the last piece of the answer
    error: str | None = None  # why, where finish_reason is "error", or "abort" by a deadline
    logprobs: list[dict[int, float]] | None = None  # of token_ids, as in CompletionOutput
    index: int = 0  # of the answer, where there are several
    finished: bool = False  # no more pieces of any answer follow


@dataclass(slots=True)
class BlockStats:
    """KV blocks of one worker."""

    used: int
    peak: int
    total: int


@dataclass(slots=True)
class EngineStats:
    """Of an engine since it started, or where it says so since `LLM.stats(reset=True)`."""

    blocks: list[BlockStats]  # per worker; peaks since the reset
    logs: list[RequestLog]  # of requests finished since the reset, the latest 100,000; 1,000 with `LLM.observe_logs`
    busy_s: list[float]  # per worker, spent on steps since the reset
    roles: list[Role]  # per worker, now
    drift: dict[str, float]  # measured over predicted, by kind of work; empty where the policy does not correct itself
    num_preemptions: int
    num_restarts: list[int]  # per worker, begun after it died
    num_running: int  # sequences: answers of requests
    num_waiting: int  # sequences, for a first or, preempted, another turn

"""What callers get back; the shapes are vLLM's."""

from __future__ import annotations

from dataclasses import dataclass

from nanopd.messages import RequestLog, Role, Route
from nanopd.metrics import RequestMetrics
from nanopd.routing.policy import Decision


@dataclass(slots=True)
class CompletionOutput:
    """One generated continuation of a prompt."""

    index: int  # among the outputs of its request
    text: str  # "" where the model has no tokenizer
    token_ids: list[int]
    finish_reason: str | None  # a value of messages.FinishReason
    stop_reason: int | str | None = None  # the stop token id or stop string of the request that ended the text
    logprobs: list[dict[int, float]] | None = None  # per token: token id -> log probability, the chosen token first
    cumulative_logprob: float | None = None  # the sum over all tokens; None where logprobs is None
    score: float | None = None  # in a beam search: cumulative_logprob / length ** length_penalty


@dataclass(slots=True)
class RequestOutput:
    """The result of a request."""

    request_id: str
    prompt: str | None  # None where token ids were given
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    metrics: RequestMetrics
    route: Route | None
    error: str | None = None  # the reason where finish_reason is "error", or "abort" by a deadline
    finished: bool = True
    decision: Decision | None = None  # the policy's last decision before the first token, with its predictions
    num_cached_tokens: int = 0  # tokens of the prompt that were in the prefix cache of the worker of the prefill
    prompt_logprobs: list[dict[int, float] | None] | None = None  # per token of the prompt, None for the first one


@dataclass(slots=True)
class RequestOutputDelta:
    """The next piece of a streamed answer."""

    text: str
    token_ids: list[int]
    finish_reason: str | None = None  # set in the last piece of the answer
    error: str | None = None  # the reason where finish_reason is "error", or "abort" by a deadline
    logprobs: list[dict[int, float]] | None = None  # those of token_ids, as in CompletionOutput
    index: int = 0  # which of several answers this is a piece of
    finished: bool = False  # whether this is the last piece of the last answer


@dataclass(slots=True)
class BlockStats:
    """Numbers of KV blocks of one worker."""

    used: int
    peak: int  # the most that were in use at once
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

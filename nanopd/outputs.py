"""What callers get back; the shapes are vLLM's."""

from __future__ import annotations

from dataclasses import dataclass

from nanopd.core.metrics import RequestMetrics
from nanopd.messages import Route


@dataclass(slots=True)
class CompletionOutput:
    """One generated continuation of a prompt."""

    index: int
    text: str  # "" where the model has no tokenizer
    token_ids: list[int]
    finish_reason: str | None  # a value of messages.FinishReason
    stop_reason: int | str | None = None  # the stop token id or stop string asked for that was found
    logprobs: list[dict[int, float]] | None = None  # per token: token id -> log probability, the chosen one first


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
    num_cached_tokens: int = 0  # of the prompt, found in the prefix cache of the worker that computed the rest


@dataclass(slots=True)
class RequestOutputDelta:
    """The next piece of a streamed answer."""

    text: str
    token_ids: list[int]
    finish_reason: str | None = None  # set in the last piece
    error: str | None = None  # why, where finish_reason is "error", or "abort" by a deadline
    logprobs: list[dict[int, float]] | None = None  # of token_ids, as in CompletionOutput


@dataclass(slots=True)
class BlockStats:
    """KV blocks of one worker."""

    used: int
    peak: int
    total: int

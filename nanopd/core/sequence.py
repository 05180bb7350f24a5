"""A sequence of tokens on its way through the engine: one answer to a request.

Owns what belongs to one sequence wherever it is: tokens, status, route, times. What a worker's scheduler needs of it
every step stands in that scheduler's `SlotTable` while the sequence holds a slot there.
Parent process only; knows neither workers nor blocks beyond the ids in its table.

    WAITING ─▶ PREFILL ─▶ MOVING ◀─▶ RUNNING ─▶ FINISHED_(STOPPED | LENGTH | ABORTED | ERROR)
       ▲          │          │          │         a collocated sequence skips MOVING;
       └──────────┴──────────┴──────────┘         the way back is PREEMPTED
"""

from __future__ import annotations

from dataclasses import InitVar, dataclass, field
from enum import Enum
from typing import Any, Protocol

import numpy as np

from nanopd.core.speculation import Drafter
from nanopd.messages import EventKind, FinishReason, RequestEvent, RequestLog, Route
from nanopd.request import Request, SamplingParams


class TextStream(Protocol):
    """Makes text of a sequence's tokens and looks for its stop strings."""

    stopped_by: str | None  # the stop string that was found

    def push(self, token_ids: list[int], may_stop: bool) -> str:
        """Text that has become final; empty once stopped."""

    def finish(self) -> str:
        """The rest, when no more tokens come."""


class Chooser(Protocol):
    """Chooses the tokens of sequences, each of which waits for the choice before it goes on."""

    def sampled(self, seq: Sequence) -> None:
        """The sequence has its next token, which is no more than a proposal, and its logprobs."""

    def ended(self, seq: Sequence) -> None:
        """The sequence has finished, in whatever way."""


class SequenceStatus(Enum):
    WAITING = "waiting"
    PREFILL = "prefill"
    MOVING = "moving"
    RUNNING = "running"
    PREEMPTED = "preempted"
    FINISHED_STOPPED = "stopped"
    FINISHED_LENGTH = "length"
    FINISHED_ABORTED = "aborted"
    FINISHED_ERROR = "error"

    @property
    def is_finished(self) -> bool:
        return self in FINISH_REASONS


FINISH_REASONS = {
    SequenceStatus.FINISHED_STOPPED: FinishReason.STOP,
    SequenceStatus.FINISHED_LENGTH: FinishReason.LENGTH,
    SequenceStatus.FINISHED_ABORTED: FinishReason.ABORT,
    SequenceStatus.FINISHED_ERROR: FinishReason.ERROR,
}


@dataclass(slots=True, eq=False)
class Sequence:
    """One prompt and the tokens generated from it."""

    seq_id: int  # order of submission
    request: Request
    max_model_len: InitVar[int]
    eos_token_ids: InitVar[tuple[int, ...]]
    seed: int  # in `__init__`: that of a request which has none
    root_key: bytes = b""  # what the keys of its prefixes begin with
    chooser: Chooser | None = None  # None: what is sampled is taken
    request_id: str = field(init=False)
    params: SamplingParams = field(init=False)
    rank: tuple[int, int, int] = field(init=False)  # priority, then order of requests, and within one; lower goes first
    # The prompt, then the tokens that the parent has received: of an unwatched sequence as of its last
    # `SlotTable.sync`, as the table has the newest ones.
    token_ids: list[int] = field(init=False)
    token_times_s: list[float] = field(default_factory=list)  # one per generated token
    logprobs: list[dict[int, float]] | None = None
    prompt_logprobs: list[dict[int, float] | None] = field(default_factory=list)  # if asked for; the first one is None
    num_prompt_tokens: int = field(init=False)
    end_len: int = field(init=False)  # number of tokens at which the sequence ends for length
    min_len: int = field(init=False)  # below, the sequence must not stop
    stop_ids: frozenset[int] = field(init=False)
    status: SequenceStatus = SequenceStatus.WAITING
    route: Route | None = None
    slot: int | None = None  # in the scheduler of the worker it is on
    block_table: list[int] = field(default_factory=list)  # on the worker it is on
    host_table: list[int] = field(default_factory=list)  # if swapped out: blocks in host memory of its decode worker
    num_swapped: int = 0  # tokens in `host_table`; else 0
    num_expected_cached: int = 0  # tokens that need not be computed where it waits, as far as is known
    num_published_blocks: int = 0  # blocks at its beginning that the worker's prefix cache knows
    block_keys: list[bytes] = field(default_factory=list)  # of full blocks, for prefix caches, as far as needed
    num_cached_tokens: int | None = None  # found when its prefill started first; None: it has not started
    awaits_choice: bool = False  # its last token is a proposal
    drafter: Drafter | None = None  # None: the sequence never has drafts
    is_watched: bool = False  # the engine looks at each of its tokens
    stop_reason: int | str | None = None
    text: TextStream | None = None  # where tokens become text while they come
    error: str | None = None
    decision: Any = None  # of the policy, with the numbers behind it
    num_deaths: int = 0  # of workers that were computing it
    events: list[RequestEvent] = field(init=False)

    def __post_init__(self, max_model_len: int, eos_token_ids: tuple[int, ...]) -> None:
        request, params = self.request, self.request.params
        self.request_id, self.params = request.request_id, params
        self.rank = (request.priority, self.seq_id, self.seq_id)
        self.seed = self.seed if params.seed is None else params.seed
        self.token_ids = list(request.prompt_token_ids)
        self.logprobs = None if params.logprobs is None else []
        self.num_prompt_tokens = len(request.prompt_token_ids)
        self.end_len = request.max_num_tokens or max_model_len
        self.min_len = self.num_prompt_tokens + params.min_tokens
        self.stop_ids = frozenset(() if params.ignore_eos else eos_token_ids) | frozenset(params.stop_token_ids)
        wants_more = params.stop_token_ids or self.logprobs is not None
        self.is_watched = bool(request.is_streamed or self.needs_feedback or wants_more)
        self.events = [RequestEvent(request.arrival_s, EventKind.ARRIVED)]

    @property
    def worker(self) -> int | None:
        """The worker whose scheduler has it now."""
        if self.route is None:
            return None
        is_decoding = self.status is SequenceStatus.RUNNING or bool(self.host_table)
        return self.route.decode_worker if is_decoding else self.route.prefill_worker

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def output_token_ids(self) -> list[int]:
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def needs_feedback(self) -> bool:
        """Whether the parent must see each token before the next one may be computed."""
        is_drafting = self.drafter is not None and self.drafter.is_drafting
        return bool(is_drafting or self.params.stop or self.params.logits_processors or self.chooser)

    @property
    def awaits_prompt_logprobs(self) -> bool:
        """Whether its prompt has to be computed, from the first token on, for the logits."""
        return self.params.prompt_logprobs is not None and len(self.prompt_logprobs) < self.num_prompt_tokens

    def log_event(self, time_s: float, kind: EventKind, worker: int | None = None) -> None:
        self.events.append(RequestEvent(time_s, kind, worker))

    def log(self) -> RequestLog:
        drafts = (0, 0) if self.drafter is None else (self.drafter.num_drafts, self.drafter.num_accepted)
        head = self.request_id, self.num_prompt_tokens, self.events, np.array(self.token_times_s)
        return RequestLog(*head, self.route, self.num_cached_tokens or 0, *drafts, FINISH_REASONS.get(self.status))

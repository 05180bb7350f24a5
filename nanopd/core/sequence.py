"""A sequence of tokens on its way through the engine: one answer to a request.

Owns what belongs to one sequence wherever it is: tokens, status, route, times. What a worker's scheduler needs of it
every step stands in that scheduler's `SlotTable` while the sequence holds a slot there.
Parent process only; knows neither workers nor blocks beyond the ids in its table.

    WAITING ─▶ PREFILL ─▶ MOVING ◀─▶ RUNNING ─▶ FINISHED_(STOPPED | LENGTH | ABORTED | ERROR)
       ▲          │          │          │         a collocated sequence skips MOVING;
       └──────────┴──────────┴──────────┘         the way back is PREEMPTED
"""

from __future__ import annotations

from enum import Enum
from typing import Protocol

import numpy as np

from nanopd.core.speculation import Drafter
from nanopd.messages import EventKind, FinishReason, RequestEvent, RequestLog, Route
from nanopd.request import Request


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


class Sequence:
    """One prompt and the tokens generated from it."""

    __slots__ = (
        "awaits_choice",
        "block_keys",
        "block_table",
        "chooser",
        "decision",
        "drafter",
        "end_len",
        "error",
        "events",
        "host_table",
        "is_watched",
        "logprobs",
        "min_len",
        "num_cached_tokens",
        "num_deaths",
        "num_expected_cached",
        "num_prompt_tokens",
        "num_published_blocks",
        "num_swapped",
        "params",
        "prompt_logprobs",
        "rank",
        "request",
        "request_id",
        "root_key",
        "route",
        "seed",
        "seq_id",
        "slot",
        "status",
        "stop_ids",
        "stop_reason",
        "text",
        "token_ids",
        "token_times_s",
    )

    def __init__(
        self,
        seq_id: int,
        request: Request,
        *,
        max_model_len: int,
        eos_token_ids: tuple[int, ...],
        seed: int,
        root_key: bytes = b"",
        chooser: Chooser | None = None,
    ) -> None:
        """`seed` counts where the request has none; `root_key` is what the keys of its prefixes begin with."""
        params = request.params
        self.seq_id = seq_id  # order of submission
        self.request, self.request_id, self.params = request, request.request_id, params
        self.rank = (request.priority, seq_id, seq_id)  # then the order of requests, and within one; lower goes first
        self.seed = params.seed if params.seed is not None else seed
        self.root_key = root_key
        # The prompt, then the tokens that the parent has received: of an unwatched sequence as of its last
        # `SlotTable.sync`, as the table has the newest ones.
        self.token_ids = list(request.prompt_token_ids)
        self.token_times_s: list[float] = []  # one per generated token
        self.logprobs: list[dict[int, float]] | None = None if params.logprobs is None else []
        self.prompt_logprobs: list[dict[int, float] | None] = []  # if asked for: per token of the prompt, first None
        self.num_prompt_tokens = len(request.prompt_token_ids)
        self.end_len = request.max_num_tokens or max_model_len  # number of tokens at which the sequence ends for length
        self.min_len = self.num_prompt_tokens + params.min_tokens  # below, the sequence must not stop
        self.stop_ids = frozenset(() if params.ignore_eos else eos_token_ids) | frozenset(params.stop_token_ids)
        self.status = SequenceStatus.WAITING
        self.route: Route | None = None
        self.slot: int | None = None  # in the scheduler of the worker it is on
        self.block_table: list[int] = []  # on the worker it is on
        self.host_table: list[int] = []  # of a swapped-out sequence: blocks in host memory of its decode worker
        self.num_swapped = 0  # tokens in `host_table`; else 0
        self.num_expected_cached = 0  # tokens that need not be computed where it waits, as far as is known
        self.num_published_blocks = 0  # blocks at its beginning that the worker's prefix cache knows
        self.block_keys: list[bytes] = []  # of full blocks, for prefix caches; as far as they were needed
        self.num_cached_tokens: int | None = None  # found when its prefill started first; None: it has not started
        self.chooser = chooser  # None: what is sampled is taken
        self.awaits_choice = False  # its last token is a proposal
        self.drafter: Drafter | None = None  # None: the sequence never has drafts
        self.is_watched = bool(  # the engine looks at each of its tokens
            request.is_streamed or self.needs_feedback or params.stop_token_ids or self.logprobs is not None
        )
        self.stop_reason: int | str | None = None
        self.text: TextStream | None = None  # where tokens become text while they come
        self.error: str | None = None
        self.decision: object = None  # of the policy, with the numbers behind it
        self.num_deaths = 0  # of workers that were computing it
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
        return RequestLog(
            self.request_id,
            self.num_prompt_tokens,
            self.events,
            np.array(self.token_times_s),
            self.route,
            self.num_cached_tokens or 0,
            num_draft_tokens=self.drafter.num_drafts if self.drafter is not None else 0,
            num_accepted_tokens=self.drafter.num_accepted if self.drafter is not None else 0,
            finish_reason=FINISH_REASONS.get(self.status),
        )

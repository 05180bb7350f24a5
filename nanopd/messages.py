"""What crosses processes and rooms: plain data, numpy and the standard library only.

Two families. Objects of the parent (`SamplingParams`, `Role`, `Route`, `RequestEvent`, `RequestLog`, `Work`) and wire
messages (`SlotExtras`, `StepBatch`, `StepResult`, `TransferPlan`, `TransferAck`), which are flat numpy arrays so that
they go through a shared-memory ring without pickling. This module knows their layout, not who sends them when.

Wire format of a message: int64 words, native byte order. Word 0 is the message kind, then its int fields, then the
number of items of each section; behind them the sections themselves, each padded to a multiple of 8 bytes.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum, IntEnum
from typing import Annotated, Any

import numpy as np

from nanopd.errors import RequestError
from nanopd.rules import TRUE_OR_FALSE, Rule, check, integer, list_of, number, one_of, optional, positive, ruled, text

MAX_LOGPROBS = 20  # per token; what StepResult has room for
MAX_ANSWERS = 128  # per request
MAX_STOP_TOKEN_IDS = 128  # per request; what a StepBatch is sure to have room for
MAX_BAD_WORDS, MAX_BAD_WORD_TOKENS = 1024, 16  # per request, per word; what a SlotExtras is sure to have room for
MAX_PROCESSOR_BYTES = 1 << 20  # per request, pickled; likewise

LogitsProcessor = Callable[[list[int], Any], Any]  # (tokens generated so far, logits [vocab_size]) -> logits


def _is_word(value: object) -> bool:
    if isinstance(value, str):
        return bool(value.strip())
    return isinstance(value, tuple) and 0 < len(value) <= MAX_BAD_WORD_TOKENS and all(map(TOKEN_ID.allows, value))


def _is_bias(value: object) -> bool:
    return isinstance(value, dict) and all(map(TOKEN_ID.allows, value)) and all(map(BIAS_VALUE.allows, value.values()))


TOKEN_ID = integer(0)
BIAS_VALUE = number(-100, 100)
SEED = integer(0, 2**64 - 1)
LOGPROBS = integer(0, MAX_LOGPROBS)
BAD_WORD = Rule(_is_word, f"text, or 1 to {MAX_BAD_WORD_TOKENS} token ids")
BIASES = Rule(_is_bias, f"a mapping of token ids, each to {BIAS_VALUE.text}")


class Role(str, Enum):
    """Which routes a worker may be part of (the table of docs/en/design.md)."""

    PREFILL = "prefill"
    DECODE = "decode"
    MIXED = "mixed"

    @property
    def may_prefill(self) -> bool:
        return self is not Role.DECODE

    @property
    def may_decode(self) -> bool:
        return self is not Role.PREFILL


@dataclass(frozen=True, slots=True, order=True)
class Route:
    """The worker that computes a request's prompt and the worker that generates its tokens."""

    prefill_worker: int
    decode_worker: int

    @property
    def is_collocated(self) -> bool:
        return self.prefill_worker == self.decode_worker

    def __str__(self) -> str:
        return f"{self.prefill_worker}->{self.decode_worker}"


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to choose a request's tokens. Names and defaults are vLLM's.

    Raises:
        RequestError: a value out of range; names field, value and what is allowed.
    """

    temperature: float = ruled(1.0, number(0), "the logits are divided by it; below 1e-5: greedy")
    top_p: float = ruled(1.0, positive(1), "draw from the smallest set of best tokens with this share of the mass")
    top_k: int = ruled(0, integer(-1, 2**31 - 1), "draw from this many best tokens; 0 or -1: off")
    seed: int | None = ruled(None, optional(SEED), "None: derived from the engine's seed and the request's number")
    max_tokens: int | None = ruled(16, optional(integer(1)), "of an answer; None: up to max_model_len")
    min_tokens: int = ruled(0, integer(0, 2**31 - 1), "before as many, nothing ends the answer; at most max_tokens")
    stop: tuple[str, ...] = ruled((), list_of(text("a non-empty text")), "end the answer, and are no part of its text")
    stop_token_ids: tuple[int, ...] = ruled((), list_of(TOKEN_ID, most=MAX_STOP_TOKEN_IDS), "end the answer too")
    ignore_eos: bool = ruled(False, TRUE_OR_FALSE, "go on after the model's end tokens")
    logprobs: int | None = ruled(None, optional(LOGPROBS), "log probabilities of the chosen token and as many best")
    prompt_logprobs: int | None = ruled(None, optional(LOGPROBS), "the same for the prompt's tokens but the first")
    min_p: float = ruled(0.0, number(0, 1), "tokens below this share of the best one's likelihood are not drawn")
    presence_penalty: float = ruled(0.0, number(-2, 2), "subtracted from the logits of tokens generated before")
    frequency_penalty: float = ruled(0.0, number(-2, 2), "the same for each time they were generated")
    repetition_penalty: float = ruled(
        1.0, number(1e-6, 10**6), "of tokens seen before, prompt included: divides logits > 0, multiplies others"
    )
    logit_bias: Mapping[int, float] | None = ruled(None, optional(BIASES), "added to the logits of these tokens")
    bad_words: tuple[str | tuple[int, ...], ...] = ruled(
        (), list_of(BAD_WORD, most=MAX_BAD_WORDS), "never generated; LLM makes token ids of text"
    )
    allowed_token_ids: tuple[int, ...] | None = ruled(
        None, optional(list_of(TOKEN_ID, least=1)), "nothing else is generated; None: all are allowed"
    )
    logits_processors: tuple[LogitsProcessor, ...] = ruled(
        (), list_of(Rule(callable, "a function")), "run in the worker, which gets them pickled"
    )
    n: int = ruled(1, integer(1, MAX_ANSWERS), "answers; answer i of a seeded request has the seed + i")
    best_of: int | None = ruled(
        None, optional(integer(1, MAX_ANSWERS)), "answers to choose the n likeliest from; at least n; None: n"
    )

    def __post_init__(self) -> None:
        for name in ("stop", "stop_token_ids", "bad_words", "logits_processors"):
            object.__setattr__(self, name, _as_tuple(getattr(self, name) or ()))
        object.__setattr__(self, "allowed_token_ids", _as_tuple(self.allowed_token_ids))
        if isinstance(self.logit_bias, dict):  # JSON has text as keys
            bias = {int(k) if isinstance(k, str) and k.isdecimal() else k: v for k, v in self.logit_bias.items()}
            object.__setattr__(self, "logit_bias", bias)
        check(self, RequestError)
        if self.min_tokens > (self.max_tokens or math.inf):
            raise RequestError("min_tokens", self.min_tokens, f"at most max_tokens, {self.max_tokens}")
        if self.best_of is not None and self.best_of < self.n:
            raise RequestError("best_of", self.best_of, f"n to {MAX_ANSWERS}, or null")
        if len(self.pickled_processors()) > MAX_PROCESSOR_BYTES:
            allowed = f"at most {MAX_PROCESSOR_BYTES} bytes when pickled"
            raise RequestError("logits_processors", self.logits_processors, allowed)

    def split(self) -> list[SamplingParams]:
        """Those of the sequences that are to be generated, each with n = 1."""
        count = self.best_of or self.n
        if count == 1:
            return [self]
        logprobs = 0 if self.logprobs is None and count > self.n else self.logprobs  # to choose by
        seeds = [None if self.seed is None else (self.seed + i) % 2**64 for i in range(count)]
        first = replace(self, n=1, best_of=None, logprobs=logprobs)
        return [first, *(replace(first, seed=seed, prompt_logprobs=None) for seed in seeds[1:])]

    def pickled_processors(self) -> bytes:
        """Of `logits_processors`; b"" if there are none. Raises RequestError if one cannot be pickled."""
        try:
            return pickle.dumps(self.logits_processors) if self.logits_processors else b""
        except Exception as error:
            allowed = f"callables that can be pickled ({error})"
            raise RequestError("logits_processors", self.logits_processors, allowed) from None

    @property
    def changes_logits(self) -> bool:
        """Whether it asks for more than a draw from the logits as they are."""
        penalties = self.presence_penalty, self.frequency_penalty, self.repetition_penalty
        others = self.logit_bias, self.bad_words, self.allowed_token_ids, self.logits_processors
        return penalties != (0, 0, 1) or any(others)


@dataclass(frozen=True, slots=True)
class BeamSearchParams:
    """How to search for the likeliest answers. Names, defaults and meanings are those of transformers.

    Raises:
        RequestError: a value out of range; names field, value and what is allowed.
    """

    num_beams: int = ruled(4, integer(1, MAX_LOGPROBS // 2), "answers, and candidates for them")
    max_tokens: int = ruled(16, integer(1), "of an answer")
    length_penalty: float = ruled(1.0, number(-1e3, 1e3), "scores are log probabilities / length ** length_penalty")
    early_stopping: bool | str = ruled(
        False, one_of(False, True, "never"), "True: as soon as there are enough; never: when none can get better"
    )
    ignore_eos: bool = ruled(False, TRUE_OR_FALSE, "go on after the model's end tokens")

    def __post_init__(self) -> None:
        check(self, RequestError)


def _as_tuple(value: Any) -> Any:
    """Text as one of one, lists in it as tuples; what is no collection is left to be refused."""
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, Iterable):
        return value
    return tuple(tuple(item) if isinstance(item, list) else item for item in value)


class FinishReason(str, Enum):
    """Why a request ended; the values are what `CompletionOutput.finish_reason` shows."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


class EventKind(str, Enum):
    """The moments of a request's life that metrics are made of."""

    ARRIVED = "arrived"  # when its arrival was due, not when the engine looked
    ROUTED = "routed"  # a route was chosen (again, after a preemption or a failure)
    SCHEDULED = "scheduled"  # first chunk handed to a worker
    PREEMPTED = "preempted"
    MOVING = "moving"  # prefill done, blocks on their way
    MOVED = "moved"  # decode worker has all blocks
    FINISHED = "finished"


@dataclass(frozen=True, slots=True)
class RequestEvent:
    time_s: float  # of the engine's clock
    kind: EventKind
    worker: int | None = None


@dataclass(slots=True)
class RequestLog:
    """All that metrics need to know of one request."""

    request_id: str
    num_prompt_tokens: int
    events: list[RequestEvent]
    token_times_s: np.ndarray  # [num_output_tokens] float64, when each token reached the parent
    route: Route | None = None  # the last one
    num_cached_tokens: int = 0
    num_draft_tokens: int = 0  # that were verified
    num_accepted_tokens: int = 0  # of these
    finish_reason: FinishReason | None = None


@dataclass(slots=True)
class Work:
    """A step or a move of blocks that a worker has done."""

    worker: int  # of a move: its destination
    end_s: float  # of the engine's clock, when the parent read of it
    duration_s: float  # by the worker's own clock
    num_prompt_tokens: int = 0
    num_decoding: int = 0  # rows of one token
    num_moved_bytes: int = 0


# ------------------------------------------------------------- control messages, pickled, through a worker's pipe


@dataclass(frozen=True, slots=True)
class Progress:
    """Worker to parent, while loading."""

    done_bytes: int
    total_bytes: int


class TransferPath(str, Enum):
    """How blocks get from one worker to another."""

    SHM = "shm"  # the destination reads the source's cache in shared memory
    IPC = "ipc"  # the destination reads the source's cache in the memory of a GPU
    RELAY = "relay"  # the source packs, the destination unpacks: both get the plan, the source first


@dataclass(frozen=True, slots=True)
class Ready:
    """Worker to parent: weights loaded, KV cache allocated."""

    num_blocks: int
    pid: int
    kv_handle: object = None  # what a peer needs to open the cache on a GPU; None: nothing more than it has
    paths: dict[int, TransferPath] = field(default_factory=dict)  # by source: how this worker gets blocks


@dataclass(frozen=True, slots=True)
class Failed:
    """Worker to parent, the last thing it says."""

    reason: str
    traceback: str


@dataclass(frozen=True, slots=True)
class Peer:
    """A KV cache that can be opened."""

    generation: int
    num_blocks: int
    kv_handle: object = None  # of its `Ready`


@dataclass(frozen=True, slots=True)
class Peers:
    """Parent to worker, before the first plan and whenever something changes: what became of other workers' caches.

    Another generation replaces the one before, None stands for a dead worker. In both cases the old cache is closed,
    and plans that wait for it are given up: acknowledged with 0 bytes.
    """

    peers: dict[int, Peer | None]


@dataclass(frozen=True, slots=True)
class Shutdown:
    """Parent to worker: end."""


# ---------------------------------------------------------------------------------------------- wire messages


class RowFlag(IntEnum):
    """Bits of `StepBatch.row_flags`."""

    SAMPLE = 1  # the row's last token is the newest of its sequence: sample the next one
    FROM_SLOT = 2  # the row's one token is the one last sampled in its slot (the parent may not know it yet)
    DRAFTS = 4  # all tokens but the row's first are guesses: sample behind each, not only behind the last


SLOT_INIT = np.dtype(
    [
        ("seed", "<u8"),
        ("slot", "<i4"),
        ("temperature", "<f4"),
        ("top_p", "<f4"),
        ("top_k", "<i4"),  # 0: off
        ("num_logprobs", "<i4"),  # -1: none
        ("min_len", "<i4"),  # tokens (prompt included) below which stop ids are masked
        ("num_stop_ids", "<i4"),  # how many entries of StepBatch.stop_ids are this slot's
        ("min_p", "<f4"),
    ]
)
TABLE_UPDATE = np.dtype([("slot", "<i4"), ("index", "<i4"), ("block_id", "<i4")])
BLOCK_COPY = np.dtype([("src", "<i4"), ("dst", "<i4")])
PENALTIES = np.dtype([("presence", "<f4"), ("frequency", "<f4"), ("repetition", "<f4")])
BIAS = np.dtype([("token_id", "<i4"), ("bias", "<f4")])

# Sections: flat arrays of the dtype beside.
Int32s = Annotated[np.ndarray, np.dtype("<i4")]
Float32s = Annotated[np.ndarray, np.dtype("<f4")]
Bytes = Annotated[np.ndarray, np.dtype("u1")]


@dataclass(slots=True)
class SlotExtras:
    """What only few sequences ask for. Goes ahead of the step with the slot's `slot_inits` record and holds from there.

    It says all that there is to know, so a sequence that was preempted, moved or forked goes on as if nothing had been.
    """

    slot: int
    num_prompt_tokens: int
    num_prompt_logprobs: int  # -1: none
    changes_logits: int  # 0: all sections but `token_ids` are of no use
    token_ids: Int32s  # [num_tokens], of the prompt and generated so far
    penalties: Annotated[np.ndarray, PENALTIES]  # [1]
    biases: Annotated[np.ndarray, BIAS]  # [*]
    allowed_ids: Int32s  # [*]; none: all are allowed
    bad_words: Int32s  # [num_words * MAX_BAD_WORD_TOKENS], behind as many -1 as fill up the word
    processors: Bytes  # [*], pickled


@dataclass(slots=True)
class StepBatch:
    """One step of one worker: what changed since the last step, then the rows to compute.

    A worker keeps, per *slot*, the block table, the sampling parameters and the last sampled token of the sequence
    that holds the slot; a steady decode row is therefore 16 bytes. Order of application: `slot_inits`,
    `table_updates`, `copies`, then the forward pass over all rows, then sampling.
    """

    step_id: int
    slot_inits: Annotated[np.ndarray, SLOT_INIT]  # [*], a sequence enters a slot
    stop_ids: Int32s  # [*], the slot_inits' stop ids (EOS included), concatenated
    table_updates: Annotated[np.ndarray, TABLE_UPDATE]  # [*]
    copies: Annotated[np.ndarray, BLOCK_COPY]  # [*]: copy-on-write, then to host blocks (-id), then from there
    row_slots: Int32s  # [num_rows]
    row_starts: Int32s  # [num_rows], position of the row's first token (= num_computed_tokens)
    row_lens: Int32s  # [num_rows], num_scheduled_tokens
    row_flags: Int32s  # [num_rows], RowFlag bits
    token_ids: Int32s  # [*], the tokens of all rows without FROM_SLOT, concatenated


@dataclass(slots=True)
class StepResult:
    """What a worker sampled in one step, in the order of the rows with SAMPLE: a token each, with DRAFTS several."""

    step_id: int
    duration_us: int  # of the step on the device
    token_ids: Int32s  # [*]; -1: the sequence cannot go on, and `errors` says why
    # [num_logprob_rows]: indices into token_ids, or -1 - slot for the next token of that slot's prompt
    logprob_rows: Int32s
    logprob_ids: Int32s  # [num_logprob_rows * (1 + MAX_LOGPROBS)], the chosen token first; -1: none
    logprobs: Float32s  # the same shape
    errors: Bytes = field(default_factory=lambda: np.empty(0, np.uint8))  # [*], text

    def part(self, rows: np.ndarray) -> StepResult:
        """That of some of the tokens: rows [*] int64, indices into token_ids, ascending. Prompts go with token 0."""
        of_row = np.searchsorted(rows, self.logprob_rows).clip(max=len(rows) - 1)
        is_prompt = self.logprob_rows < 0
        kept = np.flatnonzero((rows[of_row] == self.logprob_rows) | (is_prompt & (rows[0] == 0)))
        ids, values = (c.reshape(-1, 1 + MAX_LOGPROBS)[kept].ravel() for c in (self.logprob_ids, self.logprobs))
        logprob_rows = np.where(is_prompt, self.logprob_rows, of_row)[kept].astype(np.int32)
        tokens = self.token_ids[rows]
        return StepResult(self.step_id, self.duration_us, tokens, logprob_rows, ids, values, self.errors)


@dataclass(slots=True)
class TransferPlan:
    """Copy blocks of `src_worker` into blocks of `dst_worker`, one to one."""

    plan_id: int
    src_worker: int
    src_generation: int
    dst_worker: int
    dst_generation: int
    src_blocks: Int32s  # [num_blocks], ids on the source
    dst_blocks: Int32s  # [num_blocks], ids on the destination


@dataclass(slots=True)
class TransferAck:
    """A plan is done: every byte has arrived, and nothing more will be written."""

    plan_id: int
    duration_us: int
    num_bytes: int  # 0: given up, as the source is dead

"""What crosses processes and rooms: plain data, numpy and the standard library only.

Two families. Objects of the parent (`SamplingParams`, `Role`, `Route`, `RequestEvent`, `RequestLog`, `Work`) and wire
messages (`SlotExtras`, `StepBatch`, `StepResult`, `TransferPlan`, `TransferAck`), which are flat numpy arrays so that
they go through a shared-memory ring without pickling. This module knows their layout, not who sends them when.

Wire format of a message: int64 words, native byte order. Word 0 is the message kind, then the values of HEADER, then
the number of items of each section; behind them the sections themselves, each padded to a multiple of 8 bytes.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from enum import Enum, IntEnum
from functools import partial
from typing import Any, ClassVar

import numpy as np

from nanopd.errors import RequestError

MAX_LOGPROBS = 20  # per token; what StepResult has room for
MAX_ANSWERS = 128  # per request
MAX_STOP_TOKEN_IDS = 128  # per request; what a StepBatch is sure to have room for
MAX_BAD_WORDS, MAX_BAD_WORD_TOKENS = 1024, 16  # per request, per word; what a SlotExtras is sure to have room for
MAX_PROCESSOR_BYTES = 1 << 20  # per request, pickled; likewise

LogitsProcessor = Callable[[list[int], Any], Any]  # (tokens generated so far, logits [vocab_size]) -> logits


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

    temperature: float = 1.0  # 0: greedy
    top_p: float = 1.0
    top_k: int = 0  # 0 or -1: off
    seed: int | None = None  # None: derived from the engine's seed and the request's number
    max_tokens: int | None = 16  # None: up to max_model_len
    min_tokens: int = 0
    stop: tuple[str, ...] = ()  # a str or a list of str is taken too
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None  # None: none; n: the chosen token's and the n best
    prompt_logprobs: int | None = None  # the same for each token of the prompt but the first
    min_p: float = 0.0  # tokens less likely than this share of the best one's likelihood are not drawn
    presence_penalty: float = 0.0  # subtracted from the logits of tokens generated before
    frequency_penalty: float = 0.0  # the same for each time they were generated
    repetition_penalty: float = 1.0  # of tokens seen before, prompt included: divides logits > 0, multiplies others
    logit_bias: dict[int, float] | None = None  # added to the logits of these tokens
    bad_words: tuple[str | tuple[int, ...], ...] = ()  # never generated; LLM makes token ids of text
    allowed_token_ids: tuple[int, ...] | None = None  # None: all
    logits_processors: tuple[LogitsProcessor, ...] = ()  # run in the worker, which gets them pickled
    n: int = 1  # answers; answer i of a seeded request is that of a request for one with the seed + i
    best_of: int | None = None  # answers to choose the n likeliest from; None: n

    def __post_init__(self) -> None:
        for name in ("stop", "stop_token_ids", "bad_words", "logits_processors"):
            value = getattr(self, name) or ()
            object.__setattr__(self, name, (value,) if isinstance(value, str) else tuple(value))
        words = (tuple(word) if isinstance(word, list) else word for word in self.bad_words)
        object.__setattr__(self, "bad_words", tuple(words))
        if self.allowed_token_ids is not None:
            object.__setattr__(self, "allowed_token_ids", tuple(self.allowed_token_ids))
        if isinstance(self.logit_bias, dict):  # JSON has text as keys
            bias = {int(k) if isinstance(k, str) and k.isdecimal() else k: v for k, v in self.logit_bias.items()}
            object.__setattr__(self, "logit_bias", bias)
        for name, is_allowed, allowed in (*self._checks(), *self._logit_checks()):
            if not is_allowed:
                raise RequestError(name, getattr(self, name), allowed)

    def _checks(self) -> Iterator[tuple[str, bool, str]]:
        """Field, whether its value is allowed, and what is; in an order in which later ones may rely on earlier."""
        yield "temperature", _is_number(self.temperature, 0.0), "a finite number >= 0"
        yield "top_p", _is_number(self.top_p, 0.0, 1.0) and self.top_p > 0, "0 < top_p <= 1"
        yield "top_k", _is_count(self.top_k, -1, 2**31 - 1), "-1 or 0 (off), or a count"
        yield "seed", self.seed is None or _is_count(self.seed, 0, 2**64 - 1), "None, or 0 <= seed < 2**64"
        yield "max_tokens", self.max_tokens is None or _is_count(self.max_tokens, 1), "None, or at least 1"
        most = self.max_tokens or 2**31 - 1
        yield "min_tokens", _is_count(self.min_tokens, 0, most), "0 <= min_tokens <= max_tokens"
        yield "stop", all(isinstance(s, str) and s for s in self.stop), "non-empty strings"
        yield "stop_token_ids", all(_is_count(t, 0) for t in self.stop_token_ids), "token ids >= 0"
        is_short = len(self.stop_token_ids) <= MAX_STOP_TOKEN_IDS
        yield "stop_token_ids", is_short, f"at most {MAX_STOP_TOKEN_IDS} of them"
        yield "ignore_eos", isinstance(self.ignore_eos, bool), "true or false"
        yield "n", _is_count(self.n, 1, MAX_ANSWERS), f"1 to {MAX_ANSWERS}"
        is_off = self.best_of is None
        yield "best_of", is_off or _is_count(self.best_of, self.n, MAX_ANSWERS), f"None, or n to {MAX_ANSWERS}"
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            yield name, value is None or _is_count(value, 0, MAX_LOGPROBS), f"None, or 0 to {MAX_LOGPROBS}"

    def _logit_checks(self) -> Iterator[tuple[str, bool, str]]:
        """As `_checks`, of what changes the logits or which of them count."""
        yield "min_p", _is_number(self.min_p, 0.0, 1.0), "0 <= min_p <= 1"
        for name in ("presence_penalty", "frequency_penalty"):
            yield name, _is_number(getattr(self, name), -2.0, 2.0), "-2 to 2"
        yield "repetition_penalty", _is_number(self.repetition_penalty, 1e-6, 1e6), "1e-6 to 1e6; 1: off"
        bias = {} if self.logit_bias is None else self.logit_bias
        is_bias = isinstance(bias, dict) and all(_is_count(t, 0) and _is_number(b, -100, 100) for t, b in bias.items())
        yield "logit_bias", is_bias, "token ids, with a number from -100 to 100 each"
        yield "bad_words", all(map(_is_word, self.bad_words)), f"text, or 1 to {MAX_BAD_WORD_TOKENS} token ids, each"
        yield "bad_words", len(self.bad_words) <= MAX_BAD_WORDS, f"at most {MAX_BAD_WORDS} of them"
        allowed = (0,) if self.allowed_token_ids is None else self.allowed_token_ids
        yield "allowed_token_ids", len(allowed) > 0 and all(_is_count(t, 0) for t in allowed), "None, or token ids >= 0"
        yield "logits_processors", all(map(callable, self.logits_processors)), "callables"
        is_short = len(self.pickled_processors()) <= MAX_PROCESSOR_BYTES
        yield "logits_processors", is_short, f"at most {MAX_PROCESSOR_BYTES} bytes when pickled"

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

    num_beams: int = 4  # answers, and candidates for them
    max_tokens: int = 16
    length_penalty: float = 1.0  # the score of an answer is its log probability / length ** length_penalty
    early_stopping: bool | str = False  # True: as soon as there are enough; "never": when none can get better
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        for name, is_allowed, allowed in (
            ("num_beams", _is_count(self.num_beams, 1, MAX_LOGPROBS // 2), f"1 to {MAX_LOGPROBS // 2}"),
            ("max_tokens", _is_count(self.max_tokens, 1), "at least 1"),
            ("length_penalty", _is_number(self.length_penalty, -1e3, 1e3), "-1000 to 1000"),
            ("early_stopping", self.early_stopping in (False, True, "never"), 'False, True or "never"'),
            ("ignore_eos", isinstance(self.ignore_eos, bool), "true or false"),
        ):
            if not is_allowed:
                raise RequestError(name, getattr(self, name), allowed)


def _is_count(value: object, least: int, most: float = math.inf) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _is_word(value: object) -> bool:
    if isinstance(value, str):
        return bool(value.strip())
    return isinstance(value, tuple) and 0 < len(value) <= MAX_BAD_WORD_TOKENS and all(_is_count(t, 0) for t in value)


def _is_number(value: object, least: float, most: float = math.inf) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return least <= value <= most and math.isfinite(value)


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


class MessageKind(IntEnum):
    STEP = 1
    TRANSFER = 2
    STEP_RESULT = 3
    TRANSFER_ACK = 4
    SLOT_EXTRAS = 5


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


def _empty(dtype: np.dtype | type) -> np.ndarray:
    return np.empty(0, dtype)


@dataclass(slots=True)
class SlotExtras:
    """What only few sequences ask for. Goes ahead of the step with the slot's `slot_inits` record and holds from there.

    It says all that there is to know, so a sequence that was preempted, moved or forked goes on as if nothing had been.
    """

    slot: int
    num_prompt_tokens: int
    num_prompt_logprobs: int  # -1: none
    changes_logits: int  # 0: all sections but `token_ids` are of no use
    token_ids: np.ndarray  # [num_tokens] int32, of the prompt and generated so far
    penalties: np.ndarray  # [1] PENALTIES
    biases: np.ndarray  # [*] BIAS
    allowed_ids: np.ndarray  # [*] int32; none: all are allowed
    bad_words: np.ndarray  # [num_words * MAX_BAD_WORD_TOKENS] int32, behind as many -1 as fill up the word
    processors: np.ndarray  # [*] uint8, pickled

    KIND: ClassVar = MessageKind.SLOT_EXTRAS
    HEADER: ClassVar = ("slot", "num_prompt_tokens", "num_prompt_logprobs", "changes_logits")
    SECTIONS: ClassVar[dict[str, np.dtype]] = {
        "token_ids": np.dtype("<i4"),
        "penalties": PENALTIES,
        "biases": BIAS,
        "allowed_ids": np.dtype("<i4"),
        "bad_words": np.dtype("<i4"),
        "processors": np.dtype("u1"),
    }


@dataclass(slots=True)
class StepBatch:
    """One step of one worker: what changed since the last step, then the rows to compute.

    A worker keeps, per *slot*, the block table, the sampling parameters and the last sampled token of the sequence
    that holds the slot; a steady decode row is therefore 16 bytes. Order of application: `slot_inits`,
    `table_updates`, `copies`, then the forward pass over all rows, then sampling.
    """

    step_id: int
    slot_inits: np.ndarray  # [*] SLOT_INIT, a sequence enters a slot
    stop_ids: np.ndarray  # [*] int32, the slot_inits' stop ids (EOS included), concatenated
    table_updates: np.ndarray  # [*] TABLE_UPDATE
    copies: np.ndarray  # [*] BLOCK_COPY, copy-on-write
    row_slots: np.ndarray  # [num_rows] int32
    row_starts: np.ndarray  # [num_rows] int32, position of the row's first token (= num_computed_tokens)
    row_lens: np.ndarray  # [num_rows] int32, num_scheduled_tokens
    row_flags: np.ndarray  # [num_rows] int32, RowFlag bits
    token_ids: np.ndarray  # [*] int32, the tokens of all rows without FROM_SLOT, concatenated

    KIND: ClassVar = MessageKind.STEP
    HEADER: ClassVar = ("step_id",)
    SECTIONS: ClassVar = {
        "slot_inits": SLOT_INIT,
        "stop_ids": np.dtype("<i4"),
        "table_updates": TABLE_UPDATE,
        "copies": BLOCK_COPY,
        "row_slots": np.dtype("<i4"),
        "row_starts": np.dtype("<i4"),
        "row_lens": np.dtype("<i4"),
        "row_flags": np.dtype("<i4"),
        "token_ids": np.dtype("<i4"),
    }


@dataclass(slots=True)
class StepResult:
    """What a worker sampled in one step, in the order of the rows with SAMPLE: a token each, with DRAFTS several."""

    step_id: int
    duration_us: int  # of the step on the device
    token_ids: np.ndarray  # [*] int32; -1: the sequence cannot go on, and `errors` says why
    # [num_logprob_rows] int32: indices into token_ids, or -1 - slot for the next token of that slot's prompt
    logprob_rows: np.ndarray
    logprob_ids: np.ndarray  # [num_logprob_rows * (1 + MAX_LOGPROBS)] int32, the chosen token first; -1: none
    logprobs: np.ndarray  # the same shape, float32
    errors: np.ndarray = field(default_factory=partial(_empty, np.uint8))  # [*] uint8, text

    def part(self, rows: np.ndarray) -> StepResult:
        """That of some of the tokens: rows [*] int64, indices into token_ids, ascending. Prompts go with token 0."""
        of_row = np.searchsorted(rows, self.logprob_rows).clip(max=len(rows) - 1)
        is_prompt = self.logprob_rows < 0
        kept = np.flatnonzero((rows[of_row] == self.logprob_rows) | (is_prompt & (rows[0] == 0)))
        ids, values = (c.reshape(-1, 1 + MAX_LOGPROBS)[kept].ravel() for c in (self.logprob_ids, self.logprobs))
        logprob_rows = np.where(is_prompt, self.logprob_rows, of_row)[kept].astype(np.int32)
        tokens = self.token_ids[rows]
        return StepResult(self.step_id, self.duration_us, tokens, logprob_rows, ids, values, self.errors)

    KIND: ClassVar = MessageKind.STEP_RESULT
    HEADER: ClassVar = ("step_id", "duration_us")
    SECTIONS: ClassVar[dict[str, np.dtype]] = {
        "token_ids": np.dtype("<i4"),
        "logprob_rows": np.dtype("<i4"),
        "logprob_ids": np.dtype("<i4"),
        "logprobs": np.dtype("<f4"),
        "errors": np.dtype("u1"),
    }


@dataclass(slots=True)
class TransferPlan:
    """Copy blocks of `src_worker` into blocks of `dst_worker`, one to one."""

    plan_id: int
    src_worker: int
    src_generation: int
    dst_worker: int
    dst_generation: int
    src_blocks: np.ndarray  # [num_blocks] int32, ids on the source
    dst_blocks: np.ndarray  # [num_blocks] int32, ids on the destination

    KIND: ClassVar = MessageKind.TRANSFER
    HEADER: ClassVar = ("plan_id", "src_worker", "src_generation", "dst_worker", "dst_generation")
    SECTIONS: ClassVar = {"src_blocks": np.dtype("<i4"), "dst_blocks": np.dtype("<i4")}


@dataclass(slots=True)
class TransferAck:
    """A plan is done: every byte has arrived, and nothing more will be written."""

    plan_id: int
    duration_us: int
    num_bytes: int  # 0: given up, as the source is dead

    KIND: ClassVar = MessageKind.TRANSFER_ACK
    HEADER: ClassVar = ("plan_id", "duration_us", "num_bytes")
    SECTIONS: ClassVar[dict[str, np.dtype]] = {}

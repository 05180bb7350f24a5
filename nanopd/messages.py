"""What crosses processes and rooms: plain data, numpy and the standard library only.

Two families. Objects of the parent (`SamplingParams`, `Role`, `Route`, `RequestEvent`, `RequestLog`) and wire
messages (`StepBatch`, `StepResult`, `TransferPlan`, `TransferAck`), which are flat numpy arrays so that they go
through a shared-memory ring without pickling. This module knows their layout, not who sends them when.

Wire format of a message: int64 words, native byte order. Word 0 is the message kind, then the values of HEADER, then
the number of items of each section; behind them the sections themselves, each padded to a multiple of 8 bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum, IntEnum
from typing import ClassVar

import numpy as np

from nanopd.errors import RequestError

MAX_LOGPROBS = 20  # per token; what StepResult has room for
MAX_STOP_TOKEN_IDS = 128  # per request; what a StepBatch is sure to have room for


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

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids or ()))
        for name, is_allowed, allowed in self._checks():
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
        is_off = self.logprobs is None
        yield "logprobs", is_off or _is_count(self.logprobs, 0, MAX_LOGPROBS), f"None, or 0 to {MAX_LOGPROBS}"


def _is_count(value: object, least: int, most: float = math.inf) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


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
    finish_reason: FinishReason | None = None


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


class RowFlag(IntEnum):
    """Bits of `StepBatch.row_flags`."""

    SAMPLE = 1  # the row's last token is the newest of its sequence: sample the next one
    FROM_SLOT = 2  # the row's one token is the one last sampled in its slot (the parent may not know it yet)


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
        ("padding", "<i4"),
    ]
)
TABLE_UPDATE = np.dtype([("slot", "<i4"), ("index", "<i4"), ("block_id", "<i4")])
BLOCK_COPY = np.dtype([("src", "<i4"), ("dst", "<i4")])


def _empty(dtype: np.dtype | type) -> np.ndarray:
    return np.empty(0, dtype)


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
    """What a worker sampled in one step, in the order of the rows that have SAMPLE."""

    step_id: int
    duration_us: int  # of the step on the device
    token_ids: np.ndarray  # [*] int32
    logprob_rows: np.ndarray  # [num_logprob_rows] int32, indices into token_ids
    logprob_ids: np.ndarray  # [num_logprob_rows * (1 + MAX_LOGPROBS)] int32, the chosen token first; -1: none
    logprobs: np.ndarray  # the same shape, float32

    KIND: ClassVar = MessageKind.STEP_RESULT
    HEADER: ClassVar = ("step_id", "duration_us")
    SECTIONS: ClassVar = {
        "token_ids": np.dtype("<i4"),
        "logprob_rows": np.dtype("<i4"),
        "logprob_ids": np.dtype("<i4"),
        "logprobs": np.dtype("<f4"),
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

"""What crosses processes and rooms: plain data, numpy and the standard library only.

Two families. Objects of the parent (`SamplingParams`, `Role`, `Route`, `RequestEvent`, `RequestLog`, `Work`) and wire
messages (`SlotExtras`, `StepBatch`, `StepResult`, `TransferPlan`, `TransferAck`), which are flat numpy arrays so that
they go through a shared-memory ring without pickling. This module knows their layout, not who sends them when.

Wire format of a message: int64 words, native byte order. Word 0 is the message kind, then its int fields, then the
number of items of each section; behind them the sections themselves, each padded to a multiple of 8 bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum, IntEnum
from typing import Annotated, Any, TypeAlias

import numpy as np

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

    num_blocks: int  # of the KV cache
    num_host_blocks: int  # of the host memory for sequences that are swapped out
    paths: dict[int, TransferPath]  # by source: how this worker gets blocks
    kv_handle: object  # what a peer needs to open the cache on a GPU; None: nothing more than it has


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


ToWorker: TypeAlias = StepBatch | TransferPlan | SlotExtras
FromWorker: TypeAlias = StepResult | TransferAck

"""A step in the making, and what is remembered of it until its result comes; numpy and plain Python."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nanopd.core.extras import extras_of
from nanopd.core.sequence import Sequence
from nanopd.messages import BLOCK_COPY, SLOT_INIT, TABLE_UPDATE, RowFlag, SlotExtras, StepBatch

NO_INTS, NO_INITS = np.empty(0, np.int32), np.empty(0, SLOT_INIT)


@dataclass(slots=True)
class Chunk:
    """Prefill work: as chunks get done, blocks may be shared, and move if the sequence leaves for another worker."""

    seq: Sequence
    slot: int
    end: int  # tokens computed when the chunk is done
    is_last: bool  # its last token's successor is sampled
    is_leaving: bool


@dataclass(slots=True)
class StepInFlight:
    step_id: int
    row_slots: np.ndarray  # [num_rows] int32
    sampled_slots: np.ndarray  # [*] int32, in the order of the rows that sample
    chunks: list[Chunk]
    num_prompt_tokens: int  # of the chunks
    drafts: dict[int, list[int]]  # by slot


class BatchBuilder:
    """A StepBatch in the making, with its token budget."""

    def __init__(self, step_id: int, budget: int) -> None:
        self.step_id = step_id
        self.budget = budget
        self.extras: list[SlotExtras] = []  # to be sent ahead of the step
        self.inits: list[tuple] = []
        self.stop_ids: list[int] = []
        self.table_updates: list[int] = []  # slot, index, block_id, slot, index, ...
        self.copies: list[int] = []  # src, dst, src, dst, ...; those in host memory negative
        # slots, starts, lengths, flags of the decode rows, [*] int32 each
        self.decodes: tuple[np.ndarray, ...] = (NO_INTS,) * 4
        self.drafts: dict[int, list[int]] = {}  # by slot
        self.rows: list[tuple[int, int, int, int]] = []  # prefill rows: slot, start, length, flags
        self.token_ids: list[int] = []
        self.chunks: list[Chunk] = []
        self.admitted: list[Sequence] = []  # their prefill starts with this step
        self.num_prompt_tokens = 0  # of the chunks

    def enter(self, seq: Sequence, slot: int) -> None:
        """Tell the worker who holds the slot from now on, and in which blocks."""
        params = seq.params
        stop_ids = sorted(seq.stop_ids) if params.min_tokens else []  # the worker needs them for masking only
        logprobs = -1 if params.logprobs is None else params.logprobs
        draw = params.temperature, params.top_p, max(params.top_k, 0)
        self.inits.append((seq.seed, slot, *draw, logprobs, seq.min_len, len(stop_ids), params.min_p))
        if params.changes_logits or seq.awaits_prompt_logprobs:
            self.extras.append(extras_of(seq, slot))
            if seq.awaits_prompt_logprobs:
                seq.prompt_logprobs = [None]
        self.stop_ids += stop_ids
        for index, block_id in enumerate(seq.block_table):
            self.table_updates += (slot, index, block_id)

    def add_copies(self, src_blocks: list[int], dst_blocks: list[int]) -> None:
        for copy in zip(src_blocks, dst_blocks, strict=True):
            self.copies += copy

    def set_decodes(self, *columns: np.ndarray) -> None:
        """Slots, starts, lengths and flags of the decode rows, each [*] int32."""
        self.decodes = columns
        self.budget -= len(columns[0]) + sum(map(len, self.drafts.values()))

    def add_chunk(self, slot: int, start: int, token_ids: list[int], flags: int) -> None:
        self.rows.append((slot, start, len(token_ids), flags))
        self.token_ids += token_ids
        self.budget -= len(token_ids)
        self.num_prompt_tokens += len(token_ids)

    def build(self) -> StepBatch:
        inits = np.array(self.inits, SLOT_INIT) if self.inits else NO_INITS
        updates, copies = _int32(self.table_updates).view(TABLE_UPDATE), _int32(self.copies).view(BLOCK_COPY)
        stop_ids, token_ids = _int32(self.stop_ids), _int32(self.token_ids)
        slots, starts, lens, flags = self.decodes
        if self.rows:
            rows = np.array(self.rows, np.int32).T
            slots, starts, lens, flags = map(np.concatenate, zip(self.decodes, rows, strict=True))
        return StepBatch(self.step_id, inits, stop_ids, updates, copies, slots, starts, lens, flags, token_ids)

    def sampled_slots(self) -> np.ndarray:
        """[*] int32, in the order of the rows that sample."""
        chunks = [slot for slot, _, _, flags in self.rows if flags & RowFlag.SAMPLE]
        slots, _, lens, _ = self.decodes
        if self.drafts:
            slots = np.repeat(slots, lens)
        return np.concatenate((slots, np.array(chunks, np.int32))) if chunks else slots


def _int32(values: list[int]) -> np.ndarray:
    return np.array(values, np.int32) if values else NO_INTS

"""The sequences of one worker that decode, and the rows that a step has for them: one token each, or drafts behind it.

Parent process, one thread, numpy columns over all sequences. Knows slots and blocks; that others may have to be
preempted for a block, and which, is the scheduler's to decide.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Iterable

import numpy as np

from nanopd.config import EngineConfig
from nanopd.core.residency import Residency
from nanopd.core.sequence import Sequence, SequenceStatus
from nanopd.core.step_builder import BatchBuilder, StepInFlight
from nanopd.messages import RowFlag

DECODE_FLAGS = np.int32(RowFlag.SAMPLE | RowFlag.FROM_SLOT)
FIRST_DECODE_FLAGS = np.int32(RowFlag.SAMPLE)  # of a row whose token the worker does not have in its slot
DRAFT_FLAGS = np.int32(RowFlag.SAMPLE | RowFlag.DRAFTS)


class Decodes:
    """Sequences with the status RUNNING, in order of rank."""

    def __init__(self, config: EngineConfig, residency: Residency) -> None:
        self.seqs: list[Sequence] = []
        self.num_context_tokens = 0  # computed tokens of all these sequences
        self._residency = residency
        self._max_drafts, self._max_rows = config.num_speculative_tokens, config.max_decode_rows
        self._slots: np.ndarray | None = None  # of `seqs`; None: they have changed
        self._needs_feedback = False  # whether any of the sequences does
        self._ones = np.ones(config.max_num_seqs, np.int32)

    def __len__(self) -> int:
        return len(self.seqs)

    def add(self, seq: Sequence) -> None:
        seq.status = SequenceStatus.RUNNING
        insort(self.seqs, seq, key=lambda s: s.rank)
        self.num_context_tokens += int(self._residency.slots.num_computed[seq.slot])
        self._slots = None

    def remove(self, seq: Sequence) -> None:
        self.seqs.remove(seq)
        self.num_context_tokens -= int(self._residency.slots.num_computed[seq.slot])
        self._slots = None

    @property
    def slots(self) -> np.ndarray:
        """[num_seqs] int32; the same array until the sequences change."""
        if self._slots is None:
            self._slots = np.array([seq.slot for seq in self.seqs], np.int32)
            self._needs_feedback = any(seq.needs_feedback for seq in self.seqs)
        return self._slots

    def check_integrity(self) -> None:
        num_context = int(self._residency.slots.num_computed[self.slots].sum())
        assert self.num_context_tokens == num_context, (self.num_context_tokens, num_context)

    # ------------------------------------------------------------------------------------------------- schedule

    def schedule(self, batch: BatchBuilder, find_block: Callable[[int], bool]) -> None:
        """Add a row for every sequence that has not come to its end: of one token, and of drafts if it has any.

        Args:
            find_block: called with a slot that lacks a block where blocks are few; makes room by preempting others,
                or this one, and says whether there is a block for it now.
        """
        t, ready = self._residency.slots, self.slots
        can_run = t.num_computed[ready] < t.last_start[ready]
        if self._needs_feedback:
            can_run &= ~t.is_awaited[ready]
        if not can_run.all():
            ready = ready[can_run]
        ready = ready[: batch.budget]
        if self._max_drafts and self._needs_feedback:
            self._propose(batch, ready)
        full = self._full(batch, ready)
        if len(full):
            ready = self._make_room(batch, ready, full, find_block)
        if not len(ready):
            return
        starts, lens = t.num_computed[ready], self._ones[: len(ready)]
        from_slot = t.has_last_token[ready]
        flags = lens * DECODE_FLAGS
        if not from_slot.all():
            flags = np.where(from_slot, flags, FIRST_DECODE_FLAGS)
            self._send_tokens(batch, ready[~from_slot])
        if batch.drafts:
            lens = lens + t.num_drafts[ready]
            flags = np.where(lens > 1, DRAFT_FLAGS, flags)
        batch.set_decodes(ready, starts, lens, flags)
        t.num_computed[ready] = starts + 1
        self.num_context_tokens += len(ready)
        if self._needs_feedback:
            t.is_awaited[ready] = t.needs_feedback[ready]

    def _propose(self, batch: BatchBuilder, ready: np.ndarray) -> None:
        """Drafts for those of `ready` that wait for each result, as far as a step has rows for them."""
        t, room = self._residency.slots, min(self._max_rows, batch.budget) - len(ready)
        for slot in ready[t.needs_feedback[ready]].tolist():
            drafter, num_left = self._residency.seq(slot).drafter, int(t.last_start[slot] - t.num_computed[slot]) - 1
            if drafter is not None and (drafts := drafter.propose(min(self._max_drafts, room, num_left))):
                batch.drafts[slot] = drafts
                t.num_drafts[slot] = len(drafts)
                t.has_last_token[slot] = False  # the worker does not know which of its tokens that will be
                room -= len(drafts)

    def _full(self, batch: BatchBuilder, ready: np.ndarray) -> np.ndarray:
        """The slots of `ready` that lack a block to write to. Where blocks are few, there are no drafts."""
        t, blocks = self._residency.slots, self._residency.blocks
        starts, limits = t.num_computed[ready], t.writable_len[ready]
        if batch.drafts:
            full = ready[starts + t.num_drafts[ready] >= limits]
            if blocks.num_free >= len(full) * (1 + blocks.blocks_for(self._max_drafts)):
                return full
            batch.drafts.clear()
            t.num_drafts[ready] = 0
        return ready[starts >= limits]

    def _send_tokens(self, batch: BatchBuilder, slots: np.ndarray) -> None:
        """Rows of slots that do not hold their last token: the message brings the token, and all the rest."""
        t = self._residency.slots
        for slot in slots.tolist():
            seq = self._residency.seq(slot)
            if not t.is_entered[slot]:
                batch.enter(seq, slot)
                t.is_entered[slot] = True
            batch.token_ids.append(seq.token_ids[t.num_computed[slot]])
            batch.token_ids.extend(batch.drafts.get(slot, ()))
        t.has_last_token[slots] = t.num_drafts[slots] == 0

    def _make_room(
        self, batch: BatchBuilder, ready: np.ndarray, full: np.ndarray, find_block: Callable[[int], bool]
    ) -> np.ndarray:
        """Give each slot in `full` blocks to write to; returns the slots of `ready` that can run."""
        t, blocks = self._residency.slots, self._residency.blocks
        is_tight = blocks.num_free < len(full)
        block_size, updates, seqs = blocks.block_size, batch.table_updates, t.seqs
        columns = (column[full].tolist() for column in (t.num_computed, t.num_drafts, t.is_entered))
        for slot, start, num_drafts, is_entered in zip(full.tolist(), *columns, strict=True):
            if is_tight and not find_block(slot):
                continue
            seq, last = seqs[slot], (start + num_drafts) // block_size
            assert seq is not None
            table = seq.block_table
            for copy in blocks.append(table, start, start + num_drafts + 1):
                batch.copies.extend(copy)
            if is_entered:  # else the whole table will be sent
                for index in range(start // block_size, last + 1):
                    updates += (slot, index, table[index])
            t.writable_len[slot] = (last + 1) * block_size
        return ready[t.is_active[ready] & (t.num_computed[ready] < t.writable_len[ready])] if is_tight else ready

    # -------------------------------------------------------------------------------------------------- results

    def observe(self, seq: Sequence, slot: int, token: int) -> None:
        """A sequence that may have drafts has a new token; when it begins to draft, it waits for what is in flight."""
        t = self._residency.slots
        assert seq.drafter is not None
        seq.drafter.observe(token)
        t.needs_feedback[slot] = seq.needs_feedback
        t.is_awaited[slot] = seq.needs_feedback and t.num_computed[slot] >= t.num_tokens[slot]
        self._needs_feedback |= seq.needs_feedback

    def accept_draft(self, slot: int) -> None:
        """The next draft of the slot's sequence was right: its token has been computed by the same step."""
        seq = self._residency.seq(slot)
        assert seq.drafter is not None
        seq.drafter.count_accepted()
        self._residency.slots.num_computed[slot] += 1
        self.num_context_tokens += seq.status is SequenceStatus.RUNNING

    # ------------------------------------------------------------------------------------------------ simulation

    def num_repeats(self, in_flight: Iterable[StepInFlight]) -> int:
        """How many more steps like those in flight would follow if nobody came or went; 0 where they differ."""
        t, slots = self._residency.slots, self._slots
        # The rows of a step of all that decode, and of nothing else, are a view of `slots`.
        if slots is None or not all(s.row_slots.base is slots and len(s.row_slots) == len(slots) for s in in_flight):
            return 0
        if (t.is_watched | t.stops_at_eos)[slots].any():
            return 0
        num_steps = int((t.last_start[slots] - t.num_computed[slots]).min())
        missing, blocks = t.num_computed[slots] - t.writable_len[slots], self._residency.blocks
        while num_steps > 0 and (-(-np.maximum(missing + num_steps, 0) // blocks.block_size)).sum() > blocks.num_free:
            num_steps //= 2
        return num_steps

    def repeat(self, times_s: np.ndarray) -> None:
        """Take the results of the next steps, at `times_s` ([num_steps] float64), and schedule as many more."""
        residency, t, slots = self._residency, self._residency.slots, self.slots
        t.append_many(slots, times_s)
        self.num_context_tokens += len(times_s) * len(slots)
        for slot in slots[t.num_computed[slots] > t.writable_len[slots]].tolist():
            table = residency.seq(slot).block_table
            residency.blocks.append(table, int(t.writable_len[slot]), int(t.num_computed[slot]))
            t.writable_len[slot] = len(table) * residency.blocks.block_size

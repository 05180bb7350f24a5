"""The scheduler of one worker: which tokens it computes in its next step, and in which blocks their KV entries go.

There is no prefill phase and no decode phase: in each step the computed tokens of a sequence catch up with its tokens,
one token or many. `schedule` builds the next step, `complete` takes a step's result; up to `steps_in_flight` steps may
be out at once, so a sequence's next token is computed before the parent knows the last one.

Parent process, one thread, numpy and plain Python. Knows one worker's blocks and slots, and nothing of other workers,
of time, or of text: the engine moves sequences in and out.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from nanopd.config import EngineConfig, ModelConfig
from nanopd.core.block_manager import BlockManager, extend_keys
from nanopd.core.extras import extras_of, has_extras
from nanopd.core.sequence import Sequence, SequenceStatus
from nanopd.core.slots import SlotTable
from nanopd.core.speculation import rounds_of
from nanopd.core.step_builder import NO_INTS, BatchBuilder, Chunk, StepInFlight
from nanopd.messages import MAX_LOGPROBS, Role, RowFlag, SlotExtras, StepBatch, StepResult

DECODE_FLAGS = np.int32(RowFlag.SAMPLE | RowFlag.FROM_SLOT)
FIRST_DECODE_FLAGS = np.int32(RowFlag.SAMPLE)  # of a row whose token the worker does not have in its slot
DRAFT_FLAGS = np.int32(RowFlag.SAMPLE | RowFlag.DRAFTS)


class Load(NamedTuple):
    """What a worker has to do, at one moment."""

    num_decoding: int  # sequences that decode
    num_context_tokens: int  # theirs in the cache
    num_waiting_tokens: int  # of prompts to be computed there, steps in flight included
    num_seqs: int  # places taken: of `num_bound`, those that have blocks there already
    max_num_seqs: int  # places
    num_bound: int  # sequences that it has to serve, with those that wait and those that are still bound for it
    num_free_tokens: int  # what the cache has room for now
    num_usable_tokens: int  # what the cache has room for at all


@dataclass(slots=True)
class StepOutcome:
    """What a finished step means for the sequences it was about."""

    advanced: list[tuple[Sequence, int]] = field(default_factory=list)  # prefilling ones, tokens computed so far
    prefilled: list[Sequence] = field(default_factory=list)  # have their first token and leave for their decode worker
    watched: list[Sequence] = field(default_factory=list)  # got a token that somebody wants to look at
    finished: list[tuple[Sequence, SequenceStatus]] = field(default_factory=list)  # to be finished by the engine


@dataclass(slots=True)
class _Parked:
    """A slot and blocks that some step in flight may still name."""

    last_step_id: int
    slot: int
    table: list[int]


class Scheduler:
    """Continuous batching with chunked prefill on one worker."""

    def __init__(
        self,
        worker: int,
        role: Role,
        config: EngineConfig,
        blocks: BlockManager,
        model: ModelConfig,
        max_model_len: int,
    ) -> None:
        self.worker = worker
        self.role = role
        self.blocks = blocks
        self.host_blocks = BlockManager(config.num_host_blocks(model), config.block_size)
        self.swap_pays: Callable[[int], bool] = lambda num_tokens: True  # rather than to compute so many again
        self.max_num_seqs = config.max_num_seqs
        self.max_num_batched_tokens = config.max_num_batched_tokens  # the chunk budget; may change between steps
        self.slots = SlotTable(config.num_slots, max_model_len)
        self.waiting: deque[Sequence] = deque()
        self.prefilling: list[Sequence] = []  # this and the following in order of rank
        self.decoding: list[Sequence] = []
        self.departing: list[Sequence] = []  # computed here so far, their blocks on the way to another worker
        self.admitted: list[Sequence] = []  # started by the last `schedule`
        self.preempted: list[Sequence] = []  # by the last `schedule`; to be queued again, here or elsewhere
        self.extras: list[SlotExtras] = []  # of the last `schedule`; to be sent ahead of its step
        self.num_expected = 0  # sequences bound for this worker that another one has or will prefill
        self.num_reserved = 0  # places promised to some of them
        self.lacks_room = False  # since the last `schedule`, for a sequence from elsewhere
        self.num_preemptions = 0
        self._num_context_tokens = 0  # computed of sequences that decode
        self.num_waiting_tokens = 0  # to be computed of sequences that wait or prefill, those in flight included
        self.is_dead = False
        self.generation = 0  # of the worker process; raised when it is replaced
        self.in_flight: deque[StepInFlight] = deque()
        self._parked: deque[_Parked] = deque()
        self._num_parked_blocks = 0
        self._step_id = 0
        self._caches_prefixes = config.enable_prefix_caching
        self._root_key = repr((config.model, model)).encode()
        self._is_eos = np.zeros(model.vocab_size, np.bool_)
        self._is_eos[list(model.eos_token_ids)] = True
        self._decode_slots: np.ndarray | None = None  # the slots of `decoding`; None: it has changed
        self._needs_feedback = False  # any of `decoding` does
        self._ones = np.ones(config.max_num_seqs, np.int32)
        self._max_drafts, self._max_decode_rows = config.num_speculative_tokens, config.max_decode_rows
        self._accepted: deque[tuple[np.ndarray, StepResult]] = deque()  # slots, and what they have for `accept`

    # ------------------------------------------------------------------------------------------------ queues

    @property
    def num_seqs(self) -> int:
        """Places taken, of `max_num_seqs`."""
        return len(self.prefilling) + len(self.decoding) + len(self.departing) + self.num_reserved

    @property
    def load(self) -> int:
        """Sequences it has to serve, with those that wait and those that are still bound for it."""
        return len(self.waiting) + self.num_seqs - self.num_reserved + self.num_expected

    def snapshot(self) -> Load:
        num_seqs, block_size = self.num_seqs, self.blocks.block_size
        num_bound = len(self.waiting) + num_seqs - self.num_reserved + self.num_expected
        num_free, num_usable = self.blocks.num_free * block_size, self.blocks.num_usable * block_size
        counts = len(self.decoding), self._num_context_tokens, self.num_waiting_tokens
        return Load(*counts, num_seqs, self.max_num_seqs, num_bound, num_free, num_usable)

    def num_cached(self, seq: Sequence) -> int:
        """Tokens of a sequence that is not here whose blocks the cache has now."""
        return len(self._find_prefix(seq)) * self.blocks.block_size

    def can_hold(self, num_tokens: int) -> bool:
        """Whether the pool is large enough for a sequence of so many tokens, if it had it for itself."""
        return self.blocks.blocks_for(num_tokens) <= self.blocks.num_usable

    def add(self, seq: Sequence) -> None:
        """Queue a sequence whose tokens are all to be computed, in order of rank."""
        insort(self.waiting, seq, key=lambda s: s.rank)
        seq.num_spared = max(self.num_cached(seq), seq.num_swapped)
        self.num_waiting_tokens += seq.num_tokens - seq.num_spared

    @property
    def keeps_room(self) -> bool:
        """For who had to leave."""
        return bool(self.waiting and self.waiting[0].host_table)

    def reserve(self, num_tokens: int, block_keys: list[bytes]) -> tuple[list[int], int] | None:
        """Blocks and a place for a sequence of `num_tokens` tokens that another worker prefills; None: no room now.

        Returns:
            The table, and how many blocks at its beginning are there already and must not be written. There is always
            at least one behind them to be moved, whether the newest token has been computed or not.
        """
        found = self._find(block_keys, num_tokens - 1)
        num_new = self.blocks.blocks_for(num_tokens + 1) - len(found)
        if self.keeps_room or not self._can_take(num_new, found):
            return None
        self.num_reserved += 1
        return self.blocks.allocate(num_new, found), len(found)

    def cancel_reservation(self, table: list[int]) -> None:
        self.num_reserved -= 1
        self.blocks.free(table)

    def take_over(self, seq: Sequence, table: list[int]) -> None:
        """Go on with a sequence whose KV entries have arrived in the reserved `table`."""
        self.num_reserved -= 1
        seq.block_table, seq.num_findable = table, 0
        self._make_findable(seq, seq.num_tokens - 1)
        self._acquire_slot(seq, seq.num_tokens - 1)
        self._start_decoding(seq)

    def depart(self, seq: Sequence) -> None:
        """Decode a sequence no further, as it goes on elsewhere; steps in flight still bring it tokens."""
        self.decoding.remove(seq)
        self._num_context_tokens -= int(self.slots.num_computed[seq.slot])
        self._decode_slots = None
        self.departing.append(seq)
        seq.status = SequenceStatus.MOVING

    def is_settled(self, seq: Sequence) -> bool:
        """Whether no step in flight computes anything of a sequence that decodes or departs."""
        return bool(self.slots.num_computed[seq.slot] == self.slots.num_tokens[seq.slot] - 1)

    def settled_len(self, seq: Sequence) -> int:
        """The most tokens of such a sequence once all steps in flight are done, if it goes on then."""
        return int(self.slots.num_computed[seq.slot] + self.slots.num_drafts[seq.slot]) + 1

    def keep(self, seq: Sequence) -> None:
        """Decode a departing sequence here after all."""
        self.departing.remove(seq)
        self._start_decoding(seq)

    def fork(self, parent: Sequence, child: Sequence) -> bool:
        """Let `child` decode from its last token on; False: not computed so far, or no room now.

        The tokens before are those of `parent`, which decodes here, and so are the blocks (copy-on-write).
        """
        t, num_computed = self.slots, child.num_tokens - 1
        assert parent in self.decoding and num_computed < t.num_tokens[parent.slot]
        if t.num_tokens[parent.slot] <= t.first_len[parent.slot] or not self._can_take(1, []):
            return False
        num_full = num_computed // self.blocks.block_size
        child.block_table = self.blocks.fork(parent.block_table[: self.blocks.blocks_for(num_computed)])
        child.block_keys, child.num_findable = parent.block_keys[:num_full], min(parent.num_findable, num_full)
        child.num_cached_tokens = child.num_prompt_tokens - 1
        self._acquire_slot(child, num_computed)
        self._start_decoding(child)
        for seq in (parent, child):  # whoever writes first gets a copy of the last block
            t.writable_len[seq.slot] = 0
        return True

    def resume(self, seq: Sequence) -> None:
        """Go on with a sequence whose last token has been chosen; the worker's slot may hold another one."""
        self.slots.is_awaited[seq.slot] = self.slots.has_last_token[seq.slot] = False

    def remove(self, seq: Sequence) -> None:
        """Forget a sequence in whatever state it is; its blocks are free once no step in flight names them."""
        if seq.slot is None:
            self.waiting.remove(seq)
            self.num_waiting_tokens -= seq.num_tokens - seq.num_spared
            self.forget_swapped(seq)
        else:
            self._evict(seq)
            self._release_parked()

    def _evict(self, seq: Sequence) -> None:
        if seq in self.prefilling:  # what is in flight is still computed
            self.num_waiting_tokens -= seq.num_tokens - int(self.slots.num_computed[seq.slot])
        if seq.status is SequenceStatus.RUNNING:
            self._num_context_tokens -= int(self.slots.num_computed[seq.slot])
        for queue in (self.decoding, self.prefilling, self.departing):
            if seq in queue:
                queue.remove(seq)
        self._decode_slots = None
        slot = self.slots.deactivate(seq)
        if seq.num_tokens > self.slots.first_len[slot]:
            self._make_findable(seq, seq.num_tokens - 1)
        self._parked.append(_Parked(self._step_id, slot, seq.block_table))
        self._num_parked_blocks += len(seq.block_table)
        seq.block_table = []

    # ---------------------------------------------------------------------------------------------- schedule

    def schedule(self) -> StepBatch | None:
        """The next step; None if there is nothing to compute now. Leaves news in `admitted`, `preempted`, `extras`."""
        self.admitted, self.preempted, self.extras = [], [], []
        if self.in_flight and self.in_flight[-1].drafts:  # else who drafts would run in every other step only
            return None
        step = self._build_step()
        # Blocks of sequences preempted just now; if others share them all, one more has to be preempted.
        while step is None and not self.in_flight and (self._parked or self._preempt_idle()):
            self._release_parked()
            step = self._build_step()
        self.lacks_room = False
        return step

    def _preempt_idle(self) -> bool:
        """Nothing can run: preempt one that awaits a choice, if others lack the room that it has."""
        idle = [seq for seq in self.decoding if seq.awaits_choice]
        if not (idle and (self.waiting or self.lacks_room)):
            return False
        self.lacks_room = False
        self._preempt(idle[-1])
        return True

    def _build_step(self) -> StepBatch | None:
        self._step_id += 1
        batch = BatchBuilder(self._step_id, self.max_num_batched_tokens)
        self._schedule_decodes(batch)
        self._schedule_chunks(batch)
        self._admit_waiting(batch)
        if batch.is_empty:
            self._step_id -= 1
            for seq in self.preempted:  # nothing is sent that would save their blocks
                self.forget_swapped(seq)
            return None
        step = batch.build()
        self.in_flight.append(
            StepInFlight(
                step.step_id,
                step.row_slots,
                batch.sampled_slots(),
                batch.chunks,
                batch.num_prompt_tokens,
                batch.drafts,
            )
        )
        return step

    def _schedule_decodes(self, batch: BatchBuilder) -> None:
        """A row for every decoding sequence that has not come to its end: of one token, and of drafts if it has any."""
        t, ready = self.slots, self._slots_of_decoding()
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
            ready = self._make_room(batch, ready, full)
        if not len(ready):
            return
        starts, lens = t.num_computed[ready], self._ones[: len(ready)]
        from_slot = t.has_last_token[ready]
        flags = self._ones[: len(ready)] * DECODE_FLAGS
        if not from_slot.all():
            flags = np.where(from_slot, flags, FIRST_DECODE_FLAGS)
            self._send_tokens(batch, ready[~from_slot])
        if batch.drafts:
            lens = lens + t.num_drafts[ready]
            flags = np.where(lens > 1, DRAFT_FLAGS, flags)
        batch.set_decodes(ready, starts, lens, flags)
        t.num_computed[ready] = starts + 1
        self._num_context_tokens += len(ready)
        if self._needs_feedback:
            t.is_awaited[ready] = t.needs_feedback[ready]

    def _propose(self, batch: BatchBuilder, ready: np.ndarray) -> None:
        """Drafts for those of `ready` that wait for each result, as far as a step has rows for them."""
        t, room = self.slots, min(self._max_decode_rows, batch.budget) - len(ready)
        for slot in ready[t.needs_feedback[ready]].tolist():
            drafter, num_left = self._seq(slot).drafter, int(t.last_start[slot] - t.num_computed[slot]) - 1
            if drafter is not None and (drafts := drafter.propose(min(self._max_drafts, room, num_left))):
                batch.drafts[slot] = drafts
                t.num_drafts[slot] = len(drafts)
                t.has_last_token[slot] = False  # the worker does not know which of its tokens that will be
                room -= len(drafts)

    def _full(self, batch: BatchBuilder, ready: np.ndarray) -> np.ndarray:
        """The slots of `ready` that lack a block to write to. Where blocks are few, there are no drafts."""
        t = self.slots
        starts, limits = t.num_computed[ready], t.writable_len[ready]
        if batch.drafts:
            full = ready[starts + t.num_drafts[ready] >= limits]
            if self.blocks.num_free >= len(full) * (1 + self.blocks.blocks_for(self._max_drafts)):
                return full
            batch.drafts = {}
            t.num_drafts[ready] = 0
        return ready[starts >= limits]

    def _send_tokens(self, batch: BatchBuilder, slots: np.ndarray) -> None:
        """Decode rows of slots that do not hold their last token: the message brings it, and all the rest."""
        for slot in slots.tolist():
            if not self.slots.is_entered[slot]:
                self._enter(batch, slot)
            batch.token_ids.append(self._seq(slot).token_ids[self.slots.num_computed[slot]])
            batch.token_ids += batch.drafts.get(slot, ())
        self.slots.has_last_token[slots] = self.slots.num_drafts[slots] == 0

    def _make_room(self, batch: BatchBuilder, ready: np.ndarray, full: np.ndarray) -> np.ndarray:
        """Give each slot in `full` blocks to write to, preempting who comes last; returns the slots that can run."""
        t, block_size = self.slots, self.blocks.block_size
        is_tight = self.blocks.num_free < len(full)
        columns = (column[full].tolist() for column in (t.num_computed, t.num_drafts, t.is_entered))
        for slot, start, num_drafts, is_entered in zip(full.tolist(), *columns, strict=True):
            if is_tight and not self._find_block(batch, slot):
                continue
            table, last = self._seq(slot).block_table, (start + num_drafts) // block_size
            for copy in self.blocks.append(table, start, start + num_drafts + 1):
                batch.copies += copy
            if is_entered:  # else the whole table will be sent
                for index in range(start // block_size, last + 1):
                    batch.table_updates += (slot, index, table[index])
            t.writable_len[slot] = (last + 1) * block_size
        return ready[t.is_active[ready] & (t.num_computed[ready] < t.writable_len[ready])] if is_tight else ready

    def _find_block(self, batch: BatchBuilder, slot: int) -> bool:
        """Whether there is a block for `slot` now; preempts who comes last, perhaps this one, until there will be."""
        while self.slots.is_active[slot] and not self.blocks.num_free + self._num_parked_blocks:
            seq = max(self.decoding + self.prefilling, key=lambda s: s.rank)
            self._swap_out(batch, seq)
            self._preempt(seq)
        return bool(self.slots.is_active[slot] and self.blocks.num_free)

    def _preempt(self, seq: Sequence) -> None:
        """Take a sequence's blocks; unless they have been swapped out, all its tokens will be computed again."""
        self.num_preemptions += 1
        self._evict(seq)
        seq.status = SequenceStatus.PREEMPTED
        self.preempted.append(seq)

    def _swap_out(self, batch: BatchBuilder, seq: Sequence) -> None:
        """Keep in host memory what has been computed of a sequence that will be preempted, if that is of use."""
        num_computed = min(int(self.slots.num_computed[seq.slot]), int(self.slots.num_tokens[seq.slot]) - 1)
        num_blocks = self.blocks.blocks_for(num_computed)
        may_return = self.role.may_decode and not (seq.awaits_choice or seq.awaits_prompt_logprobs)
        if may_return and self.host_blocks.can_allocate(num_blocks) and self.swap_pays(num_computed):
            seq.host_table, seq.num_swapped = self.host_blocks.allocate(num_blocks), num_computed
            batch.add_copies(seq.block_table[:num_blocks], [-block for block in seq.host_table])

    def forget_swapped(self, seq: Sequence) -> None:
        self.host_blocks.free(seq.host_table)
        seq.num_swapped = 0

    def _schedule_chunks(self, batch: BatchBuilder) -> None:
        for seq in self.prefilling[:]:
            if not batch.budget:
                return
            self._add_chunk(batch, seq)

    def _admit_waiting(self, batch: BatchBuilder) -> None:
        """Start waiting sequences, in order of rank, while there is budget, a place and blocks."""
        while self.waiting and batch.budget and self.num_seqs < self.max_num_seqs:
            seq = self.waiting[0]
            found = self._find_prefix(seq)
            num_new = self.blocks.blocks_for(seq.num_tokens + 1) - len(found)
            if not self._has_room(num_new, found):
                return
            self.waiting.popleft()
            seq.block_table, seq.num_findable = self.blocks.allocate(num_new, found), len(found)
            num_cached = max(len(found) * self.blocks.block_size, seq.num_swapped)
            missing = slice(len(found), len(seq.host_table))
            batch.add_copies([-block for block in seq.host_table[missing]], seq.block_table[missing])
            self.num_waiting_tokens += seq.num_spared
            self.forget_swapped(seq)
            self._start_prefill(seq, num_cached)
            self._add_chunk(batch, seq)

    def _start_prefill(self, seq: Sequence, num_cached: int) -> None:
        if seq.num_cached_tokens is None:
            seq.num_cached_tokens = num_cached
        seq.status = SequenceStatus.PREFILL
        self._acquire_slot(seq, num_cached)
        self.num_waiting_tokens -= num_cached
        insort(self.prefilling, seq, key=lambda s: s.rank)
        self.admitted.append(seq)

    def _add_chunk(self, batch: BatchBuilder, seq: Sequence) -> None:
        slot = seq.slot
        assert slot is not None and seq.route is not None
        is_leaving = seq.route.decode_worker != self.worker
        if not self.slots.is_entered[slot]:
            self._enter(batch, slot)
        start = int(self.slots.num_computed[slot])
        end = min(start + batch.budget, seq.num_tokens)
        is_last = end == seq.num_tokens
        batch.add_chunk(slot, start, seq.token_ids[start:end], RowFlag.SAMPLE if is_last else 0)
        self.slots.num_computed[slot] = end
        batch.chunks.append(Chunk(seq, slot, end, is_last, is_leaving))
        if is_last:
            self.prefilling.remove(seq)
            self.slots.has_last_token[slot] = True
            self.slots.is_awaited[slot] = self.slots.needs_feedback[slot]
            if is_leaving:
                self.departing.append(seq)
            else:
                self._start_decoding(seq)

    def _enter(self, batch: BatchBuilder, slot: int) -> None:
        """Tell the worker who holds the slot from now on."""
        seq, params = self._seq(slot), self._seq(slot).params
        stop_ids = sorted(seq.stop_ids) if seq.params.min_tokens else []  # the worker needs them for masking only
        logprobs = -1 if params.logprobs is None else params.logprobs
        draw = params.temperature, params.top_p, max(params.top_k, 0)
        batch.inits.append((seq.seed, slot, *draw, logprobs, seq.min_len, len(stop_ids), params.min_p))
        if has_extras(seq):
            self.extras.append(extras_of(seq, slot))
            if seq.awaits_prompt_logprobs:
                seq.prompt_logprobs = [None]
        batch.stop_ids += stop_ids
        batch.add_blocks(slot, 0, seq.block_table)
        self.slots.is_entered[slot] = True

    def _acquire_slot(self, seq: Sequence, num_computed: int) -> None:
        self.slots.acquire(seq, num_computed)
        self.slots.writable_len[seq.slot] = len(seq.block_table) * self.blocks.block_size

    def _start_decoding(self, seq: Sequence) -> None:
        seq.status = SequenceStatus.RUNNING
        insort(self.decoding, seq, key=lambda s: s.rank)
        self._num_context_tokens += int(self.slots.num_computed[seq.slot])
        self._decode_slots = None

    def _slots_of_decoding(self) -> np.ndarray:
        if self._decode_slots is None:
            self._decode_slots = np.array([seq.slot for seq in self.decoding], np.int32)
            self._needs_feedback = any(seq.needs_feedback for seq in self.decoding)
        return self._decode_slots

    def _has_room(self, num_new: int, found: list[int]) -> bool:
        """Whether blocks can be had and every running sequence could still take one more."""
        return self.blocks.can_allocate(num_new + len(self.decoding), found)

    def _can_take(self, num_new: int, found: list[int]) -> bool:
        """Whether there is a place, and room, for a sequence that does not come from the queue."""
        if self.num_seqs < self.max_num_seqs and self._has_room(num_new, found):
            return True
        self.lacks_room = True
        return False

    def _find_prefix(self, seq: Sequence) -> list[int]:
        """Blocks that hold the beginning of its tokens, as far as these need not be computed."""
        self._extend_keys(seq)
        return [] if seq.awaits_prompt_logprobs else self._find(seq.block_keys, seq.num_tokens)

    def _find(self, block_keys: list[bytes], num_tokens: int) -> list[int]:
        """Blocks that hold the beginning of `num_tokens` tokens, without the last token: it must be computed."""
        return self.blocks.find(block_keys[: (num_tokens - 1) // self.blocks.block_size])

    def _make_findable(self, seq: Sequence, num_computed: int) -> None:
        """The first `num_computed` tokens have their KV entries: others may share the full blocks of them."""
        start, end = seq.num_findable, num_computed // self.blocks.block_size
        if self._caches_prefixes and start < end:
            self._extend_keys(seq)
            self.blocks.make_findable(seq.block_table[start:end], seq.block_keys[start:end])
            seq.num_findable = end

    def _extend_keys(self, seq: Sequence) -> None:
        if self._caches_prefixes:
            extend_keys(seq.block_keys, seq.token_ids, self.blocks.block_size, self._root_key)

    def _seq(self, slot: int) -> Sequence:
        seq = self.slots.seqs[slot]
        assert seq is not None
        return seq

    # ---------------------------------------------------------------------------------------------- complete

    def complete(self, result: StepResult, now_s: float) -> StepOutcome:
        """Take the result of the oldest step in flight: append the tokens, find out who has come to an end.

        Tokens of sequences that have been removed since the step was built are dropped.
        """
        step = self.in_flight.popleft()
        self.num_waiting_tokens -= step.num_prompt_tokens
        assert step.step_id == result.step_id, (step.step_id, result.step_id)
        slots = step.sampled_slots
        if step.drafts:
            self.slots.num_drafts[list(step.drafts)] = 0
            slots, result = self._verify(step, result)
        outcome = self._take(slots, result, now_s)
        if step.chunks:
            self._advance(outcome, step.chunks)
        self._release_parked()
        return outcome

    def accept(self, now_s: float) -> StepOutcome | None:
        """Take one more token of each sequence whose drafts have turned out right; None: there are none left.

        To be called until then after each `complete`, with nothing but the outcomes' consequences in between: a token
        that came out of a draft is like one that came out of a step of its own.
        """
        if not self._accepted:
            return None
        slots, result = self._accepted.popleft()
        for slot in slots[self.slots.is_active[slots]].tolist():
            self.slots.num_computed[slot] += 1
            seq = self._seq(slot)
            assert seq.drafter is not None
            seq.drafter.num_accepted += 1
            self._num_context_tokens += seq.status is SequenceStatus.RUNNING
        return self._take(slots, result, now_s)

    def _verify(self, step: StepInFlight, result: StepResult) -> tuple[np.ndarray, StepResult]:
        """Split a result with drafts: slots and result of the first token of each row; the others are for `accept`."""
        for slot, drafts in step.drafts.items():
            seq = self.slots.seqs[slot]
            if seq is not None and seq.drafter is not None:
                seq.drafter.num_drafts += len(drafts)
        first, *others = rounds_of(step.sampled_slots, step.drafts, result.token_ids)
        self._accepted.extend((step.sampled_slots[rows], result.part(rows)) for rows in others)
        return step.sampled_slots[first], result.part(first)

    def _take(self, slots: np.ndarray, result: StepResult, now_s: float) -> StepOutcome:
        """A token for each of `slots`."""
        tokens = result.token_ids
        if len(result.logprob_rows):
            self._append_logprobs(slots, result)
        wanted = self.slots.is_active[slots]
        if not wanted.all():
            slots, tokens = slots[wanted], tokens[wanted]
        num_tokens = self.slots.append(slots, tokens, now_s)
        return self._outcome_of(slots, tokens, num_tokens, now_s, result.errors)

    def _outcome_of(
        self, slots: np.ndarray, tokens: np.ndarray, num_tokens: np.ndarray, now_s: float, errors: np.ndarray
    ) -> StepOutcome:
        """Who of `slots` has come to an end with its new token, and who is watched."""
        t, outcome = self.slots, StepOutcome()
        is_full = num_tokens >= t.end_len[slots]
        is_noted = is_full | t.is_watched[slots] | (self._is_eos[tokens] & t.heeds_eos[slots])
        if not is_noted.any():
            return outcome
        noted = zip(slots[is_noted].tolist(), tokens[is_noted].tolist(), is_full[is_noted].tolist(), strict=True)
        for slot, token, is_at_end in noted:
            seq = t.seqs[slot]
            assert seq is not None
            if token < 0:
                t.num_tokens[slot] -= 1
                seq.error = bytes(errors).decode()
                outcome.finished.append((seq, SequenceStatus.FINISHED_ERROR))
                continue
            if seq.is_watched:  # its own list is always up to date
                seq.token_ids.append(token)
                seq.token_times_s.append(now_s)
                t.is_awaited[slot] = seq.awaits_choice = seq.chooser is not None
                if seq.drafter is not None:
                    self._observe(seq, slot, token)
                outcome.watched.append(seq)
            else:
                t.sync(seq)
            if token in seq.stop_ids:
                seq.stop_reason = token if token in seq.params.stop_token_ids else None
                outcome.finished.append((seq, SequenceStatus.FINISHED_STOPPED))
            elif is_at_end:
                outcome.finished.append((seq, SequenceStatus.FINISHED_LENGTH))
        return outcome

    def _observe(self, seq: Sequence, slot: int, token: int) -> None:
        """A sequence that may have drafts has a new token; one that begins to draft waits for what is in flight."""
        t = self.slots
        assert seq.drafter is not None
        seq.drafter.observe(token)
        t.needs_feedback[slot] = seq.needs_feedback
        t.is_awaited[slot] = seq.needs_feedback and t.num_computed[slot] >= t.num_tokens[slot]
        self._needs_feedback |= seq.needs_feedback

    def _advance(self, outcome: StepOutcome, chunks: list[Chunk]) -> None:
        """What the step's chunks mean for others of the same prefix, and for sequences that leave."""
        finished = [seq for seq, _ in outcome.finished]
        for chunk in chunks:
            seq = chunk.seq
            if self.slots.seqs[chunk.slot] is not seq:
                continue
            self._make_findable(seq, chunk.end)
            if chunk.is_leaving and seq not in finished:
                self.slots.sync(seq)
                outcome.advanced.append((seq, chunk.end))
                if chunk.is_last:
                    outcome.prefilled.append(seq)

    def _append_logprobs(self, slots: np.ndarray, result: StepResult) -> None:
        """Give each sequence that asked for them: token id -> log probability, the chosen token first."""
        ids = result.logprob_ids.reshape(-1, 1 + MAX_LOGPROBS).tolist()
        values = result.logprobs.reshape(-1, 1 + MAX_LOGPROBS).tolist()
        for row, row_ids, row_values in zip(result.logprob_rows.tolist(), ids, values, strict=True):
            seq = self.slots.seqs[slots[row] if row >= 0 else -1 - row]
            logprobs = None if seq is None else seq.logprobs if row >= 0 else seq.prompt_logprobs
            if logprobs is not None:
                logprobs.append({i: value for i, value in zip(row_ids, row_values, strict=True) if i >= 0})

    def _release_parked(self) -> None:
        while self._parked and not (self.in_flight and self.in_flight[0].step_id <= self._parked[0].last_step_id):
            parked = self._parked.popleft()
            self._num_parked_blocks -= len(parked.table)
            self.slots.release(parked.slot)
            self.blocks.free(parked.table)

    def seqs_in_flight(self) -> list[Sequence]:
        """Those that a step in flight computes something of."""
        slots = np.unique(np.concatenate([NO_INTS, *(step.row_slots for step in self.in_flight)]))
        return [seq for slot in slots.tolist() if (seq := self.slots.seqs[slot]) is not None]

    # ------------------------------------------------------------------------------------------------- checks

    def check_integrity(self, reserved: Iterable[list[int]] = (), pinned: Iterable[np.ndarray] = ()) -> None:
        """Raise AssertionError when blocks or slots were lost."""
        holders = self.prefilling + self.decoding + self.departing
        tables = [*(seq.block_table for seq in holders), *(p.table for p in self._parked), *reserved]
        self.blocks.check_integrity(tables, pinned)
        self.host_blocks.check_integrity(seq.host_table for seq in self.waiting)
        num_context = int(self.slots.num_computed[self._slots_of_decoding()].sum())
        assert self._num_context_tokens == num_context, (self._num_context_tokens, num_context)
        num_slots = self.slots.num_free + len(holders) + len(self._parked)
        assert num_slots == len(self.slots.seqs), f"{len(self.slots.seqs) - num_slots} slots lost"
        left = [seq.num_tokens - int(self.slots.num_computed[seq.slot]) for seq in self.prefilling]
        num_waiting = sum(seq.num_tokens - seq.num_spared for seq in self.waiting) + sum(left)
        num_waiting += sum(step.num_prompt_tokens for step in self.in_flight)
        assert self.num_waiting_tokens == num_waiting, f"{self.num_waiting_tokens} tokens wait, not {num_waiting}"

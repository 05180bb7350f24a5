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
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from nanopd.config import EngineConfig, ModelConfig
from nanopd.core.block_manager import BlockManager, extend_keys
from nanopd.core.sequence import Sequence, SequenceStatus
from nanopd.core.slots import SlotTable
from nanopd.messages import BLOCK_COPY, MAX_LOGPROBS, SLOT_INIT, TABLE_UPDATE, Role, RowFlag, StepBatch, StepResult

NO_INTS, NO_INITS = np.empty(0, np.int32), np.empty(0, SLOT_INIT)
DECODE_FLAGS = np.int32(RowFlag.SAMPLE | RowFlag.FROM_SLOT)
FIRST_DECODE_FLAGS = np.int32(RowFlag.SAMPLE)  # of a row whose token the worker does not have in its slot


@dataclass(slots=True)
class StepOutcome:
    """What a finished step means for the sequences it was about."""

    advanced: list[tuple[Sequence, int]] = field(default_factory=list)  # prefilling ones, tokens computed so far
    prefilled: list[Sequence] = field(default_factory=list)  # have their first token and leave for their decode worker
    watched: list[Sequence] = field(default_factory=list)  # got a token that somebody wants to look at
    finished: list[tuple[Sequence, SequenceStatus]] = field(default_factory=list)  # to be finished by the engine


@dataclass(slots=True)
class _Chunk:
    """Prefill work: as chunks get done, blocks may be shared, and move if the sequence leaves for another worker."""

    seq: Sequence
    slot: int
    end: int  # tokens computed when the chunk is done
    is_last: bool  # its last token's successor is sampled
    is_leaving: bool


@dataclass(slots=True)
class _StepInFlight:
    step_id: int
    row_slots: np.ndarray  # [num_rows] int32
    sampled_slots: np.ndarray  # [*] int32, in the order of the rows that sample
    chunks: list[_Chunk]
    num_prompt_tokens: int  # of the chunks


@dataclass(slots=True)
class _Parked:
    """A slot and blocks that some step in flight may still name."""

    last_step_id: int
    slot: int
    table: list[int]


class _BatchBuilder:
    """A StepBatch in the making, with its token budget."""

    def __init__(self, step_id: int, budget: int) -> None:
        self.step_id = step_id
        self.budget = budget
        self.inits: list[tuple] = []
        self.stop_ids: list[int] = []
        self.table_updates: list[int] = []  # slot, index, block_id, slot, index, ...
        self.copies: list[int] = []  # src, dst, src, dst, ...
        self.decodes: tuple[np.ndarray, ...] = (
            NO_INTS,
        ) * 4  # slots, starts, lengths, flags of the decode rows, [*] int32 each
        self.rows: list[tuple[int, int, int, int]] = []  # prefill rows: slot, start, length, flags
        self.token_ids: list[int] = []
        self.chunks: list[_Chunk] = []
        self.num_prompt_tokens = 0  # of the chunks

    @property
    def is_empty(self) -> bool:
        return not self.rows and not len(self.decodes[0])

    def add_blocks(self, slot: int, first_index: int, block_ids: list[int]) -> None:
        for index, block_id in enumerate(block_ids, first_index):
            self.table_updates += (slot, index, block_id)

    def set_decodes(self, *columns: np.ndarray) -> None:
        """Slots, starts, lengths and flags of the decode rows, each [*] int32."""
        self.decodes = columns
        self.budget -= len(columns[0])

    def add_chunk(self, slot: int, start: int, token_ids: list[int], flags: int) -> None:
        self.rows.append((slot, start, len(token_ids), flags))
        self.token_ids += token_ids
        self.budget -= len(token_ids)
        self.num_prompt_tokens += len(token_ids)

    def build(self) -> StepBatch:
        slots, starts, lens, flags = self.decodes
        if self.rows:
            rows = np.array(self.rows, np.int32).T
            slots, starts, lens, flags = map(np.concatenate, zip(self.decodes, rows, strict=True))
        return StepBatch(
            self.step_id,
            np.array(self.inits, SLOT_INIT) if self.inits else NO_INITS,
            _int32(self.stop_ids),
            _int32(self.table_updates).view(TABLE_UPDATE),
            _int32(self.copies).view(BLOCK_COPY),
            slots,
            starts,
            lens,
            flags,
            _int32(self.token_ids),
        )

    def sampled_slots(self) -> np.ndarray:
        """[*] int32, in the order of the rows that sample."""
        chunks = [slot for slot, _, _, flags in self.rows if flags & RowFlag.SAMPLE]
        slots = self.decodes[0]
        return np.concatenate((slots, np.array(chunks, np.int32))) if chunks else slots


def _int32(values: list[int]) -> np.ndarray:
    return np.array(values, np.int32) if values else NO_INTS


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
        self.max_num_seqs = config.max_num_seqs
        self.max_num_batched_tokens = config.max_num_batched_tokens  # the chunk budget; may change between steps
        self.slots = SlotTable(config.num_slots, max_model_len)
        self.waiting: deque[Sequence] = deque()
        self.prefilling: list[Sequence] = []  # this and the following in order of seq_id
        self.decoding: list[Sequence] = []
        self.departing: list[Sequence] = []  # computed here so far, their blocks on the way to another worker
        self.admitted: list[Sequence] = []  # started by the last `schedule`
        self.preempted: list[Sequence] = []  # by the last `schedule`; to be queued again, here or elsewhere
        self.num_expected = 0  # sequences bound for this worker that another one has or will prefill
        self.num_reserved = 0  # places promised to some of them
        self.num_preemptions = 0
        self.num_waiting_tokens = 0  # to be computed of sequences that wait or prefill, those in flight included
        self.is_dead = False
        self.generation = 0  # of the worker process; raised when it is replaced
        self.in_flight: deque[_StepInFlight] = deque()
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

    # ------------------------------------------------------------------------------------------------ queues

    @property
    def num_seqs(self) -> int:
        """Places taken, of `max_num_seqs`."""
        return len(self.prefilling) + len(self.decoding) + len(self.departing) + self.num_reserved

    @property
    def load(self) -> int:
        """Sequences it has to serve, with those that wait and those that are still bound for it."""
        return len(self.waiting) + self.num_seqs - self.num_reserved + self.num_expected

    @property
    def num_decoding(self) -> int:
        return len(self.decoding)

    @property
    def num_context_tokens(self) -> int:
        """Tokens in the cache of the sequences that decode."""
        return int(self.slots.num_computed[self._slots_of_decoding()].sum())

    @property
    def num_free_tokens(self) -> int:
        return self.blocks.num_free * self.blocks.block_size

    @property
    def num_usable_tokens(self) -> int:
        return self.blocks.num_usable * self.blocks.block_size

    def can_hold(self, num_tokens: int) -> bool:
        """Whether the pool is large enough for a sequence of so many tokens, if it had it for itself."""
        return self.blocks.blocks_for(num_tokens) <= self.blocks.num_usable

    def add(self, seq: Sequence) -> None:
        """Queue a sequence whose tokens are all to be computed, in order of submission."""
        insort(self.waiting, seq, key=lambda s: s.seq_id)
        self.num_waiting_tokens += seq.num_tokens

    def reserve(self, num_tokens: int, block_keys: list[bytes]) -> tuple[list[int], int] | None:
        """Blocks and a place for a sequence of `num_tokens` tokens that another worker prefills; None: no room now.

        Returns:
            The table, and how many blocks at its beginning are there already and must not be written. There is always
            at least one behind them to be moved, whether the newest token has been computed or not.
        """
        if self.num_seqs >= self.max_num_seqs:
            return None
        found = self._find(block_keys, num_tokens - 1)
        num_new = self.blocks.blocks_for(num_tokens + 1) - len(found)
        if not self._has_room(num_new, found):
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
        self._decode_slots = None
        self.departing.append(seq)
        seq.status = SequenceStatus.MOVING

    def is_settled(self, seq: Sequence) -> bool:
        """Whether no step in flight computes anything of a sequence that decodes or departs."""
        return bool(self.slots.num_computed[seq.slot] == self.slots.num_tokens[seq.slot] - 1)

    def settled_len(self, seq: Sequence) -> int:
        """Tokens of such a sequence once all steps in flight are done, if it goes on then."""
        return int(self.slots.num_computed[seq.slot]) + 1

    def keep(self, seq: Sequence) -> None:
        """Decode a departing sequence here after all."""
        self.departing.remove(seq)
        self._start_decoding(seq)

    def fork(self, parent: Sequence, child: Sequence) -> None:
        """Let `child` go on from the tokens of `parent`, which decodes here, sharing its blocks (copy-on-write)."""
        assert parent in self.decoding and child.token_ids == parent.token_ids
        assert self.num_seqs < self.max_num_seqs
        child.block_table, child.num_findable = self.blocks.fork(parent.block_table), parent.num_findable
        child.block_keys = list(parent.block_keys)
        self._acquire_slot(child, child.num_tokens - 1)
        self._start_decoding(child)
        for seq in (parent, child):  # whoever writes first gets a copy of the last block
            self.slots.writable_len[seq.slot] = 0

    def remove(self, seq: Sequence) -> None:
        """Forget a sequence in whatever state it is; its blocks are free once no step in flight names them."""
        if seq.slot is None:
            self.waiting.remove(seq)
            self.num_waiting_tokens -= seq.num_tokens
        else:
            self._evict(seq)
            self._release_parked()

    def _evict(self, seq: Sequence) -> None:
        if seq in self.prefilling:  # what is in flight is still computed
            self.num_waiting_tokens -= seq.num_tokens - int(self.slots.num_computed[seq.slot])
        for queue in (self.decoding, self.prefilling, self.departing):
            if seq in queue:
                queue.remove(seq)
        self._decode_slots = None
        slot = self.slots.deactivate(seq)
        if seq.num_tokens > self.slots.first_len[slot]:  # a new token is there, so all before it have been computed
            self._make_findable(seq, seq.num_tokens - 1)
        self._parked.append(_Parked(self._step_id, slot, seq.block_table))
        self._num_parked_blocks += len(seq.block_table)
        seq.block_table = []

    # ---------------------------------------------------------------------------------------------- schedule

    def schedule(self) -> StepBatch | None:
        """The next step; None when there is nothing to compute now. Leaves news in `admitted` and `preempted`."""
        self.admitted, self.preempted = [], []
        step = self._build_step()
        # Blocks of sequences preempted just now; if others share them all, one more has to be preempted.
        while step is None and self._parked and not self.in_flight:
            self._release_parked()
            step = self._build_step()
        return step

    def _build_step(self) -> StepBatch | None:
        self._step_id += 1
        batch = _BatchBuilder(self._step_id, self.max_num_batched_tokens)
        self._schedule_decodes(batch)
        self._schedule_chunks(batch)
        self._admit_waiting(batch)
        if batch.is_empty:
            self._step_id -= 1
            return None
        step = batch.build()
        self.in_flight.append(
            _StepInFlight(step.step_id, step.row_slots, batch.sampled_slots(), batch.chunks, batch.num_prompt_tokens)
        )
        return step

    def _schedule_decodes(self, batch: _BatchBuilder) -> None:
        """A row of one token for every decoding sequence that has not come to its end."""
        t, ready = self.slots, self._slots_of_decoding()
        can_run = t.num_computed[ready] < t.last_start[ready]
        if self._needs_feedback:
            can_run &= ~t.is_awaited[ready]
        if not can_run.all():
            ready = ready[can_run]
        ready = ready[: batch.budget]
        starts = t.num_computed[ready]
        is_full = starts >= t.writable_len[ready]
        if is_full.any():
            ready = self._make_room(batch, ready, ready[is_full])
            starts = t.num_computed[ready]
        if not len(ready):
            return
        from_slot = t.has_last_token[ready]
        flags = self._ones[: len(ready)] * DECODE_FLAGS
        if not from_slot.all():
            flags = np.where(from_slot, flags, FIRST_DECODE_FLAGS)
            self._enter_all(batch, ready[~from_slot])
        batch.set_decodes(ready, starts, self._ones[: len(ready)], flags)
        t.num_computed[ready] = starts + 1
        if self._needs_feedback:
            t.is_awaited[ready] = t.needs_feedback[ready]

    def _enter_all(self, batch: _BatchBuilder, slots: np.ndarray) -> None:
        """Decode rows of slots that do not hold their last token: the message brings it, and all the rest."""
        for slot in slots.tolist():
            self._enter(batch, slot)
            batch.token_ids.append(self._seq(slot).token_ids[self.slots.num_computed[slot]])
        self.slots.has_last_token[slots] = True

    def _make_room(self, batch: _BatchBuilder, ready: np.ndarray, full: np.ndarray) -> np.ndarray:
        """Give each slot in `full` a block to write to, preempting the youngest; returns the slots that can run."""
        t, block_size = self.slots, self.blocks.block_size
        is_tight = self.blocks.num_free < len(full)
        starts, are_entered = t.num_computed[full].tolist(), t.is_entered[full].tolist()
        for slot, start, is_entered in zip(full.tolist(), starts, are_entered, strict=True):
            if is_tight and not self._find_block(slot):
                continue
            table, index = self._seq(slot).block_table, start // block_size
            for copy in self.blocks.append(table, start, start + 1):
                batch.copies += copy
            if is_entered:  # else the whole table will be sent
                batch.table_updates += (slot, index, table[index])
            t.writable_len[slot] = (index + 1) * block_size
        return ready[t.is_active[ready] & (t.num_computed[ready] < t.writable_len[ready])] if is_tight else ready

    def _find_block(self, slot: int) -> bool:
        """Whether there is a block for `slot` now; preempts the youngest, perhaps this one, until there will be."""
        while self.slots.is_active[slot] and not self.blocks.num_free + self._num_parked_blocks:
            self._preempt(max(self.decoding + self.prefilling, key=lambda s: s.seq_id))
        return bool(self.slots.is_active[slot] and self.blocks.num_free)

    def _preempt(self, seq: Sequence) -> None:
        """Take a sequence's blocks; all its tokens will be computed again."""
        self.num_preemptions += 1
        self._evict(seq)
        seq.status = SequenceStatus.PREEMPTED
        self.preempted.append(seq)

    def _schedule_chunks(self, batch: _BatchBuilder) -> None:
        for seq in self.prefilling[:]:
            if not batch.budget:
                return
            self._add_chunk(batch, seq)

    def _admit_waiting(self, batch: _BatchBuilder) -> None:
        """Start waiting sequences, the oldest first, while there is budget, a place and blocks."""
        while self.waiting and batch.budget and self.num_seqs < self.max_num_seqs:
            seq = self.waiting[0]
            self._extend_keys(seq)
            found = self._find(seq.block_keys, seq.num_tokens)
            num_new = self.blocks.blocks_for(seq.num_tokens + 1) - len(found)
            if not self._has_room(num_new, found):
                return
            self.waiting.popleft()
            seq.block_table, seq.num_findable = self.blocks.allocate(num_new, found), len(found)
            self._start_prefill(seq, len(found) * self.blocks.block_size)
            self._add_chunk(batch, seq)

    def _start_prefill(self, seq: Sequence, num_cached: int) -> None:
        if seq.num_cached_tokens is None:
            seq.num_cached_tokens = num_cached
        seq.status = SequenceStatus.PREFILL
        self._acquire_slot(seq, num_cached)
        self.num_waiting_tokens -= num_cached
        insort(self.prefilling, seq, key=lambda s: s.seq_id)
        self.admitted.append(seq)

    def _add_chunk(self, batch: _BatchBuilder, seq: Sequence) -> None:
        slot = seq.slot
        assert slot is not None and seq.route is not None
        if not self.slots.is_entered[slot]:
            self._enter(batch, slot)
        start = int(self.slots.num_computed[slot])
        end = min(start + batch.budget, seq.num_tokens)
        is_last = end == seq.num_tokens
        batch.add_chunk(slot, start, seq.token_ids[start:end], RowFlag.SAMPLE if is_last else 0)
        self.slots.num_computed[slot] = end
        batch.chunks.append(_Chunk(seq, slot, end, is_last, not seq.route.is_collocated))
        if is_last:
            self.prefilling.remove(seq)
            self.slots.has_last_token[slot] = True
            self.slots.is_awaited[slot] = self.slots.needs_feedback[slot]
            if seq.route.is_collocated:
                self._start_decoding(seq)
            else:
                self.departing.append(seq)

    def _enter(self, batch: _BatchBuilder, slot: int) -> None:
        """Tell the worker who holds the slot from now on."""
        seq, params = self._seq(slot), self._seq(slot).params
        stop_ids = sorted(seq.stop_ids) if seq.params.min_tokens else []  # the worker needs them for masking only
        logprobs = -1 if params.logprobs is None else params.logprobs
        top_k = max(params.top_k, 0)
        batch.inits.append(
            (seq.seed, slot, params.temperature, params.top_p, top_k, logprobs, seq.min_len, len(stop_ids), 0)
        )
        batch.stop_ids += stop_ids
        batch.add_blocks(slot, 0, seq.block_table)
        self.slots.is_entered[slot] = True

    def _acquire_slot(self, seq: Sequence, num_computed: int) -> None:
        self.slots.acquire(seq, num_computed)
        self.slots.writable_len[seq.slot] = len(seq.block_table) * self.blocks.block_size

    def _start_decoding(self, seq: Sequence) -> None:
        seq.status = SequenceStatus.RUNNING
        insort(self.decoding, seq, key=lambda s: s.seq_id)
        self._decode_slots = None

    def _slots_of_decoding(self) -> np.ndarray:
        if self._decode_slots is None:
            self._decode_slots = np.array([seq.slot for seq in self.decoding], np.int32)
            self._needs_feedback = any(seq.needs_feedback for seq in self.decoding)
        return self._decode_slots

    def _has_room(self, num_new: int, found: list[int]) -> bool:
        """Whether blocks can be had and every running sequence could still take one more."""
        return self.blocks.can_allocate(num_new + len(self.decoding), found)

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
        slots, tokens = step.sampled_slots, result.token_ids
        if len(result.logprob_rows):
            self._append_logprobs(slots, result)
        wanted = self.slots.is_active[slots]
        if not wanted.all():
            slots, tokens = slots[wanted], tokens[wanted]
        num_tokens = self.slots.append(slots, tokens, now_s)
        outcome = self._outcome_of(slots, tokens, num_tokens, now_s)
        if step.chunks:
            self._advance(outcome, step.chunks)
        self._release_parked()
        return outcome

    def _outcome_of(self, slots: np.ndarray, tokens: np.ndarray, num_tokens: np.ndarray, now_s: float) -> StepOutcome:
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
            if seq.is_watched:  # its own list is always up to date
                seq.token_ids.append(token)
                seq.token_times_s.append(now_s)
                t.is_awaited[slot] = False
                outcome.watched.append(seq)
            else:
                t.sync(seq)
            if token in seq.stop_ids:
                seq.stop_reason = token if token in seq.params.stop_token_ids else None
                outcome.finished.append((seq, SequenceStatus.FINISHED_STOPPED))
            elif is_at_end:
                outcome.finished.append((seq, SequenceStatus.FINISHED_LENGTH))
        return outcome

    def _advance(self, outcome: StepOutcome, chunks: list[_Chunk]) -> None:
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
        for slot, row_ids, row_values in zip(slots[result.logprob_rows].tolist(), ids, values, strict=True):
            seq = self.slots.seqs[slot]
            if seq is not None and seq.logprobs is not None:
                seq.logprobs.append({i: value for i, value in zip(row_ids, row_values, strict=True) if i >= 0})

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
        num_slots = self.slots.num_free + len(holders) + len(self._parked)
        assert num_slots == len(self.slots.seqs), f"{len(self.slots.seqs) - num_slots} slots lost"
        left = [seq.num_tokens - int(self.slots.num_computed[seq.slot]) for seq in self.prefilling]
        num_waiting = sum(seq.num_tokens for seq in self.waiting) + sum(left)
        num_waiting += sum(step.num_prompt_tokens for step in self.in_flight)
        assert self.num_waiting_tokens == num_waiting, f"{self.num_waiting_tokens} tokens wait, not {num_waiting}"

"""The scheduler of one worker: which tokens it computes in its next step.

There is no prefill phase and no decode phase: in each step the computed tokens of a sequence catch up with its tokens,
one token or many. `schedule` builds the next step, `complete` takes a step's result; up to `steps_in_flight` steps may
be out at once, so a sequence's next token is computed before the parent knows the last one.

Parent process, one thread, numpy and plain Python. Knows one worker, and nothing of other workers, of time, or of
text: the engine moves sequences in and out. Which sequences wait or run is in queues.py, which slots and blocks they
hold in residency.py, the rows of those that decode in decodes.py, and what results mean in results.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from nanopd.config import EngineConfig, ModelConfig
from nanopd.core.decodes import Decodes
from nanopd.core.queues import Load, Queues
from nanopd.core.residency import Residency
from nanopd.core.results import Results, StepOutcome
from nanopd.core.sequence import Sequence, SequenceStatus
from nanopd.core.step_builder import NO_INTS, BatchBuilder, Chunk, StepInFlight
from nanopd.messages import Role, RowFlag, SlotExtras, StepBatch, StepResult


@dataclass(frozen=True, slots=True)
class Scheduled:
    """What one call of `schedule` did."""

    batch: StepBatch | None  # None: there is nothing to compute now
    extras: list[SlotExtras]  # to be sent ahead of the step
    admitted: list[Sequence]  # their prefill starts with this step
    preempted: list[Sequence]  # to be queued again, here or elsewhere


class Scheduler:
    """Continuous batching with chunked prefill on one worker."""

    def __init__(
        self,
        worker: int,
        role: Role,
        config: EngineConfig,
        num_blocks: int,
        num_host_blocks: int,
        model: ModelConfig,
        generation: int = 0,
    ) -> None:
        """`generation` of the worker process, which rises when it is replaced."""
        self.worker, self.role, self.generation = worker, role, generation
        self.is_dead = False
        self.max_num_batched_tokens = config.max_num_batched_tokens  # the chunk budget; see `limit_chunks`
        self.residency = Residency(config, num_blocks, num_host_blocks, config.max_len_of(model))
        self.in_flight = self.residency.in_flight
        self._decodes = Decodes(config, self.residency)
        self.queues = Queues(self.residency, self._decodes, config.max_num_seqs)
        self.num_preemptions = 0
        self._results = Results(self.residency, self._decodes, model.vocab_size, model.eos_token_ids)
        self._preempted: list[Sequence] = []  # since the last `schedule`
        self._swap_pays: Callable[[int], bool] = lambda num_tokens: True

    # -------------------------------------------------------------------------------------------------- settings

    def set_role(self, role: Role) -> None:
        self.role = role

    def limit_chunks(self, max_num_batched_tokens: int) -> None:
        """Compute at most so many tokens in a step from now on."""
        self.max_num_batched_tokens = max_num_batched_tokens

    def swap_where(self, pays: Callable[[int], bool]) -> None:
        """Swap a preempted sequence out where `pays`, given its computed tokens, says so; else recompute it."""
        self._swap_pays = pays

    def succeed(self, old: Scheduler) -> None:
        """Go on in place of the scheduler of the worker's dead process, with its budget and counts."""
        self.num_preemptions, self.max_num_batched_tokens = old.num_preemptions, old.max_num_batched_tokens

    def die(self) -> list[Sequence]:
        """The worker is dead. Returns the sequences that a step in flight computes something of."""
        self.is_dead = True
        slots = np.unique(np.concatenate([NO_INTS, *(step.row_slots for step in self.in_flight)]))
        return [seq for slot in slots.tolist() if (seq := self.residency.slots.seqs[slot]) is not None]

    # -------------------------------------------------------------------------------------------------- sequences

    @property
    def load(self) -> int:
        """See `Queues.load`."""
        return self.queues.load

    def snapshot(self) -> Load:
        """What there is to do, and room for more."""
        return self.queues.snapshot()

    def num_cached(self, seq: Sequence) -> int:
        """Tokens of a sequence that is not here whose blocks the cache has now."""
        return self.queues.num_cached(seq)

    def can_hold(self, num_tokens: int) -> bool:
        """Whether the pool is large enough for a sequence of so many tokens, if it had it for itself."""
        return self.residency.blocks.blocks_for(num_tokens) <= self.residency.blocks.num_usable

    def add(self, seq: Sequence) -> None:
        """Queue a sequence whose tokens are all to be computed, in order of rank."""
        self.queues.add(seq)

    def remove(self, seq: Sequence) -> None:
        """Forget a sequence in whatever state it is; its blocks are free once no step in flight names them."""
        self.queues.remove(seq)

    # ---------------------------------------------------------------------------------------------- schedule

    def schedule(self) -> Scheduled:
        """Build the next step."""
        batch: BatchBuilder | None = None
        if not (self.in_flight and self.in_flight[-1].drafts):  # else drafts would run in every other step only
            batch = self._build_step()
            # Blocks of sequences preempted just now; if others share them all, one more has to be preempted.
            while batch is None and not self.in_flight and (self.residency.num_parked_blocks or self._preempt_idle()):
                self.residency.release_parked()
                batch = self._build_step()
            self.queues.forget_turned_away()
        preempted, self._preempted = self._preempted, []
        if batch is None:
            return Scheduled(None, [], [], preempted)
        step = batch.build()
        parts = batch.sampled_slots(), batch.chunks, batch.num_prompt_tokens, batch.drafts
        self.in_flight.append(StepInFlight(step.step_id, step.row_slots, *parts))
        return Scheduled(step, batch.extras, batch.admitted, preempted)

    def _build_step(self) -> BatchBuilder | None:
        if not (self._decodes or self.queues.prefilling or self.queues.waiting):
            return None
        batch = BatchBuilder(self.residency.begin_step(), self.max_num_batched_tokens)
        if self._decodes:
            self._decodes.schedule(batch, lambda slot: self._find_block(batch, slot))
        for seq in self.queues.prefilling[:]:
            if not batch.budget:
                break
            self._add_chunk(batch, seq)
        self._admit_waiting(batch)
        if not batch.rows and not len(batch.decodes[0]):
            for seq in self._preempted:  # nothing is sent that would save their blocks
                self.residency.forget_swapped(seq)
            return None
        return batch

    def _admit_waiting(self, batch: BatchBuilder) -> None:
        """Start waiting sequences, in order of rank, while there is budget, a place and blocks."""
        while batch.budget and (started := self.queues.start()) is not None:
            seq, copies = started
            batch.add_copies(*copies)
            batch.admitted.append(seq)
            self._add_chunk(batch, seq)

    def _add_chunk(self, batch: BatchBuilder, seq: Sequence) -> None:
        t, slot = self.residency.slots, seq.slot
        assert slot is not None and seq.route is not None
        is_leaving = seq.route.decode_worker != self.worker
        if not t.is_entered[slot]:
            batch.enter(seq, slot)
            t.is_entered[slot] = True
        start = int(t.num_computed[slot])
        end = min(start + batch.budget, seq.num_tokens)
        is_last = end == seq.num_tokens
        batch.add_chunk(slot, start, seq.token_ids[start:end], RowFlag.SAMPLE if is_last else 0)
        t.num_computed[slot] = end
        batch.chunks.append(Chunk(seq, slot, end, is_last, is_leaving))
        if is_last:
            t.has_last_token[slot] = True
            t.is_awaited[slot] = t.needs_feedback[slot]
            self.queues.prefilled(seq, is_leaving)

    # ---------------------------------------------------------------------------------------------- preemption

    def _find_block(self, batch: BatchBuilder, slot: int) -> bool:
        """Whether there is a block for `slot` now; preempts who comes last, perhaps this one, until there will be."""
        t, blocks = self.residency.slots, self.residency.blocks
        while t.is_active[slot] and not blocks.num_free + self.residency.num_parked_blocks:
            seq = max(self._decodes.seqs + self.queues.prefilling, key=lambda s: s.rank)
            self._swap_out(batch, seq)
            self._preempt(seq)
        return bool(t.is_active[slot] and blocks.num_free)

    def _preempt_idle(self) -> bool:
        """Nothing can run: preempt one that awaits a choice, if others lack the room that it has."""
        idle = [seq for seq in self._decodes.seqs if seq.awaits_choice]
        if not (idle and (self.queues.waiting or self.queues.has_turned_away)):
            return False
        self.queues.forget_turned_away()
        self._preempt(idle[-1])
        return True

    def _preempt(self, seq: Sequence) -> None:
        """Take a sequence's blocks; unless they have been swapped out, all its tokens will be computed again."""
        self.num_preemptions += 1
        self.queues.evict(seq)
        seq.status = SequenceStatus.PREEMPTED
        self._preempted.append(seq)

    def _swap_out(self, batch: BatchBuilder, seq: Sequence) -> None:
        """Keep in host memory what has been computed of a sequence that will be preempted, if that is of use."""
        t, residency = self.residency.slots, self.residency
        num_computed = min(int(t.num_computed[seq.slot]), int(t.num_tokens[seq.slot]) - 1)
        may_return = self.role.may_decode and not (seq.awaits_choice or seq.awaits_prompt_logprobs)
        num_blocks = residency.blocks.blocks_for(num_computed)
        if may_return and residency.host_blocks.can_allocate(num_blocks) and self._swap_pays(num_computed):
            batch.add_copies(*residency.swap_out(seq, num_computed))

    # ---------------------------------------------------------------------------------------------- complete

    def complete(self, result: StepResult, now_s: float) -> Iterator[StepOutcome]:
        """Take the result of the oldest step in flight: append the tokens, find out who has come to an end.

        One outcome, and further ones where drafts were right; see `Results.take` for what to do in between.
        """
        step = self.in_flight.popleft()
        self.queues.computed(step.num_prompt_tokens)
        assert step.step_id == result.step_id, (step.step_id, result.step_id)
        for outcome in self._results.take(step, result, now_s):
            self.residency.release_parked()
            yield outcome

    def num_repeats(self) -> int:
        """How many more steps like those in flight would follow if nothing came in between: for simulation."""
        if self.queues.waiting or self.queues.prefilling or self.queues.num_expected:
            return 0
        return self._decodes.num_repeats(self.in_flight)

    def repeat(self, times_s: np.ndarray) -> None:
        """Take the results of the next steps of a row that `num_repeats` foretold, and schedule as many more like them.

        Args:
            times_s: [num_steps] float64, when each result has come; all tokens are 0.
        """
        self._decodes.repeat(times_s)
        self.residency.skip_steps(len(times_s))

    def check_integrity(self, held: Iterable[Iterable[int]] = ()) -> None:
        """See `Queues.check_integrity`."""
        self.queues.check_integrity(sum(step.num_prompt_tokens for step in self.in_flight), held)

"""From a worker's results to tokens of its sequences: which are wanted, which drafts were right, what has ended.

Parent process, one thread. Knows slots and sequences; queues are the scheduler's, and what an end or a token means to
callers is the engine's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from nanopd.core.decodes import Decodes
from nanopd.core.residency import Residency
from nanopd.core.sequence import Sequence, SequenceStatus
from nanopd.core.speculation import rounds_of
from nanopd.core.step_builder import Chunk, StepInFlight
from nanopd.messages import MAX_LOGPROBS, StepResult


@dataclass(slots=True)
class StepOutcome:
    """What a finished step means for the sequences that it was about."""

    advanced: list[tuple[Sequence, int]] = field(default_factory=list)  # prefilling ones, tokens computed so far
    prefilled: list[Sequence] = field(default_factory=list)  # have their first token and leave for their decode worker
    watched: list[Sequence] = field(default_factory=list)  # got a token that the engine wants to look at
    proposed: list[Sequence] = field(default_factory=list)  # got a token that their chooser wants to look at
    finished: list[tuple[Sequence, SequenceStatus]] = field(default_factory=list)  # to be ended by the engine


class Results:
    """Appends tokens to the sequences of one worker."""

    def __init__(self, residency: Residency, decodes: Decodes, vocab_size: int, eos_token_ids: tuple[int, ...]) -> None:
        self._residency, self._slots, self._decodes = residency, residency.slots, decodes
        self._is_eos = np.zeros(vocab_size, np.bool_)
        self._is_eos[list(eos_token_ids)] = True

    def take(self, step: StepInFlight, result: StepResult, now_s: float) -> Iterator[StepOutcome]:
        """The outcome of a step, then one for each further token of sequences whose drafts were right.

        The consequences of an outcome (ends, above all) have to be drawn before the next one is asked for: a token that
        came out of a draft is like one that came out of a step of its own.
        """
        slots, accepted = step.sampled_slots, []
        if step.drafts:
            self._slots.num_drafts[list(step.drafts)] = 0
            for slot, drafts in step.drafts.items():
                if (seq := self._slots.seqs[slot]) is not None and seq.drafter is not None:
                    seq.drafter.count_verified(len(drafts))
            first, *others = rounds_of(slots, step.drafts, result.token_ids)
            accepted = [(slots[rows], result.part(rows)) for rows in others]
            slots, result = slots[first], result.part(first)
        outcome = self._append(slots, result, now_s)
        if step.chunks:
            self._advance(outcome, step.chunks)
        yield outcome
        for more_slots, more in accepted:
            for slot in more_slots[self._slots.is_active[more_slots]].tolist():
                self._decodes.accept_draft(slot)
            yield self._append(more_slots, more, now_s)

    def _append(self, slots: np.ndarray, result: StepResult, now_s: float) -> StepOutcome:
        """A token for each of `slots`; those of sequences that have left since the step was built are dropped."""
        t, tokens = self._slots, result.token_ids
        if len(result.logprob_rows):
            self._append_logprobs(slots, result)
        wanted = t.is_active[slots]
        if not wanted.all():
            slots, tokens = slots[wanted], tokens[wanted]
        num_tokens = t.append(slots, tokens, now_s)
        is_full = num_tokens >= t.end_len[slots]
        is_noted = is_full | t.is_watched[slots] | (self._is_eos[tokens] & t.stops_at_eos[slots])
        if not is_noted.any():
            return StepOutcome()
        return self._outcome_of(slots[is_noted], tokens[is_noted], is_full[is_noted], now_s, result.errors)

    def _outcome_of(
        self, slots: np.ndarray, tokens: np.ndarray, is_full: np.ndarray, now_s: float, errors: np.ndarray
    ) -> StepOutcome:
        """What the new token of each slot means for its sequence."""
        t, outcome = self._slots, StepOutcome()
        for slot, token, is_at_end in zip(slots.tolist(), tokens.tolist(), is_full.tolist(), strict=True):
            seq = t.seqs[slot]
            assert seq is not None
            if token < 0:
                t.num_tokens[slot] -= 1
                seq.error = bytes(errors).decode()
                outcome.finished.append((seq, SequenceStatus.FINISHED_ERROR))
                continue
            if seq.is_watched:  # the sequence's own list is always up to date
                seq.token_ids.append(token)
                seq.token_times_s.append(now_s)
                if seq.chooser is not None:
                    t.is_awaited[slot] = seq.awaits_choice = True
                    outcome.proposed.append(seq)
                else:
                    t.is_awaited[slot] = False
                    outcome.watched.append(seq)
                if seq.drafter is not None:  # last, as it may have to wait for what is in flight
                    self._decodes.observe(seq, slot, token)
            else:
                t.sync(seq)
            if token in seq.stop_ids:
                seq.stop_reason = token if token in seq.params.stop_token_ids else None
                outcome.finished.append((seq, SequenceStatus.FINISHED_STOPPED))
            elif is_at_end:
                outcome.finished.append((seq, SequenceStatus.FINISHED_LENGTH))
        return outcome

    def _advance(self, outcome: StepOutcome, chunks: list[Chunk]) -> None:
        """What the step's chunks mean for others of the same prefix, and for sequences that leave."""
        finished = [seq for seq, _ in outcome.finished]
        for chunk in chunks:
            seq = chunk.seq
            if self._slots.seqs[chunk.slot] is not seq:
                continue
            self._residency.publish(seq, chunk.end)
            if chunk.is_leaving and seq not in finished:
                self._slots.sync(seq)
                outcome.advanced.append((seq, chunk.end))
                if chunk.is_last:
                    outcome.prefilled.append(seq)

    def _append_logprobs(self, slots: np.ndarray, result: StepResult) -> None:
        """Give each sequence that asked for them: token id -> log probability, the chosen token first."""
        ids = result.logprob_ids.reshape(-1, 1 + MAX_LOGPROBS).tolist()
        values = result.logprobs.reshape(-1, 1 + MAX_LOGPROBS).tolist()
        for row, row_ids, row_values in zip(result.logprob_rows.tolist(), ids, values, strict=True):
            seq = self._slots.seqs[slots[row] if row >= 0 else -1 - row]
            logprobs = None if seq is None else seq.logprobs if row >= 0 else seq.prompt_logprobs
            if logprobs is not None:
                logprobs.append({i: value for i, value in zip(row_ids, row_values, strict=True) if i >= 0})

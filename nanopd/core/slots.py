"""The sequences of one worker as numpy columns, so that a step over many of them is a few vector operations.

A slot is the index under which a worker and its scheduler speak of a sequence: the worker keeps block table, sampling
parameters and last token per slot, the scheduler keeps the columns below. A slot that a step in flight names must not
be given away; the scheduler sees to that.
"""

from __future__ import annotations

import numpy as np

from nanopd.core.sequence import Sequence


class SlotTable:
    """Columns of length `num_slots`.

    New tokens are written here for all slots at once; `sync` copies those of one slot to its sequence, whose own list
    is behind until then.
    """

    def __init__(self, num_slots: int, max_model_len: int) -> None:
        def column(dtype: type) -> np.ndarray:
            return np.zeros(num_slots, dtype)

        self.seqs: list[Sequence | None] = [None] * num_slots
        # Index slot * max_model_len + position; zeros that are never touched take no memory.
        self._max_model_len = np.int64(max_model_len)
        self._token_ids = np.zeros(num_slots * max_model_len, np.int32)
        self._times_s = np.zeros(num_slots * max_model_len, np.float64)
        self.num_tokens = column(np.int32)  # tokens known to the parent
        self.first_len = column(np.int32)  # with more tokens, all before the newest are sure to have been computed
        self.num_computed = column(np.int32)  # tokens computed once all steps in flight are done
        self.writable_len = column(np.int32)  # positions below may be written without asking the block manager
        self.end_len = column(np.int32)  # number of tokens at which the sequence ends for length
        self.last_start = column(np.int32)  # the last position to be computed is before this one
        self.is_active = column(np.bool_)  # results for the slot are wanted
        self.is_entered = column(np.bool_)  # the worker knows the slot's parameters and block table
        self.num_drafts = column(np.int32)  # in the step in flight, behind the sequence's newest token
        self.has_last_token = column(np.bool_)  # the worker has the newest token of the slot, or will have in order
        self.is_awaited = column(np.bool_)  # must not be scheduled before its result is back
        self.needs_feedback = column(np.bool_)  # the parent must see each token before the next one may be computed
        self.is_watched = column(np.bool_)  # the engine looks at each of its tokens
        self.stops_at_eos = column(np.bool_)
        self._free = list(reversed(range(num_slots)))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def acquire(self, seq: Sequence, num_computed: int) -> None:
        """Give `seq` a slot; the worker hears of it with the first row that names it."""
        slot = self._free.pop()  # the last one released: a worker keeps tables for as few slots as possible
        seq.slot = slot
        self.seqs[slot] = seq
        self.num_tokens[slot] = seq.num_tokens
        self.first_len[slot] = seq.num_tokens - (num_computed == seq.num_tokens - 1)
        self.num_computed[slot] = num_computed
        self.end_len[slot] = seq.end_len
        self.last_start[slot] = seq.end_len - 1  # the token at end_len - 1 is sampled, never computed
        self.is_active[slot] = True
        self.is_entered[slot] = self.has_last_token[slot] = False
        self.num_drafts[slot] = 0
        self.is_awaited[slot] = seq.awaits_choice
        self.needs_feedback[slot] = seq.needs_feedback
        self.is_watched[slot] = seq.is_watched
        self.stops_at_eos[slot] = not seq.params.ignore_eos

    def append(self, slots: np.ndarray, token_ids: np.ndarray, now_s: float) -> np.ndarray:
        """A new token for each of `slots` ([*] int32); returns how many tokens each has now."""
        positions = self.num_tokens[slots]
        cells = slots * self._max_model_len + positions
        self._token_ids[cells] = token_ids
        self._times_s[cells] = now_s
        positions += 1
        self.num_tokens[slots] = positions
        return positions

    def append_many(self, slots: np.ndarray, times_s: np.ndarray) -> None:
        """Take token 0 for each of `slots` ([num_slots] int32) at each of `times_s` ([num_steps]), as in simulation.

        The tokens count as computed too, as further steps take the place of those that brought them.
        """
        num_steps = len(times_s)
        # [num_steps, num_slots]; the tokens themselves are 0 already, as no other token is ever written in simulation
        cells = slots * self._max_model_len + self.num_tokens[slots] + np.arange(num_steps)[:, None]
        self._times_s[cells] = times_s[:, None]
        self.num_tokens[slots] += num_steps
        self.num_computed[slots] += num_steps

    def sync(self, seq: Sequence) -> None:
        """Bring the sequence's own list of tokens up to date."""
        assert seq.slot is not None
        row = seq.slot * self._max_model_len
        new = slice(row + len(seq.token_ids), row + int(self.num_tokens[seq.slot]))
        seq.token_ids += self._token_ids[new].tolist()
        seq.token_times_s += self._times_s[new].tolist()

    def deactivate(self, seq: Sequence) -> int:
        """Take `seq` out of its slot and return the slot, which still has to be released."""
        assert seq.slot is not None
        self.sync(seq)
        slot, seq.slot = seq.slot, None
        self.seqs[slot] = None
        self.is_active[slot] = False
        return slot

    def release(self, slot: int) -> None:
        self._free.append(slot)

"""The sequences of one worker, by what they do there, and the room that is left for others.

    waiting ─ start ─▶ prefilling ─ prefilled ─▶ decodes    (or migrating, if another worker decodes the sequence)
                                                 decodes ◀─▶ migrating ─▶ taken over by another worker

A sequence from elsewhere is *expected* as soon as its route leads here, and has a place and blocks once they are
*reserved*. Parent process, one thread. Knows no steps and no budgets.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from collections.abc import Iterable
from typing import NamedTuple

from nanopd.core.decodes import Decodes
from nanopd.core.residency import Residency
from nanopd.core.sequence import Sequence, SequenceStatus


class Load(NamedTuple):
    """What a worker has to do, at one moment."""

    num_decoding: int  # sequences that decode
    num_context_tokens: int  # tokens that these have in the cache
    num_waiting_tokens: int  # tokens of prompts that are to be computed there, steps in flight included
    num_seqs: int  # places taken: sequences of `num_bound` that have blocks there already
    max_num_seqs: int  # places
    num_bound: int  # sequences that it has to serve, with those that wait and those that are still bound for it
    num_free_tokens: int  # what the cache has room for now
    num_usable_tokens: int  # what the cache has room for at all


class Queues:
    """Who waits, prefills, decodes or migrates on one worker."""

    def __init__(self, residency: Residency, decodes: Decodes, max_num_seqs: int) -> None:
        self.waiting: deque[Sequence] = deque()
        self.prefilling: list[Sequence] = []  # in order of rank, as `waiting`
        self.decodes = decodes
        self.migrating: list[Sequence] = []  # computed here so far, their blocks on the way to another worker
        self.num_expected = 0  # sequences bound for this worker that another one has or will prefill
        self.num_waiting_tokens = 0  # to be computed of sequences that wait or prefill, those in flight included
        self.has_turned_away = False  # a sequence from elsewhere, for lack of room; see `forget_turned_away`
        self._residency, self._max_num_seqs = residency, max_num_seqs
        self._num_reserved = 0  # places promised to expected sequences

    @property
    def num_seqs(self) -> int:
        """Places taken, of `max_num_seqs`."""
        return len(self.prefilling) + len(self.decodes) + len(self.migrating) + self._num_reserved

    @property
    def load(self) -> int:
        """Sequences it has to serve, with those that wait and those that are still bound for it."""
        return len(self.waiting) + self.num_seqs - self._num_reserved + self.num_expected

    def snapshot(self) -> Load:
        blocks, num_seqs = self._residency.blocks, self.num_seqs
        num_free, num_usable = blocks.num_free * blocks.block_size, blocks.num_usable * blocks.block_size
        counts = len(self.decodes), self.decodes.num_context_tokens, self.num_waiting_tokens
        return Load(*counts, num_seqs, self._max_num_seqs, self.load, num_free, num_usable)

    def num_cached(self, seq: Sequence) -> int:
        """Tokens of a sequence that is not here whose blocks the cache has now."""
        return len(self._residency.find_prefix(seq)) * self._residency.blocks.block_size

    @property
    def num_spare_blocks(self) -> int:
        """Free blocks when every decoding sequence has taken one more."""
        return self._residency.blocks.num_free - len(self.decodes)

    def add(self, seq: Sequence) -> None:
        """Queue a sequence whose tokens are all to be computed, in order of rank."""
        insort(self.waiting, seq, key=lambda s: s.rank)
        seq.num_expected_cached = max(self.num_cached(seq), seq.num_swapped)
        self.num_waiting_tokens += seq.num_tokens - seq.num_expected_cached

    def expect(self, change: int) -> None:
        """So many more sequences (or, negative, fewer) are bound for this worker."""
        self.num_expected += change

    @property
    def keeps_room(self) -> bool:
        """Whether all room is kept for the first waiting sequence, as it was preempted here and swapped out."""
        return bool(self.waiting and self.waiting[0].host_table)

    def reserve(self, num_tokens: int, block_keys: list[bytes]) -> tuple[list[int], int] | None:
        """Blocks and a place for a sequence of `num_tokens` tokens that another worker prefills; None: no room now.

        Returns:
            The table, and how many blocks at its beginning are there already and must not be written. There is always
            at least one behind them to be moved, whether the newest token has been computed or not.
        """
        blocks = self._residency.blocks
        found = self._residency.find(block_keys, num_tokens - 1)
        num_new = blocks.blocks_for(num_tokens + 1) - len(found)
        if self.keeps_room or not self._can_take(num_new, found):
            return None
        self._num_reserved += 1
        return blocks.allocate(num_new, found), len(found)

    def cancel_reservation(self, table: list[int]) -> None:
        self._num_reserved -= 1
        self._residency.blocks.free(table)

    def turn_away(self) -> None:
        """A sequence from elsewhere would not find room; see `reserve`, which need not be asked again."""
        self.has_turned_away = True

    def take_over(self, seq: Sequence, table: list[int]) -> None:
        """Go on with a sequence whose KV entries have arrived in the reserved `table`."""
        self._num_reserved -= 1
        self._residency.receive(seq, table)
        self.decodes.add(seq)

    def migrate(self, seq: Sequence) -> None:
        """Decode a sequence no further, as it goes on elsewhere; steps in flight still bring it tokens."""
        self.decodes.remove(seq)
        self.migrating.append(seq)
        seq.status = SequenceStatus.MOVING

    def keep(self, seq: Sequence) -> None:
        """Decode a migrating sequence here after all."""
        self.migrating.remove(seq)
        self.decodes.add(seq)

    def fork(self, parent: Sequence, child: Sequence) -> bool:
        """Let `child` decode from its last token on; False: not computed so far, or no room now.

        The tokens before are those of `parent`, which decodes here, and so are the blocks (copy-on-write).
        """
        if not (self._residency.can_fork(parent, child) and self._can_take(1, [])):
            return False
        self._residency.fork(parent, child)
        self.decodes.add(child)
        return True

    def remove(self, seq: Sequence) -> None:
        """Forget a sequence in whatever state it is; its blocks are free once no step in flight names them."""
        if seq.slot is None:
            self.waiting.remove(seq)
            self.num_waiting_tokens -= seq.num_tokens - seq.num_expected_cached
            self._residency.forget_swapped(seq)
        else:
            self.evict(seq)
            self._residency.release_parked()

    def evict(self, seq: Sequence) -> None:
        """Take a started sequence's slot and blocks, which stay parked while steps in flight may name them."""
        if seq.status is SequenceStatus.RUNNING:
            self.decodes.remove(seq)
        elif seq in self.prefilling:  # the chunks in flight are still computed
            self.num_waiting_tokens -= seq.num_tokens - int(self._residency.slots.num_computed[seq.slot])
            self.prefilling.remove(seq)
        else:
            self.migrating.remove(seq)
        self._residency.park(seq)

    def _can_take(self, num_new: int, found: list[int]) -> bool:
        """Whether there is a place, and room, for a sequence that does not come from the queue."""
        if self.num_seqs < self._max_num_seqs and self.has_room(num_new, found):
            return True
        self.has_turned_away = True
        return False

    def has_room(self, num_new: int, found: list[int]) -> bool:
        """Whether blocks can be had and every decoding sequence could still take one more."""
        return self._residency.blocks.can_allocate(num_new + len(self.decodes), found)

    # ------------------------------------------------------------------------------------- as steps are scheduled

    def start(self) -> tuple[Sequence, tuple[list[int], list[int]]] | None:
        """Give the first waiting sequence blocks and a slot and begin its prefill; None: none waits, or has no room.

        Returns:
            The sequence, and copies from host memory that bring back what was swapped out; see `Residency.swap_in`.
        """
        if not self.waiting or self.num_seqs >= self._max_num_seqs:
            return None
        seq, residency = self.waiting[0], self._residency
        found = residency.find_prefix(seq)
        num_new = residency.blocks.blocks_for(seq.num_tokens + 1) - len(found)
        if not self.has_room(num_new, found):
            return None
        self.waiting.popleft()
        num_cached = residency.admit(seq, num_new, found)
        copies = residency.swap_in(seq, len(found))
        self.num_waiting_tokens += seq.num_expected_cached - num_cached
        if seq.num_cached_tokens is None:
            seq.num_cached_tokens = num_cached
        seq.status = SequenceStatus.PREFILL
        residency.acquire_slot(seq, num_cached)
        insort(self.prefilling, seq, key=lambda s: s.rank)
        return seq, copies

    def prefilled(self, seq: Sequence, is_leaving: bool) -> None:
        """The last chunk of a sequence's prompt is scheduled; it decodes here, or leaves for another worker."""
        self.prefilling.remove(seq)
        if is_leaving:
            self.migrating.append(seq)
        else:
            self.decodes.add(seq)

    def computed(self, num_prompt_tokens: int) -> None:
        """A step with so many tokens of prompts is done."""
        self.num_waiting_tokens -= num_prompt_tokens

    def forget_turned_away(self) -> None:
        """A step was scheduled: whoever lacks room has to ask again."""
        self.has_turned_away = False

    def check_integrity(self, num_in_flight: int, held: Iterable[Iterable[int]]) -> None:
        """Raise AssertionError when blocks, slots or tokens were lost.

        Args:
            num_in_flight: tokens of prompts in steps in flight
            held: block tables and pinned blocks of this worker that hand-overs hold
        """
        t, residents = self._residency.slots, self.prefilling + self.decodes.seqs + self.migrating
        self._residency.check_integrity(residents, self.waiting, held)
        self.decodes.check_integrity()
        num_waiting = num_in_flight + sum(seq.num_tokens - seq.num_expected_cached for seq in self.waiting)
        num_waiting += sum(seq.num_tokens - int(t.num_computed[seq.slot]) for seq in self.prefilling)
        assert self.num_waiting_tokens == num_waiting, f"{self.num_waiting_tokens} tokens wait, not {num_waiting}"

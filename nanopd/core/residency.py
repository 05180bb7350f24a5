"""What one worker holds: which sequences have a slot there, in which blocks, and what its prefix cache knows.

A sequence that leaves may still be named by steps in flight: its slot and blocks are *parked* until the last of these
is done. A preempted sequence may be *swapped*: its blocks are copied to host memory and back. A full block whose tokens
have been computed is *published*: sequences with the same beginning share it.
Parent process, one thread. Knows no queues and no budgets; who comes and goes is the scheduler's to decide.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from nanopd.config import EngineConfig
from nanopd.core.block_manager import BlockManager, extend_keys
from nanopd.core.sequence import Sequence
from nanopd.core.slots import SlotTable
from nanopd.core.step_builder import StepInFlight


@dataclass(slots=True)
class _Parked:
    """A slot and blocks that a step in flight may still name."""

    last_step_id: int
    slot: int
    table: list[int]


class Residency:
    """Slots, blocks on the device and blocks in host memory of one worker."""

    def __init__(self, config: EngineConfig, num_blocks: int, num_host_blocks: int, max_model_len: int) -> None:
        """The null block of each pool counts among its blocks."""
        self.blocks = BlockManager(num_blocks, config.block_size)
        self.host_blocks = BlockManager(num_host_blocks, config.block_size)
        self.slots = SlotTable(config.num_slots, max_model_len)
        self.in_flight: deque[StepInFlight] = deque()  # oldest first
        self.num_parked_blocks = 0
        self._step_id = 0  # of the newest step
        self._parked: deque[_Parked] = deque()
        self._caches_prefixes = config.enable_prefix_caching

    def seq(self, slot: int) -> Sequence:
        """The sequence that holds `slot`."""
        seq = self.slots.seqs[slot]
        assert seq is not None
        return seq

    # --------------------------------------------------------------------------------------------- steps' numbers

    def begin_step(self) -> int:
        """The number of a new step: whoever leaves from now on may be named by it. It may turn out to be empty."""
        self._step_id += 1
        return self._step_id

    def skip_steps(self, count: int) -> None:
        """Number the steps in flight as if so many had been done before them."""
        self._step_id += count
        for step in self.in_flight:
            step.step_id += count

    # ------------------------------------------------------------------------------------- entering and leaving

    def admit(self, seq: Sequence, num_new: int, found: list[int]) -> int:
        """Give a waiting sequence a table: the blocks `found` for it, and `num_new` blocks behind them.

        Returns:
            How many of its tokens need not be computed, those that `swap_in` brings back included.
        """
        seq.block_table, seq.num_published_blocks = self.blocks.allocate(num_new, found), len(found)
        return max(len(found) * self.blocks.block_size, seq.num_swapped)

    def receive(self, seq: Sequence, table: list[int]) -> None:
        """Take over a sequence whose KV entries have arrived in `table`; its newest token has not been computed."""
        seq.block_table, seq.num_published_blocks = table, 0
        self.publish(seq, seq.num_tokens - 1)
        self.acquire_slot(seq, seq.num_tokens - 1)

    def can_fork(self, parent: Sequence, child: Sequence) -> bool:
        """Whether all tokens of `child` but the last, which are `parent`'s, are sure to have been computed."""
        t = self.slots
        assert child.num_tokens <= t.num_tokens[parent.slot]
        return bool(t.num_tokens[parent.slot] > t.first_len[parent.slot])

    def fork(self, parent: Sequence, child: Sequence) -> None:
        """Let `child`, whose tokens but the last are `parent`'s, share the parent's blocks (copy-on-write)."""
        t, num_computed = self.slots, child.num_tokens - 1
        num_full = num_computed // self.blocks.block_size
        child.block_table = self.blocks.fork(parent.block_table[: self.blocks.blocks_for(num_computed)])
        child.block_keys = parent.block_keys[:num_full]
        child.num_published_blocks = min(parent.num_published_blocks, num_full)
        child.num_cached_tokens = child.num_prompt_tokens - 1
        self.acquire_slot(child, num_computed)
        for seq in (parent, child):  # the one that writes first gets a copy of the last block
            t.writable_len[seq.slot] = 0

    def acquire_slot(self, seq: Sequence, num_computed: int) -> None:
        """Give a sequence with a block table a slot; its first `num_computed` tokens are in the cache."""
        self.slots.acquire(seq, num_computed)
        self.slots.writable_len[seq.slot] = len(seq.block_table) * self.blocks.block_size

    def park(self, seq: Sequence) -> None:
        """Take a sequence's slot and blocks; they are free once no step up to the newest one is in flight."""
        slot = self.slots.deactivate(seq)
        if seq.num_tokens > self.slots.first_len[slot]:
            self.publish(seq, seq.num_tokens - 1)
        self._parked.append(_Parked(self._step_id, slot, seq.block_table))
        self.num_parked_blocks += len(seq.block_table)
        seq.block_table = []

    def release_parked(self) -> None:
        """Free what no step in flight can name."""
        while self._parked and not (self.in_flight and self.in_flight[0].step_id <= self._parked[0].last_step_id):
            parked = self._parked.popleft()
            self.num_parked_blocks -= len(parked.table)
            self.slots.release(parked.slot)
            self.blocks.free(parked.table)

    def is_drained(self, seq: Sequence) -> bool:
        """Whether no step in flight computes anything of a sequence that decodes or migrates."""
        return bool(self.slots.num_computed[seq.slot] == self.slots.num_tokens[seq.slot] - 1)

    def drained_len(self, seq: Sequence) -> int:
        """The most tokens of such a sequence once all steps in flight are done."""
        return int(self.slots.num_computed[seq.slot] + self.slots.num_drafts[seq.slot]) + 1

    def resume(self, seq: Sequence) -> None:
        """A sequence's last token has been chosen; the worker's slot may hold another one."""
        self.slots.is_awaited[seq.slot] = self.slots.has_last_token[seq.slot] = False

    def abandon(self, seq: Sequence) -> None:
        """The worker is dead: the sequence has neither slot nor blocks there any more."""
        if seq.slot is not None:
            self.slots.deactivate(seq)
        seq.block_table, seq.host_table, seq.num_swapped = [], [], 0

    # --------------------------------------------------------------------------------------------- prefix cache

    def find_prefix(self, seq: Sequence) -> list[int]:
        """Published blocks of the sequence's beginning, as far as its tokens need not be computed."""
        self._extend_keys(seq)
        return [] if seq.awaits_prompt_logprobs else self.find(seq.block_keys, seq.num_tokens)

    def find(self, block_keys: list[bytes], num_tokens: int) -> list[int]:
        """Published blocks of the beginning of `num_tokens` tokens, without the last token: it must be computed."""
        return self.blocks.find(block_keys[: (num_tokens - 1) // self.blocks.block_size])

    def publish(self, seq: Sequence, num_computed: int) -> None:
        """The first `num_computed` tokens have their KV entries: others may share the full blocks of them."""
        start, end = seq.num_published_blocks, num_computed // self.blocks.block_size
        if self._caches_prefixes and start < end:
            self._extend_keys(seq)
            self.blocks.publish(seq.block_table[start:end], seq.block_keys[start:end])
            seq.num_published_blocks = end

    def _extend_keys(self, seq: Sequence) -> None:
        if self._caches_prefixes:
            extend_keys(seq.block_keys, seq.token_ids, self.blocks.block_size, seq.root_key)

    # ------------------------------------------------------------------------------------------------- swapping

    def swap_out(self, seq: Sequence, num_computed: int) -> tuple[list[int], list[int]]:
        """Keep the first `num_computed` tokens of a sequence in host memory, which has room for them.

        Returns:
            The blocks to copy: sources on the device and, as negative numbers, destinations in host memory.
        """
        num_blocks = self.blocks.blocks_for(num_computed)
        seq.host_table, seq.num_swapped = self.host_blocks.allocate(num_blocks), num_computed
        return seq.block_table[:num_blocks], [-block for block in seq.host_table]

    def swap_in(self, seq: Sequence, num_found: int) -> tuple[list[int], list[int]]:
        """The copies (see `swap_out`, the other way) of all that a swapped sequence has not found in the cache.

        The blocks in host memory may be used for what a later step copies out.
        """
        missing = slice(num_found, len(seq.host_table))
        copies = [-block for block in seq.host_table[missing]], seq.block_table[missing]
        self.forget_swapped(seq)
        return copies

    def forget_swapped(self, seq: Sequence) -> None:
        self.host_blocks.free(seq.host_table)
        seq.num_swapped = 0

    # --------------------------------------------------------------------------------------------------- checks

    def check_integrity(
        self, residents: list[Sequence], swapped: Iterable[Sequence], held: Iterable[Iterable[int]]
    ) -> None:
        """Raise AssertionError when a block or a slot was lost."""
        tables = [*(seq.block_table for seq in residents), *(p.table for p in self._parked)]
        self.blocks.check_integrity(tables, held)
        self.host_blocks.check_integrity(seq.host_table for seq in swapped)
        num_slots = self.slots.num_free + len(residents) + len(self._parked)
        assert num_slots == len(self.slots.seqs), f"{len(self.slots.seqs) - num_slots} slots lost"

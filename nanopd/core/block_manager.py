"""The block pool of one worker: which KV blocks are in use, and how often.

Lives in the parent and is driven by one thread. Knows blocks and block tables, not requests: a block table is a plain
`list[int]` that belongs to the caller, position `i` of a sequence lies in block `table[i // block_size]`.
Contents stay with the worker; where a shared block is about to be written, the manager says which block to copy.
Every operation is all-or-nothing: it does its work, or raises `OutOfBlocks` and has changed nothing.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable

from nanopd.errors import NanopdError

NULL_BLOCK = 0  # what padding rows point at; never allocated


class OutOfBlocks(NanopdError):
    """The pool cannot give as many blocks as were asked for; nothing was changed."""

    def __init__(self, num_needed: int, num_free: int) -> None:
        self.num_needed = num_needed
        self.num_free = num_free
        super().__init__(f"{num_needed} blocks needed, {num_free} free")


class BlockManager:
    """Allocation, sharing and copy-on-write of `num_blocks` blocks of `block_size` tokens each."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        assert num_blocks > 1 and block_size > 0, (num_blocks, block_size)
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._ref_counts = [0] * num_blocks  # tables that hold the block, and pins
        # A queue: the block that has been free for longest is handed out first.
        self._free = deque(range(NULL_BLOCK + 1, num_blocks))

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_usable(self) -> int:
        """Blocks that can be allocated at all: all but the null block."""
        return self.num_blocks - 1

    def blocks_for(self, num_tokens: int) -> int:
        """Length of the table of a sequence of `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    def can_allocate(self, num_blocks: int) -> bool:
        return num_blocks <= len(self._free)

    def allocate(self, num_blocks: int) -> list[int]:
        """A new table of blocks that nobody else holds.

        Raises:
            OutOfBlocks: fewer than `num_blocks` are free.
        """
        if num_blocks > len(self._free):
            raise OutOfBlocks(num_blocks, len(self._free))
        return [self._take() for _ in range(num_blocks)]

    def can_append(self, table: list[int], first_new_token: int, num_tokens: int) -> bool:
        num_new = max(0, self.blocks_for(num_tokens) - len(table))
        return num_new + len(self._shared(table, first_new_token, num_tokens)) <= len(self._free)

    def append(self, table: list[int], first_new_token: int, num_tokens: int) -> list[tuple[int, int]]:
        """Make `table` ready for writing the positions `first_new_token .. num_tokens - 1`.

        The table grows to `num_tokens` tokens (it never shrinks), and blocks in that range that others hold too are
        replaced by blocks of its own (copy-on-write).

        Returns:
            The copies (src, dst) to perform, in this order, before the positions are written. At most one: only the
            block of `first_new_token` can hold earlier tokens. The other owners of `src` may free it at once, so
            what could overwrite it before the copy is done (another stream, another process) has to wait.

        Raises:
            OutOfBlocks: the pool cannot give the blocks; table and pool are as before.
        """
        num_new = -(-num_tokens // self.block_size) - len(table)
        shared = self._shared(table, first_new_token, num_tokens)
        num_needed = len(shared) + (num_new if num_new > 0 else 0)
        if num_needed > len(self._free):
            raise OutOfBlocks(num_needed, len(self._free))
        copies = []
        for i in shared:
            src, table[i] = table[i], self._take()
            self._ref_counts[src] -= 1
            if i * self.block_size < first_new_token:  # else all of it is written before it is read
                copies.append((src, table[i]))
        for _ in range(num_new):
            table.append(self._take())
        return copies

    def fork(self, table: list[int]) -> list[int]:
        """A second table that shares all blocks of `table`."""
        self.pin(table)
        return list(table)

    def free(self, table: list[int]) -> None:
        """Give the table's references back and empty it."""
        self._release(table)
        table.clear()

    def pin(self, blocks: Iterable[int]) -> None:
        """Hold blocks that are in use (those of a transfer plan), so that they outlive their tables until `unpin`."""
        for block in blocks:
            assert self._ref_counts[block] > 0, f"block {block} is free"
            self._ref_counts[block] += 1

    def unpin(self, blocks: Iterable[int]) -> None:
        self._release(map(int, blocks))  # a plan's blocks are numpy integers, which must not get into tables

    def check_integrity(self, tables: Iterable[list[int]], pinned: Iterable[Iterable[int]] = ()) -> None:
        """Compare the pool with all `tables` and all `pinned` blocks there are.

        Raises:
            AssertionError: names a block that is lost, held by nobody or too often, or free and in use at once.
        """
        held = Counter(int(block) for blocks in (*tables, *pinned) for block in blocks)
        free = Counter(self._free)
        for block in sorted(held.keys() | free.keys() | set(range(self.num_blocks))):
            is_usable = NULL_BLOCK < block < self.num_blocks
            ref_count = self._ref_counts[block] if is_usable else 0
            if ref_count != held[block] or free[block] != (is_usable and ref_count == 0):
                raise AssertionError(
                    f"block {block}: ref_count {ref_count}, held {held[block]} times by tables and pins, "
                    f"{free[block]} times in the free queue"
                )

    def _shared(self, table: list[int], first_new_token: int, num_tokens: int) -> list[int]:
        """Indices into `table` of the blocks that are to be written and that others hold too."""
        start = first_new_token // self.block_size
        if start >= len(table):  # the usual case of a decode step that needs a block at all
            return []
        ref_counts = self._ref_counts
        return [i for i, block in enumerate(table[start : self.blocks_for(num_tokens)], start) if ref_counts[block] > 1]

    def _take(self) -> int:
        block = self._free.popleft()
        self._ref_counts[block] = 1
        return block

    def _release(self, blocks: Iterable[int]) -> None:
        for block in blocks:
            assert self._ref_counts[block] > 0, f"block {block} is free already"
            self._ref_counts[block] -= 1
            if self._ref_counts[block] == 0:
                self._free.append(block)

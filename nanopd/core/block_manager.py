"""The block pool of one worker: which KV blocks are in use, and how often, and which tokens they are known to hold.

Lives in the parent and is driven by one thread. Knows blocks and block tables, not requests: a block table is a plain
`list[int]` that belongs to the caller, position `i` of a sequence lies in block `table[i // block_size]`.
Contents stay with the worker; where a shared block is about to be written, the manager says which block to copy.
Every operation is all-or-nothing: it does its work, or raises `OutOfBlocks` and has changed nothing.

Prefix cache: a full block may be published under a key that stands for its tokens and all before them
(`extend_keys`). It stays so, in use or free, until it is handed out for other tokens.
"""

from __future__ import annotations

from array import array
from collections import Counter, OrderedDict, deque
from collections.abc import Iterable
from hashlib import blake2b

from nanopd.errors import NanopdError

NULL_BLOCK = 0  # what padding rows point at; never allocated
KEY_NBYTES = 16  # among 2^40 prefixes, two share a key with a probability of 2^-49


def extend_keys(keys: list[bytes], token_ids: list[int], block_size: int, root: bytes) -> None:
    """Append the keys of the full blocks of `token_ids` that have none yet.

    A key is the BLAKE2b digest of the key before it (of `root`, what the model is known by) and the block's tokens, so
    equal keys mean equal prefixes.
    """
    start, end = len(keys) * block_size, len(token_ids) // block_size * block_size
    if start == end:
        return
    tokens = memoryview(array("i", token_ids[start:end]))
    key = keys[-1] if keys else root
    for i in range(0, end - start, block_size):
        key = blake2b(key + tokens[i : i + block_size], digest_size=KEY_NBYTES).digest()
        keys.append(key)


class OutOfBlocks(NanopdError):
    """The pool cannot give as many blocks as were asked for; nothing was changed."""

    def __init__(self, num_needed: int, num_free: int) -> None:
        self.num_needed = num_needed
        self.num_free = num_free
        super().__init__(f"{num_needed} blocks needed, {num_free} free")


class BlockManager:
    """Allocation, sharing and copy-on-write of `num_blocks` blocks of `block_size` tokens each."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        assert num_blocks > 0 and block_size > 0, (num_blocks, block_size)
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._ref_counts = [0] * num_blocks  # tables that hold the block, and pins
        # Queues: the block that has been free for longest is handed out first, published ones when there are no others.
        self._free = deque(range(NULL_BLOCK + 1, num_blocks))
        self._free_published: OrderedDict[int, None] = OrderedDict()
        self._by_key: dict[bytes, int] = {}  # published blocks
        self._key_of: dict[int, bytes] = {}  # the reverse

    @property
    def num_free(self) -> int:
        return len(self._free) + len(self._free_published)

    @property
    def num_usable(self) -> int:
        """Blocks that can be allocated at all: all but the null block."""
        return self.num_blocks - 1

    def blocks_for(self, num_tokens: int) -> int:
        """Length of the table of a sequence of `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    def find(self, keys: Iterable[bytes]) -> list[int]:
        """The published blocks of the longest prefix of `keys`, for `allocate`."""
        blocks = []
        for key in keys:  # with one look-up each: a long prompt has hundreds of them
            if (block := self._by_key.get(key)) is None:
                break
            blocks.append(block)
        return blocks

    def publish(self, blocks: Iterable[int], keys: Iterable[bytes]) -> None:
        """Blocks in use hold the tokens of `keys` and are not written any more; of two for one key, one is found."""
        for block, key in zip(blocks, keys, strict=True):
            if self._by_key.setdefault(key, block) == block:
                self._key_of[block] = key

    def can_allocate(self, num_blocks: int, found: Iterable[int] = ()) -> bool:
        return num_blocks + self._num_free_of(found) <= self.num_free

    def allocate(self, num_blocks: int, found: Iterable[int] = ()) -> list[int]:
        """A new table: blocks that were found just now, and behind them `num_blocks` that nobody else holds.

        Raises:
            OutOfBlocks: too few are free.
        """
        table = list(found)
        num_needed = num_blocks + self._num_free_of(table)
        if num_needed > self.num_free:
            raise OutOfBlocks(num_needed, self.num_free)
        for block in table:
            self._free_published.pop(block, None)
            self._ref_counts[block] += 1
        table += [self._take() for _ in range(num_blocks)]
        return table

    def append(self, table: list[int], first_new_token: int, num_tokens: int) -> list[tuple[int, int]]:
        """Make `table` ready for writing the positions `first_new_token .. num_tokens - 1`.

        The table grows to `num_tokens` tokens (it never shrinks), and blocks in that range that others hold too are
        replaced by blocks of its own (copy-on-write). What is written in place cannot be found any more.

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
        if num_needed > len(self._free) and num_needed > self.num_free:  # called often: a property costs
            raise OutOfBlocks(num_needed, self.num_free)
        copies = []
        for i in shared:
            src, table[i] = table[i], self._take()
            self._ref_counts[src] -= 1
            if i * self.block_size < first_new_token:  # else all of it is written before it is read
                copies.append((src, table[i]))
        for block in table[first_new_token // self.block_size :]:  # in the usual case there is none
            self._forget(block)
        for _ in range(num_new):
            table.append(self._take())
        return copies

    def fork(self, table: list[int]) -> list[int]:
        """A second table that shares all blocks of `table`."""
        self.pin(table)
        return list(table)

    def free(self, table: list[int]) -> None:
        """Give the table's references back and empty it."""
        self._release(reversed(table))  # a block cannot be found without those before it, so these go last
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
        free = Counter([*self._free, *self._free_published])
        for block in sorted(held.keys() | free.keys() | set(range(self.num_blocks))):
            is_usable = NULL_BLOCK < block < self.num_blocks
            ref_count = self._ref_counts[block] if is_usable else 0
            if ref_count != held[block] or free[block] != (is_usable and ref_count == 0):
                raise AssertionError(
                    f"block {block}: ref_count {ref_count}, held {held[block]} times by tables and pins, "
                    f"{free[block]} times in the free queues"
                )
        assert self._by_key == {key: block for block, key in self._key_of.items()}, "keys and blocks do not match"
        published = [block for block in self._key_of if not self._ref_counts[block]]
        assert sorted(published) == sorted(self._free_published), "a free block is in the wrong queue"

    def _shared(self, table: list[int], first_new_token: int, num_tokens: int) -> list[int]:
        """Indices into `table` of the blocks that are to be written and that others hold too."""
        start = first_new_token // self.block_size
        if start >= len(table):  # the usual case of a decode step that needs a block at all
            return []
        ref_counts = self._ref_counts
        return [i for i, block in enumerate(table[start : self.blocks_for(num_tokens)], start) if ref_counts[block] > 1]

    def _num_free_of(self, blocks: Iterable[int]) -> int:
        return sum(not self._ref_counts[block] for block in blocks)

    def _take(self) -> int:
        if self._free:
            block = self._free.popleft()
        else:
            block, _ = self._free_published.popitem(last=False)
            self._forget(block)
        self._ref_counts[block] = 1
        return block

    def _forget(self, block: int) -> None:
        """It will hold other tokens than those of its key, if it has one."""
        if (key := self._key_of.pop(block, None)) is not None:
            del self._by_key[key]

    def _release(self, blocks: Iterable[int]) -> None:
        for block in blocks:
            assert self._ref_counts[block] > 0, f"block {block} is free already"
            self._ref_counts[block] -= 1
            if self._ref_counts[block] == 0:
                if block in self._key_of:
                    self._free_published[block] = None
                else:
                    self._free.append(block)

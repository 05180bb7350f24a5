"""Block manager against a brute-force model that keeps the tokens of every block, as a worker would."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from profiles import examples

from nanopd.core.block_manager import NULL_BLOCK, BlockManager, OutOfBlocks, extend_keys

GARBAGE = -1
INDEX = st.integers(0, 1000)


class ModelSequence:
    def __init__(self, table: list[int], tokens: list[int]) -> None:
        self.table = table
        self.tokens = tokens


class BlockManagerMachine(RuleBasedStateMachine):
    """`memory` is written where the manager lets a sequence write; every sequence must read its own tokens back."""

    @initialize(num_blocks=st.integers(2, 12), block_size=st.integers(1, 4))
    def start(self, num_blocks: int, block_size: int) -> None:
        self.manager = BlockManager(num_blocks, block_size)
        self.memory = [[GARBAGE] * block_size for _ in range(num_blocks)]
        self.sequences: list[ModelSequence] = []
        self.plans: list[tuple[list[int], list[list[int]]]] = []  # pinned blocks, their contents when pinned
        self.next_token = 0
        self.published: dict[tuple[int, ...], int] = {}  # a prefix of whole blocks -> the block of its end
        self.histories: list[list[int]] = []  # tokens that sequences once had
        self.freed: list[int] = list(range(1, num_blocks))  # the block that has been free for longest first

    # ------------------------------------------------------------------------------------------- the model

    def owners(self, block: int) -> int:
        tables = [sequence.table for sequence in self.sequences] + [blocks for blocks, _ in self.plans]
        return sum(table.count(block) for table in tables)

    def num_free(self) -> int:
        return sum(self.owners(block) == 0 for block in range(1, self.manager.num_blocks))

    def prefixes(self, tokens: list[int]) -> list[tuple[int, ...]]:
        size = self.manager.block_size
        return [tuple(tokens[:end]) for end in range(size, len(tokens) + 1, size)]

    def keys(self, tokens: list[int]) -> list[bytes]:
        keys: list[bytes] = []
        extend_keys(keys, tokens, self.manager.block_size, b"the model")
        return keys

    def note_taken(self, blocks: list[int]) -> None:
        """These were handed out, in this order: published ones only when there were no others."""
        published = set(self.published.values())
        assert blocks == sorted(self.freed, key=published.__contains__)[: len(blocks)]
        for prefix in [p for p, block in self.published.items() if block in blocks]:
            del self.published[prefix]
        self.freed = [block for block in self.freed if block not in blocks]

    def note_freed(self, blocks: list[int]) -> None:
        self.freed += [block for block in blocks if self.owners(block) == 0]

    def write(self, sequence: ModelSequence, start: int, tokens: list[int]) -> None:
        size = self.manager.block_size
        sequence.tokens = sequence.tokens[:start] + tokens
        for position, token in enumerate(tokens, start):
            block = sequence.table[position // size]
            assert self.owners(block) == 1 and block != NULL_BLOCK
            self.memory[block][position % size] = token

    def new_tokens(self, count: int) -> list[int]:
        self.next_token += count
        return list(range(self.next_token - count, self.next_token))

    def allocate_or_none(self, num_blocks: int, found: list[int] | None = None) -> list[int] | None:
        found, free = found or [], self.num_free()
        num_needed = num_blocks + sum(self.owners(block) == 0 for block in found)
        assert self.manager.can_allocate(num_blocks, found) == (num_needed <= free)
        if num_needed <= free:
            table = self.manager.allocate(num_blocks, found)
            assert table[: len(found)] == found
            self.freed = [block for block in self.freed if block not in found]
            self.note_taken(table[len(found) :])
            return table
        with pytest.raises(OutOfBlocks) as error:
            self.manager.allocate(num_blocks, found)
        assert (error.value.num_needed, error.value.num_free) == (num_needed, free)
        return None

    # ------------------------------------------------------------------------------------------- operations

    @rule(num_tokens=st.integers(0, 12), num_reserved=st.integers(0, 2))
    def allocate(self, num_tokens: int, num_reserved: int) -> None:
        num_blocks = next(n for n in range(13) if n * self.manager.block_size >= num_tokens)
        assert self.manager.blocks_for(num_tokens) == num_blocks
        table = self.allocate_or_none(num_blocks + num_reserved)
        if table is not None:
            self.sequences.append(ModelSequence(table, []))
            self.write(self.sequences[-1], 0, self.new_tokens(num_tokens))

    @precondition(lambda self: self.sequences)
    @rule(index=INDEX, num_rewritten=st.sampled_from([0, 0, 0, 1, 5]), num_new=st.sampled_from([1, 1, 1, 2, 3, 7]))
    def append(self, index: int, num_rewritten: int, num_new: int) -> None:
        sequence = self.sequences[index % len(self.sequences)]
        size, before = self.manager.block_size, list(sequence.table)
        start = max(0, len(sequence.tokens) - num_rewritten)
        end = start + num_new
        touched = sorted({position // size for position in range(start, end)})
        replaced = [i for i in touched if i < len(before) and self.owners(before[i]) > 1]
        num_needed = len(replaced) + len([i for i in range(touched[-1] + 1) if i >= len(before)])
        if num_needed > self.num_free():
            with pytest.raises(OutOfBlocks):
                self.manager.append(sequence.table, start, end)
            assert sequence.table == before
            return
        for src, dst in self.manager.append(sequence.table, start, end):
            assert src in before and dst not in before
            self.memory[dst] = list(self.memory[src])
        assert len(sequence.table) == max(len(before), touched[-1] + 1)
        assert [i for i, block in enumerate(before) if sequence.table[i] != block] == replaced
        self.note_taken([sequence.table[i] for i in replaced] + sequence.table[len(before) :])
        written = sequence.table[start // size :]
        self.published = {prefix: block for prefix, block in self.published.items() if block not in written}
        self.write(sequence, start, self.new_tokens(num_new))

    @precondition(lambda self: self.sequences)
    @rule(index=INDEX, num_less=st.sampled_from([0, 0, 1, 2, 5]))
    def fork(self, index: int, num_less: int) -> None:
        parent = self.sequences[index % len(self.sequences)]
        tokens = parent.tokens[: max(0, len(parent.tokens) - num_less)]
        table = parent.table[: self.manager.blocks_for(len(tokens))] if num_less else parent.table
        self.sequences.append(ModelSequence(self.manager.fork(table), tokens))

    @precondition(lambda self: self.sequences)
    @rule(index=INDEX)
    def free(self, index: int) -> None:
        sequence = self.sequences.pop(index % len(self.sequences))
        self.histories.append(sequence.tokens)
        blocks = sequence.table[::-1]
        self.manager.free(sequence.table)
        assert sequence.table == []
        self.note_freed(blocks)

    @precondition(lambda self: self.sequences)
    @rule(index=INDEX)
    def preempt(self, index: int) -> None:
        sequence = self.sequences.pop(index % len(self.sequences))
        blocks = sequence.table[::-1]
        self.manager.free(sequence.table)
        self.note_freed(blocks)
        self.overwrite_free_blocks()
        table = self.allocate_or_none(self.manager.blocks_for(len(sequence.tokens)))
        if table is not None:
            self.sequences.append(ModelSequence(table, []))
            self.write(self.sequences[-1], 0, sequence.tokens)

    @precondition(lambda self: self.sequences)
    @rule(index=INDEX, num_blocks=st.integers(0, 4))
    def pin(self, index: int, num_blocks: int) -> None:
        blocks = self.sequences[index % len(self.sequences)].table[:num_blocks]
        self.manager.pin(np.array(blocks, np.int32))
        self.plans.append((blocks, [list(self.memory[block]) for block in blocks]))

    @precondition(lambda self: self.plans)
    @rule(index=INDEX)
    def unpin(self, index: int) -> None:
        blocks, _ = self.plans.pop(index % len(self.plans))
        self.manager.unpin(np.array(blocks, np.int32))
        self.note_freed(blocks)

    @precondition(lambda self: self.sequences)
    @rule(index=INDEX, first=st.integers(0, 2))
    def publish(self, index: int, first: int) -> None:
        sequence = self.sequences[index % len(self.sequences)]
        prefixes = self.prefixes(sequence.tokens)
        self.manager.publish(sequence.table[first : len(prefixes)], self.keys(sequence.tokens)[first:])
        for prefix, block in list(zip(prefixes, sequence.table, strict=False))[first:]:
            self.published.setdefault(prefix, block)

    @precondition(lambda self: self.histories)
    @rule(index=INDEX, length=st.integers(0, 30), num_new=st.integers(0, 5))
    def start_with_old_tokens(self, index: int, length: int, num_new: int) -> None:
        tokens = self.histories[index % len(self.histories)][:length] + self.new_tokens(num_new)
        prefixes = self.prefixes(tokens)
        num_found = next((i for i, prefix in enumerate(prefixes) if prefix not in self.published), len(prefixes))
        found = self.manager.find(self.keys(tokens))
        assert found == [self.published[prefix] for prefix in prefixes[:num_found]]
        table = self.allocate_or_none(self.manager.blocks_for(len(tokens)) - num_found, found)
        if table is not None:
            num_cached = num_found * self.manager.block_size
            self.sequences.append(ModelSequence(table, tokens[:num_cached]))
            self.write(self.sequences[-1], num_cached, tokens[num_cached:])

    # ------------------------------------------------------------------------------------------- what must hold

    @invariant()
    def overwrite_free_blocks(self) -> None:
        for block, contents in enumerate(self.memory):
            if self.owners(block) == 0 and block not in self.published.values():
                contents[:] = [GARBAGE] * len(contents)

    @invariant()
    def sequences_read_their_own_tokens(self) -> None:
        size = self.manager.block_size
        for sequence in self.sequences:
            read = [self.memory[sequence.table[i // size]][i % size] for i in range(len(sequence.tokens))]
            assert read == sequence.tokens
            assert all(type(block) is int for block in sequence.table)

    @invariant()
    def pinned_blocks_keep_their_contents(self) -> None:
        for blocks, contents in self.plans:
            assert [self.memory[block] for block in blocks] == contents

    @invariant()
    def published_blocks_hold_their_tokens(self) -> None:
        for prefix, block in self.published.items():
            assert tuple(self.memory[block]) == prefix[-self.manager.block_size :]

    @invariant()
    def no_block_is_lost(self) -> None:
        assert self.manager.num_free == self.num_free()
        self.manager.check_integrity((s.table for s in self.sequences), (blocks for blocks, _ in self.plans))

    def teardown(self) -> None:
        if not hasattr(self, "manager"):
            return
        for sequence in self.sequences:
            self.manager.free(sequence.table)
        for blocks, _ in self.plans:
            self.manager.unpin(blocks)
        self.manager.check_integrity([])
        assert sorted(self.manager.allocate(self.manager.num_usable)) == list(range(1, self.manager.num_blocks))


TestBlockManagerMachine = BlockManagerMachine.TestCase
TestBlockManagerMachine.settings = examples(4, stateful_step_count=40)


# ------------------------------------------------------------------------------------------------- by hand


def test_blocks_are_handed_out_in_the_order_in_which_they_became_free() -> None:
    manager = BlockManager(num_blocks=6, block_size=4)
    first, second = manager.allocate(2), manager.allocate(2)
    assert (first, second) == ([1, 2], [3, 4])
    manager.free(second)
    manager.free(first)
    assert manager.allocate(5) == [5, 4, 3, 2, 1]


def test_published_blocks_are_handed_out_last_and_from_their_end() -> None:
    manager = BlockManager(num_blocks=6, block_size=2)
    keys: list[bytes] = []
    extend_keys(keys, [7, 8, 9, 10, 11], 2, b"")
    table = manager.allocate(3)
    manager.publish(table[:2], keys)
    manager.free(table)
    assert manager.find(keys) == [1, 2]
    assert manager.allocate(4) == [4, 5, 3, 2]
    assert manager.find(keys) == [1]
    manager.check_integrity([[4, 5, 3, 2]])


def test_keys_are_of_all_tokens_before_and_of_the_model() -> None:
    def keys_of(token_ids: list[int], root: bytes = b"a") -> list[bytes]:
        keys: list[bytes] = []
        for end in (3, len(token_ids)):  # extended as tokens come
            extend_keys(keys, token_ids[:end], 2, root)
        return keys

    keys = keys_of([1, 2, 3, 4, 5])
    assert len(set(keys)) == 2
    assert keys_of([1, 2, 3, 4]) == keys
    assert keys_of([1, 2, 3, 5])[0] == keys[0]
    others = [keys_of([1, 2, 3, 5])[1], *keys_of([2, 1, 3, 4]), *keys_of([3, 4, 1, 2]), *keys_of([1, 2, 3, 4], b"b")]
    assert len({*others, *keys}) == len(others) + 2


def test_append_copies_only_the_shared_block_that_keeps_tokens() -> None:
    manager = BlockManager(num_blocks=8, block_size=4)
    parent = manager.allocate(2)  # [1, 2]
    child = manager.fork(parent)
    assert manager.append(child, 6, 9) == [(2, 3)]
    assert (parent, child) == ([1, 2], [1, 3, 4])
    assert manager.append(parent, 6, 7) == []  # the child has let go of block 2
    other = manager.fork(parent)
    assert manager.append(other, 4, 6) == []  # block 2 is replaced, but none of its tokens is kept
    assert other == [1, 5]
    manager.check_integrity([parent, child, other])


def test_pinned_block_outlives_its_table() -> None:
    manager = BlockManager(num_blocks=3, block_size=1)
    table = manager.allocate(2)
    manager.pin([1])
    manager.free(table)
    assert manager.num_free == 1
    manager.check_integrity([], pinned=[[1]])
    manager.unpin([1])
    assert manager.num_free == manager.num_usable == 2


@pytest.mark.parametrize(
    ("tables", "pinned", "block"),
    [
        ([[1, 2]], [], 3),  # lost: nobody holds it
        ([[1, 2, 3, 4]], [], 4),  # held, but free
        ([[1, 2], [3], [3]], [], 3),  # held once too often
        ([[1, 2, 3]], [[2]], 2),  # pinned behind the manager's back
        ([[1, 2, 3], [0]], [], 0),  # the null block
        ([[1, 2, 3, 9]], [], 9),  # no such block
    ],
)
def test_check_integrity_names_the_block(tables: list[list[int]], pinned: list[list[int]], block: int) -> None:
    manager = BlockManager(num_blocks=6, block_size=4)
    manager.check_integrity([manager.allocate(3)])
    with pytest.raises(AssertionError, match=rf"^block {block}: "):
        manager.check_integrity(tables, pinned)


def test_double_free_is_an_assertion() -> None:
    manager = BlockManager(num_blocks=4, block_size=4)
    table = manager.allocate(1)
    stale = list(table)
    manager.free(table)
    with pytest.raises(AssertionError, match="block 1 is free"):
        manager.free(stale)

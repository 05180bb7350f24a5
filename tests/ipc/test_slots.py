"""The ring of slots against plain queues, for any interleaving of the two ends; the epochs of replaced ends."""

from __future__ import annotations

from collections import deque

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanopd.ipc.ring import CONTROL_NBYTES
from nanopd.ipc.shared_memory import SharedMemory
from nanopd.ipc.slots import MAX_SLOTS, SlotReader, SlotWriter, slots_nbytes

SLOT_NBYTES = 128
ACTIONS = ("claim", "publish", "take", "release")


def memory_of(num_slots: int) -> SharedMemory:
    return SharedMemory(slots_nbytes(SLOT_NBYTES, num_slots))


@given(st.integers(1, MAX_SLOTS), st.lists(st.sampled_from(ACTIONS), max_size=200), st.integers(0, 5))
def test_is_a_queue(num_slots: int, actions: list[str], epoch: int) -> None:
    memory = memory_of(num_slots)
    writer, reader = SlotWriter(memory, num_slots, epoch), SlotReader(memory, num_slots, epoch)
    data = memory.map()[CONTROL_NBYTES:].cast("q", (num_slots, SLOT_NBYTES // 8))
    claimed, published, taken = deque[int](), deque[int](), deque[int]()  # numbers of messages
    num_claimed = 0
    for action in actions:
        if action == "claim":
            index = writer.claim()
            assert (index is None) == (len(claimed) + len(published) + len(taken) == num_slots)
            if index is not None:
                data[index, 0] = num_claimed
                claimed.append(num_claimed)
                num_claimed += 1
        elif action == "publish" and claimed:
            published.append(claimed.popleft())
            writer.publish(-published[-1])
        elif action == "take":
            index = reader.take()
            assert (index is None) == (not published)
            if index is not None:
                taken.append(published.popleft())
                assert data[index, 0] == taken[-1]
        elif action == "release" and taken:
            assert reader.release() == -taken.popleft()


@pytest.mark.parametrize("replaced", ["writer", "reader", "both"])
def test_epochs(replaced: str) -> None:
    """What was published or taken before is nothing to the ends of a later epoch."""
    memory = memory_of(4)
    writer, reader = SlotWriter(memory, 4, 0), SlotReader(memory, 4, 0)
    for note in range(3):
        assert writer.claim() == note
        writer.publish(note)
    assert reader.take() == 0
    if replaced != "writer":
        reader.release()
    writer, reader = SlotWriter(memory, 4, 1), SlotReader(memory, 4, 1)
    assert reader.take() is None
    assert [writer.claim() for _ in range(5)] == [0, 1, 2, 3, None]
    writer.publish(7)
    assert (reader.take(), reader.take()) == (0, None)
    assert writer.claim() is None
    assert reader.release() == 7
    assert writer.claim() == 0

"""The ring of buffers against plain queues, for any interleaving of the two ends; the epochs of replaced ends."""

from __future__ import annotations

from collections import deque

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanopd.ipc.buffers import MAX_BUFFERS, BufferReader, BufferWriter, buffers_nbytes
from nanopd.ipc.control import CONTROL_NBYTES
from nanopd.ipc.shared_memory import SharedMemory

BUFFER_NBYTES = 128
ACTIONS = ("claim", "publish", "take", "release")


def memory_of(num_buffers: int) -> SharedMemory:
    return SharedMemory(buffers_nbytes(BUFFER_NBYTES, num_buffers))


@given(st.integers(1, MAX_BUFFERS), st.lists(st.sampled_from(ACTIONS), max_size=200), st.integers(0, 5))
def test_is_a_queue(num_buffers: int, actions: list[str], epoch: int) -> None:
    memory = memory_of(num_buffers)
    writer, reader = BufferWriter(memory, num_buffers, epoch), BufferReader(memory, num_buffers, epoch)
    data = memory.map()[CONTROL_NBYTES:].cast("q", (num_buffers, BUFFER_NBYTES // 8))
    claimed, published, taken = deque[int](), deque[int](), deque[int]()  # numbers of messages
    num_claimed = 0
    for action in actions:
        if action == "claim":
            index = writer.claim()
            assert (index is None) == (len(claimed) + len(published) + len(taken) == num_buffers)
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
    writer, reader = BufferWriter(memory, 4, 0), BufferReader(memory, 4, 0)
    for note in range(3):
        assert writer.claim() == note
        writer.publish(note)
    assert reader.take() == 0
    if replaced != "writer":
        reader.release()
    writer, reader = BufferWriter(memory, 4, 1), BufferReader(memory, 4, 1)
    assert reader.take() is None
    assert [writer.claim() for _ in range(5)] == [0, 1, 2, 3, None]
    writer.publish(7)
    assert (reader.take(), reader.take()) == (0, None)
    assert writer.claim() is None
    assert reader.release() == 7
    assert writer.claim() == 0

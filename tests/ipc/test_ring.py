from __future__ import annotations

import multiprocessing
import os
import random
import zlib
from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanopd.ipc.channel import Endpoint, channel
from nanopd.ipc.control import CONTROL_NBYTES, WORD
from nanopd.ipc.doorbell import Doorbell, Waiter
from nanopd.ipc.ring import RingFull, RingReader, RingWriter, ring_memory
from nanopd.ipc.shared_memory import SharedMemory

TIMEOUT_S = 30.0


def make_ring(capacity: int) -> tuple[RingWriter, RingReader]:
    memory = SharedMemory(CONTROL_NBYTES + capacity)
    return RingWriter(memory), RingReader(memory)


def footprint(message: bytes) -> int:
    return WORD + -(-len(message) // WORD) * WORD


OPERATIONS = st.lists(st.one_of(st.none(), st.binary(max_size=100)), max_size=120)  # None: read; else write


@settings(max_examples=300, deadline=None)
@given(OPERATIONS, st.integers(WORD, 300))
def test_ring_against_deque(operations: list[bytes | None], capacity: int) -> None:
    """What is read is what was written, in order; a ring is full exactly when there are too few bytes left."""
    writer, reader = make_ring(capacity)
    capacity = capacity // WORD * WORD
    unread: deque[bytes] = deque()
    for message in operations:
        if message is None:
            assert reader.read() == (unread.popleft() if unread else None)
        elif footprint(message) <= capacity:
            is_full = sum(map(footprint, (*unread, message))) > capacity
            try:
                writer.write(message)
                assert not is_full
                unread.append(message)
            except RingFull:
                assert is_full
    while (message := reader.read()) is not None:
        assert message == unread.popleft()
    assert not unread
    largest = random.Random(0).randbytes(capacity - WORD)
    writer.write(largest)  # fits wherever the last message ended
    assert reader.read() == largest


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 6), st.data())
def test_ring_memory_holds_what_it_promises(max_nbytes: int, num_messages: int, data: st.DataObject) -> None:
    memory = ring_memory(max_nbytes, num_messages)
    writer, reader = RingWriter(memory), RingReader(memory)
    sizes = data.draw(st.lists(st.integers(0, max_nbytes), max_size=40))
    for number, nbytes in enumerate(sizes):
        if number >= num_messages:
            assert reader.read() is not None
        writer.write(bytes(nbytes))  # never full


def test_full_then_read() -> None:
    writer, reader = make_ring(512)
    for _ in range(4):
        writer.write(b"x" * 120)
    with pytest.raises(RingFull, match="64 bytes: 512 of 512 are unread"):
        writer.write(bytes(64))
    assert reader.read() == b"x" * 120
    writer.write(b"y" * 64)
    assert [(reader.read() or b"")[:1] for _ in range(4)] == [b"x", b"x", b"x", b"y"]
    assert reader.read() is None


def test_message_larger_than_the_ring() -> None:
    writer, reader = make_ring(512)
    writer.write(bytes(504))
    with pytest.raises(ValueError, match="a message of 1000 bytes; this ring takes up to 504 bytes"):
        writer.write(bytes(1000))
    assert reader.read() == bytes(504)


def test_what_was_read_stays() -> None:
    writer, reader = make_ring(64)
    writer.write(b"a" * 40)
    message = reader.read()
    writer.write(b"b" * 40)
    assert message == b"a" * 40


def test_memory_too_small_for_a_ring() -> None:
    with pytest.raises(AssertionError, match="too few for a ring"):
        make_ring(WORD - 1)


def test_fence_of_processors_that_need_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    writer, reader = make_ring(512)
    for _ in range(20):
        writer.write(b"abc")
        assert reader.read() == b"abc"


def send_checksummed(memory: SharedMemory, written: Doorbell, read: Doorbell, count: int) -> None:
    writer, waiter, rng = RingWriter(memory), Waiter(), random.Random(7)
    waiter.add(read)
    for number in range(count):
        payload = number.to_bytes(8, "little") + rng.randbytes(rng.randrange(200))
        message = payload + zlib.crc32(payload).to_bytes(4, "little")
        while True:
            try:
                writer.write(message)
                break
            except RingFull:
                assert waiter.wait(TIMEOUT_S)
        written.ring()


def test_two_processes_in_order_with_checksums() -> None:
    count = 100_000
    memory, written, read = ring_memory(256, 64), Doorbell(), Doorbell()
    context = multiprocessing.get_context("spawn")
    child = context.Process(target=send_checksummed, args=(memory, written, read, count))
    child.start()
    reader, waiter = RingReader(memory), Waiter()
    waiter.add(written)
    for number in range(count):
        while (payload := reader.read()) is None:
            assert waiter.wait(TIMEOUT_S)
        read.ring()
        assert int.from_bytes(payload[:8], "little") == number
        assert int.from_bytes(payload[-4:], "little") == zlib.crc32(payload[:-4])
    child.join(TIMEOUT_S)
    assert child.exitcode == 0
    assert reader.read() is None
    assert not [name for name in os.listdir("/dev/shm") if "ring" in name]


def answer(endpoint: Endpoint) -> None:
    waiter = Waiter()
    waiter.add(endpoint, once=True)
    while True:
        while (message := endpoint.receive()) is None:
            assert waiter.wait(TIMEOUT_S)
        endpoint.send(message[::-1])
        if message == b"end":
            return


def test_channel_between_two_processes() -> None:
    """An end handed to a spawned process; the waiter reports an answer once, and is quiet when there is none."""
    here, there = channel(100, 4)
    child = multiprocessing.get_context("spawn").Process(target=answer, args=(there,))
    child.start()
    waiter = Waiter()
    waiter.add(here, once=True)
    for message in (b"abc", b"", b"x" * 99 + b"y", b"end"):
        here.send(message)
        assert waiter.wait(TIMEOUT_S) == [here]
        assert here.receive() == message[::-1]
        assert here.receive() is None
        assert waiter.wait(0.0) == []
    child.join(TIMEOUT_S)
    assert child.exitcode == 0
    here.close()
    with pytest.raises(ValueError, match="closed"):
        here.fileno()


def test_full_channel() -> None:
    """What there is no room for waits, and goes in its order when this side receives."""
    here, there = channel(100, 2)
    messages = [bytes([number]) * 100 for number in range(5)]
    for message in messages:
        here.send(message)
    assert here.has_backlog and not there.has_backlog
    received = []
    while len(received) < 5:
        received += iter(there.receive, None)
        assert here.receive() is None
    assert received == messages
    assert not here.has_backlog

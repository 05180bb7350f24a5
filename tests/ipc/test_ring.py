from __future__ import annotations

import multiprocessing
import os
import random
import zlib
from collections import deque

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from profiles import examples

from nanopd.ipc.doorbell import Doorbell, Waiter
from nanopd.ipc.ring import CONTROL_NBYTES, LINE, RingFull, RingReader, RingWriter, ring_memory
from nanopd.ipc.shared_memory import SharedMemory

TIMEOUT_S = 30.0


def make_ring(capacity: int) -> tuple[RingWriter, RingReader]:
    memory = SharedMemory(CONTROL_NBYTES + capacity)
    return RingWriter(memory), RingReader(memory)


def write(writer: RingWriter, payload: bytes) -> None:
    writer.reserve(len(payload))[:] = payload
    writer.commit(len(payload))


def address(view: memoryview) -> int:
    return np.frombuffer(view, np.uint8).ctypes.data


OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("write"), st.integers(0, 500)),
        st.tuples(st.just("read"), st.just(0)),
        st.tuples(st.just("release"), st.just(0)),
    ),
    max_size=120,
)


@examples(2)
@given(OPERATIONS, st.integers(4, 40), st.randoms(use_true_random=False))
def test_ring_against_deque(operations: list[tuple[str, int]], lines: int, rng: random.Random) -> None:
    """What is read is what was written, in order, and it stays unchanged until it is released."""
    writer, reader = make_ring(lines * LINE)
    unread: deque[bytes] = deque()
    held: deque[tuple[bytes, memoryview]] = deque()
    for operation, nbytes in operations:
        if operation == "write" and nbytes <= writer.max_message_nbytes:
            payload = rng.randbytes(nbytes)
            try:
                write(writer, payload)
                unread.append(payload)
            except RingFull:
                # Lines in use, and a gap that is smaller than the new message: else there was room.
                taken = sum(1 + -(-len(p) // LINE) for p in (*unread, *(p for p, _ in held)))
                largest = max(1 + -(-len(p) // LINE) for p in (*unread, *(p for p, _ in held), payload))
                assert taken + 1 + -(-nbytes // LINE) + largest > lines
        elif operation == "read":
            view = reader.read()
            assert (view is None) == (not unread)
            if view is not None:
                assert view == unread[0]
                held.append((unread.popleft(), view))
        elif operation == "release" and held:
            payload, view = held.popleft()
            assert view == payload
            reader.release()
    while (view := reader.read()) is not None:
        held.append((unread.popleft(), view))
        assert view == held[-1][0]
    assert not unread
    for _ in held:
        reader.release()
    largest_payload = rng.randbytes(writer.max_message_nbytes)
    write(writer, largest_payload)  # fits wherever the last message ended
    assert reader.read() == largest_payload


@given(st.integers(0, 1000), st.integers(1, 6), st.data())
def test_ring_memory_holds_what_it_promises(max_nbytes: int, num_messages: int, data: st.DataObject) -> None:
    memory = ring_memory(max_nbytes, num_messages)
    writer, reader = RingWriter(memory), RingReader(memory)
    for number, nbytes in enumerate(data.draw(st.lists(st.integers(0, max_nbytes), max_size=40))):
        if number >= num_messages:
            reader.release()
        write(writer, bytes(nbytes))  # never full
        assert reader.read() is not None


def test_messages_are_aligned_and_in_place() -> None:
    memory = ring_memory(300, 4)
    writer, reader = RingWriter(memory), RingReader(memory)
    base = address(memory.map())
    for nbytes in (1, 300, 64, 65, 300, 7):
        slot = writer.reserve(nbytes)
        where = address(slot)
        writer.commit(nbytes)
        view = reader.read()
        assert view is not None and view.nbytes == nbytes
        assert (where - base) % LINE == 0
        assert address(view) == where
        reader.release()


def test_commit_of_less_than_reserved_gives_the_rest_back() -> None:
    writer, reader = make_ring(8 * LINE)
    for _ in range(100):
        writer.reserve(3 * LINE)[:2] = b"ab"
        writer.commit(2)
        assert reader.read() == b"ab"
        reader.release()


def test_reserve_replaces_an_uncommitted_reserve() -> None:
    writer, reader = make_ring(16 * LINE)
    for round_ in range(50):
        writer.reserve(5 * LINE)[:] = bytes(5 * LINE)
        assert reader.read() is None
        write(writer, bytes([round_]) * 90)
        assert reader.read() == bytes([round_]) * 90
        reader.release()


def test_full_then_released() -> None:
    writer, reader = make_ring(8 * LINE)
    for _ in range(4):
        write(writer, b"x" * LINE)
    with pytest.raises(RingFull, match="64 bytes: 512 of 512 are unreleased"):
        writer.reserve(LINE)
    reader.read()
    with pytest.raises(RingFull):  # read, but not released
        writer.reserve(LINE)
    reader.release()
    write(writer, b"y" * LINE)
    assert [bytes(reader.read() or b"")[:1] for _ in range(4)] == [b"x", b"x", b"x", b"y"]


def test_message_larger_than_the_ring() -> None:
    writer, _ = make_ring(8 * LINE)
    writer.reserve(writer.max_message_nbytes)
    with pytest.raises(ValueError, match="a message of 1000 bytes; this ring takes up to 192 bytes"):
        writer.reserve(1000)


def test_misuse_is_caught() -> None:
    writer, reader = make_ring(8 * LINE)
    with pytest.raises(AssertionError):
        reader.release()
    with pytest.raises(AssertionError):
        writer.commit(0)
    writer.reserve(8)
    with pytest.raises(AssertionError):
        writer.commit(9)


def test_fence_of_processors_that_need_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    writer, reader = make_ring(8 * LINE)
    for _ in range(20):
        write(writer, b"abc")
        assert reader.read() == b"abc"
        reader.release()


def send_checksummed(memory: SharedMemory, written: Doorbell, released: Doorbell, count: int) -> None:
    writer, waiter, rng = RingWriter(memory), Waiter(), random.Random(7)
    waiter.add(released)
    for number in range(count):
        payload = number.to_bytes(8, "little") + rng.randbytes(rng.randrange(200))
        while True:
            try:
                slot = writer.reserve(len(payload) + 4)
                break
            except RingFull:
                assert waiter.wait(TIMEOUT_S)
        slot[:-4] = payload
        slot[-4:] = zlib.crc32(payload).to_bytes(4, "little")
        writer.commit(len(slot))
        written.ring()


def test_two_processes_in_order_with_checksums() -> None:
    count = 100_000
    memory, written, released = ring_memory(256, 64), Doorbell(), Doorbell()
    context = multiprocessing.get_context("spawn")
    child = context.Process(target=send_checksummed, args=(memory, written, released, count))
    child.start()
    reader, waiter = RingReader(memory), Waiter()
    waiter.add(written)
    for number in range(count):
        while (view := reader.read()) is None:
            assert waiter.wait(TIMEOUT_S)
        payload = bytes(view)
        reader.release()
        released.ring()
        assert int.from_bytes(payload[:8], "little") == number
        assert int.from_bytes(payload[-4:], "little") == zlib.crc32(payload[:-4])
    child.join(TIMEOUT_S)
    assert child.exitcode == 0
    assert reader.read() is None
    assert not [name for name in os.listdir("/dev/shm") if "ring" in name]

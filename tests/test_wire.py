from __future__ import annotations

import dataclasses
import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanopd import wire
from nanopd.ipc.ring import RingReader, RingWriter, ring_memory
from nanopd.messages import SLOT_INIT, SlotExtras, StepBatch, StepResult, TransferAck, TransferPlan

CLASSES = (SlotExtras, StepBatch, StepResult, TransferPlan, TransferAck)


def make(cls: Any, header: list[int], lengths: list[int], seed: int) -> Any:
    """A message with random bytes in its sections: every bit pattern must survive, NaNs included."""
    rng = np.random.default_rng(seed)
    dtypes = wire.sections(cls).values()
    arrays = [np.frombuffer(rng.bytes(length * dtype.itemsize), dtype) for length, dtype in zip(lengths, dtypes)]
    return cls(*header[: len(dataclasses.fields(cls)) - len(arrays)], *arrays)


def assert_same(actual: Any, expected: Any) -> None:
    assert type(actual) is type(expected)
    for field in dataclasses.fields(expected):
        got, want = getattr(actual, field.name), getattr(expected, field.name)
        if isinstance(want, np.ndarray):
            assert got.dtype == want.dtype and got.shape == want.shape
            assert got.tobytes() == want.tobytes()
        else:
            assert got == want


MESSAGES = st.builds(
    make,
    st.sampled_from(CLASSES),
    st.lists(st.integers(-(2**63), 2**63 - 1), min_size=8, max_size=8),
    st.lists(st.integers(0, 70), min_size=10, max_size=10),
    st.integers(0, 1000),
)


@settings(max_examples=300, deadline=None)
@given(MESSAGES)
def test_round_trip(message: Any) -> None:
    data = wire.encode(message)
    assert len(data) % wire.ALIGNMENT == 0
    assert_same(wire.decode(data), message)


@settings(max_examples=50, deadline=None)
@given(st.lists(MESSAGES, max_size=10))
def test_through_a_ring(messages: list[Any]) -> None:
    encoded = [wire.encode(message) for message in messages]
    memory = ring_memory(max(map(len, encoded), default=0), 10)
    writer, reader = RingWriter(memory), RingReader(memory)
    for data in encoded:
        writer.write(data)
    for message in messages:
        received = reader.read()
        assert received is not None
        assert_same(wire.decode(received), message)


def test_layout_of_the_bytes() -> None:
    """The layout that messages.py describes, spelt out."""
    plan = TransferPlan(7, 1, 2, 3, 4, np.array([10, 11, 12], np.int32), np.array([20, 21, 22], np.int32))
    expected = struct.pack("=8q", 2, 7, 1, 2, 3, 4, 3, 3)
    expected += struct.pack("=3i4x3i4x", 10, 11, 12, 20, 21, 22)
    assert wire.encode(plan) == expected


def test_arrays_are_aligned_views_of_the_bytes() -> None:
    message = make(StepBatch, [1], [3, 5, 1, 3, 5, 5, 5, 5, 7], seed=0)
    data = np.frombuffer(bytearray(wire.encode(message)), np.uint8)
    decoded = wire.decode(data.data)
    assert isinstance(decoded, StepBatch)
    for name in wire.sections(StepBatch):
        array = getattr(decoded, name)
        assert np.shares_memory(array, data)
        assert (array.ctypes.data - data.ctypes.data) % 8 == 0
    data[:] = 0
    assert not decoded.token_ids.any()


def test_arrays_that_are_not_contiguous_or_not_flat() -> None:
    ids = np.arange(12, dtype=np.int32).reshape(3, 4)
    plan = TransferPlan(0, 0, 0, 0, 0, ids, ids[:, ::2])
    decoded = wire.decode(wire.encode(plan))
    assert isinstance(decoded, TransferPlan)
    np.testing.assert_array_equal(decoded.src_blocks, np.arange(12))
    np.testing.assert_array_equal(decoded.dst_blocks, np.arange(0, 12, 2))


def test_another_dtype_is_refused() -> None:
    empty = np.empty(0, np.int32)
    plan = TransferPlan(0, 0, 0, 0, 0, np.arange(3, dtype=np.int64), empty)
    with pytest.raises(wire.WireError, match="TransferPlan: an array of int64 in a section of int32"):
        wire.encode(plan)
    assert SLOT_INIT.itemsize % 8 == 0  # the next seed is aligned too


@pytest.mark.parametrize("kind", [0, 99, -1])
def test_unknown_kind(kind: int) -> None:
    with pytest.raises(wire.WireError, match=rf"message kind {kind} is unknown; known: 1 \(StepBatch\)"):
        wire.decode(memoryview(struct.pack("=9q", kind, *range(8))))


@pytest.mark.parametrize("nbytes", [0, 7])
def test_too_short_for_a_kind(nbytes: int) -> None:
    with pytest.raises(wire.WireError, match="message kind None is unknown"):
        wire.decode(memoryview(bytes(nbytes)))


@pytest.mark.parametrize("cls", CLASSES)
def test_truncated_or_too_long(cls: type) -> None:
    message = make(cls, [1] * 5, [4] * 9, seed=1)
    data = wire.encode(message)
    for wrong in (*(data[:nbytes] for nbytes in range(8, len(data))), data + bytes(8)):
        with pytest.raises(wire.WireError, match=cls.__name__):
            wire.decode(wrong)


@pytest.mark.parametrize("lengths", [(-1, 4), (2**61, 1), (4, 4)])
def test_corrupt_section_lengths(lengths: tuple[int, int]) -> None:
    plan = make(TransferPlan, [1] * 5, [2, 2], seed=2)
    buffer = np.frombuffer(bytearray(wire.encode(plan)), np.int64)
    buffer[6:8] = lengths
    with pytest.raises(wire.WireError, match="section lengths"):
        wire.decode(buffer.data)

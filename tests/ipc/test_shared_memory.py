from __future__ import annotations

import multiprocessing
import os
import pickle
from multiprocessing.connection import Connection

import numpy as np
import pytest

from nanopd.ipc.doorbell import Doorbell
from nanopd.ipc.shared_memory import SharedMemory

TIMEOUT_S = 30.0


def increment_when_told(memory: SharedMemory, connection: Connection) -> None:
    nbytes = connection.recv()
    array = np.frombuffer(memory.map(nbytes), np.int64)
    array += 1
    connection.send((memory.nbytes, os.get_inheritable(memory._descriptor.fileno())))


def test_peer_maps_what_was_resized_after_it_was_spawned() -> None:
    context = multiprocessing.get_context("spawn")
    memory = SharedMemory()
    here, there = context.Pipe()
    child = context.Process(target=increment_when_told, args=(memory, there))
    child.start()
    memory.resize(1 << 20)
    array = np.frombuffer(memory.map(), np.int64)
    array[:] = np.arange(len(array))
    here.send(memory.nbytes)
    assert here.poll(TIMEOUT_S) and here.recv() == (1 << 20, False)
    np.testing.assert_array_equal(array, np.arange(len(array)) + 1)
    child.join(TIMEOUT_S)
    assert child.exitcode == 0


def test_starts_zeroed_and_grows_in_place() -> None:
    memory = SharedMemory(100)
    small = memory.map()
    assert small.nbytes == 100 and bytes(small) == bytes(100)
    small[7] = 42
    memory.resize(5 << 20)
    large = memory.map()
    assert large.nbytes == 5 << 20 and large[7] == 42
    large[8] = 43
    assert small[8] == 43


def test_a_longer_mapping_serves_shorter_requests() -> None:
    memory = SharedMemory(1000)
    whole = np.frombuffer(memory.map(), np.uint8)
    part = np.frombuffer(memory.map(10), np.uint8)
    assert len(part) == 10 and part.ctypes.data == whole.ctypes.data


def test_never_shrinks() -> None:
    memory = SharedMemory(4096)
    with pytest.raises(PermissionError):
        memory.resize(100)
    assert memory.nbytes == 4096


@pytest.mark.parametrize(("size", "nbytes"), [(0, None), (10, 11), (10, 0), (10, -1)])
def test_maps_only_what_is_there(size: int, nbytes: int | None) -> None:
    with pytest.raises(ValueError, match=f"of a shared memory of {size} bytes"):
        SharedMemory(size).map(nbytes)


def test_views_outlive_close_and_descriptors_do_not() -> None:
    before = os.listdir("/proc/self/fd")
    memory = SharedMemory(4096, name="closing-test")
    view = np.frombuffer(memory.map(), np.uint8)
    memory.close()
    memory.close()  # twice is once
    view[:] = 5
    assert view.sum() == 5 * 4096
    with pytest.raises(ValueError, match="closed"):
        memory.map()
    with open("/proc/self/maps") as maps:
        assert "closing-test" in maps.read()
    del view
    with open("/proc/self/maps") as maps:
        assert "closing-test" not in maps.read()
    assert len(os.listdir("/proc/self/fd")) == len(before)


def test_collected_without_close() -> None:
    before = os.listdir("/proc/self/fd")
    for _ in range(100):
        SharedMemory(4096).map()
        Doorbell()
    assert len(os.listdir("/proc/self/fd")) == len(before)


@pytest.mark.parametrize("make", [SharedMemory, Doorbell])
def test_pickles_only_for_a_child(make: type) -> None:
    with pytest.raises(RuntimeError, match="inheritance"):
        pickle.dumps(make())


def test_a_closed_one_cannot_be_handed_over() -> None:
    context = multiprocessing.get_context("spawn")
    bell = Doorbell()
    bell.close()
    with pytest.raises(ValueError, match="closed"):
        context.Process(target=print, args=(bell,)).start()

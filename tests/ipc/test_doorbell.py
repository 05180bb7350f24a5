from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time

import pytest

from nanopd.ipc.descriptor import Descriptor
from nanopd.ipc.doorbell import Doorbell, Waiter

TIMEOUT_S = 30.0


@pytest.fixture(params=[0.0, 0.01], ids=["sleeping", "spinning"])
def waiter(request: pytest.FixtureRequest) -> Waiter:
    return Waiter(spin_s=request.param)


def test_rings_are_reported_once(waiter: Waiter) -> None:
    first, second = Doorbell(), Doorbell()
    waiter.add(first)
    waiter.add(second)
    assert waiter.wait(0.0) == []
    for _ in range(3):
        second.ring()
        second.ring()
        assert waiter.wait(TIMEOUT_S) == [second]
        assert waiter.wait(0.0) == []
    first.ring()
    second.ring()
    assert set(map(id, waiter.wait(TIMEOUT_S))) == {id(first), id(second)}


def test_a_ring_before_the_waiter_is_not_lost(waiter: Waiter) -> None:
    bell = Doorbell()
    bell.ring()
    waiter.add(bell)
    assert waiter.wait(0.0) == [bell]


def test_a_ring_during_the_wait_ends_it(waiter: Waiter) -> None:
    bell = Doorbell()
    waiter.add(bell)
    timer = threading.Timer(0.05, bell.ring)
    timer.start()
    assert waiter.wait(TIMEOUT_S) == [bell]
    timer.join()


def test_pipes_are_reported_while_readable(waiter: Waiter) -> None:
    here, there = multiprocessing.Pipe()
    waiter.add(here)
    there.send("a")
    assert waiter.wait(0.0) == [here] and waiter.wait(0.0) == [here]
    assert here.recv() == "a"
    assert waiter.wait(0.0) == []
    there.close()
    assert waiter.wait(TIMEOUT_S) == [here]  # its end


def test_times_out(waiter: Waiter) -> None:
    waiter.add(Doorbell())
    start = time.monotonic()
    assert waiter.wait(0.05) == []
    assert 0.04 < time.monotonic() - start < 5.0


def test_removed_sources_are_not_reported(waiter: Waiter) -> None:
    kept, removed = Doorbell(), Doorbell()
    waiter.add(kept)
    waiter.add(removed)
    waiter.remove(removed)
    kept.ring()
    removed.ring()
    assert waiter.wait(TIMEOUT_S) == [kept]
    waiter.close()


def ring_and_sleep(bell: Doorbell) -> None:
    bell.ring()
    time.sleep(TIMEOUT_S)


def test_a_killed_child_wakes_the_waiter() -> None:
    context = multiprocessing.get_context("spawn")
    bell, waiter = Doorbell(), Waiter()
    child = context.Process(target=ring_and_sleep, args=(bell,))
    child.start()
    waiter.add(bell)
    assert child.pid is not None
    end = Descriptor(os.pidfd_open(child.pid))
    waiter.add(end)
    assert waiter.wait(TIMEOUT_S) == [bell]
    assert waiter.wait(0.0) == []
    os.kill(child.pid, signal.SIGKILL)
    assert waiter.wait(TIMEOUT_S) == [end]
    child.join(TIMEOUT_S)
    assert child.exitcode == -signal.SIGKILL

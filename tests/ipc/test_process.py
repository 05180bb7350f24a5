from __future__ import annotations

import multiprocessing
import os
import signal
import time
from multiprocessing.connection import Connection

import psutil
import pytest

from nanopd.ipc import process
from nanopd.ipc.process import die_with_parent

TIMEOUT_S = 30.0


def report_and_sleep(connection: Connection) -> None:
    die_with_parent()
    connection.send(os.getpid())
    time.sleep(2 * TIMEOUT_S)


def spawn_and_sleep(connection: Connection) -> None:
    multiprocessing.get_context("spawn").Process(target=report_and_sleep, args=(connection,)).start()
    time.sleep(2 * TIMEOUT_S)


def test_kill_of_the_parent_kills_the_child() -> None:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    parent = context.Process(target=spawn_and_sleep, args=(there,))
    parent.start()
    assert here.poll(TIMEOUT_S)
    child = psutil.Process(here.recv())
    assert parent.pid is not None
    os.kill(parent.pid, signal.SIGKILL)
    parent.join(TIMEOUT_S)
    deadline = time.monotonic() + TIMEOUT_S
    while child.is_running() and child.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "the child outlived its parent"
        time.sleep(0.01)


def arrive_late() -> None:
    os.getppid = lambda: 1  # as if the parent had ended before prctl took effect
    process.die_with_parent()


def test_a_parent_that_is_gone_already() -> None:
    child = multiprocessing.get_context("spawn").Process(target=arrive_late)
    child.start()
    child.join(TIMEOUT_S)
    assert child.exitcode == -signal.SIGKILL


def test_is_for_children() -> None:
    if multiprocessing.parent_process() is not None:
        pytest.skip("run by a process that multiprocessing started")
    with pytest.raises(AssertionError, match="multiprocessing"):
        die_with_parent()

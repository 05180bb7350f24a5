"""The entry of a worker process, and its loop.

Control messages (a pipe, pickled, in this order): to the parent any number of Progress, then Ready, or at any time
Failed; to the worker one Peers once all workers are ready, then Shutdown. Steps, plans and their results go
through the channel. The process ends with its parent, with Shutdown, or with the first exception, which it reports.
"""

from __future__ import annotations

import contextlib
import os
import time
import traceback
from collections import deque
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import cast

import psutil
import torch

from nanopd import cpu
from nanopd.config import EngineConfig, ModelConfig
from nanopd.ipc.channel import Endpoint
from nanopd.ipc.doorbell import Waiter
from nanopd.ipc.ring import RingFull
from nanopd.ipc.shared_memory import SharedMemory
from nanopd.messages import Failed, Progress, Ready, Shutdown, StepBatch, StepResult, TransferAck, TransferPlan
from nanopd.wire import decode, encode, encoded_size
from nanopd.worker.worker import Launched, Worker

PROGRESS_INTERVAL_S = 0.1
IDLE_WAIT_S = 10.0
RING_FULL_WAIT_S = 0.001


def main(
    index: int,
    config: EngineConfig,
    model: ModelConfig,
    path: Path,
    endpoint: Endpoint,
    control: Connection,
    kv_memories: list[SharedMemory],
) -> None:
    """Run worker `index` until told to stop. Ctrl-C is for the parent, which blocks it here and then says Shutdown."""
    try:
        _use_threads(num_threads(config))
        worker = Worker(index, config, model, path, kv_memories, _progress_reporter(control))
        control.send(Ready(worker.num_blocks, os.getpid()))
        for peer, (generation, num_blocks) in control.recv().peers.items():
            worker.connect(peer, generation, num_blocks)
        endpoint.open()
        _serve(worker, endpoint, control)
    except BaseException as error:
        with contextlib.suppress(OSError):  # the parent is gone
            control.send(Failed(f"{type(error).__name__}: {error}", traceback.format_exc()))
        raise SystemExit(1) from None


def num_threads(config: EngineConfig) -> int:
    """A CPU worker's share of this process's cores; all of them where only GPUs work, whose workers use one or two."""
    num_cores = len(psutil.Process().cpu_affinity())
    num_cpu_workers = sum(worker.device == "cpu" for worker in config.workers)
    return max(1, num_cores // max(1, num_cpu_workers))


def _use_threads(count: int) -> None:
    """Let torch and numba use `count` threads; more than there are cores cost a factor of 50 by spinning."""
    cpu.prepare_thread()  # first: when numba starts its threads, it resets OpenMP's number of them, which is torch's
    torch.set_num_threads(count)


def _serve(worker: Worker, endpoint: Endpoint, control: Connection) -> None:
    """Start what comes in and report what is done, in order; sleep only when nothing is under way."""
    waiter = Waiter()
    waiter.add(endpoint.bell)
    waiter.add(control)
    under_way: deque[Launched] = deque()
    while True:
        view = endpoint.reader.read()
        if view is not None:
            under_way.append(worker.launch(cast("StepBatch | TransferPlan", decode(view))))
            endpoint.reader.release()
        while under_way and under_way[0].is_done():
            _reply(endpoint, under_way.popleft().result())
        if view is None and not under_way and control in waiter.wait(IDLE_WAIT_S):
            command = control.recv()
            assert isinstance(command, Shutdown)
            return


def _reply(endpoint: Endpoint, result: StepResult | TransferAck) -> None:
    nbytes = encoded_size(result)
    while True:
        try:
            out = endpoint.writer.reserve(nbytes)
            break
        except RingFull:
            time.sleep(RING_FULL_WAIT_S)  # the parent is behind
    encode(result, out)
    endpoint.commit(nbytes)


def _progress_reporter(control: Connection) -> Callable[[int, int], None]:
    last_s = 0.0

    def report(done_bytes: int, total_bytes: int) -> None:
        nonlocal last_s
        if time.monotonic() - last_s >= PROGRESS_INTERVAL_S or done_bytes == total_bytes:
            last_s = time.monotonic()
            control.send(Progress(done_bytes, total_bytes))

    return report

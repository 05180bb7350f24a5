"""The entry of a worker process, and its loop.

Control messages (a pipe, pickled, in this order): to the parent any number of Progress, then Ready, or at any time
Failed; to the worker any number of Peers, then Shutdown. Steps, plans and their results go through the channel. The
process ends with its parent, with Shutdown, or with the first exception, which it reports.
"""

from __future__ import annotations

import contextlib
import time
import traceback
from collections import defaultdict, deque
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
from nanopd.ipc.shared_memory import Memories
from nanopd.messages import Failed, Progress, Ready, Shutdown, ToWorker, TransferPlan
from nanopd.wire import decode, encode
from nanopd.worker.kv_transfer import Pair
from nanopd.worker.pending import Pending
from nanopd.worker.worker import Worker

IDLE_WAIT_S = 10.0
CPU_POLL_INTERVAL_S = 0.001  # while a CPU worker waits for the other side of a relay
GPU_SPIN_S = 0.1  # of a GPU's worker before it sleeps: sequences that are handed over to it should find it awake
CONTROL_INTERVAL_S = 0.01
BACKLOG_WAIT_S = 0.001  # while the parent is behind with reading


def main(
    index: int,
    config: EngineConfig,
    model: ModelConfig,
    path: Path,
    endpoint: Endpoint,
    control: Connection,
    memories: Memories,
    load: Callable[..., Worker] = Worker.load,
) -> None:
    """Run worker `index`, which `load` makes, until told to stop.

    Ctrl-C is for the parent, which blocks it here and then says Shutdown.
    """
    try:
        _use_threads(num_threads(config))
        worker = load(index, config, model, path, memories, lambda *done: control.send(Progress(*done)))
        control.send(Ready(worker.num_blocks, worker.num_host_blocks, worker.paths, worker.kv_handle))
        is_cpu = config.workers[index].device == "cpu"
        waits = (CPU_POLL_INTERVAL_S, 0.0) if is_cpu else (0.0, GPU_SPIN_S)
        _Server(worker, endpoint, control, *waits).run()
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


class _Server:
    """Begins what comes in and reports what is done: steps in order, and the plans of each pair of workers in order."""

    def __init__(
        self, worker: Worker, endpoint: Endpoint, control: Connection, poll_interval_s: float, spin_s: float
    ) -> None:
        self._worker, self._endpoint, self._control = worker, endpoint, control
        self._poll_interval_s = poll_interval_s
        self._waiter = Waiter(spin_s)
        self._waiter.add(endpoint, once=True)
        self._waiter.add(control)
        self._under_way: defaultdict[Pair | None, deque[Pending]] = defaultdict(deque)  # None: steps
        self._is_told_to_stop = False
        worker.call_between_layers(self._reply_to_done)  # launching a prompt's step takes a third of its time

    def run(self) -> None:
        look_s = 0.0
        while not self._is_told_to_stop:
            is_idle = not (self._begin_next() | self._reply_to_done())
            ready = self._waiter.wait(self._wait_s()) if is_idle and self._wait_s() else []
            if self._control in ready or time.monotonic() >= look_s:
                look_s = time.monotonic() + CONTROL_INTERVAL_S
                while not self._is_told_to_stop and self._control.poll():
                    self._obey()

    def _begin_next(self) -> bool:
        data = self._endpoint.receive()
        if data is None:
            return False
        message = cast("ToWorker", decode(data))
        lane = (message.src_worker, message.dst_worker) if isinstance(message, TransferPlan) else None
        while isinstance(message, TransferPlan) and not self._worker.knows(message):
            self._obey()
        self._under_way[lane].append(self._worker.launch(message))
        return True

    def _reply_to_done(self) -> bool:
        """Whether anything was done."""
        num_done = 0
        for queue in self._under_way.values():
            while queue and queue[0].is_done():
                result = queue.popleft().result()
                num_done += 1
                if result is not None:
                    self._endpoint.send(encode(result))
        return num_done > 0

    def _wait_s(self) -> float:
        """How long to sleep if nothing happens: not at all while a device may finish something."""
        if any(self._under_way.values()):
            return self._poll_interval_s
        return BACKLOG_WAIT_S if self._endpoint.has_backlog else IDLE_WAIT_S

    def _obey(self) -> None:
        command = self._control.recv()
        if isinstance(command, Shutdown):
            self._is_told_to_stop = True
            return
        for worker, peer in command.peers.items():
            self._worker.connect(worker, peer)

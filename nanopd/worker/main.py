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
from typing import TypeAlias, cast

import psutil
import torch

from nanopd import cpu
from nanopd.config import EngineConfig, WorkerSpec
from nanopd.ipc.channel import Endpoint
from nanopd.ipc.doorbell import Waiter
from nanopd.ipc.shared_memory import Memories
from nanopd.messages import Failed, Progress, Ready, Shutdown, ToWorker, TransferPlan
from nanopd.wire import decode, encode
from nanopd.worker.kv_transfer import Pair
from nanopd.worker.pending import Pending
from nanopd.worker.worker import Worker

IDLE_WAIT_S = 10.0
CPU_POLL_INTERVAL_S = 0.001  # how often a CPU worker looks whether the other side of a relay has gone on
GPU_SPIN_S = 0.1  # how long a GPU's worker spins before it sleeps, so that a sequence handed over finds it awake
CONTROL_INTERVAL_S = 0.01
BACKLOG_WAIT_S = 0.001  # how often a worker looks whether the parent, which was behind, has read

Loader: TypeAlias = Callable[..., Worker]  # called as `Worker.load`


def main(
    spec: WorkerSpec, memories: Memories, endpoint: Endpoint, control: Connection, load: Loader = Worker.load
) -> None:
    """Run the worker, which `load` makes, until told to stop.

    Ctrl-C is for the parent, which blocks it here and then says Shutdown.
    """
    try:
        # Numba goes first: when it starts its threads, it resets OpenMP's number of them, which is torch's too.
        cpu.prepare_thread()
        torch.set_num_threads(num_threads(spec.config))
        worker = load(spec, memories, lambda *done: control.send(Progress(*done)))
        control.send(Ready(worker.num_blocks, worker.num_host_blocks, worker.paths, worker.kv_handle))
        is_cpu = spec.config.workers[spec.index].device == "cpu"
        waits = (CPU_POLL_INTERVAL_S, 0.0) if is_cpu else (0.0, GPU_SPIN_S)
        _Server(worker, endpoint, control, *waits).run()
    except BaseException as error:
        with contextlib.suppress(OSError):  # raised where the parent is gone
            control.send(Failed(f"{type(error).__name__}: {error}", traceback.format_exc()))
        raise SystemExit(1) from None


def num_threads(config: EngineConfig) -> int:
    """A CPU worker's share of this process's cores; all of them where only GPUs work, whose workers use one or two.

    More threads than cores cost a factor of 50 by spinning.
    """
    num_cores = len(psutil.Process().cpu_affinity())
    num_cpu_workers = sum(worker.device == "cpu" for worker in config.workers)
    return max(1, num_cores // max(1, num_cpu_workers))


class _Server:
    """The loop: begins what comes in and reports what is done, steps in order and the plans of each pair in order."""

    def __init__(
        self, worker: Worker, endpoint: Endpoint, control: Connection, poll_interval_s: float, spin_s: float
    ) -> None:
        self._worker, self._endpoint, self._control = worker, endpoint, control
        self._poll_interval_s = poll_interval_s
        self._waiter = Waiter(spin_s)
        self._waiter.add(endpoint, once=True)
        self._waiter.add(control)
        self._under_way: defaultdict[Pair | None, deque[Pending]] = defaultdict(deque)  # by pair of plans; None: steps
        self._is_told_to_stop = False
        # The launch of a prompt's step takes a third of the step's time, in which other work gets done.
        worker.call_between_layers(self._reply_to_done)

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
        """Send the results of what is done. Returns whether anything was."""
        num_done = 0
        for queue in self._under_way.values():
            while queue and queue[0].is_done():
                result = queue.popleft().result()
                num_done += 1
                if result is not None:
                    self._endpoint.send(encode(result))
        return num_done > 0

    def _wait_s(self) -> float:
        """Seconds to sleep if nothing happens: none while a GPU may finish something."""
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

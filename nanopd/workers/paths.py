"""The ways of KV blocks between workers, seen from the parent: who is told of a plan, and what readies each way."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

import numpy as np

from nanopd.errors import WorkerError
from nanopd.messages import Route, TransferPath, TransferPlan
from nanopd.workers.client import WorkerClient

WARM_UP_TIMEOUT_S = 60.0  # kernels may have to compile
POLL_INTERVAL_S = 0.001


def send_plan(plan: TransferPlan, workers: Sequence[WorkerClient]) -> None:
    """To the destination, which acknowledges; before it to the source, where both have to act."""
    dst = workers[plan.dst_worker]
    if dst.paths.get(plan.src_worker) is TransferPath.RELAY:
        workers[plan.src_worker].send(plan)
    dst.send(plan)


def warm_up(workers: Sequence[WorkerClient], routes: Iterable[Route]) -> None:
    """Move the null block along each route with two workers: kernels compile and relays get their memory now.

    For workers of generation 0 that do nothing else.

    Raises:
        WorkerError: a worker has died, or does not answer.
    """
    null_block = np.zeros(1, np.int32)
    unanswered = [0] * len(workers)
    for number, route in enumerate(route for route in routes if not route.is_collocated):
        src, dst = route.prefill_worker, route.decode_worker
        send_plan(TransferPlan(-1 - number, src, 0, dst, 0, null_block, null_block), workers)
        unanswered[dst] += 1
    end_s = time.monotonic() + WARM_UP_TIMEOUT_S
    while any(unanswered):
        for index, worker in enumerate(workers):
            unanswered[index] -= len(worker.poll())  # which raises if the worker has died
            if unanswered[index] and time.monotonic() > end_s:
                raise WorkerError(index, "has not acknowledged its first blocks from other workers")
        time.sleep(POLL_INTERVAL_S)

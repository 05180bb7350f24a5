"""The ways of KV blocks between workers, seen from the parent: who is told of a plan, and what readies each way."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

import numpy as np

from nanopd.errors import WorkerError
from nanopd.messages import Route, TransferAck, TransferPath, TransferPlan
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
    unanswered: dict[int, Route] = {}  # by plan_id
    for number, route in enumerate(route for route in routes if not route.is_collocated):
        plan_id, src, dst = -1 - number, route.prefill_worker, route.decode_worker  # the engine's ids are positive
        send_plan(TransferPlan(plan_id, src, 0, dst, 0, null_block, null_block), workers)
        unanswered[plan_id] = route
    end_s = time.monotonic() + WARM_UP_TIMEOUT_S
    while unanswered:
        for worker in workers:
            for ack in worker.poll():
                assert isinstance(ack, TransferAck)
                del unanswered[ack.plan_id]
        if unanswered and time.monotonic() > end_s:
            route = next(iter(unanswered.values()))
            raise WorkerError(route.decode_worker, f"has not answered to blocks from worker {route.prefill_worker}")
        time.sleep(POLL_INTERVAL_S)

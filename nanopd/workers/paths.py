"""The ways of KV blocks between workers, seen from the parent: who is told of a plan, and how fast each way is."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np

from nanopd.errors import WorkerError
from nanopd.messages import Route, StepBatch, StepResult, TransferAck, TransferPath, TransferPlan

PROBE_BYTES = 64 << 20
PROBE_TIMEOUT_S = 60.0  # kernels may have to compile
POLL_INTERVAL_S = 20e-6

logger = logging.getLogger(__name__)


class Client(Protocol):
    """A worker as the parent sees it."""

    paths: dict[int, TransferPath]  # by source: how blocks get to this worker

    def send(self, message: StepBatch | TransferPlan) -> None: ...

    def poll(self) -> list[StepResult | TransferAck]: ...


def send_plan(plan: TransferPlan, workers: Sequence[Client]) -> None:
    """To the destination, which acknowledges; before it to the source, where both have to act."""
    dst = workers[plan.dst_worker]
    if dst.paths.get(plan.src_worker) is TransferPath.RELAY:
        workers[plan.src_worker].send(plan)
    dst.send(plan)


def measure(
    workers: Sequence[Client], routes: Iterable[Route], block_bytes: int, max_blocks: int
) -> dict[Route, float]:
    """GB/s of each route with two workers, through the same plans as all blocks: null blocks, the second of two plans.

    For workers of generation 0 that do nothing else. A plan has at most `max_blocks`.

    Raises:
        WorkerError: a worker has died, or does not answer.
    """
    rates = {}
    num_blocks = max(1, min(PROBE_BYTES // block_bytes, max_blocks))
    for number, route in enumerate(route for route in routes if not route.is_collocated):
        for count in (1, num_blocks):  # the first one compiles and allocates
            ack = _probe(workers, route, -1 - number, count)
        rates[route] = ack.num_bytes / max(1, ack.duration_us) / 1e3
        path = workers[route.decode_worker].paths[route.prefill_worker]
        logger.info("KV blocks %s: %s, %.1f GB/s", route, path.value, rates[route])
    return rates


def _probe(workers: Sequence[Client], route: Route, plan_id: int, num_blocks: int) -> TransferAck:
    null_blocks = np.zeros(num_blocks, np.int32)
    src, dst = route.prefill_worker, route.decode_worker
    send_plan(TransferPlan(plan_id, src, 0, dst, 0, null_blocks, null_blocks), workers)
    end_s = time.monotonic() + PROBE_TIMEOUT_S
    while not (acks := workers[dst].poll()):
        workers[src].poll()  # raises if it has died
        if time.monotonic() > end_s:
            raise WorkerError(dst, f"has not answered to blocks from worker {src}")
        time.sleep(POLL_INTERVAL_S)
    (ack,) = acks
    assert isinstance(ack, TransferAck)
    return ack

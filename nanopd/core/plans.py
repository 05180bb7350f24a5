"""The transfer plans that are out, and the hand-overs that wait for them.

Blocks that a plan names are pinned on both sides until the plan is acknowledged, whatever becomes of the sequence.
Parent process, one thread. Knows the pools of both workers, not why blocks move.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from nanopd.core.residency import Residency
from nanopd.core.scheduler import Scheduler
from nanopd.core.sequence import Sequence
from nanopd.messages import Route, TransferPlan


@dataclass(slots=True)
class Handover:
    """One sequence on its way from a worker to another."""

    seq: Sequence
    src: Scheduler
    dst: Scheduler
    home: Route | None = None  # of a sequence that has decoded at the source: its route if it stays
    dst_table: list[int] | None = None  # reserved there; None: no room so far
    num_computed: int = 0  # tokens whose KV entries exist at the source and may move
    num_planned: int = 0  # blocks that plans have been sent for, or that the destination had already
    num_plans_out: int = 0
    is_complete: bool = False  # nothing more will be computed at the source
    waits_since_s: float = math.inf  # when the sequence began to wait for room with a time limit; inf: it does not

    @property
    def has_arrived(self) -> bool:
        return self.is_complete and self.dst_table is not None and not self.num_plans_out


@dataclass(slots=True)
class _PlanOut:
    plan: TransferPlan
    src: Residency  # as they were when it was sent; a worker that is replaced gets another one
    dst: Residency
    handover: Handover | None  # None: nobody waits for it any more

    def unpin(self) -> None:
        self.src.blocks.unpin(self.plan.src_blocks)
        self.dst.blocks.unpin(self.plan.dst_blocks)


class Plans:
    """The plans that are out, whose blocks stay pinned until each is acknowledged or its destination is dead."""

    def __init__(self, send: Callable[[TransferPlan], None]) -> None:
        self._send = send
        self._out: dict[int, _PlanOut] = {}
        self._num_plans = 0

    def __bool__(self) -> bool:
        return bool(self._out)

    def send(self, handover: Handover, src_blocks: list[int], dst_blocks: list[int]) -> None:
        self._num_plans += 1
        src, dst = handover.src, handover.dst
        blocks = np.array(src_blocks, np.int32), np.array(dst_blocks, np.int32)
        plan = TransferPlan(self._num_plans, src.worker, src.generation, dst.worker, dst.generation, *blocks)
        src.residency.blocks.pin(src_blocks)
        dst.residency.blocks.pin(dst_blocks)
        handover.num_plans_out += 1
        self._out[plan.plan_id] = _PlanOut(plan, src.residency, dst.residency, handover)
        self._send(plan)

    def acknowledge(self, plan_id: int) -> Handover | None:
        """The hand-over that has one plan less to wait for; None: nobody waits for this plan."""
        if (out := self._out.pop(plan_id, None)) is None:
            return None  # the plan was dropped with its destination
        out.unpin()
        if out.handover is not None:
            out.handover.num_plans_out -= 1
        return out.handover

    def forget(self, handover: Handover) -> None:
        """Nobody waits for the plans of a hand-over any more; they keep their blocks pinned."""
        for out in self._out.values():
            if out.handover is handover:
                out.handover = None
        handover.num_plans_out = 0

    def drop(self, dead: Residency) -> None:
        """No plan to a dead worker will be acknowledged."""
        for plan_id, out in list(self._out.items()):
            if out.dst is dead:
                out.unpin()
                del self._out[plan_id]

    def pinned(self, residency: Residency) -> Iterable[np.ndarray]:
        """Blocks of a worker that plans name."""
        for out in self._out.values():
            if out.src is residency:
                yield out.plan.src_blocks
            if out.dst is residency:
                yield out.plan.dst_blocks

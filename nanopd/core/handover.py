"""Moving sequences from the worker that prefills them to the worker that decodes them.

Owns what is under way between two workers: places reserved at the destination, which blocks have been sent, and the
plans that are out. Blocks that a plan names are pinned on both sides until the plan is acknowledged, whatever becomes
of the sequence. A sequence that finds no room in time goes to another decode worker that has, or stays where it is
if that worker may decode. On a pure prefill worker it goes on waiting: nothing waits for room there in order to leave
a decode worker, so no workers can wait for each other in a circle.

    routed ─ begin ─▶ start ─▶ (reserve as soon as there is room; complete blocks move after each chunk)
           ─ prefilled ─▶ (the rest moves) ─ every plan acknowledged ─▶ decodes at the destination
                     └─ no room within the time-out ─▶ another decode worker | stays | goes on waiting

Parent process, one thread. Knows schedulers and plans, not how bytes travel.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from nanopd.core.scheduler import Scheduler
from nanopd.core.sequence import Sequence, SequenceStatus
from nanopd.messages import EventKind, Route, TransferAck, TransferPlan


@dataclass(slots=True)
class _Handover:
    seq: Sequence
    src: Scheduler
    dst: Scheduler
    dst_table: list[int] | None = None  # reserved there; None: no room so far
    num_computed: int = 0  # tokens whose KV entries exist at the source
    num_planned: int = 0  # blocks that plans have been sent for
    num_plans_out: int = 0
    prefilled_s: float | None = None  # when the first token was there

    @property
    def has_arrived(self) -> bool:
        return self.prefilled_s is not None and self.dst_table is not None and not self.num_plans_out


@dataclass(slots=True)
class _PlanOut:
    plan: TransferPlan
    handover: _Handover | None  # None: nobody waits for it any more


class Handovers:
    """All hand-overs under way."""

    def __init__(self, schedulers: list[Scheduler], send: Callable[[TransferPlan], None], timeout_s: float) -> None:
        self._schedulers = schedulers
        self._send = send  # gives a plan to the worker that executes it: the destination, which pulls
        self._timeout_s = timeout_s
        self._by_seq: dict[int, _Handover] = {}  # from routing on
        self._roomless: dict[int, _Handover] = {}  # those of started sequences without a reservation, oldest first
        self._plans: dict[int, _PlanOut] = {}
        self._num_plans = 0

    @property
    def has_plans_out(self) -> bool:
        return bool(self._plans)

    def begin(self, seq: Sequence) -> None:
        assert seq.route is not None and not seq.route.is_collocated
        src, dst = self._schedulers[seq.route.prefill_worker], self._schedulers[seq.route.decode_worker]
        self._by_seq[seq.seq_id] = _Handover(seq, src, dst)
        dst.num_expected += 1

    def start(self, seq: Sequence) -> None:
        """The prefill has started: from now on a reservation is worth its blocks."""
        handover = self._by_seq.get(seq.seq_id)
        if handover is not None:
            self._roomless[seq.seq_id] = handover

    def advance(self, seq: Sequence, num_computed: int) -> None:
        """The first `num_computed` tokens have their KV entries: whole blocks of them may move."""
        handover = self._by_seq.get(seq.seq_id)
        if handover is not None:
            handover.num_computed = num_computed
            self._move_blocks(handover)

    def prefilled(self, seq: Sequence, now_s: float) -> None:
        """The first token is there: all blocks may move."""
        handover = self._by_seq.get(seq.seq_id)
        if handover is not None:  # else it was told to stay while its last chunk was computed
            seq.status = SequenceStatus.MOVING
            seq.log_event(now_s, EventKind.MOVING, handover.src.worker)
            handover.prefilled_s = now_s
            self._move_blocks(handover)

    def acknowledge(self, ack: TransferAck, now_s: float) -> None:
        out = self._plans.pop(ack.plan_id, None)
        if out is None:
            return  # of a plan that was dropped with its destination
        self._unpin(out.plan)
        if out.handover is not None:
            out.handover.num_plans_out -= 1
            if out.handover.has_arrived:
                self._arrive(out.handover, now_s)

    def cancel(self, seq: Sequence) -> None:
        """Forget a hand-over, if there is one; plans that are out keep their blocks pinned."""
        handover = self._by_seq.get(seq.seq_id)
        if handover is not None:
            self._cancel_reservation(handover)
            self._end(handover)

    def tick(self, now_s: float) -> None:
        """Try to reserve what could not be reserved; redirect what has waited too long."""
        for handover in list(self._roomless.values()):
            if not self._try_reserve(handover, handover.dst) and now_s >= self._due_s(handover):
                self._redirect(handover, now_s)

    def next_due_s(self) -> float:
        """When `tick` has to redirect a sequence, if no room is found before; inf: never."""
        return min(map(self._due_s, self._roomless.values()), default=math.inf)

    def _due_s(self, handover: _Handover) -> float:
        return math.inf if handover.prefilled_s is None else handover.prefilled_s + self._timeout_s

    def drop_worker(self, worker: int, now_s: float) -> list[Sequence]:
        """A worker is dead: no plan to it will be acknowledged, sequences bound for it go elsewhere.

        Returns those that have to start over. Sequences *from* that worker are the caller's to cancel.
        """
        for plan_id, out in list(self._plans.items()):
            if out.plan.dst_worker == worker:
                self._unpin(out.plan)
                del self._plans[plan_id]
        bound = [h for h in self._by_seq.values() if h.dst.worker == worker and not h.src.is_dead]
        return [handover.seq for handover in bound if not self._redirect(handover, now_s)]

    def tables(self, worker: int) -> list[list[int]]:
        """Reserved block tables on a worker, for integrity checks."""
        return [h.dst_table for h in self._by_seq.values() if h.dst.worker == worker and h.dst_table is not None]

    def pinned(self, worker: int) -> Iterable[np.ndarray]:
        """Blocks of a worker that plans name, for integrity checks."""
        for out in self._plans.values():
            if out.plan.src_worker == worker:
                yield out.plan.src_blocks
            if out.plan.dst_worker == worker:
                yield out.plan.dst_blocks

    def _try_reserve(self, handover: _Handover, dst: Scheduler) -> bool:
        table = dst.reserve(handover.seq.num_tokens)
        if table is not None:
            self._set_destination(handover, dst)
            handover.dst_table, handover.num_planned = table, 0
            self._roomless.pop(handover.seq.seq_id, None)
            self._move_blocks(handover)
        return table is not None

    def _move_blocks(self, handover: _Handover) -> None:
        """Send a plan for what is complete and has not been sent."""
        if handover.dst_table is None:
            return
        block_size = handover.src.blocks.block_size
        is_last = handover.prefilled_s is not None
        end = -(-handover.num_computed // block_size) if is_last else handover.num_computed // block_size
        start, handover.num_planned = handover.num_planned, end
        if end > start:
            self._send_plan(handover, handover.seq.block_table[start:end], handover.dst_table[start:end])

    def _send_plan(self, handover: _Handover, src_blocks: list[int], dst_blocks: list[int]) -> None:
        self._num_plans += 1
        src, dst = handover.src, handover.dst
        blocks = np.array(src_blocks, np.int32), np.array(dst_blocks, np.int32)
        plan = TransferPlan(self._num_plans, src.worker, src.generation, dst.worker, dst.generation, *blocks)
        src.blocks.pin(src_blocks)
        dst.blocks.pin(dst_blocks)
        handover.num_plans_out += 1
        self._plans[plan.plan_id] = _PlanOut(plan, handover)
        self._send(plan)

    def _unpin(self, plan: TransferPlan) -> None:
        for worker, blocks in ((plan.src_worker, plan.src_blocks), (plan.dst_worker, plan.dst_blocks)):
            if not self._schedulers[worker].is_dead:
                self._schedulers[worker].blocks.unpin(blocks)

    def _arrive(self, handover: _Handover, now_s: float) -> None:
        seq, table = handover.seq, handover.dst_table
        assert table is not None
        self._end(handover)
        handover.src.remove(seq)
        handover.dst.take_over(seq, table)
        seq.log_event(now_s, EventKind.MOVED, handover.dst.worker)

    def _redirect(self, handover: _Handover, now_s: float) -> bool:
        """Find another way for a sequence whose destination has no room, or is gone; False: there is none at all."""
        self._cancel_reservation(handover)
        seq, src, dst = handover.seq, handover.src, handover.dst
        others = [s for s in self._schedulers if s.role.may_decode and not s.is_dead and s not in (src, dst)]
        others = sorted((s for s in others if s.can_hold(seq.end_len)), key=lambda s: s.load)
        if seq.slot is not None and any(self._try_reserve(handover, other) for other in others):
            return True
        if src.role.may_decode:
            self._stay(handover)
        elif not dst.is_dead or others:
            self._set_destination(handover, others[0] if dst.is_dead else dst)
            handover.prefilled_s = None if handover.prefilled_s is None else now_s
            if seq.slot is not None:
                self._roomless[seq.seq_id] = handover
        else:
            self._end(handover)
            src.remove(seq)
            return False
        return True

    def _stay(self, handover: _Handover) -> None:
        seq, src = handover.seq, handover.src
        self._end(handover)
        seq.route = Route(src.worker, src.worker)
        if seq in src.departing:  # else its last chunk is still to come and will see the new route
            src.keep(seq)

    def _end(self, handover: _Handover) -> None:
        handover.dst.num_expected -= 1
        del self._by_seq[handover.seq.seq_id]
        self._roomless.pop(handover.seq.seq_id, None)

    def _set_destination(self, handover: _Handover, dst: Scheduler) -> None:
        handover.dst.num_expected -= 1
        dst.num_expected += 1
        handover.dst = dst
        handover.seq.route = Route(handover.src.worker, dst.worker)

    def _cancel_reservation(self, handover: _Handover) -> None:
        for out in self._plans.values():
            if out.handover is handover:
                out.handover = None
        handover.num_plans_out = 0
        if handover.dst_table is not None:
            if not handover.dst.is_dead:
                handover.dst.cancel_reservation(handover.dst_table)
            handover.dst_table = None

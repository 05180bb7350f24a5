"""Moving sequences from the worker that has computed them so far to the worker that goes on with them.

Owns what is under way between two workers: places reserved at the destination, which blocks have been sent, and the
plans that are out. Blocks that a plan names are pinned on both sides until the plan is acknowledged, whatever becomes
of the sequence. A sequence that finds no room in time goes to another decode worker that has room, or stays where it
is if that worker may decode. On a pure prefill worker it goes on waiting: nothing waits for room there in order to
leave a decode worker, so no workers can wait for each other in a circle.

    routed ─ begin ─▶ start ─▶ (reserve as soon as there is room; complete blocks move after each chunk)
           ─ prefilled ─▶ (the rest moves) ─ every plan acknowledged ─▶ decodes at the destination
                     └─ no room within the time-out ─▶ another decode worker | stays | goes on waiting

A sequence that decodes already may move too. It decodes until there is room for it, then its steps in flight come back
and its blocks move as one plan; whatever goes wrong, it goes on where it is.

Parent process, one thread. Knows schedulers and plans, not how bytes travel.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from nanopd.core.plans import Handover, Plans
from nanopd.core.scheduler import Scheduler
from nanopd.core.sequence import Sequence, SequenceStatus
from nanopd.messages import EventKind, Route, TransferAck, TransferPlan


@dataclass(frozen=True, slots=True)
class _Refusal:
    """The last sequence that a destination had no room for; as long as nothing gets free, no longer one fits either."""

    num_tokens: int
    num_free: int  # blocks, without those kept for sequences that decode
    num_seqs: int

    def holds(self, dst: Scheduler) -> bool:
        return dst.queues.num_seqs >= self.num_seqs and dst.queues.num_spare_blocks <= self.num_free


class Handovers:
    """All hand-overs under way."""

    def __init__(self, schedulers: list[Scheduler], send: Callable[[TransferPlan], None], timeout_s: float) -> None:
        self._schedulers = schedulers  # the engine's own list, in which it replaces those of dead workers
        self._plans = Plans(send)  # `send` gives a plan to the worker that executes it: the destination, which pulls
        self._timeout_s = timeout_s
        self._by_seq: dict[int, Handover] = {}  # from routing on
        self._blocked: dict[int, Handover] = {}  # those of started sequences without a reservation, oldest first
        self._refusals: dict[Scheduler, _Refusal] = {}
        self._is_changed = False  # whether since the last `tick` another sequence waits
        self._due_s = math.inf  # no hand-over has to be redirected before this time
        self._draining: dict[int, Handover] = {}  # those that have a reservation and steps in flight to come back

    @property
    def has_plans_out(self) -> bool:
        return bool(self._plans)

    def begin(self, seq: Sequence) -> None:
        assert seq.route is not None and not seq.route.is_collocated
        src, dst = self._schedulers[seq.route.prefill_worker], self._schedulers[seq.route.decode_worker]
        self._add(Handover(seq, src, dst))

    def start(self, seq: Sequence, now_s: float) -> None:
        """The prefill has started: from now on a reservation is worth its blocks."""
        if (handover := self._by_seq.get(seq.seq_id)) is None:
            return
        others = (other for other in self._blocked.values() if other.dst is handover.dst and other.seq.rank < seq.rank)
        if any(other.is_complete for other in others) or not self._try_reserve(handover, handover.dst, now_s):
            self._blocked[seq.seq_id] = handover

    def move(self, seq: Sequence, dst: int, now_s: float) -> None:
        """Let a decoding sequence go on at another worker, as soon as there is room within the time-out."""
        assert seq.status is SequenceStatus.RUNNING and seq.route is not None
        self.cancel(seq)  # a move that was asked for earlier and has not begun is replaced
        src = self._schedulers[seq.route.decode_worker]
        handover = Handover(seq, src, self._schedulers[dst], home=seq.route, waits_since_s=now_s)
        self._add(handover)
        self._await_room(handover)

    def vacate(self, worker: int, now_s: float) -> None:
        """The worker may not decode any more: its sequences go elsewhere to decode, if another one can take them."""
        src = self._schedulers[worker]
        for handover in [h for h in self._by_seq.values() if h.dst is src]:
            self._redirect(handover, now_s)
        for seq in src.queues.decodes.seqs[:]:
            if seq.seq_id not in self._by_seq and (others := self.destinations(seq, src)):
                self.move(seq, others[0].worker, now_s)
        for seq in src.queues.prefilling:
            assert seq.route is not None
            if seq.route.is_collocated and (others := self.destinations(seq, src)):
                seq.route = Route(worker, others[0].worker)
                self.begin(seq)
                self.start(seq, now_s)

    def advance(self, seq: Sequence, num_computed: int) -> None:
        """The first `num_computed` tokens have their KV entries: whole blocks of them may move."""
        if (handover := self._of_prefill(seq)) is not None:
            handover.num_computed = num_computed
            self._move_blocks(handover)

    def prefilled(self, seq: Sequence, now_s: float) -> None:
        """The first token is there: all blocks may move."""
        if (handover := self._of_prefill(seq)) is not None:
            seq.status = SequenceStatus.MOVING
            seq.log_event(now_s, EventKind.MOVING, handover.src.worker)
            handover.is_complete = True
            handover.waits_since_s = now_s
            self._due_s = min(self._due_s, now_s + self._timeout_s)
            self._move_blocks(handover)

    def _of_prefill(self, seq: Sequence) -> Handover | None:
        """None: the sequence was told to stay while its last chunk was computed."""
        handover = self._by_seq.get(seq.seq_id)
        return None if handover is None or handover.home is not None else handover

    def acknowledge(self, ack: TransferAck, now_s: float) -> None:
        if (handover := self._plans.acknowledge(ack.plan_id)) is not None and handover.has_arrived:
            self._arrive(handover, now_s)

    def cancel(self, seq: Sequence) -> None:
        """Forget a hand-over, if there is one; plans that are out keep their blocks pinned."""
        if (handover := self._by_seq.get(seq.seq_id)) is not None:
            self._cancel_reservation(handover)
            self._end(handover)

    def tick(self, now_s: float) -> None:
        """Try to reserve what could not be reserved; redirect what has waited too long; move what is drained.

        Room is kept for sequences that wait with their prompt done, or small ones would take from a large one all that
        gets free.
        """
        if self._blocked:
            is_due = self._is_changed or now_s >= self._due_s
            if is_due or not all(refusal.holds(dst) for dst, refusal in self._refusals.items()):
                self._retry(now_s)
            else:
                for dst in self._refusals:
                    dst.queues.turn_away()
        for handover in list(self._draining.values()):
            if handover.src.residency.is_drained(handover.seq):
                self._complete(handover)
                if handover.has_arrived:  # nothing had been computed of the sequence, so there is no plan
                    self._arrive(handover, now_s)

    def _retry(self, now_s: float) -> None:
        self._refusals = {dst: refusal for dst, refusal in self._refusals.items() if refusal.holds(dst)}
        self._is_changed = False
        kept: list[Scheduler] = []
        for handover in sorted(self._blocked.values(), key=lambda handover: handover.seq.rank):
            if handover.dst not in kept and self._try_reserve(handover, handover.dst, now_s):
                continue
            if handover.is_complete:
                kept.append(handover.dst)
            if now_s >= handover.waits_since_s + self._timeout_s:
                self._redirect(handover, now_s)
        first_s = min((handover.waits_since_s for handover in self._blocked.values()), default=math.inf)
        self._due_s = first_s + self._timeout_s

    def next_due_s(self) -> float:
        """When `tick` may have to redirect a sequence, if no room is found before; inf: never."""
        return self._due_s if self._blocked else math.inf

    def drop_worker(self, worker: int, now_s: float) -> list[Sequence]:
        """A worker is dead: no plan to it will be acknowledged, sequences bound for it go elsewhere.

        Returns those that have to start over. Sequences *from* that worker are the caller's to cancel.
        """
        dead = self._schedulers[worker]
        self._plans.drop(dead.residency)
        self._refusals.pop(dead, None)
        bound = [h for h in self._by_seq.values() if h.dst is dead]
        return [handover.seq for handover in bound if not self._redirect(handover, now_s)]

    def held(self, worker: int) -> list[Iterable[int]]:
        """Reserved block tables on a worker, and blocks of it that plans name, for integrity checks."""
        tables = [h.dst_table or [] for h in self._by_seq.values() if h.dst.worker == worker]
        return [*tables, *self._plans.pinned(self._schedulers[worker].residency)]

    def _add(self, handover: Handover) -> None:
        self._by_seq[handover.seq.seq_id] = handover
        handover.dst.queues.expect(1)

    def destinations(self, seq: Sequence, *excluded: Scheduler) -> list[Scheduler]:
        """Workers that may decode the sequence and are large enough, the idlest first."""
        others = [s for s in self._schedulers if s.role.may_decode and not s.is_dead and s not in excluded]
        return sorted((s for s in others if s.can_hold(seq.end_len)), key=lambda s: s.load)

    def _try_reserve(self, handover: Handover, dst: Scheduler, now_s: float) -> bool:
        seq, src = handover.seq, handover.src
        num_tokens = seq.num_tokens if handover.home is None else src.residency.drained_len(seq)
        refusal = self._refusals.get(dst)
        if refusal is not None and num_tokens >= refusal.num_tokens and refusal.holds(dst):
            dst.queues.turn_away()
            return False
        if (reserved := dst.queues.reserve(num_tokens, seq.block_keys)) is None:
            if dst.queues.keeps_room:  # what gets free there is kept for a sequence that was swapped out
                self._is_changed = True
            else:
                self._refusals[dst] = _Refusal(num_tokens, dst.queues.num_spare_blocks, dst.queues.num_seqs)
            return False
        self._blocked.pop(seq.seq_id, None)
        if seq.status is SequenceStatus.RUNNING:
            src.queues.migrate(seq)
            seq.log_event(now_s, EventKind.MOVING, src.worker)
            self._draining[seq.seq_id] = handover
        self._set_destination(handover, dst)
        handover.dst_table, handover.num_planned = reserved
        self._move_blocks(handover)
        return True

    def _complete(self, handover: Handover) -> None:
        """A sequence that was decoding has all its steps back: its blocks may move."""
        seq = handover.seq
        del self._draining[seq.seq_id]
        handover.src.residency.slots.sync(seq)
        handover.num_computed, handover.is_complete = seq.num_tokens - 1, True
        self._move_blocks(handover)

    def _move_blocks(self, handover: Handover) -> None:
        """Send a plan for what is complete and has not been sent."""
        if handover.dst_table is None:
            return
        block_size = handover.src.residency.blocks.block_size
        num_computed = handover.num_computed
        end = -(-num_computed // block_size) if handover.is_complete else num_computed // block_size
        start = handover.num_planned
        if end > start:
            handover.num_planned = end
            self._plans.send(handover, handover.seq.block_table[start:end], handover.dst_table[start:end])

    def _arrive(self, handover: Handover, now_s: float) -> None:
        seq, table = handover.seq, handover.dst_table
        assert table is not None
        self._end(handover)
        handover.src.remove(seq)
        handover.dst.queues.take_over(seq, table)
        seq.log_event(now_s, EventKind.MOVED, handover.dst.worker)

    def _redirect(self, handover: Handover, now_s: float) -> bool:
        """Find another way for a sequence whose destination has no room, or is none any more; False: there is none."""
        self._cancel_reservation(handover)
        seq, src, dst = handover.seq, handover.src, handover.dst
        is_move, may_stay = handover.home is not None, src.role.may_decode
        others = self.destinations(seq, src, dst)
        # A sequence that may stay goes where it was asked to go, or not at all.
        may_go = seq.slot is not None and not (is_move and may_stay)
        if may_go and any(self._try_reserve(handover, other, now_s) for other in others):
            return True
        if not may_stay and (others or not dst.is_dead):
            keeps_dst = not others or (dst.role.may_decode and not dst.is_dead)
            self._wait_again(handover, dst if keeps_dst else others[0], now_s)
            return True
        self._end(handover)
        if may_stay or is_move:
            self._stay(handover)
        else:
            src.remove(seq)
        return may_stay or is_move

    def _wait_again(self, handover: Handover, dst: Scheduler, now_s: float) -> None:
        """Wait for room at `dst`, with a new time limit; a sequence that can decode meanwhile does so."""
        if handover.home is not None:
            self._stay(handover)
        self._set_destination(handover, dst)
        if handover.waits_since_s < math.inf:
            handover.waits_since_s = now_s
        if handover.seq.slot is not None:
            self._await_room(handover)

    def _await_room(self, handover: Handover) -> None:
        self._blocked[handover.seq.seq_id] = handover
        self._is_changed = True
        self._due_s = min(self._due_s, handover.waits_since_s + self._timeout_s)

    def _stay(self, handover: Handover) -> None:
        seq, src = handover.seq, handover.src
        self._draining.pop(seq.seq_id, None)
        handover.is_complete, handover.num_computed = False, 0
        seq.route = handover.home or Route(src.worker, src.worker)
        # Else the sequence decodes, or its last chunk is still to come and will see the new route.
        if seq in src.queues.migrating:
            src.queues.keep(seq)

    def _end(self, handover: Handover) -> None:
        seq_id = handover.seq.seq_id
        handover.dst.queues.expect(-1)
        del self._by_seq[seq_id]
        self._is_changed |= self._blocked.pop(seq_id, None) is not None
        self._draining.pop(seq_id, None)

    def _set_destination(self, handover: Handover, dst: Scheduler) -> None:
        handover.dst.queues.expect(-1)
        dst.queues.expect(1)
        handover.dst = dst
        if handover.seq.status is not SequenceStatus.RUNNING:  # else the sequence still decodes at home
            handover.seq.route = Route(handover.src.worker, dst.worker)

    def _cancel_reservation(self, handover: Handover) -> None:
        self._plans.forget(handover)
        if handover.dst_table is not None:
            handover.dst.queues.cancel_reservation(handover.dst_table)
            handover.dst_table = None

"""Gives sequences to workers: chooses a route by the policy, or lets a sequence wait for a worker or another sequence.

Engine's thread. Ends no sequence: those that cannot be served are returned, with the reason.
"""

from __future__ import annotations

from collections.abc import Iterable

from nanopd.config import EngineConfig
from nanopd.core.followers import Followers
from nanopd.core.handover import Handovers
from nanopd.core.scheduler import Scheduler
from nanopd.core.sequence import Sequence
from nanopd.engine.fleet import Clock, Fleet
from nanopd.engine.roles import Roles
from nanopd.messages import EventKind, Role, Route
from nanopd.routing.policy import Decision, Policy


class Dispatcher:
    """Queues sequences where the policy says."""

    def __init__(
        self, config: EngineConfig, fleet: Fleet, roles: Roles, policy: Policy, handovers: Handovers, clock: Clock
    ) -> None:
        self.followers = Followers(fleet.schedulers)
        self._max_chunk = config.max_num_batched_tokens
        self._fleet, self._roles, self._policy, self._clock = fleet, roles, policy, clock
        self._handovers = handovers
        self._stranded: list[Sequence] = []  # on no worker; those of their routes are being replaced
        self._role_changes: list[tuple[int, Role]] = []  # that the policy asks for

    def route(self, seqs: Iterable[Sequence]) -> list[Sequence]:
        """Choose a route for each unfinished sequence and queue it there; without one it waits for a worker.

        One that awaits a choice waits for that, and its followers wait for it no longer.

        Returns:
            Those that cannot be served, now on no worker; their `error` says why.
        """
        refused = []
        for seq in seqs:
            if seq.status.is_finished:
                continue
            seq.route = None  # it is on no worker now
            if seq.awaits_choice:
                refused += self.route(self.followers.release(seq))
            elif not self._try(seq):
                refused.append(seq)
        return refused

    def requeue(self, seq: Sequence, scheduler: Scheduler) -> list[Sequence]:
        """Let a preempted sequence wait where it decoded, or elsewhere if that worker cannot bring it back by itself.

        Returns:
            As `route` does.
        """
        assert seq.route is not None
        self._handovers.cancel(seq)
        seq.log_event(self._clock(), EventKind.PREEMPTED, scheduler.worker)
        is_home = seq.route.decode_worker == scheduler.worker and not seq.awaits_choice
        if is_home and (seq.host_table or scheduler.role is Role.MIXED):
            if not seq.host_table:
                seq.route = Route(scheduler.worker, scheduler.worker)
            scheduler.add(seq)
            return []
        scheduler.residency.forget_swapped(seq)
        return self.route([seq])

    def route_stranded(self) -> list[Sequence]:
        """Workers have come back, or will not, or have other roles. Returns as `route` does."""
        stranded, self._stranded = self._stranded, []
        return self.route(stranded)

    def _reroute_waiting(self) -> list[Sequence]:
        """Sequences that wait for a route which is not allowed any more take another one. Returns as `route` does."""
        refused = []
        for worker in self._fleet.live_workers:
            scheduler = self._fleet.schedulers[worker]
            for seq in list(scheduler.queues.waiting):
                if seq.route not in self._roles.allowed and self._roles.feasible(seq):
                    self._handovers.cancel(seq)
                    scheduler.remove(seq)
                    refused += self.route([seq])
        return refused

    def change_role(self, worker: int, role: Role) -> list[Sequence]:
        """Give a worker another role, and what it may not serve any more to others. Returns as `route` does."""
        self._roles.change(worker, role)
        refused = self._reroute_waiting()
        if not (role.may_decode or self._fleet.schedulers[worker].is_dead):
            self._handovers.vacate(worker, self._clock())
        return refused + self.route_stranded()

    def take_role_changes(self) -> list[tuple[int, Role]]:
        """Changes that the policy has asked for since the last call."""
        changes, self._role_changes = self._role_changes, []
        return changes

    def _try(self, seq: Sequence) -> bool:
        """Queue the sequence, or let it wait for a worker; False: it cannot be served, its `error` says why."""
        if not (routes := self._roles.feasible(seq)):
            if self._roles.can_serve(self._roles.allowed, seq.end_len):  # once dead workers have come back
                self._stranded.append(seq)
                return True
            seq.error = f"no route is left: {'; '.join(map(str, self._fleet.errors.values()))}"
            return False
        decision = self._policy.choose(routes, seq, self._fleet.schedulers, self._clock())
        if not seq.token_times_s:  # else the decision's predictions are of the rest of the answer
            seq.decision = decision
        self._role_changes += decision.roles
        if decision.route is None:
            seq.error = _turned_away(decision)
            return False
        seq.route = decision.route
        scheduler = self._fleet.schedulers[seq.route.prefill_worker]
        if decision.chunk_budget is not None:
            scheduler.limit_chunks(min(decision.chunk_budget, self._max_chunk))
        seq.log_event(self._clock(), EventKind.ROUTED, scheduler.worker)
        if not seq.route.is_collocated:
            self._handovers.begin(seq)
        scheduler.add(seq)
        return True


def _turned_away(decision: Decision) -> str:
    best = decision.taken
    assert best is not None
    figures = f"TTFT {best.ttft_ms:.0f} ms, first gap {best.first_gap_ms:.0f} ms, TPOT {best.tpot_ms:.1f} ms"
    return f"turned away: no route keeps the service levels; the best, {best.route}, would take {figures}"

"""When a worker should do more than its configured role allows, and when no more.

A prefill or decode worker becomes mixed while most requests would clearly do better on a route that only its role
forbids, and goes back when hardly any is served better for it. Sees predictions only; roles are the engine's to change.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from nanopd.config import allowed_routes
from nanopd.messages import Role, Route
from nanopd.routing.decision import Prediction, WorkerLoad
from nanopd.routing.outlook import RouteSet

MEMORY = 32  # requests
OPEN, CLOSE = 0.5, 0.05  # shares of requests
CLEAR_EXCESS = 0.05  # over the service levels
CLEAR_COST = 0.8  # of two routes that keep them alike

Changes = tuple[tuple[int, Role], ...]


class RoleKeeper:
    """Compares what routes promise within the configured roles, within those of now, and beyond them."""

    def __init__(self, roles: Sequence[Role], has_limits: bool) -> None:
        """`has_limits`: who keeps them all has nothing to gain."""
        self._roles, self._has_limits = roles, has_limits
        self._lack = 0.0  # share of requests that would be served better if one more worker were mixed
        self._gain = 0.0  # that are served better as some are
        self._wanted = np.zeros(len(roles))  # share of them for which this one would be
        self._feasible = self._within = self._beyond = RouteSet(())

    def changes(
        self,
        feasible: RouteSet,
        taken: Prediction,
        best: Callable[[RouteSet], Prediction],
        workers: Sequence[WorkerLoad],
    ) -> Changes:
        """Which workers should change their roles, after a request that will take the best of `feasible` routes."""
        if all(role is Role.MIXED for role in self._roles):
            return ()
        if feasible is not self._feasible:
            self._set_routes(feasible, workers)
        opened = [w for w, role in enumerate(self._roles) if workers[w].role is not role]
        may_lack = self._beyond.routes and (taken.excess > CLEAR_EXCESS or not self._has_limits)
        ideal = best(self._beyond) if may_lack else taken
        is_gain = not self._within.routes or (bool(opened) and _is_clearly_better(taken, best(self._within)))
        is_lacking = _is_clearly_better(ideal, taken)
        self._lack += (is_lacking - self._lack) / MEMORY
        self._gain += (is_gain - self._gain) / MEMORY
        self._wanted -= self._wanted / MEMORY
        if is_lacking:
            self._wanted[_beyond_roles(ideal.route, workers)] += 1 / MEMORY
        if self._lack > OPEN:
            worker = int(np.argmax(self._wanted))
            self._lack, self._gain, self._wanted[worker] = 0.0, 1.0, 0.0
            return ((worker, Role.MIXED),)
        if opened and self._gain < CLOSE:
            self._gain = 1.0
            worker = min(opened, key=lambda w: workers[w].load)
            return ((worker, self._roles[worker]),)
        return ()

    def _set_routes(self, feasible: RouteSet, workers: Sequence[WorkerLoad]) -> None:
        """Only workers of feasible routes count: others are dead, or too small. One opens at a time."""
        configured = set(allowed_routes(self._roles))
        live = sorted({*feasible.prefill_workers, *feasible.decode_workers})
        routes = [Route(p, d) for p in live for d in live]
        self._feasible = feasible
        self._within = RouteSet(route for route in feasible.routes if route in configured)
        self._beyond = RouteSet(route for route in routes if len(_beyond_roles(route, workers)) == 1)


def _beyond_roles(route: Route, workers: Sequence[WorkerLoad]) -> list[int]:
    p, d = route.prefill_worker, route.decode_worker
    return [w for w, may in ((p, workers[p].role.may_prefill), (d, workers[d].role.may_decode)) if not may]


def _is_clearly_better(one: Prediction, other: Prediction) -> bool:
    if abs(one.excess - other.excess) > CLEAR_EXCESS:
        return one.excess < other.excess
    return one.cost_ms < CLEAR_COST * other.cost_ms

"""Which routes may serve a sequence: by the workers' roles and lives, the sizes of their caches, and the policy.

Engine's thread, but for `check`, which any thread may call. Chooses nothing: that is the policy's part.
"""

from __future__ import annotations

from nanopd.config import allowed_routes, routes_for_policy
from nanopd.core.sequence import Sequence
from nanopd.engine.fleet import Fleet
from nanopd.errors import RequestError
from nanopd.messages import Role, Route
from nanopd.request import Request
from nanopd.routing.policy import Policy


class Roles:
    """The routes of a fleet's workers."""

    def __init__(self, fleet: Fleet, policy_name: str, policy: Policy) -> None:
        """`policy_name`: a value of `EngineConfig.policy`, which says which of the allowed routes are the policy's."""
        self._fleet, self._policy_name, self._policy = fleet, policy_name, policy
        self.allowed = allowed_routes(fleet.roles)

    def feasible(self, seq: Sequence) -> list[Route]:
        """Live routes of the policy, or the one asked for; failing those, whatever the roles allow."""
        asked_for = [seq.request.route] if seq.request.route in self.allowed else self._policy.routes
        able = [not s.is_dead and s.can_hold(seq.end_len) for s in self._fleet.schedulers]
        for routes in (asked_for, self.allowed):
            if live := [route for route in routes if able[route.prefill_worker] and able[route.decode_worker]]:
                return live
        return []

    def can_serve(self, routes: list[Route], num_tokens: int) -> bool:
        """Whether one of the routes is there for so many tokens, or will be if dead workers' replacements succeed."""
        live = (route for route in routes if not any(map(self._fleet.is_lost, _workers_of(route))))
        return any(self._has_capacity(route, num_tokens) for route in live)

    def check(self, request: Request, max_model_len: int) -> None:
        """Raise RequestError if no route can ever serve the request, as long as roles stay as they are."""
        if request.route is not None and request.route not in self.allowed:
            raise RequestError("route", str(request.route), map(str, self.allowed))
        num_tokens = request.max_num_tokens or max_model_len
        routes = self._policy.routes if request.route is None else [request.route]
        if not any(self._has_capacity(route, num_tokens) for route in routes):
            pools = [scheduler.residency.blocks for scheduler in self._fleet.schedulers]
            sizes = [blocks.num_usable * blocks.block_size for blocks in pools]
            raise RequestError("max_tokens", f"{num_tokens} tokens with the prompt", f"KV caches of {sizes} tokens")

    def can_change(self, worker: int, role: Role, longest: int) -> bool:
        """Whether the policy has a route for a sequence of `longest` tokens if the worker has that role."""
        roles = self._fleet.roles
        roles[worker] = role
        return self.can_serve(routes_for_policy(self._policy_name, roles), longest)

    def change(self, worker: int, role: Role) -> None:
        self._fleet.schedulers[worker].set_role(role)
        self.allowed = allowed_routes(self._fleet.roles)
        self._policy.set_routes(routes_for_policy(self._policy_name, self._fleet.roles))

    def _has_capacity(self, route: Route, num_tokens: int) -> bool:
        return all(self._fleet.schedulers[worker].can_hold(num_tokens) for worker in _workers_of(route))


def _workers_of(route: Route) -> tuple[int, int]:
    return route.prefill_worker, route.decode_worker

"""When a worker is opened to the other side, and when it is closed again."""

from __future__ import annotations

from collections.abc import Callable

from test_adaptive import Worker

from nanopd.messages import Role, Route
from nanopd.routing.capacity import ROLE_MEMORY, RoleSwitcher
from nanopd.routing.policy import Prediction, RouteSet

ROLES = [Role.PREFILL, Role.DECODE, Role.DECODE]
FEASIBLE = RouteSet([Route(0, 1), Route(0, 2)])


def prediction(route: Route, violation: float, cost_ms: float = 1000.0) -> Prediction:
    return Prediction(route, 100.0, 10.0, 10.0, 0.0, violation, cost_ms)


def rank(violation: Callable[[Route], float]) -> Callable[[RouteSet], Prediction]:
    return lambda some: min((prediction(r, violation(r)) for r in some.routes), key=lambda p: p.slo_violation)


class Machine:
    """Workers whose roles follow the switcher, as the engine's do."""

    def __init__(self) -> None:
        self.switcher = RoleSwitcher(ROLES, has_limits=True)
        self.workers = [Worker(role=role) for role in ROLES]
        self.num_changes = 0

    def serve(self, num_requests: int, violation: Callable[[Route], float]) -> list[Role]:
        best = rank(violation)
        for _ in range(num_requests):
            roles = [worker.role for worker in self.workers]
            feasible = RouteSet(Route(p, d) for p in range(3) for d in range(3) if may(roles, p, d))
            for worker, role in self.switcher.changes(feasible, best(feasible), best, self.workers):
                self.workers[worker].role = role
                self.num_changes += 1
        return [worker.role for worker in self.workers]


def may(roles: list[Role], p: int, d: int) -> bool:
    return roles[p].may_prefill and roles[d].may_decode


def too_many_prompts(route: Route) -> float:
    """Prompts wait at worker 0; worker 2 could compute some."""
    return {0: 2.0, 1: 1.5, 2: 0.0}[route.prefill_worker]


def test_who_could_help_most_requests_is_opened_and_goes_back() -> None:
    machine = Machine()
    assert machine.serve(8 * ROLE_MEMORY, lambda _: 0.0) == ROLES
    assert machine.serve(ROLE_MEMORY // 3, too_many_prompts) == ROLES  # not at once
    assert machine.serve(ROLE_MEMORY, too_many_prompts) == [Role.PREFILL, Role.DECODE, Role.MIXED]
    assert machine.serve(8 * ROLE_MEMORY, too_many_prompts)[0] is Role.PREFILL  # it is needed, and others are not
    assert machine.num_changes == 1
    machine.serve(2 * ROLE_MEMORY, lambda _: 0.0)
    assert machine.num_changes == 1  # nor back at once
    assert machine.serve(4 * ROLE_MEMORY, lambda _: 0.0) == ROLES


def test_now_and_then_does_not_count() -> None:
    machine = Machine()
    for _ in range(100):
        machine.serve(2, lambda _: 0.0)
        assert machine.serve(1, too_many_prompts) == ROLES


def test_what_costs_a_little_less_is_not_worth_a_change() -> None:
    workers = [Worker(role=role) for role in ROLES]
    taken = prediction(FEASIBLE.routes[0], 0.0)

    def num_changes(has_limits: bool, cost_ms: float) -> int:
        switcher, cheaper = RoleSwitcher(ROLES, has_limits), prediction(Route(0, 0), 0.0, cost_ms)
        return sum(len(switcher.changes(FEASIBLE, taken, lambda _: cheaper, workers)) for _ in range(ROLE_MEMORY))

    assert num_changes(has_limits=False, cost_ms=950.0) == 0
    assert num_changes(has_limits=False, cost_ms=500.0) == 1
    assert num_changes(has_limits=True, cost_ms=500.0) == 0, "all limits are kept"


def test_mixed_workers_have_nothing_to_change_to() -> None:
    switcher, feasible = RoleSwitcher([Role.MIXED] * 2, has_limits=True), RouteSet([Route(0, 1)])
    best = rank(lambda route: route.decode_worker)
    assert not switcher.changes(feasible, best(feasible), best, [Worker(), Worker()])

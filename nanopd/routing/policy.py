"""A policy chooses the route of each request: the question, the answer, and the policies that predict nothing.

Parent process, engine thread. A policy sees numbers about workers, never the workers, and chooses among routes that its
caller found feasible.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Workers
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

from nanopd.core.scheduler import Load
from nanopd.core.sequence import Sequence
from nanopd.messages import Role, Route

if TYPE_CHECKING:  # A module that only reads decisions need not import scipy, with which the cost model is fitted.
    from nanopd.routing.cost_model import CostModel

RoleChanges = tuple[tuple[int, Role], ...]  # index of a worker, and the role that it should have


class WorkerLoad(Protocol):
    """One worker at the moment of a decision; its scheduler looks like this."""

    role: Role

    @property
    def load(self) -> int:
        """Sequences that the worker has to serve: those it runs, those that wait and those still bound for it."""

    def snapshot(self) -> Load:
        """Its load in all figures."""

    def num_cached(self, seq: Sequence) -> int:
        """Tokens of a sequence that the worker's prefix cache holds, so that it need not compute them."""


class RouteSet:
    """Routes to choose from, with the workers that they lead over."""

    def __init__(self, routes: Iterable[Route]) -> None:
        self.routes = list(routes)
        self.all = frozenset(self.routes)
        self.collocated = [route for route in self.routes if route.is_collocated]
        self.prefill_workers = sorted({route.prefill_worker for route in self.routes})
        self.decode_workers = sorted({route.decode_worker for route in self.routes})


class Prediction(NamedTuple):
    """What a policy expects of one request on one route."""

    route: Route
    ttft_ms: float
    first_gap_ms: float
    tpot_ms: float
    caused_ms: float  # the delay of requests that are there already, summed over them
    slo_violation: float  # the request's own and what it causes to others, about 1 per missed limit; 0: none
    cost_ms: float  # the time to the end of the answer, plus `caused_ms`


@dataclass(frozen=True, slots=True)
class Decision:
    """A route and the reasons for it; a policy that predicts nothing gives the route alone."""

    route: Route | None  # None: the request is turned away
    taken: Prediction | None = None  # for `route`, or for the best route if the request is turned away
    best_other: Prediction | None = None  # for the best of the routes not taken
    num_output: float | None = None  # the predicted tokens of the answer
    chunk_budget: int | None = None  # tokens per step of the prefill worker from now on
    roles: RoleChanges = ()


class Policy(Protocol):
    """Chooses routes, and is told of every end."""

    routes: list[Route]  # all that it may choose from
    costs: CostModel | None = None  # what it predicts with, to be told of measured times; None: it does not use these

    def set_routes(self, routes: list[Route]) -> None:
        """Choose from these routes from now on, as roles have changed."""
        self.routes = routes

    def choose(self, feasible: list[Route], seq: Sequence, workers: Workers[WorkerLoad], now_s: float) -> Decision:
        """A route for `seq` out of `feasible`, which is not empty and in the order of `routes`.

        A sequence that has lost its route is asked about again.
        """

    def finished(self, seq: Sequence) -> None:
        """A request has ended, in whatever way."""


class FixedPolicy(Policy):
    """A policy that goes by load alone, and is deterministic.

    `collocated` and `disaggregated` take the route whose workers have the fewest sequences, `round_robin` goes over all
    routes in turn.
    """

    def __init__(self, name: str, routes: list[Route]) -> None:
        self.name = name
        self.routes = routes
        self._next = 0  # round_robin: the index into `routes` of the next one

    def choose(self, feasible: list[Route], seq: Sequence, workers: Workers[WorkerLoad], now_s: float) -> Decision:
        """See `Policy.choose`."""
        if self.name == "round_robin":
            route = min(feasible, key=lambda r: (self.routes.index(r) - self._next) % len(self.routes))
            self._next = (self.routes.index(route) + 1) % len(self.routes)
            return Decision(route)
        return Decision(
            min(feasible, key=lambda r: (workers[r.prefill_worker].load + workers[r.decode_worker].load, r))
        )

    def finished(self, seq: Sequence) -> None:
        """A fixed policy learns nothing."""

"""What a router is asked and what it answers: workers as it sees them, predictions, decisions."""

from __future__ import annotations

from collections.abc import Sequence as Workers
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

from nanopd.core.scheduler import Load
from nanopd.core.sequence import Sequence
from nanopd.messages import Role, Route

if TYPE_CHECKING:  # who only looks at decisions does not fit anything
    from nanopd.routing.cost_model import CostModel


class WorkerLoad(Protocol):
    """One worker at the moment of a decision; its scheduler looks like this."""

    role: Role

    @property
    def load(self) -> int:
        """Sequences that it has to serve, with those that wait and those that are still bound for it."""

    def snapshot(self) -> Load:
        """The same and all the rest."""

    def num_cached(self, seq: Sequence) -> int:
        """Tokens of a sequence that need not be computed there."""


class Prediction(NamedTuple):
    """What is expected of one request on one route."""

    route: Route
    ttft_ms: float
    first_gap_ms: float
    tpot_ms: float
    caused_ms: float  # delay of requests already there, summed over them
    excess: float  # over the service levels, its own and that caused to others; 0: all are kept
    cost_ms: float  # time to the end of the answer, and the delay caused


@dataclass(frozen=True, slots=True)
class Decision:
    """A route and why; policies that predict nothing give the route alone."""

    route: Route | None  # None: turned away
    taken: Prediction | None = None  # of that route, or of the best one if turned away
    best_other: Prediction | None = None  # of the best route not taken
    num_output: float | None = None  # tokens predicted
    chunk_budget: int | None = None  # tokens per step of the prefill worker from now on
    roles: tuple[tuple[int, Role], ...] = ()  # workers that should change theirs


class Policy(Protocol):
    """Chooses routes; told of every end."""

    routes: list[Route]  # all it may choose from

    @property
    def costs(self) -> CostModel | None:
        """What it predicts with, to be told of what was measured; None: nothing measured matters."""

    def choose(self, feasible: list[Route], seq: Sequence, workers: Workers[WorkerLoad], now_s: float) -> Decision:
        """One of `feasible`, not empty and in the order of `routes`; again for a sequence that has lost its route."""

    def finished(self, seq: Sequence) -> None:
        """A request has ended, in whatever way."""

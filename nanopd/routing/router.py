"""Which route a request takes: the fixed policies.

Parent process. Sees numbers about workers, never the workers; chooses among routes that the caller found feasible.
"""

from __future__ import annotations

from collections.abc import Sequence as Workers

from nanopd.core.sequence import Sequence
from nanopd.messages import Route
from nanopd.routing.decision import Decision, WorkerLoad


class Router:
    """Chooses among feasible routes by a fixed policy; deterministic. A `Policy`.

    `collocated` and `disaggregated` take the route whose workers have the least to do, `round_robin` goes over all
    routes in turn.
    """

    def __init__(self, policy: str, routes: list[Route]) -> None:
        self.policy = policy
        self.routes = routes
        self.costs = None
        self._next = 0  # round_robin: index into `routes` of the next one

    def choose(self, feasible: list[Route], seq: Sequence, workers: Workers[WorkerLoad], now_s: float) -> Decision:
        """See `Policy.choose`."""
        if self.policy == "round_robin":
            route = min(feasible, key=lambda r: (self.routes.index(r) - self._next) % len(self.routes))
            self._next = (self.routes.index(route) + 1) % len(self.routes)
            return Decision(route)
        return Decision(
            min(feasible, key=lambda r: (workers[r.prefill_worker].load + workers[r.decode_worker].load, r))
        )

    def finished(self, seq: Sequence) -> None:
        """Nothing is learned."""

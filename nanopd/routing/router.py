"""Which route a request takes: the fixed policies.

Parent process. Sees numbers about workers, never the workers; chooses among routes that the caller found feasible.
"""

from __future__ import annotations

from collections.abc import Callable

from nanopd.messages import Route


class Router:
    """Chooses among feasible routes by a fixed policy; deterministic.

    `collocated` and `disaggregated` take the route whose workers have the least to do, `round_robin` goes over all
    routes in turn.
    """

    def __init__(self, policy: str, routes: list[Route]) -> None:
        self.policy = policy
        self.routes = routes
        self._next = 0  # round_robin: index into `routes` of the next one

    def choose(self, feasible: list[Route], load: Callable[[int], int]) -> Route:
        """One of `feasible`, a non-empty list in the order of `routes`; `load(worker)` counts a worker's sequences."""
        if self.policy == "round_robin":
            route = min(feasible, key=lambda r: (self.routes.index(r) - self._next) % len(self.routes))
            self._next = (self.routes.index(route) + 1) % len(self.routes)
            return route
        return min(feasible, key=lambda r: (load(r.prefill_worker) + load(r.decode_worker), r))

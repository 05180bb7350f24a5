"""The adaptive policy: predicts every feasible route and takes what keeps the SLO, then what costs least.

For each route it predicts the request's own TTFT, first gap and TPOT and what it does to requests already there
(`forecast`), from the cost model, the length predictor, the workers' loads and what it has itself sent where. It also
plans each worker's chunk budget and, from the mix of requests, how many workers should be dedicated to prefill and
which should change their roles (`capacity`). Every decision comes with the numbers behind it. Knows no blocks and no
messages, and time only as it is told.
"""

from __future__ import annotations

from collections.abc import Sequence as Workers

from nanopd.core.sequence import Sequence
from nanopd.messages import Role, Route
from nanopd.metrics import SLO
from nanopd.routing.capacity import BoundLoad, DedicatedPrefill, Demand, RoleSwitcher
from nanopd.routing.cost_model import CostModel
from nanopd.routing.forecast import ExpectedRequest, Forecast
from nanopd.routing.length_predictor import LengthPredictor
from nanopd.routing.policy import Decision, Policy, Prediction, RoleChanges, RouteSet, WorkerLoad

# These were set by hand: no measurement is on record for either.
REJECT_ABOVE = 1.1  # times a limit: a request predicted beyond this on its best route cannot be served in time
QUANTILES = (0.1, 0.5, 0.9)  # of answers' lengths, that stand for their distribution


class AdaptivePolicy(Policy):
    """Chooses routes one request at a time."""

    def __init__(
        self,
        routes: list[Route],
        num_workers: int,
        costs: CostModel,
        max_chunk: int,
        slo: SLO | None = None,
        admission: str = "queue",
        predictor: LengthPredictor | None = None,
        roles: Workers[Role] = (),
    ) -> None:
        """`max_chunk` bounds the chunk budgets; `admission="reject"` turns away what no route serves within `slo`.

        `roles`: of the workers as configured; none: all mixed.
        """
        self.routes = routes
        self.costs: CostModel = costs
        self.max_chunk = max_chunk
        self.slo = slo or SLO()
        self.admission = admission
        self.predictor = predictor or LengthPredictor()
        self.demand = Demand(num_workers, costs.terms.beta)
        self.dedicated = DedicatedPrefill(max_chunk, self.slo.tpot_ms)
        self._switcher = RoleSwitcher(roles, has_limits=self.slo != SLO())
        self._feasible = RouteSet(())  # of the last choice

    def choose(self, feasible: list[Route], seq: Sequence, workers: Workers[WorkerLoad], now_s: float) -> Decision:
        """See `Policy.choose`."""
        demand, num_tokens, num_generated = self.demand, seq.num_tokens, seq.num_tokens - seq.num_prompt_tokens
        demand.release(seq.seq_id)
        demand.advance(now_s)
        num_output, spread = self.expected_output(seq)
        loads, num_cached = [w.snapshot() for w in workers], [w.num_cached(seq) for w in workers]
        num_dedicated = self.dedicated.update(demand, self.costs.terms, min(load.num_usable_tokens for load in loads))
        request = ExpectedRequest(num_tokens, num_cached, num_output, spread)
        forecast = Forecast(self.costs, self.slo, self.max_chunk, demand, loads, request, num_dedicated)
        if feasible != self._feasible.routes:
            self._feasible = RouteSet(feasible)
        taken, best_other = forecast.best(self._feasible)
        roles: RoleChanges = ()
        if seq.request.route is None:
            roles = self._switcher.changes(self._feasible, taken, lambda routes: forecast.best(routes)[0], workers)
        is_late = self._is_late(taken)
        if self.admission == "reject" and seq.decision is None and is_late:
            return Decision(None, taken, best_other, num_output + num_generated, roles=roles)
        p, d = taken.route.prefill_worker, taken.route.decode_worker
        demand.bind(seq.seq_id, d, BoundLoad(1, num_tokens + num_output / 2, num_output, not is_late))
        demand.count(p, num_tokens, num_tokens - num_cached[p], num_output)
        return Decision(taken.route, taken, best_other, num_output + num_generated, forecast.chunk_budget(p), roles)

    def expected_output(self, seq: Sequence) -> tuple[float, tuple[float, ...]]:
        """Tokens still to be generated: how many are expected, and the QUANTILES over their mean."""
        num_generated = seq.num_tokens - seq.num_prompt_tokens
        mean, lengths = self.predictor.predict(seq.num_prompt_tokens, QUANTILES, num_generated)
        left = [length - num_generated for length in lengths]
        return mean - num_generated, tuple(len(left) * num / sum(left) for num in left)

    def finished(self, seq: Sequence) -> None:
        """See `Policy.finished`; a complete answer's length is learned."""
        self.demand.release(seq.seq_id)
        self.predictor.finished(seq)

    def _is_late(self, best: Prediction) -> bool:
        values_ms = best.ttft_ms, best.first_gap_ms, best.tpot_ms
        limits_ms = self.slo.ttft_ms, self.slo.first_gap_ms, self.slo.tpot_ms
        return any(limit is not None and value > REJECT_ABOVE * limit for value, limit in zip(values_ms, limits_ms))

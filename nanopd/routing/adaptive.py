"""The adaptive router: predicts every feasible route and takes what keeps the service levels, then what costs least.

For each route it predicts the request's own TTFT, first gap and TPOT and what it does to requests already there
(`outlook`), from the cost model, the length predictor, the workers' loads and what it has itself sent where. It also
plans each worker's chunk budget and, from the mix of requests, how many workers should be kept free of decodes. Every
decision comes with the numbers behind it. Knows no blocks and no messages, and time only as it is told.
"""

from __future__ import annotations

from collections.abc import Sequence as Workers
from dataclasses import dataclass

import numpy as np

from nanopd.core.sequence import Sequence, SequenceStatus
from nanopd.messages import Role, Route
from nanopd.metrics import SLO
from nanopd.routing.cost_model import CostModel
from nanopd.routing.decision import Decision, Prediction, WorkerLoad
from nanopd.routing.length_predictor import LengthPredictor
from nanopd.routing.outlook import Expected, Outlook, RouteSet
from nanopd.routing.roles import Changes, RoleKeeper
from nanopd.routing.split import Split

HOPELESS = 1.1  # times a limit: what is turned away where that is asked for
QUANTILES = (0.1, 0.5, 0.9)  # of output lengths that stand for the distribution
MEMORY_STEPS = 300  # decode steps after which the mix of requests is forgotten


@dataclass(frozen=True, slots=True)
class _Bound:
    """An unfinished request, where it decodes or will."""

    worker: int
    amounts: np.ndarray  # [4]: 1, tokens half-way through the answer, tokens of the answer, whether it may be in time


class AdaptiveRouter:
    """Chooses routes one request at a time; a `Policy`."""

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
        self.costs = costs
        self.max_chunk = max_chunk
        self.slo = slo or SLO()
        self.admission = admission
        self.predictor = predictor or LengthPredictor()
        self.split = Split(num_workers, costs, max_chunk, self.slo.tpot_ms, MEMORY_STEPS * costs.terms.beta)
        self._keeper = RoleKeeper(roles, has_limits=self.slo != SLO())
        # [4, num_workers]: requests bound for each, their context tokens, their outputs, how many may be in time
        self.bound = np.zeros((4, num_workers))
        self._bound_by_seq: dict[int, _Bound] = {}
        self._feasible = RouteSet(())  # of the last choice

    def choose(self, feasible: list[Route], seq: Sequence, workers: Workers[WorkerLoad], now_s: float) -> Decision:
        """See `Policy.choose`."""
        self._forget(seq)
        self.split.advance(now_s)
        num_tokens, num_generated = seq.num_tokens, seq.num_tokens - seq.num_prompt_tokens
        num_output, spread = self.foresee(seq)
        loads, num_cached = [w.snapshot() for w in workers], [w.num_cached(seq) for w in workers]
        request = Expected(num_tokens, num_cached, num_output, spread)
        outlook = Outlook(self.costs, self.slo, self.split, self.max_chunk, loads, self.bound.T.tolist(), request)
        if feasible != self._feasible.routes:
            self._feasible = RouteSet(feasible)
        taken, best_other = outlook.best(self._feasible)
        roles: Changes = ()
        if seq.request.route is None:
            roles = self._keeper.changes(self._feasible, taken, lambda routes: outlook.best(routes)[0], workers)
        is_hopeless = self._is_hopeless(taken)
        if self.admission == "reject" and seq.decision is None and is_hopeless:
            return Decision(None, taken, best_other, num_output + num_generated, roles=roles)
        p, d = taken.route.prefill_worker, taken.route.decode_worker
        self._remember(seq, _Bound(d, np.array((1, num_tokens + num_output / 2, num_output, not is_hopeless))))
        self.split.count(p, num_tokens, num_tokens - num_cached[p], num_output)
        return Decision(taken.route, taken, best_other, num_output + num_generated, outlook.chunk_budget(p), roles)

    def foresee(self, seq: Sequence) -> tuple[float, tuple[float, ...]]:
        """Tokens still to be generated: how many are expected, and the QUANTILES over their mean."""
        num_generated = seq.num_tokens - seq.num_prompt_tokens
        mean, lengths = self.predictor.foresee(seq.num_prompt_tokens, QUANTILES, num_generated)
        left = [length - num_generated for length in lengths]
        return mean - num_generated, tuple(len(left) * num / sum(left) for num in left)

    def finished(self, seq: Sequence) -> None:
        """See `Policy.finished`; a complete answer's length is learned."""
        self._forget(seq)
        if seq.status in (SequenceStatus.FINISHED_STOPPED, SequenceStatus.FINISHED_LENGTH):
            self.predictor.observe(seq.num_prompt_tokens, seq.num_tokens - seq.num_prompt_tokens)

    def _is_hopeless(self, best: Prediction) -> bool:
        pairs = (
            (best.ttft_ms, self.slo.ttft_ms),
            (best.first_gap_ms, self.slo.first_gap_ms),
            (best.tpot_ms, self.slo.tpot_ms),
        )
        return any(limit_ms is not None and value_ms > HOPELESS * limit_ms for value_ms, limit_ms in pairs)

    def _remember(self, seq: Sequence, bound: _Bound) -> None:
        self._bound_by_seq[seq.seq_id] = bound
        self.bound[:, bound.worker] += bound.amounts

    def _forget(self, seq: Sequence) -> None:
        bound = self._bound_by_seq.pop(seq.seq_id, None)
        if bound is not None:
            self.bound[:, bound.worker] -= bound.amounts

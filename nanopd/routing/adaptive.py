"""The adaptive router: predicts every feasible route and takes what keeps the service levels, then what costs least.

For each route it predicts the request's own TTFT, first gap and TPOT and what it does to requests already there, from
the cost model, the length predictor, the workers' loads and what it has itself sent where. It also plans each worker's
chunk budget and, from the mix of requests, how many workers should be kept free of decodes. Every decision comes with
the numbers behind it. Knows no blocks and no messages, and time only as it is told.
"""

from __future__ import annotations

from collections.abc import Sequence as Workers
from dataclasses import dataclass

import numpy as np

from nanopd.core.metrics import SLO
from nanopd.core.sequence import Sequence, SequenceStatus
from nanopd.messages import Role, Route
from nanopd.routing.cost_model import CostModel, chunk_pairs
from nanopd.routing.decision import Decision, Prediction, WorkerLoad
from nanopd.routing.length_predictor import LengthPredictor
from nanopd.routing.roles import Changes, RoleKeeper, RouteSet
from nanopd.routing.split import Split

TOLERANCE = 0.05  # how far from its limit, relatively, a predicted figure begins to count
EXCESS_STEP = 0.05  # excesses that differ by less are alike
HOPELESS = 1.1  # times a limit: what is turned away where that is asked for
QUANTILES = (0.1, 0.5, 0.9)  # of output lengths that stand for the distribution
MEMORY_STEPS = 300  # decode steps after which the mix of requests is forgotten
MIN_CHUNK = 128  # tokens
TTFT_SHARE = 0.8  # of the TTFT limit in which the prompts at a worker should be computed
MAX_BUSY = 0.9  # share of a decoding worker's time that prompts are taken to have at most


@dataclass(frozen=True, slots=True)
class _Bound:
    """An unfinished request, where it decodes or will."""

    worker: int
    amounts: np.ndarray  # [3]: 1, tokens half-way through the answer, tokens of the answer


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
        self.bound = np.zeros((3, num_workers))  # of each worker: requests, their context tokens, their outputs
        self._bound_by_seq: dict[int, _Bound] = {}
        self._feasible = RouteSet.of(())  # of the last choice

    def choose(self, feasible: list[Route], seq: Sequence, workers: Workers[WorkerLoad], now_s: float) -> Decision:
        """See `Policy.choose`."""
        self._forget(seq)
        self.split.advance(now_s)
        num_generated = seq.num_tokens - seq.num_prompt_tokens
        num_output, lengths = self.foresee(seq)
        outlook = _Outlook(self, workers, seq.num_tokens, num_output, lengths / lengths.mean())
        if feasible != self._feasible.routes:
            self._feasible = RouteSet.of(feasible)
        taken, best_other = outlook.best(self._feasible)
        roles: Changes = ()
        if seq.fixed_route is None:
            roles = self._keeper.changes(self._feasible, taken, lambda routes: outlook.best(routes)[0], workers)
        if self.admission == "reject" and seq.decision is None and self._is_hopeless(taken):
            return Decision(None, taken, best_other, num_output + num_generated, roles=roles)
        p, d = taken.route.prefill_worker, taken.route.decode_worker
        self._remember(seq, _Bound(d, np.array((1, seq.num_tokens + num_output / 2, num_output))))
        self.split.count(p, seq.num_tokens, num_output)
        budget = outlook.parts[p].batch + int(outlook.parts[p].chunk)
        return Decision(taken.route, taken, best_other, num_output + num_generated, budget, roles)

    def foresee(self, seq: Sequence) -> tuple[float, np.ndarray]:
        """Tokens still to be generated: expected, and at QUANTILES ([*] float64)."""
        num_generated = seq.num_tokens - seq.num_prompt_tokens
        mean, lengths = self.predictor.foresee(seq.num_prompt_tokens, QUANTILES, num_generated)
        return mean - num_generated, np.array(lengths, np.float64) - num_generated

    def finished(self, seq: Sequence) -> None:
        """See `Policy.finished`; a complete answer's length is learned."""
        self._forget(seq)
        if seq.status in (SequenceStatus.FINISHED_STOPPED, SequenceStatus.FINISHED_LENGTH):
            self.predictor.observe(seq.num_prompt_tokens, seq.num_tokens - seq.num_prompt_tokens)

    def roles(self, num_usable_tokens: float) -> list[Role]:
        """The part that each worker should play now: those with the fewest decodes are kept for prefill."""
        num_prefill = self.split.update(num_usable_tokens)
        roles = [Role.MIXED] * self.bound.shape[1]
        for worker in np.argsort(self.bound[0], kind="stable")[:num_prefill].tolist():
            roles[worker] = Role.PREFILL
        return roles

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


@dataclass(slots=True)
class _Part:
    """What is expected at one worker. Plain numbers: eight workers are too few for arrays to be faster."""

    batch: int  # that decodes now
    context: int
    waiting: int  # prompt tokens
    others_output: float  # tokens of an answer there
    idle_ms: float  # a decode step
    room_ms: float  # in which ends of answers free the room of a token
    chunk: float = 0.0
    ttft_ms: float = 0.0  # of the request, if it is prefilled here
    beside: float = 0.0  # who will decode then
    before_ms: float = 0.0  # a decode step then, without the request
    after_ms: float = 0.0  # and with it
    tpot_ms: float = 0.0  # with prompts in between
    wait_ms: float = 0.0  # for room, if it decodes here


class _Outlook:
    """What one request would mean on every route. Arrays are [num_workers] unless said otherwise."""

    def __init__(
        self,
        router: AdaptiveRouter,
        workers: Workers[WorkerLoad],
        num_new: int,
        num_output: float,
        spread: np.ndarray,  # [num_quantiles] of output lengths, over their mean
    ) -> None:
        self._costs, self._slo, self._split = router.costs, router.slo, router.split
        self._max_chunk, self._num_new, self._num_output, self._spread = router.max_chunk, num_new, num_output, spread
        self._pairs = chunk_pairs(num_new, 0)
        self._delay_ms = self._costs.terms.gamma * num_new + self._costs.terms.a2 * self._pairs  # of a decode beside it
        bound = list(zip(*router.bound.tolist(), strict=True))
        self.parts = [self._prefill_part(load, *of) for load, of in zip(workers, bound, strict=True)]
        soonest_ms = min(part.ttft_ms for part in self.parts)
        rates = self._split.prompt_rate.tolist()
        for part, load, of, rate in zip(self.parts, workers, bound, rates, strict=True):
            self._add_decode(part, load, soonest_ms, of[0], of[1], rate)
        roles = router.roles(min(load.num_usable_tokens for load in workers))
        self._add_excess(np.array([role is Role.PREFILL for role in roles]))

    def _prefill_part(self, load: WorkerLoad, num_bound: float, _: float, outputs: float) -> _Part:
        """The queue ahead and the prompt itself, in chunks beside the decodes that are there."""
        batch, context, waiting = load.num_decoding, load.num_context_tokens, load.num_waiting_tokens
        others = outputs / num_bound if num_bound > 0 else self._num_output
        idle_ms = self._costs.step_ms(batch, context)
        part = _Part(batch, context, waiting, others, idle_ms, others * idle_ms / max(context, 1))
        part.chunk = self._plan_chunk(part)
        num_tokens = waiting + self._num_new
        pairs = (self._pairs + waiting * self._split.mean_prompt / 2) / num_tokens  # per token
        num_full, rest = divmod(num_tokens, part.chunk)
        # half a step until the next begins, and another one if that has been sent already
        part.ttft_ms = idle_ms * (0.5 if waiting else 1.5)
        if num_full:
            part.ttft_ms += num_full * self._costs.mixed_ms(batch, context, part.chunk, pairs * part.chunk)
        if rest:
            part.ttft_ms += self._costs.mixed_ms(batch, context, rest, pairs * rest)
        part.ttft_ms += max(self._num_new - (load.num_usable_tokens - context), 0) * part.room_ms
        return part

    def _plan_chunk(self, part: _Part) -> float:
        """Prompt tokens per step: as few as keep the TPOT of the decodes there, but as many as the TTFT needs."""
        slo, gamma = self._slo, self._costs.terms.gamma
        most = max(self._max_chunk - part.batch, 1)
        if slo.tpot_ms is None or slo.ttft_ms is None or not part.batch:
            return most
        gentle = (slo.tpot_ms - part.idle_ms) / gamma
        num_tokens = part.waiting + self._num_new
        needed = num_tokens * part.idle_ms / max(TTFT_SHARE * slo.ttft_ms - gamma * num_tokens, 1e-3)
        return min(max(gentle, needed, MIN_CHUNK), most) // 1

    def _add_decode(
        self, part: _Part, load: WorkerLoad, soonest_ms: float, num_bound: float, context: float, prompt_rate: float
    ) -> None:
        """A row more beside those that will decode then, prompts in between, and the wait for room."""
        # those that decode now are leaving evenly until its first token; those to come will be there if they last
        terms, num_output = self._costs.terms, self._num_output
        share = soonest_ms / max(part.others_output * part.idle_ms, num_output * terms.beta)
        part.beside = part.batch * max(1 - share, 0) + max(num_bound - part.batch, 0) / max(share, 1)
        context = context / max(num_bound, 1) * part.beside
        part.before_ms = self._costs.step_ms(part.beside, context)
        part.after_ms = self._costs.step_ms(part.beside + 1, context + self._num_new + num_output / 2)
        busy = min(terms.gamma * prompt_rate, MAX_BUSY)
        part.tpot_ms = part.after_ms / (1 - busy) + terms.gamma * part.waiting / num_output
        roomless = (load.load - load.num_seqs) * self._split.mean_prompt
        part.wait_ms = max(roomless + self._num_new - load.num_free_tokens, 0) * part.room_ms

    def _add_excess(self, is_kept: np.ndarray) -> None:
        """Over the service levels, by the part that a worker plays; `is_kept`: should be free of decodes."""
        columns = [
            (p.batch, p.waiting, p.others_output, p.idle_ms, p.beside, p.before_ms, p.after_ms) for p in self.parts
        ]
        batch, waiting, others, idle_ms, beside, before_ms, after_ms = np.array(columns, np.float64).T
        gamma, zeros, own_output = self._costs.terms.gamma, 0 * batch, 0 * batch + self._num_output
        disturbed, quiet, grown, before, own = self._tpot_excess(
            np.array((idle_ms, idle_ms, after_ms, before_ms, after_ms)),
            np.array((others, others, others, others, own_output)),
            np.array((zeros + self._delay_ms, zeros, zeros, zeros, gamma * waiting)),
        )
        self._prefill_excess = batch * (disturbed - quiet)
        self._decode_excess = beside * (grown - before) + own + is_kept
        self._prefill_caused_ms = batch * self._delay_ms
        # a decode keeps prompts away until the last one has left
        stay_ms = self._num_output * after_ms / (1 + beside)
        self._decode_caused_ms = beside * (after_ms - before_ms) * self._num_output
        self._decode_caused_ms += self._split.request_rate * stay_ms * gamma * self._split.mean_prompt

    def _tpot_excess(self, step_ms: np.ndarray, num_output: np.ndarray, late_ms: np.ndarray) -> np.ndarray:
        """Expected over the lengths of the answer and over whether prompts come in between; all [..., num_workers].

        `late_ms` is what delays the answer anyhow.
        """
        if self._slo.tpot_ms is None:
            return np.zeros_like(step_ms)
        step_ms, late_ms = step_ms[:, None], late_ms[:, None]
        lengths = np.maximum(num_output[:, None] * self._spread[:, None], 1)  # [..., num_quantiles, num_workers]
        mean_prompt = max(self._split.mean_prompt, 1.0)
        num_prompts = self._split.prompt_rate / mean_prompt * lengths * step_ms
        is_hit = -np.expm1(-num_prompts)
        stall_ms = self._costs.terms.gamma * mean_prompt * num_prompts / np.maximum(is_hit, 1e-9)
        tpot_ms = np.array((step_ms + late_ms / lengths, step_ms + (late_ms + stall_ms) / lengths))
        spared, hit = _excess(tpot_ms, self._slo.tpot_ms)
        return (spared + is_hit * (hit - spared)).mean(axis=1)

    def best(self, feasible: RouteSet) -> tuple[Prediction, Prediction | None]:
        """The best route and the second best; arrays are [num_routes]."""
        p, d = feasible.pairs.T
        is_moved = p != d
        prefill_ms, step_ms, room_ms = np.array([(w.ttft_ms, w.tpot_ms, w.wait_ms) for w in self.parts]).T
        wait_ms = np.maximum(room_ms[d] - prefill_ms[p], 0)
        late_ms = is_moved * (self._costs.move_ms(p, d, self._num_new) + step_ms[d] + wait_ms)
        ttft_ms = prefill_ms[p] + ~is_moved * wait_ms
        first_gap_ms = step_ms[d] + late_ms
        tpot_ms = step_ms[d] + late_ms / self._num_output
        excess = self._prefill_excess[p] + self._decode_excess[d]
        excess += _excess(ttft_ms, self._slo.ttft_ms) + _excess(first_gap_ms, self._slo.first_gap_ms)
        excess += _excess(tpot_ms, self._slo.tpot_ms) - _excess(step_ms, self._slo.tpot_ms)[d]
        caused_ms = self._prefill_caused_ms[p] + self._decode_caused_ms[d]
        cost_ms = ttft_ms + self._num_output * tpot_ms + caused_ms
        ranked = np.lexsort((cost_ms, np.rint(excess / EXCESS_STEP)))[:2].tolist()
        columns = (ttft_ms, first_gap_ms, tpot_ms, caused_ms, excess, cost_ms)
        best = [Prediction(feasible.routes[i], *(float(column[i]) for column in columns)) for i in ranked]
        return best[0], best[1] if len(best) > 1 else None


def _excess(value_ms: np.ndarray, limit_ms: float | None) -> np.ndarray:
    """By how much figures exceed their limit: next to nothing below it, towards 1 above, as who misses misses once."""
    if limit_ms is None:
        return np.zeros_like(value_ms)
    over = np.logaddexp(0.0, (value_ms / limit_ms - 1) / TOLERANCE)
    return over / (1 + over)

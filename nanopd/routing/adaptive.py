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
    ) -> None:
        """`max_chunk` bounds the chunk budgets; `admission="reject"` turns away what no route serves within `slo`."""
        self.routes = routes
        self.costs = costs
        self.max_chunk = max_chunk
        self.slo = slo or SLO()
        self.admission = admission
        self.predictor = predictor or LengthPredictor()
        self.split = Split(num_workers, costs.terms, max_chunk, self.slo.tpot_ms, MEMORY_STEPS * costs.terms.beta)
        self.bound = np.zeros((3, num_workers))  # of each worker: requests, their context tokens, their outputs
        self._bound_by_seq: dict[int, _Bound] = {}
        self._feasible: list[Route] = []  # of the last choice
        self._pairs = np.empty((0, 2), np.int64)  # their workers

    def choose(self, feasible: list[Route], seq: Sequence, workers: Workers[WorkerLoad], now_s: float) -> Decision:
        """See `Policy.choose`."""
        self._forget(seq)
        self.split.advance(now_s)
        num_generated = seq.num_tokens - seq.num_prompt_tokens
        num_output, lengths = self.foresee(seq)
        outlook = _Outlook(self, workers, seq.num_tokens, num_output, lengths / lengths.mean())
        if feasible != self._feasible:
            self._feasible = list(feasible)
            self._pairs = np.array([(route.prefill_worker, route.decode_worker) for route in feasible])
        taken, best_other = outlook.best(feasible, self._pairs)
        if self.admission == "reject" and self._is_hopeless(taken):
            return Decision(None, taken, best_other, num_output + num_generated)
        p, d = taken.route.prefill_worker, taken.route.decode_worker
        self._remember(seq, _Bound(d, np.array((1, seq.num_tokens + num_output / 2, num_output))))
        self.split.count(p, seq.num_tokens, num_output)
        budget = int(outlook.chunk[p] + outlook.batch[p])
        return Decision(taken.route, taken, best_other, num_output + num_generated, budget)

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
        self._costs, self._slo, self._split, self._bound = router.costs, router.slo, router.split, router.bound
        self._num_new, self._num_output, self._spread = num_new, num_output, spread
        columns = [
            (
                w.num_decoding,
                w.num_context_tokens,
                w.num_waiting_tokens,
                w.num_free_tokens,
                w.num_usable_tokens,
                w.load - w.num_seqs,  # have no blocks yet
            )
            for w in workers
        ]
        self.batch, self._context, self._waiting, self._free, self._usable, self._roomless = np.array(
            columns, np.float64
        ).T
        num_bound, _, outputs = self._bound
        self._others_output = np.where(num_bound > 0, outputs / np.maximum(num_bound, 1), num_output)
        self._idle_ms = self._costs.step_ms(self.batch, self._context)
        self.chunk = self._plan_chunk(router.max_chunk)
        self._predict_prefill()
        self._predict_decode()
        self._add_excess(np.array([role is Role.PREFILL for role in router.roles(self._usable.min())]))

    def _plan_chunk(self, max_chunk: int) -> np.ndarray:
        """Prompt tokens per step: as few as keep the TPOT of the decodes there, but as many as the TTFT needs."""
        slo, gamma = self._slo, self._costs.terms.gamma
        most = np.maximum(max_chunk - self.batch, 1.0)
        if slo.tpot_ms is None or slo.ttft_ms is None:
            return most
        gentle = (slo.tpot_ms - self._idle_ms) / gamma
        num_tokens = self._waiting + self._num_new
        left_ms = np.maximum(TTFT_SHARE * slo.ttft_ms - gamma * num_tokens, 1e-3)
        needed = num_tokens * self._idle_ms / left_ms
        chunk = np.where(self.batch > 0, np.maximum(gentle, needed), most)
        return np.clip(np.floor(chunk), min(MIN_CHUNK, max_chunk), most)

    def _predict_prefill(self) -> None:
        """The queue ahead and the prompt itself, in chunks beside the decodes that are there."""
        num_tokens = self._waiting + self._num_new
        pairs = chunk_pairs(self._num_new, 0) + self._waiting * self._split.mean_prompt / 2
        num_full = np.floor(num_tokens / self.chunk)
        sizes = np.array((self.chunk, num_tokens - num_full * self.chunk))  # [2, num_workers]: full chunks, the rest
        chunk_ms = self._costs.mixed_ms(self.batch, self._context, sizes, pairs / num_tokens * sizes)
        # half a step until the next begins, and another one if that has been sent already
        start_ms = self._idle_ms * (1.5 - (self._waiting > 0))
        self.ttft_ms = start_ms + num_full * chunk_ms[0] + (sizes[1] > 0) * chunk_ms[1]
        lacking = np.maximum(self._num_new - (self._usable - self._context), 0)
        self.ttft_ms += lacking * self._room_ms(self._idle_ms)
        pairs_ms = self._costs.terms.a2 * chunk_pairs(self._num_new, 0)
        self._delay_ms = self._costs.terms.gamma * self._num_new + pairs_ms  # of each decode beside it

    def _room_ms(self, step_ms: np.ndarray) -> np.ndarray:
        """Milliseconds in which ends of answers free the room of a token."""
        return self._others_output * step_ms / np.maximum(self._context, 1)

    def _predict_decode(self) -> None:
        """A row more beside those that will decode then, prompts in between, and the wait for room."""
        num_bound, context, _ = self._bound
        # those that decode now are leaving evenly until its first token; those to come will be there if they last
        last_ms = np.maximum(self._others_output * self._idle_ms, self._num_output * self._costs.terms.beta)
        share = self.ttft_ms.min() / last_ms
        self._beside = self.batch * np.maximum(1 - share, 0)
        self._beside += np.maximum(num_bound - self.batch, 0) / np.maximum(share, 1)
        context = context / np.maximum(num_bound, 1) * self._beside
        own_context = self._num_new + self._num_output / 2
        batches = np.array((self._beside, self._beside + 1))  # [2, num_workers]: without it, with it
        steps_ms = self._costs.step_ms(batches, np.array((context, context + own_context)))
        self._before_ms, self._after_ms = steps_ms
        gamma = self._costs.terms.gamma
        busy = np.minimum(gamma * self._split.prompt_rate, MAX_BUSY)
        self._tpot_ms = self._after_ms / (1 - busy) + gamma * self._waiting / self._num_output
        lacking = np.maximum(self._roomless * self._split.mean_prompt + self._num_new - self._free, 0)
        self._wait_ms = lacking * self._room_ms(self._before_ms)

    def _add_excess(self, is_kept: np.ndarray) -> None:
        """Over the service levels, by the part that a worker plays; `is_kept`: should be free of decodes."""
        zeros = np.zeros_like(self.batch)
        own_output = np.full_like(self.batch, self._num_output)
        queue_ms = self._costs.terms.gamma * self._waiting
        late_ms = np.array((zeros + self._delay_ms, zeros, zeros, zeros, queue_ms))
        steps_ms = np.array((self._idle_ms, self._idle_ms, self._after_ms, self._before_ms, self._after_ms))
        others = self._others_output
        outputs = np.array((others, others, others, others, own_output))
        disturbed, quiet, grown, before, own = self._tpot_excess(steps_ms, outputs, late_ms)
        self._prefill_excess = self.batch * (disturbed - quiet)
        self._decode_excess = self._beside * (grown - before) + own + is_kept
        # a decode keeps prompts away until the last one has left
        stay_ms = self._num_output * self._after_ms / (1 + self._beside)
        stall_ms = self._costs.terms.gamma * self._split.mean_prompt
        self._decode_caused_ms = self._beside * (self._after_ms - self._before_ms) * self._num_output
        self._decode_caused_ms += self._split.request_rate * stay_ms * stall_ms

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

    def best(self, feasible: list[Route], pairs: np.ndarray) -> tuple[Prediction, Prediction | None]:
        """The best route and the second best, of `pairs` [num_routes, 2] of workers; arrays are [num_routes]."""
        p, d = pairs.T
        is_moved = p != d
        move_ms = self._costs.move_ms(p, d, self._num_new)
        wait_ms = np.maximum(self._wait_ms[d] - self.ttft_ms[p], 0)
        late_ms = is_moved * (move_ms + self._tpot_ms[d] + wait_ms)
        ttft_ms = self.ttft_ms[p] + ~is_moved * wait_ms
        first_gap_ms = self._tpot_ms[d] + late_ms
        tpot_ms = self._tpot_ms[d] + late_ms / self._num_output
        excess = self._prefill_excess[p] + self._decode_excess[d]
        excess += _excess(ttft_ms, self._slo.ttft_ms) + _excess(first_gap_ms, self._slo.first_gap_ms)
        excess += _excess(tpot_ms, self._slo.tpot_ms) - _excess(self._tpot_ms, self._slo.tpot_ms)[d]
        caused_ms = self.batch[p] * self._delay_ms + self._decode_caused_ms[d]
        cost_ms = ttft_ms + self._num_output * tpot_ms + caused_ms
        ranked = np.lexsort((cost_ms, np.rint(excess / EXCESS_STEP)))[:2].tolist()
        columns = (ttft_ms, first_gap_ms, tpot_ms, caused_ms, excess, cost_ms)
        best = [Prediction(feasible[i], *(float(column[i]) for column in columns)) for i in ranked]
        return best[0], best[1] if len(best) > 1 else None


def _excess(value_ms: np.ndarray, limit_ms: float | None) -> np.ndarray:
    """By how much figures exceed their limit: next to nothing below it, growing ever more slowly above."""
    if limit_ms is None:
        return np.zeros_like(value_ms)
    return np.log1p(np.logaddexp(0.0, (value_ms / limit_ms - 1) / TOLERANCE))

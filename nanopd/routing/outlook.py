"""What one request would mean on every route: predictions for each worker, and from them for routes.

Knows the workers' loads, what has been sent where and the mix of requests, all as numbers; neither sequences nor
decisions. Plain numbers: a machine's workers are too few for arrays to be faster.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from nanopd.core.metrics import SLO
from nanopd.core.scheduler import Load
from nanopd.messages import Route
from nanopd.routing.cost_model import CostModel, chunk_pairs
from nanopd.routing.decision import Prediction
from nanopd.routing.split import Split

TOLERANCE = 0.05  # how far from its limit, relatively, a predicted figure begins to count
EXCESS_STEP = 0.05  # excesses that differ by less are alike
MIN_CHUNK = 128  # tokens
TTFT_SHARE = 0.8  # of the TTFT limit in which the prompts at a worker should be computed
MAX_BUSY = 0.9  # share of a decoding worker's time that prompts are taken to have at most
KEPT_FREE = 3.0  # excesses: as much as so many missed limits; with 1, single decodes there drive prompts away
NUM_PROMISING = 3  # workers for prompt and for answer each, whose pairs are looked at


class RouteSet:
    """Routes to choose from."""

    def __init__(self, routes: Iterable[Route]) -> None:
        self.routes = list(routes)
        self.all = frozenset(self.routes)
        self.collocated = [route for route in self.routes if route.is_collocated]
        self.prefill_workers = sorted({route.prefill_worker for route in self.routes})
        self.decode_workers = sorted({route.decode_worker for route in self.routes})


@dataclass(frozen=True, slots=True)
class Expected:
    """A request as it is foreseen."""

    num_new: int  # tokens to be computed
    num_output: float  # tokens to be generated, on average
    spread: tuple[float, ...]  # quantiles of output lengths over their mean


@dataclass(slots=True)
class _Worker:
    """One worker, and what it would mean to compute the prompt or the answer there."""

    load: Load
    num_bound: float  # requests that have been sent there to decode
    num_hopeful: float  # of these, may keep the service levels
    context_bound: float  # their tokens half-way through their answers
    num_output: float  # tokens of an answer there
    stretch: float  # of decode steps, by the prompts that usually come
    idle_ms: float  # a decode step now
    chunk: float = 0.0  # prompt tokens per step
    ttft_ms: float = 0.0
    step_ms: float = 0.0  # of the answer, with the prompts that usually come in between
    stall_ms: float = 0.0  # of the answer, by prompts that wait there
    until_ms: float = 0.0  # there are a place and room to decode
    prefill_caused_ms: float = 0.0
    decode_caused_ms: float = 0.0
    prefill_excess: float = 0.0  # of others, those to come included, by the prompt
    decode_excess: float = 0.0  # and by the answer

    @property
    def room_ms(self) -> float:
        """In which ends of answers free the room of a token."""
        return self.num_output * self.idle_ms / max(self.load.num_context_tokens, 1)

    @property
    def place_ms(self) -> float:
        """Until it has a place for one more."""
        missing = max(self.load.num_bound + 1 - self.load.max_num_seqs, 0)
        return missing * self.num_output * self.idle_ms / max(self.load.num_decoding, 1)


class Outlook:
    """Predictions for one request, from the cost model's terms as corrected so far and the mix of requests."""

    def __init__(
        self,
        costs: CostModel,
        slo: SLO,
        split: Split,
        max_chunk: int,
        loads: Sequence[Load],
        bound: Sequence[Sequence[float]],  # to each worker, see AdaptiveRouter.bound
        request: Expected,
    ) -> None:
        self._costs, self._terms, self._split, self._request = costs, costs.terms, split, request
        self._max_chunk, self._num_workers = max_chunk, len(loads)
        self._ttft_limit_ms, self._gap_limit_ms, self._tpot_limit_ms = (
            math.inf if ms is None else ms for ms in (slo.ttft_ms, slo.first_gap_ms, slo.tpot_ms)
        )
        self._pairs = chunk_pairs(request.num_new, 0)
        self._workers = [self._worker(*of) for of in zip(loads, bound, split.prompt_rate, strict=True)]
        for worker in self._workers:
            self._add_prefill(worker)
        soonest_ms = min(worker.ttft_ms for worker in self._workers)
        for worker, rate in zip(self._workers, split.prompt_rate, strict=True):
            self._add_decode(worker, soonest_ms, rate)
        num_kept = split.update(min(load.num_usable_tokens for load in loads))
        for worker in sorted(self._workers, key=lambda worker: worker.num_bound)[:num_kept]:
            worker.decode_excess += KEPT_FREE  # it should be free of decodes

    def _worker(self, load: Load, bound: Sequence[float], prompt_rate: float) -> _Worker:
        num_bound, context, output, num_hopeful = bound
        num_output = output / num_bound if num_bound > 0 else self._request.num_output
        stretch = 1 / (1 - min(self._terms.gamma * prompt_rate, MAX_BUSY))
        idle_ms = self._costs.step_ms(load.num_decoding, load.num_context_tokens)
        return _Worker(load, num_bound, num_hopeful, context, num_output, stretch, idle_ms)

    def _add_prefill(self, worker: _Worker) -> None:
        """The queue ahead and the prompt itself, in chunks beside the decodes that are there; a place and room."""
        load, num_new, idle_ms = worker.load, self._request.num_new, worker.idle_ms
        batch, context, waiting = load.num_decoding, load.num_context_tokens, load.num_waiting_tokens
        num_tokens = waiting + num_new
        worker.chunk = self._plan_chunk(worker)
        num_steps = math.ceil(num_tokens / worker.chunk)
        pairs = self._pairs + waiting * self._split.mean_prompt / 2
        steps_ms = num_steps * self._costs.mixed_ms(batch, context, num_tokens / num_steps, pairs / num_steps)
        # half a step until the next begins, and another one if that has been sent already
        queue_ms = max(idle_ms * (0.5 if waiting else 1.5) + steps_ms, worker.place_ms)
        worker.ttft_ms = queue_ms + max(num_new + context - load.num_usable_tokens, 0) * worker.room_ms
        delay_ms = (steps_ms - num_steps * idle_ms) * num_new / num_tokens  # of each decode
        worker.prefill_caused_ms = batch * delay_ms
        worker.prefill_excess = self._excess_of_next(worker, steps_ms / num_tokens)
        # whoever is still to decode there may be disturbed too
        others, quiet_ms = max(batch, worker.num_hopeful), (idle_ms or self._terms.beta) * worker.stretch
        disturbed = self._tpot_excess(quiet_ms, delay_ms, worker.num_output)
        worker.prefill_excess += others * (disturbed - _excess(quiet_ms, self._tpot_limit_ms))

    def _excess_of_next(self, worker: _Worker, token_ms: float) -> float:
        """Who comes to the queue behind the prompt misses its TTFT more likely, unless it would anyhow."""
        next_ms = worker.ttft_ms + token_ms * self._split.mean_prompt
        without_ms = next_ms - token_ms * self._request.num_new
        num_next = self._split.request_rate / self._num_workers * worker.ttft_ms
        return num_next * (_excess(next_ms, self._ttft_limit_ms) - _excess(without_ms, self._ttft_limit_ms))

    def _plan_chunk(self, worker: _Worker) -> float:
        """Prompt tokens per step: as few as keep the TPOT of the decodes there, but as many as the TTFT needs."""
        load, gamma = worker.load, self._terms.gamma
        most = max(self._max_chunk - load.num_decoding, 1)
        if not load.num_decoding:
            return most
        gentle = self._costs.chunk_within(self._tpot_limit_ms, load.num_decoding, load.num_context_tokens)
        num_tokens = load.num_waiting_tokens + self._request.num_new
        needed = num_tokens * worker.idle_ms / max(TTFT_SHARE * self._ttft_limit_ms - gamma * num_tokens, 1e-3)
        return min(max(gentle, needed, MIN_CHUNK), most) // 1

    def chunk_budget(self, worker: int) -> int:
        """Tokens per step from now on, if the worker computes the prompt."""
        w = self._workers[worker]
        return w.load.num_decoding + int(w.chunk)

    def _add_decode(self, worker: _Worker, soonest_ms: float, prompt_rate: float) -> None:
        """A row more beside those that will decode then, prompts in between, and the wait for a place and room."""
        # those that decode now are leaving evenly until its first token; those to come will be there if they last
        load, terms, split, num_output = worker.load, self._terms, self._split, self._request.num_output
        batch, num_bound, stretch = load.num_decoding, worker.num_bound, worker.stretch
        share = soonest_ms / max(worker.num_output * worker.idle_ms, num_output * terms.beta)
        beside = batch * max(1 - share, 0) + max(num_bound - batch, 0) / max(share, 1)
        context = worker.context_bound / max(num_bound, 1) * beside
        before_ms = self._costs.step_ms(beside, context)
        after_ms = self._costs.step_ms(beside + 1, context + self._request.num_new + num_output / 2)
        worker.step_ms, worker.stall_ms = after_ms * stretch, terms.gamma * load.num_waiting_tokens
        roomless = (load.num_bound - load.num_seqs) * split.mean_prompt + self._request.num_new
        worker.until_ms = max(max(roomless - load.num_free_tokens, 0) * worker.room_ms, worker.place_ms)
        before, after = (_excess(ms * stretch, self._tpot_limit_ms) for ms in (before_ms, after_ms))
        worker.decode_excess = beside * (after - before) + self._own_excess(worker, after_ms, prompt_rate)
        # a decode keeps prompts away until the last one has left
        kept_away = split.request_rate * terms.gamma * split.mean_prompt / (1 + beside)
        worker.decode_caused_ms = num_output * (beside * (after_ms - before_ms) + kept_away * after_ms)

    def _own_excess(self, worker: _Worker, step_ms: float, prompt_rate: float) -> float:
        """Of the answer's TPOT: expected over its lengths, and over whether prompts come in between."""
        num_output, mean_prompt = self._request.num_output, max(self._split.mean_prompt, 1.0)
        result = 0.0
        for of in self._request.spread:
            length = max(num_output * of, 1)
            num_prompts = prompt_rate / mean_prompt * length * step_ms
            is_hit = -math.expm1(-num_prompts)
            hit_ms = worker.stall_ms + self._terms.gamma * mean_prompt * num_prompts / max(is_hit, 1e-9)
            spared = _excess(step_ms + worker.stall_ms / length, self._tpot_limit_ms)
            result += spared + is_hit * (_excess(step_ms + hit_ms / length, self._tpot_limit_ms) - spared)
        return result / len(self._request.spread)

    def best(self, feasible: RouteSet) -> tuple[Prediction, Prediction | None]:
        """The best route and the second best."""
        predictions = [self._predict(route) for route in self._promising(feasible)]
        ranked = sorted(predictions, key=lambda p: (round(p.excess / EXCESS_STEP), p.cost_ms))[:2]
        return ranked[0], ranked[1] if len(ranked) > 1 else None

    def _promising(self, feasible: RouteSet) -> list[Route]:
        """All collocated routes, and the pairs of those workers that suit the prompt best and the answer best."""
        num_output = self._request.num_output

        def by_prefill(worker: int) -> tuple[int, float]:
            w = self._workers[worker]
            excess = w.prefill_excess + _excess(w.ttft_ms, self._ttft_limit_ms)
            return round(excess / EXCESS_STEP), w.ttft_ms + w.prefill_caused_ms

        def by_decode(worker: int) -> tuple[int, float]:
            w = self._workers[worker]
            cost_ms = w.until_ms + num_output * w.step_ms + w.stall_ms + w.decode_caused_ms
            excess = w.decode_excess + _excess(w.until_ms - soonest_ms + w.step_ms, self._gap_limit_ms)
            return round(excess / EXCESS_STEP), cost_ms

        soonest_ms = min(w.ttft_ms for w in self._workers)
        sources = sorted(feasible.prefill_workers, key=by_prefill)[:NUM_PROMISING]
        destinations = sorted(feasible.decode_workers, key=by_decode)[:NUM_PROMISING]
        pairs = (Route(p, d) for p in sources for d in destinations if p != d)
        return feasible.collocated + [route for route in pairs if route in feasible.all] or feasible.routes

    def _predict(self, route: Route) -> Prediction:
        p, d = self._workers[route.prefill_worker], self._workers[route.decode_worker]
        ttft_ms, late_ms, num_output = p.ttft_ms, 0.0, self._request.num_output
        wait_ms = max(d.until_ms - ttft_ms, 0.0)
        if p is d:
            ttft_ms += wait_ms
        else:
            move_ms = self._costs.move_ms(route.prefill_worker, route.decode_worker, self._request.num_new)
            late_ms = move_ms + d.step_ms + wait_ms
        gap_ms, stall_ms = d.step_ms + late_ms, d.stall_ms + late_ms
        tpot_ms = d.step_ms + stall_ms / num_output
        excess = _excess(ttft_ms, self._ttft_limit_ms) + _excess(gap_ms, self._gap_limit_ms)
        excess += _excess(tpot_ms, self._tpot_limit_ms) + p.prefill_excess + d.decode_excess
        caused_ms = p.prefill_caused_ms + d.decode_caused_ms
        cost_ms = ttft_ms + num_output * tpot_ms + caused_ms
        return Prediction(route, ttft_ms, gap_ms, tpot_ms, caused_ms, excess, cost_ms)

    def _tpot_excess(self, step_ms: float, stall_ms: float, num_output: float) -> float:
        """Expected over the lengths of an answer that is held up for `stall_ms`."""
        lengths = [max(num_output * of, 1) for of in self._request.spread]
        return sum(_excess(step_ms + stall_ms / length, self._tpot_limit_ms) for length in lengths) / len(lengths)


def _excess(value_ms: float, limit_ms: float) -> float:
    """By how much a figure exceeds its limit: nothing well below it, towards 1 above, as who misses misses once."""
    over = (value_ms / limit_ms - 1) / TOLERANCE
    if over < -10:
        return 0.0
    over = math.log1p(math.exp(over)) if over < 30 else over
    return over / (1 + over)

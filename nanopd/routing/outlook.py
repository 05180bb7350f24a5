"""What one request would mean on every route: predictions for each worker, and from them for routes.

Knows the workers' loads, what has been sent where and the mix of requests, all as numbers; neither sequences nor
decisions. Plain numbers: a machine's workers are too few for arrays to be faster.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from nanopd.core.scheduler import Load
from nanopd.messages import Route
from nanopd.metrics import SLO
from nanopd.routing.cost_model import CostModel, chunk_history, chunk_pairs
from nanopd.routing.decision import Prediction
from nanopd.routing.split import Split

TOLERANCE = 0.05  # how far from its limit, relatively, a predicted figure begins to count
NEGLIGIBLE = 0.5  # times a limit
EXCESS_STEP = 0.05  # excesses that differ by less are alike
MIN_CHUNK, CHUNK_STEP = 128, 1.5  # tokens, and times as many when they are too few
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

    num_tokens: int  # that there are
    num_cached: Sequence[int]  # by worker: of these, that it need not compute
    num_output: float  # tokens to be generated, on average
    spread: tuple[float, ...]  # quantiles of output lengths over their mean


@dataclass(slots=True)
class _Worker:
    """One worker, and what it would mean to compute the prompt or the answer there."""

    load: Load
    num_cached: int  # tokens of the request
    num_new: int  # the others
    num_bound: float  # requests that have been sent there to decode
    num_hopeful: float  # of these, may keep the service levels
    context_bound: float  # their tokens half-way through their answers
    num_output: float  # tokens of an answer there
    prompt_rate: float  # tokens per ms that usually come
    stretch: float  # of decode steps, by these
    idle_ms: float  # a decode step now
    place_ms: float  # until it has a place for one more
    room_ms: float  # in which ends of answers free the room of a token
    is_kept_free: bool = False  # of decodes, if possible
    # of the prompt
    chunk: float = 0.0  # tokens per step
    ttft_ms: float = 0.0
    prefill_caused_ms: float = 0.0
    prefill_excess: float = 0.0  # of others
    prefill_rank: tuple[int, float] = (0, 0.0)  # excess, cost: the less the better
    # of the answer
    step_ms: float = 0.0  # with the prompts that usually come in between
    stall_ms: float = 0.0  # by prompts that wait there
    until_ms: float = 0.0  # there are a place and room to decode
    decode_caused_ms: float = 0.0
    decode_excess: float = 0.0
    decode_rank: tuple[int, float] = (0, 0.0)


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
        self._max_chunk = max_chunk
        self._ttft_limit_ms, self._gap_limit_ms, self._tpot_limit_ms = (
            math.inf if ms is None else ms for ms in (slo.ttft_ms, slo.first_gap_ms, slo.tpot_ms)
        )
        self._lengths = [max(request.num_output * of, 1.0) for of in request.spread]
        self._soonest_ms = 0.0  # the first token, on the best worker for that
        columns = loads, request.num_cached, bound, split.prompt_rate
        self._workers = [self._worker(*of) for of in zip(*columns, strict=True)]
        num_kept = split.update(min(load.num_usable_tokens for load in loads))
        for worker in sorted(self._workers, key=lambda worker: worker.num_bound)[:num_kept]:
            worker.is_kept_free = True

    def _worker(self, load: Load, num_cached: int, bound: Sequence[float], prompt_rate: float) -> _Worker:
        num_bound, context, output, num_hopeful = bound
        num_output = output / num_bound if num_bound > 0 else self._request.num_output
        stretch = 1 / (1 - min(self._terms.gamma * prompt_rate, MAX_BUSY))
        idle_ms = self._terms.decode_ms(load.num_decoding, load.num_context_tokens)
        answer_ms = num_output * idle_ms
        place_ms = max(load.num_bound + 1 - load.max_num_seqs, 0) * answer_ms / max(load.num_decoding, 1)
        room_ms = answer_ms / max(load.num_context_tokens, 1)
        expected = num_bound, num_hopeful, context, num_output, prompt_rate, stretch, idle_ms, place_ms, room_ms
        return _Worker(load, num_cached, self._request.num_tokens - num_cached, *expected)

    def _add_prefill(self, worker: _Worker) -> None:
        """The queue ahead and the prompt itself, in chunks beside the decodes that are there; a place and room."""
        load, num_new, idle_ms = worker.load, worker.num_new, worker.idle_ms
        batch, waiting = load.num_decoding, load.num_waiting_tokens
        num_steps, steps_ms = self._plan_chunks(worker)
        # half a step until the next begins, and another one if that has been sent already
        queue_ms = max(idle_ms * (0.5 if waiting else 1.5) + steps_ms, worker.place_ms)
        roomless = self._request.num_tokens + load.num_context_tokens - load.num_usable_tokens
        worker.ttft_ms = queue_ms + max(roomless, 0) * worker.room_ms
        delay_ms = (steps_ms - num_steps * idle_ms) * num_new / (waiting + num_new)  # of each decode
        worker.prefill_caused_ms = batch * delay_ms
        # whoever is still to decode there may be disturbed too
        if others := max(batch, worker.num_hopeful):
            quiet_ms = (idle_ms or self._terms.beta) * worker.stretch
            disturbed = self._tpot_excess(quiet_ms, delay_ms, worker.num_output)
            worker.prefill_excess = others * (disturbed - _excess(quiet_ms, self._tpot_limit_ms))
        own = _excess(worker.ttft_ms, self._ttft_limit_ms)
        worker.prefill_excess += own * self._excess_of_next(worker, steps_ms / (waiting + num_new))
        excess = own + worker.prefill_excess
        worker.prefill_rank = round(excess / EXCESS_STEP), worker.ttft_ms + worker.prefill_caused_ms

    def _excess_of_next(self, worker: _Worker, token_ms: float) -> float:
        """Who comes before the first token, and comes to this queue, misses its TTFT more likely for the prompt.

        Counts as far as the prompt will be late itself: a queue that is lost anyhow is the place for it.
        """
        next_ms = worker.ttft_ms + token_ms * self._split.mean_new
        without_ms = next_ms - token_ms * worker.num_new
        num_next = self._split.request_rate * worker.ttft_ms
        return num_next * (_excess(next_ms, self._ttft_limit_ms) - _excess(without_ms, self._ttft_limit_ms))

    def _plan_chunks(self, worker: _Worker) -> tuple[int, float]:
        """Prompt tokens per step: as few as keep the TPOT of the decodes there, but as many as the TTFT needs.

        Returns:
            In how many steps the prompt and those that wait will be computed, and the time that takes.
        """
        load, limit_ms = worker.load, TTFT_SHARE * self._ttft_limit_ms
        worker.chunk = most = max(self._max_chunk - load.num_decoding, 1)
        if load.num_decoding:
            gentle = self._costs.chunk_within(self._tpot_limit_ms, load.num_decoding, load.num_context_tokens)
            worker.chunk = min(max(gentle, MIN_CHUNK), most) // 1
        while (steps := self._prefill_ms(worker))[1] > limit_ms and worker.chunk < most:
            worker.chunk = min(worker.chunk * CHUNK_STEP, most) // 1
        return steps

    def _prefill_ms(self, worker: _Worker) -> tuple[int, float]:
        load, num_new, num_cached, chunk = worker.load, worker.num_new, worker.num_cached, worker.chunk
        waiting = load.num_waiting_tokens
        num_steps = math.ceil((waiting + num_new) / chunk)
        pairs, history = chunk_pairs(num_new, num_cached), chunk_history(num_new, num_cached, chunk)
        if waiting and (mean_new := self._split.mean_new):
            num_others, mean_cached = waiting / mean_new, self._split.mean_prompt - mean_new
            pairs += num_others * chunk_pairs(mean_new, mean_cached)
            history += num_others * chunk_history(mean_new, mean_cached, chunk)
        per_step = (waiting + num_new) / num_steps, pairs / num_steps, history / num_steps
        return num_steps, num_steps * self._costs.mixed_ms(load.num_decoding, load.num_context_tokens, *per_step)

    def chunk_budget(self, worker: int) -> int:
        """Tokens per step from now on, if the worker computes the prompt."""
        w = self._workers[worker]
        return w.load.num_decoding + int(w.chunk)

    def _add_decode(self, worker: _Worker) -> None:
        """A row more beside those that will decode then, prompts in between, and the wait for a place and room."""
        # those that decode now are leaving evenly until its first token; those to come will be there if they last
        load, terms, split, num_output = worker.load, self._terms, self._split, self._request.num_output
        batch, num_bound, stretch = load.num_decoding, worker.num_bound, worker.stretch
        share = self._soonest_ms / max(worker.num_output * worker.idle_ms, num_output * terms.beta)
        beside = batch * max(1 - share, 0) + max(num_bound - batch, 0) / max(share, 1)
        context = worker.context_bound / max(num_bound, 1) * beside
        before_ms = terms.decode_ms(beside, context)
        after_ms = terms.decode_ms(beside + 1, context + self._request.num_tokens + num_output / 2)
        worker.step_ms, worker.stall_ms = after_ms * stretch, terms.gamma * load.num_waiting_tokens
        roomless = (load.num_bound - load.num_seqs) * split.mean_prompt + self._request.num_tokens
        worker.until_ms = max(max(roomless - load.num_free_tokens, 0) * worker.room_ms, worker.place_ms)
        before, after = _excess(before_ms * stretch, self._tpot_limit_ms), _excess(worker.step_ms, self._tpot_limit_ms)
        worker.decode_excess = beside * (after - before) + self._own_excess(worker, after_ms)
        worker.decode_excess += KEPT_FREE * worker.is_kept_free
        # a decode keeps prompts away until the last one has left
        kept_away = split.request_rate * terms.gamma * split.mean_new / (1 + beside)
        worker.decode_caused_ms = num_output * (beside * (after_ms - before_ms) + kept_away * after_ms)
        excess = worker.decode_excess + _excess(worker.until_ms - self._soonest_ms + worker.step_ms, self._gap_limit_ms)
        cost_ms = worker.until_ms + num_output * worker.step_ms + worker.stall_ms + worker.decode_caused_ms
        worker.decode_rank = round(excess / EXCESS_STEP), cost_ms

    def _own_excess(self, worker: _Worker, step_ms: float) -> float:
        """Of the answer's TPOT: expected over its lengths, and over whether prompts come in between."""
        limit_ms, stall_ms, result = self._tpot_limit_ms, worker.stall_ms, 0.0
        mean_new = max(self._split.mean_new, 1.0)
        prompts_per_token, prompt_ms = worker.prompt_rate / mean_new * step_ms, self._terms.gamma * mean_new
        for length in self._lengths:
            spared = _excess(step_ms + stall_ms / length, limit_ms)
            num_prompts = prompts_per_token * length
            is_hit = -math.expm1(-num_prompts)
            hit_ms = stall_ms + prompt_ms * num_prompts / max(is_hit, 1e-9)
            result += spared + is_hit * (_excess(step_ms + hit_ms / length, limit_ms) - spared)
        return result / len(self._lengths)

    def best(self, feasible: RouteSet) -> tuple[Prediction, Prediction | None]:
        """The best route and the second best."""
        predictions = [self._predict(route) for route in self._promising(feasible)]
        ranked = sorted(predictions, key=lambda p: (round(p.excess / EXCESS_STEP), p.cost_ms))[:2]
        return ranked[0], ranked[1] if len(ranked) > 1 else None

    def _promising(self, feasible: RouteSet) -> list[Route]:
        """One worker for all that suit it best, and pairs of those that suit the prompt best and the answer best."""
        workers = self._workers
        for p in feasible.prefill_workers:
            if not workers[p].chunk:
                self._add_prefill(workers[p])
        self._soonest_ms = min(workers[p].ttft_ms for p in feasible.prefill_workers)
        for d in feasible.decode_workers:
            if not workers[d].step_ms:
                self._add_decode(workers[d])

        def rank(route: Route) -> tuple[int, float]:
            p, d = workers[route.prefill_worker].prefill_rank, workers[route.decode_worker].decode_rank
            return p[0] + d[0], p[1] + d[1]

        sources = sorted(feasible.prefill_workers, key=lambda p: workers[p].prefill_rank)[:NUM_PROMISING]
        destinations = sorted(feasible.decode_workers, key=lambda d: workers[d].decode_rank)[:NUM_PROMISING]
        pairs = (Route(p, d) for p in sources for d in destinations if p != d)
        collocated = sorted(feasible.collocated, key=rank)[:NUM_PROMISING]
        return collocated + [route for route in pairs if route in feasible.all] or feasible.routes

    def _predict(self, route: Route) -> Prediction:
        p, d = self._workers[route.prefill_worker], self._workers[route.decode_worker]
        ttft_ms, late_ms, num_output = p.ttft_ms, 0.0, self._request.num_output
        wait_ms = max(d.until_ms - ttft_ms, 0.0)
        if p is d:
            ttft_ms += wait_ms
        else:
            move_ms = self._costs.move_ms(route.prefill_worker, route.decode_worker, d.num_new)
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
    if value_ms < NEGLIGIBLE * limit_ms:
        return 0.0
    over = (value_ms / limit_ms - 1) / TOLERANCE
    over = math.log1p(math.exp(over)) if over < 30 else over
    return over / (1 + over)

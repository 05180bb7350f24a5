"""What each route would mean for one request and for the others: predictions by worker, and from them by route.

Knows the workers' loads, what is bound for them and the mix of requests, all as numbers; neither sequences nor
decisions. Plain numbers: a machine's workers are too few for arrays to be faster.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, exp, expm1, inf, log1p
from typing import NamedTuple

from nanopd.core.scheduler import Load
from nanopd.messages import Route
from nanopd.metrics import SLO
from nanopd.routing.capacity import BoundLoad, Demand
from nanopd.routing.cost_model import CostModel, chunk_history, chunk_pairs
from nanopd.routing.policy import Prediction, RouteSet

# These were set by hand: no measurement is on record for any of them, and the note on DEDICATED_PENALTY has no figures.
TOLERANCE = 0.05  # how far from its limit, relatively, a predicted figure begins to count
NEGLIGIBLE = 0.5  # times a limit, below which a figure violates nothing at all
VIOLATION_STEP = 0.05  # violations that differ by less are alike
MIN_CHUNK, CHUNK_STEP = 128, 1.5  # tokens, and times as many when they are too few
TTFT_SHARE = 0.8  # of the TTFT limit in which the prompts at a worker should be computed
MAX_BUSY = 0.9  # share of a decoding worker's time that prompts are taken to have at most
# violations that a decode at a dedicated prefill worker counts as; with 1, single decodes there drive prompts away
DEDICATED_PENALTY = 3.0
NUM_PROMISING = 3  # workers for prompt and for answer each, whose pairs are looked at

Rank = tuple[int, float]  # violation in steps, cost in ms: the less the better


class ExpectedRequest(NamedTuple):
    """A request whose answer has an expected length."""

    num_tokens: int  # of the prompt, and those generated before it lost its route
    num_cached: Sequence[int]  # by worker: tokens of `num_tokens` that it need not compute
    num_output: float  # tokens to be generated, on average
    spread: tuple[float, ...]  # quantiles of the answer's length over its mean


class _Prefill(NamedTuple):
    """What it would mean to compute the prompt at a worker."""

    chunk: float  # tokens per step
    ttft_ms: float
    caused_ms: float
    violation: float  # caused to others
    rank: Rank


class _Decode(NamedTuple):
    """What it would mean to generate the answer at a worker."""

    step_ms: float  # with the prompts that usually come in between
    stall_ms: float  # by prompts that wait there already
    wait_ms: float  # until there are a sequence slot and KV blocks
    caused_ms: float
    violation: float  # caused to others, and of the answer's own TPOT
    rank: Rank


@dataclass(slots=True)
class _Worker:
    """One worker as it is, whatever the request."""

    load: Load
    num_cached: int  # tokens of the request
    num_new: int  # the other tokens of the request
    bound: BoundLoad
    num_output: float  # mean tokens of an answer there
    prompt_rate: float  # tokens of prompts per ms that usually come
    stretch: float  # of decode steps, by these
    idle_ms: float  # a decode step now, without prompts
    slot_wait_ms: float  # until one of max_num_seqs is free
    token_wait_ms: float  # in which answers that end free the KV cache of one token
    is_dedicated: bool = False  # to prefill


class Forecast:
    """Predictions for one request, from the cost model's terms as corrected so far and the demand."""

    def __init__(
        self,
        costs: CostModel,
        slo: SLO,
        max_chunk: int,
        demand: Demand,
        loads: Sequence[Load],
        request: ExpectedRequest,
        num_dedicated: int = 0,
    ) -> None:
        """`num_dedicated` workers, those with the fewest decodes, are dedicated to prefill."""
        self._costs, self._terms, self._demand, self._request = costs, costs.terms, demand, request
        self._max_chunk = max_chunk
        self._ttft_limit_ms, self._gap_limit_ms, self._tpot_limit_ms = (
            inf if ms is None else ms for ms in (slo.ttft_ms, slo.first_gap_ms, slo.tpot_ms)
        )
        self._lengths = [max(request.num_output * of, 1.0) for of in request.spread]
        self._first_token_ms = 0.0  # until it comes from the worker that is fastest for that
        self._prefills: dict[int, _Prefill] = {}  # by worker, of those that some route has led over
        self._decodes: dict[int, _Decode] = {}
        columns = loads, request.num_cached, demand.bound, demand.prompt_rate
        self._workers = [self._worker(*of) for of in zip(*columns, strict=True)]
        for worker in sorted(self._workers, key=lambda worker: worker.bound.num_requests)[:num_dedicated]:
            worker.is_dedicated = True

    def _worker(self, load: Load, num_cached: int, bound: BoundLoad, prompt_rate: float) -> _Worker:
        num_output = bound.num_output / bound.num_requests if bound.num_requests > 0 else self._request.num_output
        stretch = 1 / (1 - min(self._terms.gamma * prompt_rate, MAX_BUSY))
        idle_ms = self._terms.decode_ms(load.num_decoding, load.num_context_tokens)
        answer_ms = num_output * idle_ms
        slot_wait_ms = max(load.num_bound + 1 - load.max_num_seqs, 0) * answer_ms / max(load.num_decoding, 1)
        token_wait_ms = answer_ms / max(load.num_context_tokens, 1)
        expected = num_output, prompt_rate, stretch, idle_ms, slot_wait_ms, token_wait_ms
        return _Worker(load, num_cached, self._request.num_tokens - num_cached, bound, *expected)

    def best(self, feasible: RouteSet) -> tuple[Prediction, Prediction | None]:
        """The best route and the second best."""
        predictions = [self._predict(route) for route in self._promising(feasible)]
        ranked = sorted(predictions, key=lambda p: (_steps(p.slo_violation), p.cost_ms))[:2]
        return ranked[0], ranked[1] if len(ranked) > 1 else None

    def chunk_budget(self, worker: int) -> int:
        """Tokens per step from now on, if the worker computes the prompt."""
        return self._workers[worker].load.num_decoding + int(self._prefills[worker].chunk)

    def _promising(self, feasible: RouteSet) -> list[Route]:
        """The best routes within one worker, and pairs of the workers best for the prompt and best for the answer."""
        prefills, decodes = self._prefills, self._decodes
        for p in feasible.prefill_workers:
            if p not in prefills:
                prefills[p] = self._forecast_prefill(self._workers[p])
        self._first_token_ms = min([prefills[p].ttft_ms for p in feasible.prefill_workers])
        for d in feasible.decode_workers:
            if d not in decodes:
                decodes[d] = self._forecast_decode(self._workers[d])

        def rank(route: Route) -> Rank:
            p, d = prefills[route.prefill_worker].rank, decodes[route.decode_worker].rank
            return p[0] + d[0], p[1] + d[1]

        sources = sorted(feasible.prefill_workers, key=lambda p: prefills[p].rank)[:NUM_PROMISING]
        destinations = sorted(feasible.decode_workers, key=lambda d: decodes[d].rank)[:NUM_PROMISING]
        pairs = (Route(p, d) for p in sources for d in destinations if p != d)
        collocated = sorted(feasible.collocated, key=rank)[:NUM_PROMISING]
        return collocated + [route for route in pairs if route in feasible.all] or feasible.routes

    def _predict(self, route: Route) -> Prediction:
        p, d = self._prefills[route.prefill_worker], self._decodes[route.decode_worker]
        ttft_ms, late_ms, num_output = p.ttft_ms, 0.0, self._request.num_output
        wait_ms = max(d.wait_ms - ttft_ms, 0.0)
        if route.is_collocated:
            ttft_ms += wait_ms
        else:
            num_moved = self._workers[route.decode_worker].num_new
            move_ms = self._costs.move_ms(route.prefill_worker, route.decode_worker, num_moved)
            late_ms = move_ms + d.step_ms + wait_ms
        gap_ms, stall_ms = d.step_ms + late_ms, d.stall_ms + late_ms
        tpot_ms = d.step_ms + stall_ms / num_output
        violation = _violation(ttft_ms, self._ttft_limit_ms) + _violation(gap_ms, self._gap_limit_ms)
        violation += _violation(tpot_ms, self._tpot_limit_ms) + p.violation + d.violation
        caused_ms = p.caused_ms + d.caused_ms
        cost_ms = ttft_ms + num_output * tpot_ms + caused_ms
        return Prediction(route, ttft_ms, gap_ms, tpot_ms, caused_ms, violation, cost_ms)

    # ------------------------------------------------------------------------------------------------ the prompt

    def _forecast_prefill(self, worker: _Worker) -> _Prefill:
        """The queue ahead and the prompt itself, in chunks beside the decodes there; a sequence slot and KV blocks."""
        load, num_new, idle_ms = worker.load, worker.num_new, worker.idle_ms
        batch, waiting = load.num_decoding, load.num_waiting_tokens
        chunk, num_steps, steps_ms = self._plan_chunks(worker)
        # half a step until the next begins, and another one if that has been sent already
        queue_ms = max(idle_ms * (0.5 if waiting else 1.5) + steps_ms, worker.slot_wait_ms)
        num_missing = self._request.num_tokens + load.num_context_tokens - load.num_usable_tokens
        ttft_ms = queue_ms + max(num_missing, 0) * worker.token_wait_ms
        delay_ms = (steps_ms - num_steps * idle_ms) * num_new / (waiting + num_new)  # of each decode
        caused_ms, violation = batch * delay_ms, 0.0
        # Requests that are still to decode there may be delayed as well as those that do.
        if others := max(batch, worker.bound.num_on_time):
            quiet_ms = (idle_ms or self._terms.beta) * worker.stretch
            delayed = self._tpot_violation(quiet_ms, delay_ms, worker.num_output)
            violation = others * (delayed - _violation(quiet_ms, self._tpot_limit_ms))
        own = _violation(ttft_ms, self._ttft_limit_ms)
        violation += own * self._violation_of_next(ttft_ms, num_new, steps_ms / (waiting + num_new))
        return _Prefill(chunk, ttft_ms, caused_ms, violation, (_steps(own + violation), ttft_ms + caused_ms))

    def _violation_of_next(self, ttft_ms: float, num_new: int, token_ms: float) -> float:
        """Of the TTFT limit by requests that join the queue before the prompt's first token, and wait for the prompt.

        The caller weighs it with the prompt's own violation: the place for a prompt that will be late is a queue in
        which all are late anyhow.
        """
        next_ms = ttft_ms + token_ms * self._demand.mean_new
        without_ms = next_ms - token_ms * num_new
        num_next = self._demand.request_rate * ttft_ms
        return num_next * (_violation(next_ms, self._ttft_limit_ms) - _violation(without_ms, self._ttft_limit_ms))

    def _plan_chunks(self, worker: _Worker) -> tuple[float, int, float]:
        """Prompt tokens per step: as few as keep the TPOT of the decodes there, but as many as the TTFT needs.

        Returns:
            The tokens, in how many steps the prompt and those that wait will be computed, and the time that takes.
        """
        load, num_new, num_cached, demand = worker.load, worker.num_new, worker.num_cached, self._demand
        batch, context, waiting = load.num_decoding, load.num_context_tokens, load.num_waiting_tokens
        num_others = waiting / demand.mean_new if demand.mean_new else 0.0
        num_mean_cached = demand.mean_prompt - demand.mean_new
        pairs = chunk_pairs(num_new, num_cached) + num_others * chunk_pairs(demand.mean_new, num_mean_cached)
        most, limit_ms = max(self._max_chunk - batch, 1), TTFT_SHARE * self._ttft_limit_ms
        chunk: float = most
        if batch:
            within = self._costs.chunk_within(self._tpot_limit_ms, batch, context)
            chunk = min(max(within, MIN_CHUNK), most) // 1
        while True:
            num_steps = ceil((waiting + num_new) / chunk)
            history = chunk_history(num_new, num_cached, chunk)
            if num_others:
                history += num_others * chunk_history(demand.mean_new, num_mean_cached, chunk)
            per_step = (waiting + num_new) / num_steps, pairs / num_steps, history / num_steps
            steps_ms = num_steps * self._costs.mixed_ms(batch, context, *per_step)
            if steps_ms <= limit_ms or chunk >= most:
                return chunk, num_steps, steps_ms
            chunk = min(chunk * CHUNK_STEP, most) // 1

    # ------------------------------------------------------------------------------------------------ the answer

    def _forecast_decode(self, worker: _Worker) -> _Decode:
        """One more row beside those that will decode by then, prompts in between, and the wait until it may start."""
        load, terms, demand, num_output = worker.load, self._terms, self._demand, self._request.num_output
        batch, num_bound, stretch = load.num_decoding, worker.bound.num_requests, worker.stretch
        # Until the first token, answers that decode now end evenly; those to come will be there if they last.
        share = self._first_token_ms / max(worker.num_output * worker.idle_ms, num_output * terms.beta)
        beside = batch * max(1 - share, 0) + max(num_bound - batch, 0) / max(share, 1)
        context = worker.bound.num_context / max(num_bound, 1) * beside
        before_ms = terms.decode_ms(beside, context)
        after_ms = terms.decode_ms(beside + 1, context + self._request.num_tokens + num_output / 2)
        step_ms, stall_ms = after_ms * stretch, terms.gamma * load.num_waiting_tokens
        num_missing = (load.num_bound - load.num_seqs) * demand.mean_prompt + self._request.num_tokens
        wait_ms = max(max(num_missing - load.num_free_tokens, 0) * worker.token_wait_ms, worker.slot_wait_ms)
        limit_ms = self._tpot_limit_ms
        added = _violation(step_ms, limit_ms) - _violation(before_ms * stretch, limit_ms)  # to each row beside it
        violation = beside * added + self._own_violation(worker, after_ms, stall_ms)
        violation += DEDICATED_PENALTY * worker.is_dedicated
        # A decode keeps prompts away from its worker until the last decode there has ended.
        kept_away = demand.request_rate * terms.gamma * demand.mean_new / (1 + beside)
        caused_ms = num_output * (beside * (after_ms - before_ms) + kept_away * after_ms)
        late = _violation(wait_ms - self._first_token_ms + step_ms, self._gap_limit_ms)
        cost_ms = wait_ms + num_output * step_ms + stall_ms + caused_ms
        return _Decode(step_ms, stall_ms, wait_ms, caused_ms, violation, (_steps(violation + late), cost_ms))

    def _own_violation(self, worker: _Worker, step_ms: float, stall_ms: float) -> float:
        """Of the TPOT limit by the answer: expected over its lengths, and over whether prompts come in between."""
        limit_ms, result = self._tpot_limit_ms, 0.0
        mean_new = max(self._demand.mean_new, 1.0)
        prompts_per_token, prompt_ms = worker.prompt_rate / mean_new * step_ms, self._terms.gamma * mean_new
        for length in self._lengths:
            undisturbed = _violation(step_ms + stall_ms / length, limit_ms)
            num_prompts = prompts_per_token * length
            is_hit = -expm1(-num_prompts)
            hit_ms = stall_ms + prompt_ms * num_prompts / max(is_hit, 1e-9)
            result += undisturbed + is_hit * (_violation(step_ms + hit_ms / length, limit_ms) - undisturbed)
        return result / len(self._lengths)

    def _tpot_violation(self, step_ms: float, stall_ms: float, num_output: float) -> float:
        """Expected over the lengths of an answer that is held up once for `stall_ms`."""
        lengths = [max(num_output * of, 1) for of in self._request.spread]
        return sum([_violation(step_ms + stall_ms / length, self._tpot_limit_ms) for length in lengths]) / len(lengths)


def _violation(value_ms: float, limit_ms: float) -> float:
    """By how much a figure violates its limit: nothing well below it, towards 1 above it.

    It saturates there because a request that misses its limit is counted once, by however much it misses it.
    """
    if value_ms < NEGLIGIBLE * limit_ms:
        return 0.0
    over = (value_ms / limit_ms - 1) / TOLERANCE
    over = log1p(exp(over)) if over < 30 else over
    return over / (1 + over)


def _steps(violation: float) -> int:
    return round(violation / VIOLATION_STEP)

"""How much the workers can bear at the present mix of requests, and what should change about their roles for it.

`Demand` records what was asked for lately and what is still to be decoded where. Two things rest on it. Softly,
`DedicatedPrefill` says how many workers should get no decodes, by a fluid model of the whole machine
(`bearable_loads`). Hard, `RoleSwitcher` says which worker should do more than its configured role allows, by forecasts
for single requests, since a role forbids routes outright. Numbers only: roles are the engine's to change.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from operator import add, sub
from typing import NamedTuple

import numpy as np

from nanopd.config import allowed_routes
from nanopd.messages import Role, Route
from nanopd.routing.cost_model import Terms, chunk_history, chunk_pairs
from nanopd.routing.policy import Prediction, RoleChanges, RouteSet, WorkerLoad

# These were set by hand: no measurement is on record for any of them.
MEMORY_STEPS = 300  # decode steps after which the mix of requests is forgotten
LEAST_SEEN = 0.05  # share of the memory that rates are taken over at least: the first requests say little about them
MIN_REQUESTS = 5  # below which no worker is dedicated
CLEAR_GAIN = 1.02  # times the bearable load, so that workers do not change sides with every request
PLAN_SHARE = 0.05  # of the memory, between one plan and the next
LOADS = np.geomspace(0.2, 5, 200)[:, None]  # [num_loads, 1] times the present one
NUM_ITERATIONS = 8  # until a batch and its step time agree
MAX_BATCH = 1e4  # above which the iteration is cut off, as it diverges where the workers cannot bear the load
ROLE_MEMORY = 32  # requests over which shares of requests are averaged
OPEN, CLOSE = 0.5, 0.05  # shares of requests
CLEAR_VIOLATION = 0.05  # a difference in `Prediction.slo_violation` that counts
CLEAR_COST = 0.8  # times the other's cost, for two routes with alike violations


class BoundLoad(NamedTuple):
    """Requests that are to decode at one worker, those that decode there now included; one of them, or their sums."""

    num_requests: float
    num_context: float  # tokens half-way through the answers
    num_output: float  # tokens of the answers
    num_on_time: float  # requests that may still keep the SLO


class Demand:
    """What is asked for: averages over the latest requests, fading with time, and what each worker has to decode."""

    def __init__(self, num_workers: int, decode_step_ms: float) -> None:
        """`decode_step_ms`: the time of a decode step, which sets the time scale of the memory."""
        self.memory_ms = MEMORY_STEPS * decode_step_ms
        self.now_ms = 0.0  # since the first request
        self.num_requests = self.num_output = 0.0  # these and the private ones fade
        self.mean_new = 0.0  # tokens of a prompt that have to be computed
        self.mean_prompt = 0.0  # tokens of a prompt
        self.prompt_rate = [0.0] * num_workers  # tokens per ms that each worker is given to prefill
        self.bound = [BoundLoad(0.0, 0.0, 0.0, 0.0)] * num_workers
        self._num_prompt, self._seen_ms = 0.0, 0.0
        self._num_new = [0.0] * num_workers  # tokens of prompts to be computed
        self._updated_s: float | None = None
        self._bound_by_seq: dict[int, tuple[int, BoundLoad]] = {}  # with the worker

    @property
    def window_ms(self) -> float:
        """The time over which the faded sums were taken."""
        return max(self._seen_ms, LEAST_SEEN * self.memory_ms)

    @property
    def request_rate(self) -> float:
        """Requests per ms."""
        return self.num_requests / self.window_ms

    def advance(self, now_s: float) -> None:
        """Let time pass: requests of long ago count less."""
        elapsed_ms = 0.0 if self._updated_s is None else (now_s - self._updated_s) * 1e3
        kept = math.exp(-elapsed_ms / self.memory_ms)
        self._updated_s = now_s
        self.now_ms += elapsed_ms
        self.num_requests *= kept
        self.num_output *= kept
        self._num_prompt *= kept
        self._num_new = [num_tokens * kept for num_tokens in self._num_new]
        self._seen_ms = self._seen_ms * kept + self.memory_ms * (1 - kept)
        window_ms = self.window_ms
        self.prompt_rate = [num_tokens / window_ms for num_tokens in self._num_new]

    def count(self, prefill_worker: int, num_prompt: int, num_new: int, num_output: float) -> None:
        """A request is sent to `prefill_worker`, which has to compute `num_new` tokens of its prompt."""
        self.num_requests += 1
        self.num_output += num_output
        self._num_prompt += num_prompt
        self._num_new[prefill_worker] += num_new
        self.mean_new, self.mean_prompt = sum(self._num_new) / self.num_requests, self._num_prompt / self.num_requests

    def bind(self, seq_id: int, decode_worker: int, load: BoundLoad) -> None:
        """A sequence will decode at `decode_worker`."""
        self._bound_by_seq[seq_id] = decode_worker, load
        self.bound[decode_worker] = BoundLoad(*map(add, self.bound[decode_worker], load))

    def release(self, seq_id: int) -> None:
        """A sequence has ended or lost its route; it may never have had one."""
        if bound := self._bound_by_seq.pop(seq_id, None):
            worker, load = bound
            self.bound[worker] = BoundLoad(*map(sub, self.bound[worker], load))


def bearable_loads(
    demand: Demand, terms: Terms, max_chunk: int, tpot_ms: float, num_usable_tokens: float
) -> np.ndarray:  # [num_workers] float64
    """How many times the present load could be served, for each number 0 .. num_workers - 1 of dedicated workers.

    A fluid model: so many workers do nothing but prefill; all answers decode on the others, which put prompts into what
    the TPOT limit leaves of their steps. `num_usable_tokens`: of one worker's KV cache.
    """
    num_workers = len(demand.bound)
    num_prefill = np.arange(num_workers)  # arrays are [num_workers] or, with loads, [num_loads, num_workers]
    num_decode = num_workers - num_prefill
    token_rate = LOADS * demand.num_output / demand.window_ms / num_decode  # per ms and decoding worker
    num_context = demand.mean_prompt + demand.num_output / demand.num_requests / 2

    def step_ms(batch: np.ndarray) -> np.ndarray:
        return terms.decode_ms(batch, batch * num_context, np.maximum)

    batch = token_rate * terms.beta  # of steps without prompts
    for _ in range(NUM_ITERATIONS):
        batch = np.minimum(token_rate * step_ms(batch), MAX_BATCH)
    batch = batch + np.sqrt(batch)  # A batch fluctuates like a Poisson variable.
    is_kept = (step_ms(batch) <= tpot_ms) & (batch * num_context <= num_usable_tokens)
    mean_new, mean_cached = demand.mean_new, demand.mean_prompt - demand.mean_new
    alone_ms = terms.step_ms(0, 0, max_chunk) / max_chunk * mean_new  # a prompt in a worker that only prefills
    alone_ms += terms.a2 * chunk_pairs(mean_new, mean_cached)
    alone_ms += terms.a3 * chunk_history(mean_new, mean_cached, max_chunk)
    batch = np.minimum(token_rate * tpot_ms, MAX_BATCH)  # of steps that prompts stretch to the limit
    chunk = terms.chunk_within(tpot_ms, batch, batch * num_context, maximum=np.maximum)
    beside = num_decode * (chunk / tpot_ms) * (alone_ms / mean_new)  # as many workers that only prefill
    is_kept &= LOADS * demand.request_rate * alone_ms <= num_prefill + beside
    return (is_kept * LOADS).max(axis=0)


class DedicatedPrefill:
    """The number of workers that should do nothing but prefill, kept until another one bears clearly more.

    The number that bears the highest load wins at any load, so that it is right before the load comes.
    """

    def __init__(self, max_chunk: int, tpot_ms: float | None) -> None:
        """`tpot_ms`: the limit that decodes have to keep; None: there is none, and no worker is dedicated."""
        self.num_workers = 0
        self._max_chunk, self._tpot_ms = max_chunk, tpot_ms
        self._planned_ms = -math.inf

    def update(self, demand: Demand, terms: Terms, num_usable_tokens: float) -> int:
        """The number at the present demand; `num_usable_tokens`: of one worker's KV cache."""
        if self._tpot_ms is None or demand.num_requests < MIN_REQUESTS:
            return 0
        if demand.now_ms - self._planned_ms >= PLAN_SHARE * demand.memory_ms:
            self._planned_ms = demand.now_ms
            loads = bearable_loads(demand, terms, self._max_chunk, self._tpot_ms, num_usable_tokens)
            if loads.max() > CLEAR_GAIN * loads[self.num_workers]:
                self.num_workers = int(np.argmax(loads))
        return self.num_workers


class RoleSwitcher:
    """Says when a prefill or decode worker should become mixed, and when it should go back to its configured role.

    It becomes mixed while most requests would clearly do better on a route that only its role forbids, and goes back
    when hardly any request does better for it. One worker changes at a time.
    """

    def __init__(self, roles: Sequence[Role], has_limits: bool) -> None:
        """`roles`: as configured. `has_limits`: there is an SLO, and a request that keeps it has nothing to gain."""
        self._roles, self._has_limits = roles, has_limits
        self._lack = 0.0  # share of requests that would be served better if one more worker were mixed
        self._gain = 0.0  # share of requests that are served better because some are
        self._wanted = [0.0] * len(roles)  # share of requests for which this worker would have to be mixed
        self._feasible = self._within = self._beyond = RouteSet(())

    def changes(
        self,
        feasible: RouteSet,
        taken: Prediction,
        best: Callable[[RouteSet], Prediction],
        workers: Sequence[WorkerLoad],
    ) -> RoleChanges:
        """The changes of roles to ask for, after a request that will take the best of `feasible` routes."""
        if all(role is Role.MIXED for role in self._roles):
            return ()
        if feasible is not self._feasible:
            self._set_routes(feasible, workers)
        opened = [w for w, role in enumerate(self._roles) if workers[w].role is not role]
        may_lack = self._beyond.routes and (taken.slo_violation > CLEAR_VIOLATION or not self._has_limits)
        ideal = best(self._beyond) if may_lack else taken
        is_gain = not self._within.routes or (bool(opened) and _is_clearly_better(taken, best(self._within)))
        is_lacking = _is_clearly_better(ideal, taken)
        self._lack += (is_lacking - self._lack) / ROLE_MEMORY
        self._gain += (is_gain - self._gain) / ROLE_MEMORY
        self._wanted = [share - share / ROLE_MEMORY for share in self._wanted]
        if is_lacking:
            for worker in _forbidden_at(ideal.route, workers):
                self._wanted[worker] += 1 / ROLE_MEMORY
        if self._lack > OPEN:
            worker = self._wanted.index(max(self._wanted))
            self._lack, self._gain, self._wanted[worker] = 0.0, 1.0, 0.0
            return ((worker, Role.MIXED),)
        if opened and self._gain < CLOSE:
            self._gain = 1.0
            worker = min(opened, key=lambda w: workers[w].load)
            return ((worker, self._roles[worker]),)
        return ()

    def _set_routes(self, feasible: RouteSet, workers: Sequence[WorkerLoad]) -> None:
        """Only workers of feasible routes count: the others are dead, or have too small a cache."""
        configured = set(allowed_routes(self._roles))
        live = sorted({*feasible.prefill_workers, *feasible.decode_workers})
        routes = [Route(p, d) for p in live for d in live]
        self._feasible = feasible
        self._within = RouteSet(route for route in feasible.routes if route in configured)
        self._beyond = RouteSet(route for route in routes if len(_forbidden_at(route, workers)) == 1)


def _forbidden_at(route: Route, workers: Sequence[WorkerLoad]) -> list[int]:
    """The workers of a route whose present role forbids their part in it."""
    p, d = route.prefill_worker, route.decode_worker
    return [w for w, may in ((p, workers[p].role.may_prefill), (d, workers[d].role.may_decode)) if not may]


def _is_clearly_better(one: Prediction, other: Prediction) -> bool:
    if abs(one.slo_violation - other.slo_violation) > CLEAR_VIOLATION:
        return one.slo_violation < other.slo_violation
    return one.cost_ms < CLEAR_COST * other.cost_ms

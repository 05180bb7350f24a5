"""A run of the engine under a virtual clock, on workers that only take the time that real ones would.

Engine, schedulers, block managers, router and predictor are the real ones; of a worker only the cost model is left: a
step comes back after its predicted time, a move of blocks after that of its bytes, one at a time for each pair of
workers. Answers have the lengths that the workload says. The parent's own time is taken as nothing.

Runs of decode steps that differ in nothing but their lengths are jumped over: their results are taken at once when
something else happens.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from nanopd.config import EngineConfig, ModelConfig
from nanopd.core.scheduler import Scheduler
from nanopd.engine.engine import Engine
from nanopd.lab.workload import WorkloadRequest, prompt_token_ids
from nanopd.messages import FromWorker, RequestLog, RowFlag, StepBatch, StepResult, ToWorker, TransferAck, TransferPlan
from nanopd.request import Request, SamplingParams
from nanopd.routing.cost_model import Parameters, Terms, rows_of
from nanopd.routing.factory import make_policy
from nanopd.routing.policy import Policy
from nanopd.workers.client import WorkerClient

MIN_JUMP = 3  # steps that are worth a jump
NEVER_S = 1e12
NO_INTS, NO_FLOATS = np.empty(0, np.int32), np.empty(0, np.float32)


class VirtualClock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@dataclass(slots=True)
class _Step:
    due_s: float
    result: StepResult


@dataclass(slots=True)
class _Run:
    """Decode steps that follow those in flight, of the same rows."""

    slots: np.ndarray  # of the rows, the array that the scheduler has for all that decode
    num_steps: int
    due_s: np.ndarray  # [steps in flight + num_steps] float64


class SimulatedWorker(WorkerClient):
    """A worker that answers when a real worker would have."""

    def __init__(self, parameters: Parameters, clock: VirtualClock, block_size: int, num_host_blocks: int) -> None:
        self.paths = {}  # the destination alone acts
        self.num_blocks = parameters.num_kv_tokens // block_size + 1
        self.num_host_blocks = num_host_blocks
        self.steps: deque[_Step] = deque()
        self.step_free_s = 0.0  # when the last step in the queue is done
        self._parameters, self._clock, self._block_size = parameters, clock, block_size
        self._pair_terms = parameters.pair_terms()
        self._moves: list[tuple[float, int, TransferAck]] = []  # a heap: due, plan_id, acknowledgement
        self._pair_free_s: dict[int, float] = {}  # by source worker: when its last move is done

    def send(self, message: ToWorker) -> None:
        if isinstance(message, TransferPlan):
            self._move(message)
        elif isinstance(message, StepBatch):  # Other messages take no time of their own.
            self._compute(message)

    def _compute(self, message: StepBatch) -> None:
        duration_ms = self._parameters.terms.step_ms(*rows_of(message))
        self.step_free_s = max(self.step_free_s, self._clock.now_s) + duration_ms / 1e3
        tokens = np.zeros(np.count_nonzero(message.row_flags & RowFlag.SAMPLE), np.int32)
        result = StepResult(message.step_id, round(duration_ms * 1e3), tokens, NO_INTS, NO_INTS, NO_FLOATS)
        self.steps.append(_Step(self.step_free_s, result))

    def _move(self, plan: TransferPlan) -> None:
        num_bytes = len(plan.src_blocks) * self._block_size * self._parameters.kv_bytes_per_token
        terms = self._pair_terms.get((plan.src_worker, plan.dst_worker), self._parameters.terms)
        duration_ms = terms.move_ms(num_bytes)
        start_s = max(self._pair_free_s.get(plan.src_worker, 0.0), self._clock.now_s)
        due_s = self._pair_free_s[plan.src_worker] = start_s + duration_ms / 1e3
        ack = TransferAck(plan.plan_id, round(duration_ms * 1e3), num_bytes)
        heapq.heappush(self._moves, (due_s, plan.plan_id, ack))

    def next_due_s(self) -> float:
        """When `poll` will have something to say; inf: never."""
        step_s = self.steps[0].due_s if self.steps else math.inf
        return min(step_s, self._moves[0][0]) if self._moves else step_s

    def poll(self) -> list[FromWorker]:
        now_s = self._clock.now_s
        done: list[FromWorker] = []
        while self.steps and self.steps[0].due_s <= now_s:
            done.append(self.steps.popleft().result)
        while self._moves and self._moves[0][0] <= now_s:
            done.append(heapq.heappop(self._moves)[2])
        return done

    def delay(self, num_steps: int, due_s: np.ndarray) -> None:
        """Let `num_steps` more like those in the queue be done before them.

        Args:
            due_s: [steps in the queue] float64, when each will be done then.
        """
        for step, step_due_s in zip(self.steps, due_s.tolist(), strict=True):
            step.due_s = step_due_s
            step.result.step_id += num_steps
        self.step_free_s = self.steps[-1].due_s


class _Jumper:
    """Jumps over runs of like decode steps of one worker: results are taken many at once, and heard of by nobody."""

    def __init__(self, worker: SimulatedWorker, scheduler: Scheduler, terms: Terms, max_in_flight: int) -> None:
        self._worker, self._scheduler, self._terms, self._max_in_flight = worker, scheduler, terms, max_in_flight
        self._run: _Run | None = None
        self._tried: _Step | None = None  # the newest step when a run was looked for last

    def next_due_s(self) -> float:
        """When the worker has to be heard; during a run, when the first step after it is done."""
        if self._run is None:
            return self._worker.next_due_s()
        return float(self._run.due_s[self._run.num_steps])

    def catch_up(self, now_s: float) -> None:
        """Take the results of the run's steps that are done by now, so that the scheduler is as it would be."""
        run = self._run
        if run is None or run.due_s[0] > now_s:
            return
        num_done = int(np.searchsorted(run.due_s[: run.num_steps], now_s, side="right"))
        self._scheduler.repeat(run.due_s[:num_done])
        self._worker.delay(num_done, run.due_s[num_done : num_done + len(self._worker.steps)])
        run.due_s, run.num_steps = run.due_s[num_done:], run.num_steps - num_done
        if not run.num_steps:
            self._run = None

    def look(self) -> None:
        """After the engine has done what it could: end the run if something came in between, or begin one."""
        queues, steps = self._scheduler.queues, self._worker.steps
        if self._run is not None:
            is_new = queues.decodes.slots is not self._run.slots
            if is_new or queues.waiting or queues.prefilling or queues.num_expected:
                self._run = None
            return
        if len(steps) < self._max_in_flight or steps[-1] is self._tried:
            return
        self._tried = steps[-1]
        num_steps = self._scheduler.num_repeats()
        if num_steps < MIN_JUMP:
            return
        num_rows = len(queues.decodes)
        num_context = queues.decodes.num_context_tokens + num_rows * np.arange(1, num_steps + 1)
        durations_ms = self._terms.step_ms(num_rows, num_context, maximum=np.maximum)
        due_s = np.cumsum(np.concatenate(([self._worker.step_free_s], durations_ms / 1e3)))
        due_s = np.concatenate(([step.due_s for step in steps], due_s[1:]))
        self._run = _Run(queues.decodes.slots, num_steps, due_s)


def simulate(
    config: EngineConfig,
    model: ModelConfig,
    parameters: Parameters,
    requests: Sequence[WorkloadRequest],
    policy: Policy | None = None,
    may_jump: bool = True,
    until: Callable[[RequestLog], bool] | None = None,
) -> tuple[Engine, list[RequestLog]]:
    """Serve `requests` (in order of arrival) to the end.

    Args:
        policy: None: the one that `config` names.
        may_jump: False takes every step by itself; the outcome is the same.
        until: is told of the ends; where it says yes, the run is over.

    Returns:
        The engine as it is then, and what happened to each request, in the order in which they ended.
    """
    clock = VirtualClock()
    pools = config.block_size, config.num_host_blocks(model)
    workers = [SimulatedWorker(parameters, clock, *pools) for _ in config.workers]
    policy = policy or make_policy(config, parameters)
    # A worker that does not answer for long has many steps to jump over; and there is no text to find drafts in.
    config = config.replace(step_timeout_s=NEVER_S, num_speculative_tokens=0)
    engine = Engine(config, model, list(workers), clock, policy=policy)
    args = parameters.terms, config.steps_in_flight
    jumpers = [_Jumper(w, s, *args) for w, s in zip(workers, engine.schedulers, strict=True)] if may_jump else []
    logs: list[RequestLog] = []
    arrivals = deque(enumerate(requests))
    is_over = False
    while (arrivals or engine.has_unfinished) and not is_over:
        due_s = [source.next_due_s() for source in jumpers or workers]
        wakeup_s = engine.next_wakeup_s()
        due_s.append(wakeup_s if wakeup_s > clock.now_s else math.inf)  # what could be done now has been done
        clock.now_s = max(clock.now_s, min(*due_s, arrivals[0][1].arrival_s if arrivals else math.inf))
        assert clock.now_s < NEVER_S, "nothing can happen any more"
        for jumper in jumpers:
            jumper.catch_up(clock.now_s)
        while arrivals and arrivals[0][1].arrival_s <= clock.now_s:
            _submit(engine, *arrivals.popleft())
        ended = [update.seq.log() for update in engine.step() if update.is_finished]
        for jumper in jumpers:
            jumper.look()
        logs += ended
        is_over = until is not None and any(until(log) for log in ended)
    return engine, logs


def _submit(engine: Engine, number: int, request: WorkloadRequest) -> None:
    params = SamplingParams(temperature=0, max_tokens=request.num_output_tokens, ignore_eos=True)
    prompt = prompt_token_ids(request, engine.model.vocab_size)
    engine.submit(Request(str(number), prompt, params, request.arrival_s))

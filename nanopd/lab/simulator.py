"""A run of the engine under a virtual clock, on workers that only take the time that real ones would.

Engine, schedulers, block managers, router and predictor are the real ones; of a worker only the cost model is left: a
step comes back after its predicted time, a move of blocks after that of its bytes, one at a time for each pair of
workers. Answers have the lengths that the workload says. The parent's own time is taken as nothing.

Runs of decode steps that differ in nothing but their lengths are jumped over: nobody hears of them one by one.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nanopd.config import EngineConfig, ModelConfig
from nanopd.core.block_manager import BlockManager
from nanopd.core.scheduler import Load, Scheduler
from nanopd.engine.engine import Engine
from nanopd.lab.workload import WorkloadRequest, prompt_token_ids
from nanopd.messages import (
    RequestLog,
    Role,
    RowFlag,
    SlotExtras,
    StepBatch,
    StepResult,
    TransferAck,
    TransferPath,
    TransferPlan,
)
from nanopd.request import SamplingParams
from nanopd.routing.cost_model import Parameters, rows_of
from nanopd.routing.decision import Policy
from nanopd.routing.policy import make_policy

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
    batch: StepBatch
    result: StepResult


@dataclass(slots=True)
class _Run:
    """Decode steps that follow those in flight, of the same rows."""

    num_steps: int
    due_s: np.ndarray  # [steps in flight + num_steps] float64


class SimulatedWorker:
    """A WorkerClient that answers when a real worker would have."""

    def __init__(self, parameters: Parameters, clock: VirtualClock, block_size: int, num_host_blocks: int) -> None:
        self.paths: dict[int, TransferPath] = {}  # the destination alone acts
        self.num_blocks, self.num_host_blocks = parameters.num_kv_tokens // block_size + 1, num_host_blocks
        self.scheduler: _JumpingScheduler | None = None  # that sends the steps; None: nothing is jumped over
        self._parameters, self._clock, self._block_size = parameters, clock, block_size
        self._pair_terms = parameters.pair_terms()
        self._steps: deque[_Step] = deque()
        self._run: _Run | None = None
        self._moves: list[tuple[float, int, TransferAck]] = []  # a heap: due, plan_id, acknowledgement
        self._step_free_s = 0.0  # when the last step in the queue is done
        self._pair_free_s: dict[int, float] = {}  # by source worker: when its last move is done

    def send(self, message: SlotExtras | StepBatch | TransferPlan) -> None:
        if isinstance(message, SlotExtras):  # takes no time of its own
            return
        if isinstance(message, TransferPlan):
            self._move(message)
            return
        duration_ms = self._parameters.terms.step_ms(*rows_of(message))
        self._step_free_s = max(self._step_free_s, self._clock.now_s) + duration_ms / 1e3
        tokens = np.zeros(np.count_nonzero(message.row_flags & RowFlag.SAMPLE), np.int32)
        result = StepResult(message.step_id, round(duration_ms * 1e3), tokens, NO_INTS, NO_INTS, NO_FLOATS)
        self._steps.append(_Step(self._step_free_s, message, result))
        if self.scheduler is not None:
            self._start_run(message, self.scheduler.num_like(step.batch.row_slots for step in self._steps))

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
        if self._run is not None:
            step_s = float(self._run.due_s[self._run.num_steps])
        else:
            step_s = self._steps[0].due_s if self._steps else math.inf
        return min(step_s, self._moves[0][0]) if self._moves else step_s

    def poll(self) -> list[StepResult | TransferAck]:
        now_s = self._clock.now_s
        done: list[StepResult | TransferAck] = []
        if self._run is not None and self._run.due_s[self._run.num_steps] <= now_s:
            self.end_run()
        while self._run is None and self._steps and self._steps[0].due_s <= now_s:
            done.append(self._steps.popleft().result)
        while self._moves and self._moves[0][0] <= now_s:
            done.append(heapq.heappop(self._moves)[2])
        return done

    def _start_run(self, last: StepBatch, num_steps: int) -> None:
        """`num_steps` more like `last`, which is the last one in flight."""
        if num_steps < MIN_JUMP:
            return
        num_rows, num_tokens = len(last.row_slots), int(last.row_starts.sum()) + len(last.row_slots)
        num_context = num_tokens + num_rows * np.arange(1, num_steps + 1)
        durations_ms = self._parameters.terms.step_ms(num_rows, num_context, maximum=np.maximum)
        due_s = np.cumsum(np.concatenate(([self._step_free_s], durations_ms / 1e3)))
        in_flight_s = [step.due_s for step in self._steps]
        self._run = _Run(num_steps, np.concatenate((in_flight_s, due_s[1:])))

    @property
    def num_steps_done(self) -> int:
        """Of the run, that have not been accounted for."""
        run = self._run
        if run is None or run.due_s[0] > self._clock.now_s:
            return 0
        return int(np.searchsorted(run.due_s[: run.num_steps], self._clock.now_s, side="right"))

    def end_run(self) -> None:
        """The steps to come are no longer like the last ones: they will be heard of one by one."""
        run, num_done, self._run = self._run, self.num_steps_done, None
        if run is None or not num_done:
            return
        assert self.scheduler is not None
        self.scheduler.repeat(self._steps[0].batch.row_slots, run.due_s[:num_done])
        for step, due_s in zip(self._steps, run.due_s[num_done:].tolist()):
            step.due_s = due_s
            step.result.step_id += num_done
        self._step_free_s = self._steps[-1].due_s


def _ending_run(method: Callable[..., Any]) -> Callable[..., Any]:
    def call(self: _JumpingScheduler, *args: Any) -> Any:
        self.client.end_run()
        return method(self, *args)

    return call


class _JumpingScheduler(Scheduler):
    """A scheduler that can take the results of many like steps at once; anything else ends the run of its worker."""

    def __init__(self, client: SimulatedWorker, config: EngineConfig, *args: Any) -> None:
        self.client = client
        self._max_in_flight = config.steps_in_flight
        super().__init__(*args)

    add = _ending_run(Scheduler.add)
    reserve = _ending_run(Scheduler.reserve)
    cancel_reservation = _ending_run(Scheduler.cancel_reservation)
    take_over = _ending_run(Scheduler.take_over)
    depart = _ending_run(Scheduler.depart)
    keep = _ending_run(Scheduler.keep)
    remove = _ending_run(Scheduler.remove)

    @property
    def num_expected(self) -> int:
        return self._num_expected

    @num_expected.setter
    def num_expected(self, value: int) -> None:  # steps are held back for sequences on their way
        self.client.end_run()
        self._num_expected = value

    def snapshot(self) -> Load:
        load, num_done = super().snapshot(), self.client.num_steps_done
        if not num_done:
            return load
        num_taken = self._num_blocks_for(self._slots_of_decoding(), num_done) * self.blocks.block_size
        return load._replace(
            num_context_tokens=load.num_context_tokens + num_done * load.num_decoding,
            num_free_tokens=load.num_free_tokens - num_taken,
        )

    def num_like(self, in_flight: Iterable[np.ndarray]) -> int:
        """How many more steps like those in flight, given by their slots, would follow if nothing came in between."""
        t, slots = self.slots, self._decode_slots
        # the rows of a step of all that decode, and of nothing else, are a view of their slots
        if slots is None or not all(rows.base is slots and len(rows) == len(slots) for rows in in_flight):
            return 0
        is_full = len(self.in_flight) == self._max_in_flight
        if not is_full or self.waiting or self.prefilling or self.num_expected:
            return 0
        if (t.is_watched | t.heeds_eos)[slots].any():
            return 0
        num_steps = int((t.last_start[slots] - t.num_computed[slots]).min())
        while num_steps > 0 and self._num_blocks_for(slots, num_steps) > self.blocks.num_free:
            num_steps //= 2
        return num_steps

    def _num_blocks_for(self, slots: np.ndarray, num_steps: int) -> int:
        missing = self.slots.num_computed[slots] + num_steps - self.slots.writable_len[slots]
        return int((-(-np.maximum(missing, 0) // self.blocks.block_size)).sum())

    def repeat(self, slots: np.ndarray, times_s: np.ndarray) -> None:
        """Take the results of the next steps, all of just `slots` ([*] int32), and schedule as many more like them."""
        t, num_steps = self.slots, len(times_s)
        cells = slots * t._max_model_len + t.num_tokens[slots] + np.arange(num_steps)[:, None]  # [num_steps, num_slots]
        t._times_s[cells] = times_s[:, None]  # all tokens are 0
        t.num_tokens[slots] += num_steps
        t.num_computed[slots] += num_steps
        self._num_context_tokens += num_steps * len(slots)
        for slot in slots[t.num_computed[slots] > t.writable_len[slots]].tolist():
            table = self._seq(slot).block_table
            self.blocks.append(table, int(t.writable_len[slot]), int(t.num_computed[slot]))
            t.writable_len[slot] = len(table) * self.blocks.block_size
        self._step_id += num_steps
        for step in self.in_flight:
            step.step_id += num_steps


class _JumpingEngine(Engine):
    """Passes by workers that have neither answered nor anything to do now."""

    def _live_workers(self) -> list[int]:
        return [worker for worker in super()._live_workers() if self._is_concerned(worker)]

    def _is_concerned(self, worker: int) -> bool:
        scheduler, client = self.schedulers[worker], self.workers[worker]
        assert isinstance(client, SimulatedWorker)
        if scheduler.waiting or client.next_due_s() <= self.clock():
            return True
        may_send = len(scheduler.in_flight) < self.config.steps_in_flight
        return may_send and bool(scheduler.prefilling or scheduler.decoding)

    def _new_scheduler(self, worker: int, role: Role) -> Scheduler:
        client = self.workers[worker]
        assert isinstance(client, SimulatedWorker)
        blocks = BlockManager(client.num_blocks, self.config.block_size)
        args = worker, role, self.config, blocks, self.model, self.max_model_len
        client.scheduler = _JumpingScheduler(client, self.config, *args)
        return client.scheduler


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
    num_host_blocks = config.num_host_blocks(model)
    workers = [SimulatedWorker(parameters, clock, config.block_size, num_host_blocks) for _ in config.workers]
    policy = policy or make_policy(config, parameters)
    # who does not answer for long has many steps to jump over; and there is no text to find drafts in
    config = config.replace(step_timeout_s=NEVER_S, num_speculative_tokens=0)
    engine = (_JumpingEngine if may_jump else Engine)(config, model, list(workers), clock, policy=policy)
    logs: list[RequestLog] = []
    arrivals = deque(enumerate(requests))
    is_over = False
    while (arrivals or engine.has_unfinished) and not is_over:
        due_s = [worker.next_due_s() for worker in workers]
        wakeup_s = engine.next_wakeup_s()
        due_s.append(wakeup_s if wakeup_s > clock.now_s else math.inf)  # what could be done now has been done
        clock.now_s = max(clock.now_s, min(*due_s, arrivals[0][1].arrival_s if arrivals else math.inf))
        assert clock.now_s < NEVER_S, "nothing can happen any more"
        while arrivals and arrivals[0][1].arrival_s <= clock.now_s:
            _submit(engine, *arrivals.popleft())
        ended = [update.seq.log() for update in engine.step() if update.is_finished]
        logs += ended
        is_over = until is not None and any(until(log) for log in ended)
    return engine, logs


def _submit(engine: Engine, number: int, request: WorkloadRequest) -> None:
    params = SamplingParams(temperature=0, max_tokens=request.num_output_tokens, ignore_eos=True)
    prompt = prompt_token_ids(request, engine.model.vocab_size)
    engine.submit(str(number), prompt, params, arrival_s=request.arrival_s)

"""The workers of an engine, as they live, die and come back: their clients, schedulers, and what each has to answer.

Engine's thread; never waits. Knows no routes and no requests: what becomes of a dead worker's sequences is the
engine's to decide.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial

from nanopd.config import EngineConfig, ModelConfig
from nanopd.core.in_flight import Ledger
from nanopd.core.scheduler import Scheduled, Scheduler
from nanopd.core.sequence import Sequence
from nanopd.errors import WorkerError
from nanopd.messages import Role, StepBatch, StepResult, TransferAck, TransferPlan, Work
from nanopd.routing.cost_model import CostModel, MoveSample, StepSample, chunk_pairs, rows_of
from nanopd.workers.client import WorkerClient
from nanopd.workers.paths import send_plan

Clock = Callable[[], float]  # seconds

HOST_BYTES_PER_MS = 25e6  # to and from host memory; an H200 does 55e6, older buses half of that

logger = logging.getLogger(__name__)


class Fleet:
    """All workers, by number."""

    def __init__(
        self,
        config: EngineConfig,
        model: ModelConfig,
        clients: list[WorkerClient],
        clock: Clock,
        replace: Callable[[int], bool] | None,
        costs: CostModel | None,
    ) -> None:
        """See `Engine.__init__`. `costs` is corrected by measured times; None: nothing depends on them."""
        self.clients = clients
        self.errors: dict[int, WorkerError] = {}  # of dead workers
        self.ledger = Ledger(len(clients), config.step_timeout_s)
        self.peak_blocks = [0] * len(clients)  # in use, since `reset_statistics`
        self._returning: set[int] = set()  # dead workers that are being replaced
        self._config, self._model, self._clock, self._replace = config, model, clock, replace
        self._costs = costs
        self._on_work: Callable[[Work], None] | None = None
        self.schedulers = [self._new_scheduler(worker, role) for worker, role in enumerate(config.roles)]

    def _new_scheduler(self, worker: int, role: Role, generation: int = 0) -> Scheduler:
        client = self.clients[worker]
        pools = client.num_blocks, client.num_host_blocks
        scheduler = Scheduler(worker, role, self._config, *pools, self._model, generation)
        if self._costs is not None:
            scheduler.swap_where(partial(_swap_pays, self._costs))
        return scheduler

    @property
    def live_workers(self) -> list[int]:
        return [worker for worker, scheduler in enumerate(self.schedulers) if not scheduler.is_dead]

    @property
    def roles(self) -> list[Role]:
        return [scheduler.role for scheduler in self.schedulers]

    @property
    def has_steps_in_flight(self) -> bool:
        return any(scheduler.in_flight and not scheduler.is_dead for scheduler in self.schedulers)

    def is_lost(self, worker: int) -> bool:
        """Whether the worker is dead and no replacement is on its way."""
        return worker in self.errors and worker not in self._returning

    # ------------------------------------------------------------------------------------------------ messages

    def send_step(self, worker: int, scheduled: Scheduled) -> None:
        """Send a step that is there, behind what it needs."""
        client, batch = self.clients[worker], scheduled.batch
        assert batch is not None
        for extras in scheduled.extras:
            client.send(extras)
        client.send(batch)
        self.ledger.of_worker[worker].sent(batch, self._clock())

    def send_plan(self, plan: TransferPlan) -> None:
        send_plan(plan, self.clients)
        self.ledger.of_worker[plan.dst_worker].sent(plan, self._clock())

    def answered(self, worker: int, answer: StepResult | TransferAck, now_s: float) -> None:
        """Account for what the worker has done, before the answer is taken."""
        sent = self.ledger.of_worker[worker].answered(answer, now_s)
        if self._costs is not None:
            _correct(self._costs, sent, answer)
        if self._on_work is not None:
            self._on_work(_work(self.schedulers[worker], answer, now_s))

    def observe(self, on_work: Callable[[Work], None] | None) -> None:
        """Call `on_work` with each step and each move that is done from now on."""
        self._on_work = on_work

    # ------------------------------------------------------------------------------------------- lives and deaths

    def bury(self, worker: int, error: WorkerError) -> list[Sequence]:
        """A worker is gone. Returns the sequences that it was computing something of."""
        logger.error("%s", str(error))  # the record must not keep the traceback and all that it refers to
        self.errors[worker] = error
        self.ledger.of_worker[worker].forget()
        if self._replace is not None and self._replace(worker):
            self._returning.add(worker)
        return self.schedulers[worker].die()

    def revive(self, worker: int, client: WorkerClient, generation: int) -> None:
        """A dead worker has been replaced by `client`, whose KV cache is empty."""
        old = self.schedulers[worker]
        assert old.is_dead and generation > old.generation
        self.clients[worker] = client
        self.schedulers[worker] = self._new_scheduler(worker, old.role, generation)
        self.schedulers[worker].succeed(old)
        del self.errors[worker]
        self._returning.remove(worker)

    def give_up(self, worker: int, error: WorkerError) -> None:
        """A dead worker could not be replaced."""
        logger.error("%s", str(error))
        self.errors[worker] = error
        self._returning.remove(worker)

    # ------------------------------------------------------------------------------------------------- statistics

    def note_peak(self, worker: int) -> None:
        blocks = self.schedulers[worker].residency.blocks
        self.peak_blocks[worker] = max(self.peak_blocks[worker], blocks.num_usable - blocks.num_free)

    def reset_statistics(self) -> None:
        """Forget peaks and busy times so far."""
        self.peak_blocks = [0] * len(self.clients)
        for ledger in self.ledger.of_worker:
            ledger.reset_busy()


def _correct(costs: CostModel, sent: StepBatch | TransferPlan | None, answer: StepResult | TransferAck) -> None:
    """Correct the cost model by how long the worker took for what it was sent."""
    ms = answer.duration_us / 1e3
    if isinstance(sent, StepBatch):
        costs.observe(StepSample(*rows_of(sent), ms))
    elif sent is not None and isinstance(answer, TransferAck) and answer.num_bytes:  # else the plan was given up
        costs.observe(MoveSample(answer.num_bytes, ms), (sent.src_worker, sent.dst_worker))


def _work(scheduler: Scheduler, answer: StepResult | TransferAck, now_s: float) -> Work:
    work = Work(scheduler.worker, now_s, answer.duration_us / 1e6)
    if isinstance(answer, TransferAck):
        work.num_moved_bytes = answer.num_bytes
    else:
        step = scheduler.in_flight[0]
        work.num_prompt_tokens = step.num_prompt_tokens
        work.num_decoding = len(step.row_slots) - len(step.chunks)
    return work


def _swap_pays(costs: CostModel, num_tokens: int) -> bool:
    """Whether the way of so many tokens out to host memory and back takes less time than to compute them again."""
    swap_ms = 2 * num_tokens * costs.parameters.kv_bytes_per_token / HOST_BYTES_PER_MS
    return swap_ms < costs.mixed_ms(0, 0, num_tokens, chunk_pairs(num_tokens, 0))

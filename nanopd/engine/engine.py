"""The engine: takes requests, drives the workers' schedulers, hands out tokens.

`step` does whatever can be done now and returns: results in, deadlines and deaths, routing, hand-overs, next steps out.
It has no thread, no clock and no processes of its own: clock and workers are given to it, so that it runs in a
background thread (frontend/engine_thread.py), in a test with workers in the same process, or under a virtual clock.
Whoever gave it the workers is told of one that is dead or hung, and may `revive` it.

Owns the sequences; the only module that sees requests, routes, blocks and text together. Its parts: fleet.py (workers,
their lives and deaths), roles.py (which routes there are), dispatch.py (which one a sequence takes), answers.py (text
and what callers hear), deadlines.py.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

from nanopd.config import EngineConfig, ModelConfig
from nanopd.core.handover import Handovers
from nanopd.core.results import StepOutcome
from nanopd.core.sequence import Chooser, Sequence, SequenceStatus
from nanopd.engine.answers import Answers, MakeText, Update
from nanopd.engine.deadlines import Deadlines
from nanopd.engine.dispatch import Dispatcher
from nanopd.engine.fleet import Clock, Fleet
from nanopd.engine.roles import Roles
from nanopd.engine.sequences import Sequences
from nanopd.engine.validation import check_request
from nanopd.errors import RequestError, WorkerError
from nanopd.messages import EventKind, Role, TransferAck
from nanopd.request import Request
from nanopd.routing.factory import make_policy
from nanopd.routing.policy import Policy
from nanopd.workers.client import WorkerClient

MAX_REPLAYS = 2  # of a request that was being computed when a worker died

logger = logging.getLogger(__name__)


class Engine:
    """Serves requests on the given workers until none is left."""

    def __init__(
        self,
        config: EngineConfig,
        model: ModelConfig,
        workers: list[WorkerClient],
        clock: Clock,
        make_text: MakeText | None = None,
        replace: Callable[[int], bool] | None = None,
        policy: Policy | None = None,
    ) -> None:
        """Serve on `workers`, a list that is the engine's from now on.

        Args:
            make_text: called with prompt_token_ids and stop strings, gives what makes text of tokens; None: there is
                no tokenizer.
            replace: called with a worker that is dead or hung, which it has to end; whether a `revive` or `give_up` of
                it will follow. None: dead workers stay dead.
            policy: None: the one that `config` names.
        """
        self.max_model_len = config.max_len_of(model)
        self.config, self.model, self.clock = config.replace(max_model_len=self.max_model_len), model, clock
        self._sequences = Sequences(self.config, model)
        self.seqs = self._sequences.unfinished  # by request_id
        self.policy = policy or make_policy(config)
        self.fleet = Fleet(self.config, model, workers, clock, replace, self.policy.costs)
        self.workers, self.schedulers = self.fleet.clients, self.fleet.schedulers  # the fleet's own lists
        self.roles = Roles(self.fleet, config.policy, self.policy)
        self.handovers = Handovers(self.schedulers, self.fleet.send_plan, config.handover_timeout_s)
        self.dispatcher = Dispatcher(config, self.fleet, self.roles, self.policy, self.handovers, clock)
        self._answers = Answers(make_text)
        self._deadlines = Deadlines()

    # ------------------------------------------------------------------------------------------------ requests

    def submit(
        self, request: Request, parent: Sequence | None = None, chooser: Chooser | None = None, is_checked: bool = False
    ) -> Sequence:
        """Queue a request.

        Args:
            parent: one with the same prompt, which is computed once for both: this one joins where that one decodes.
            chooser: chooses its tokens; of its end the chooser hears in place of the caller of `step`.
            is_checked: `check` has let it pass; only the roles may have changed since.

        Raises:
            RequestError: it can never be served; nothing was queued.
        """
        if is_checked:
            self.roles.check(request, self.max_model_len)
        else:
            self.check(request)
        seq = self._sequences.new(request, chooser)
        self._answers.begin(seq)
        self._deadlines.add(seq)
        self._follow(seq, parent)
        return seq

    def check(self, request: Request) -> None:
        """Raise RequestError if the request can never be served.

        Any thread may call it. The ids of unfinished requests and the roles may change until it is submitted.
        """
        if request.request_id in self.seqs:
            raise RequestError("request_id", request.request_id, "an id that no unfinished request has")
        check_request(request, self.model, self.max_model_len, self._answers.have_text)
        self.roles.check(request, self.max_model_len)

    def abort(self, request_id: str) -> None:
        """End a request with what it has so far; one that is unknown or finished is left alone."""
        if (seq := self.seqs.get(request_id)) is not None:
            self._finish(seq, SequenceStatus.FINISHED_ABORTED)

    def fork(self, parent: Sequence, request_id: str, token_ids: list[int]) -> Sequence:
        """A request that goes on from `token_ids`: all but the last are tokens of `parent`, whose blocks it shares."""
        child = self._sequences.fork(parent, request_id, token_ids)
        self._follow(child, parent)
        return child

    def choose(self, seq: Sequence, token_id: int) -> None:
        """Let a sequence that awaits it go on, with this token in place of the one it has sampled."""
        seq.token_ids[-1], seq.awaits_choice = token_id, False
        del seq.block_keys[(seq.num_tokens - 1) // self.config.block_size :]
        if seq.worker is None:
            self._route([seq])
        else:
            self.schedulers[seq.worker].residency.resume(seq)

    def _follow(self, seq: Sequence, parent: Sequence | None) -> None:
        """Let a new sequence wait until its parent decodes; one that has none is computed from the beginning."""
        if parent is None or parent.status.is_finished:
            self._route([seq])
        else:
            self.dispatcher.followers.add(seq, parent)

    def _route(self, seqs: Iterable[Sequence]) -> None:
        """Queue sequences, or end those that cannot be served."""
        self._refuse(self.dispatcher.route(seqs))

    def _refuse(self, seqs: Iterable[Sequence]) -> None:
        for seq in seqs:
            self._finish(seq, SequenceStatus.FINISHED_ERROR)

    def _finish(self, seq: Sequence, status: SequenceStatus) -> None:
        """End a request, whatever it is doing; the caller hears of it in the next updates."""
        if seq.status.is_finished:
            return
        self.handovers.cancel(seq)
        worker = seq.worker
        if worker is not None and not self.schedulers[worker].is_dead:
            self.schedulers[worker].remove(seq)
        seq.status = status
        seq.log_event(self.clock(), EventKind.FINISHED, worker)
        del self.seqs[seq.request_id]
        self.policy.finished(seq)
        if seq.chooser is not None:
            seq.chooser.ended(seq)
        else:
            self._answers.end(seq)
        self._route(self.dispatcher.followers.release(seq))

    # ---------------------------------------------------------------------------------------------------- step

    @property
    def has_unfinished(self) -> bool:
        """Whether a request, or anything that was sent out for one, is still under way."""
        return bool(self.seqs or self.fleet.has_steps_in_flight or self.handovers.has_plans_out)

    def next_wakeup_s(self) -> float:
        """When, on the engine's clock, `step` has something to do even if no worker answers; inf: never."""
        held_s = [self.fleet.ledger.of_worker[w].next_step_s for w in self.fleet.live_workers if self._may_hold(w)]
        return min(self._deadlines.next_s(), self.handovers.next_due_s(), self.fleet.ledger.next_due_s(), *held_s)

    def step(self) -> list[Update]:
        """Do what can be done now; returns what callers should hear. Never waits."""
        now_s = self.clock()
        for worker in self.fleet.live_workers:
            self._take_results(worker, now_s)
        for worker in self.fleet.ledger.overdue(now_s):
            reason = f"has not done a step or a transfer within step_timeout_s={self.config.step_timeout_s}"
            self._bury(worker, WorkerError(worker, reason))
        for seq, limit in self._deadlines.passed(now_s):
            self._expire(seq, is_for_queue=limit == "queue_timeout_s")
        self._change_roles()
        self.handovers.tick(now_s)
        has_left = True
        while has_left:  # a sequence was preempted, and is queued on a worker that has had its turn already
            self._route(self.dispatcher.followers.join(now_s))
            has_left = sum([self._send_steps(worker) for worker in self.fleet.live_workers]) > 0
        self._route(self.dispatcher.followers.join(now_s))
        return self._answers.take()

    def drain(self, wait: Callable[[], None]) -> list[Update]:
        """Step until nothing is left, calling `wait` in between."""
        updates = self.step()
        while self.has_unfinished:
            wait()
            updates += self.step()
        return updates

    def _take_results(self, worker: int, now_s: float) -> None:
        scheduler = self.schedulers[worker]
        try:
            messages = self.workers[worker].poll()
        except WorkerError as error:
            self._bury(worker, error)
            return
        for message in messages:
            self.fleet.answered(worker, message, now_s)
            if isinstance(message, TransferAck):
                self.handovers.acknowledge(message, now_s)
            else:
                for outcome in scheduler.complete(message, now_s):
                    self._heed(outcome, now_s)

    def _heed(self, outcome: StepOutcome, now_s: float) -> None:
        for seq in self._answers.push(outcome.watched):
            self._finish(seq, SequenceStatus.FINISHED_STOPPED)
        for seq in outcome.proposed:
            assert seq.chooser is not None
            seq.chooser.sampled(seq)
        for seq, num_computed in outcome.advanced:
            self.handovers.advance(seq, num_computed)
        for seq, status in outcome.finished:
            self._finish(seq, status)
        for seq in outcome.prefilled:
            self.handovers.prefilled(seq, now_s)

    def _expire(self, seq: Sequence, is_for_queue: bool) -> None:
        """A time limit of the sequence has passed: the one for its end, or for the start of its prefill."""
        leader = self.dispatcher.followers.leader_of(seq)  # the sequence whose prompt is computed for this one
        if is_for_queue and leader.status is not SequenceStatus.WAITING:
            return
        seq.error = "its queue_timeout_s has passed" if is_for_queue else "the deadline has passed"
        self._finish(seq, SequenceStatus.FINISHED_ABORTED)

    def _send_steps(self, worker: int) -> bool:
        """Keep `steps_in_flight` steps out; returns whether a sequence was preempted and left for another worker."""
        scheduler, has_left = self.schedulers[worker], False
        while len(scheduler.in_flight) < self.config.steps_in_flight:
            if self._may_hold(worker) and self.clock() < self.fleet.ledger.of_worker[worker].next_step_s:
                break
            scheduled = scheduler.schedule()
            for seq in scheduled.admitted:
                seq.log_event(self.clock(), EventKind.SCHEDULED, worker)
                self.handovers.start(seq, self.clock())
            for seq in scheduled.preempted:
                self._refuse(self.dispatcher.requeue(seq, scheduler))
                has_left |= seq.worker != worker
            if scheduled.batch is None:
                break
            self.fleet.send_step(worker, scheduled)
        self.fleet.note_peak(worker)
        return has_left

    def _may_hold(self, worker: int) -> bool:
        """Whether the worker has something to do, and may have more of it when it needs its next step.

        A step that is sent as soon as there is room queues behind the one under way, and sequences that arrive
        meanwhile miss both.
        """
        scheduler = self.schedulers[worker]
        return 0 < len(scheduler.in_flight) < self.config.steps_in_flight and scheduler.queues.num_expected > 0

    # ------------------------------------------------------------------------------------- workers that come and go

    def _bury(self, worker: int, error: WorkerError) -> None:
        """A worker is gone: what it had is computed again elsewhere, from prompt and delivered tokens."""
        for seq in self.fleet.bury(worker, error):
            seq.num_deaths += 1
        victims = [seq for seq in self.seqs.values() if seq.worker == worker]
        for seq in victims:
            self.handovers.cancel(seq)
        displaced = self.handovers.drop_worker(worker, self.clock())
        for seq in victims:
            self.schedulers[worker].residency.abandon(seq)
        for seq in victims + displaced:
            seq.status, seq.route = SequenceStatus.PREEMPTED, None
            seq.log_event(self.clock(), EventKind.PREEMPTED, worker)
        for seq in victims + displaced:
            if seq.num_deaths > MAX_REPLAYS:
                seq.error = f"{seq.num_deaths} workers died while they computed it; the last: {error}"
                self._finish(seq, SequenceStatus.FINISHED_ERROR)
            else:
                self._route([seq])

    def revive(self, worker: int, client: WorkerClient, generation: int) -> None:
        """A dead worker has been replaced by `client`, whose KV cache is empty."""
        self.fleet.revive(worker, client, generation)
        self._refuse(self.dispatcher.route_stranded())

    def give_up(self, worker: int, error: WorkerError) -> None:
        """A dead worker could not be replaced."""
        self.fleet.give_up(worker, error)
        self._refuse(self.dispatcher.route_stranded())

    # ------------------------------------------------------------------------------------------ moves and roles

    def move(self, request_id: str, worker: int) -> None:
        """Let a decoding request go on at another worker; if it finds no room there within the time-out, it stays.

        Raises:
            RequestError: it does not decode, or that worker cannot take it.
        """
        seq = self.seqs.get(request_id)
        if seq is None or seq.status is not SequenceStatus.RUNNING:
            raise RequestError("request_id", request_id, "a request that is decoding")
        assert seq.route is not None
        others = self.handovers.destinations(seq, self.schedulers[seq.route.decode_worker])
        allowed = sorted(scheduler.worker for scheduler in others)
        if worker not in allowed:
            raise RequestError("worker", worker, f"{allowed}, the other live decode workers that are large enough")
        self.handovers.move(seq, worker, self.clock())

    def set_role(self, worker: int, role: Role) -> None:
        """Change which routes a worker may serve; no request is lost by it.

        What waits for a route that is not allowed any more takes another one. What has been started is prefilled where
        it is; if that worker may not decode any more it decodes elsewhere, or there if nobody else can take it.

        Raises:
            RequestError: no such worker, or the policy would have no route for the requests under way.
        """
        if not 0 <= worker < len(self.schedulers):
            raise RequestError("worker", worker, f"0 to {len(self.schedulers) - 1}")
        possible = [r.value for r in Role if self.roles.can_change(worker, r, self._longest)]
        if role not in possible:
            raise RequestError("role", role.value, possible)
        self._refuse(self.dispatcher.change_role(worker, role))

    def _change_roles(self) -> None:
        """As the policy asked, where the requests under way allow it."""
        for worker, role in self.dispatcher.take_role_changes():
            if self.roles.can_change(worker, role, self._longest):
                logger.info("worker %d: %s", worker, role.value)
                self._refuse(self.dispatcher.change_role(worker, role))

    @property
    def _longest(self) -> int:
        """Tokens that an unfinished sequence may come to, at most."""
        return max((seq.end_len for seq in self.seqs.values()), default=0)

    def check_integrity(self) -> None:
        """Raise AssertionError if a block or a slot of a live worker was lost."""
        for worker in self.fleet.live_workers:
            self.schedulers[worker].check_integrity(self.handovers.held(worker))

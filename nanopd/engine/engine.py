"""The engine: takes requests, drives the workers' schedulers, hands out tokens.

`step` does whatever can be done now and returns: results in, deadlines and deaths, routing, hand-overs, next steps out.
It has no thread, no clock and no processes of its own: clock and workers are given to it, so that it runs in a
background thread (engine_thread.py), in a test with workers in the same process, or under a virtual clock. Whoever
gave it the workers is told of one that is dead or hung, and may `revive` it.
Owns all bookkeeping; the only module that sees requests, routes, blocks and text together.
"""

from __future__ import annotations

import heapq
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from nanopd.config import EngineConfig, ModelConfig, allowed_routes, routes_for_policy
from nanopd.core.block_manager import BlockManager
from nanopd.core.followers import Followers
from nanopd.core.handover import Handovers
from nanopd.core.pacer import Pacer
from nanopd.core.scheduler import Scheduler, StepOutcome
from nanopd.core.sequence import Chooser, Sequence, SequenceStatus, TextStream
from nanopd.core.speculation import Drafter
from nanopd.core.watchdog import Watchdog
from nanopd.errors import RequestError, WorkerError
from nanopd.messages import (
    EventKind,
    Role,
    Route,
    StepResult,
    TransferAck,
    TransferPlan,
    Work,
)
from nanopd.request import SamplingParams
from nanopd.routing.cost_model import CostModel, chunk_pairs
from nanopd.routing.decision import Decision, Policy
from nanopd.routing.feedback import Feedback
from nanopd.routing.policy import make_policy
from nanopd.workers.client import WorkerClient
from nanopd.workers.paths import send_plan

MAX_REPLAYS = 2  # of a request that was being computed when a worker died
HOST_BYTES_PER_MS = 25e6  # to and from host memory; an H200 does 55e6, older buses half of that

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Update:
    """News of a request: new tokens of a streamed one, or the end of any."""

    seq: Sequence
    token_ids: list[int]
    text: str
    is_finished: bool


class Engine:
    """Serves requests on the given workers until none is left."""

    def __init__(
        self,
        config: EngineConfig,
        model: ModelConfig,
        workers: list[WorkerClient],
        clock: Callable[[], float],
        make_text: Callable[[list[int], tuple[str, ...]], TextStream] | None = None,
        replace: Callable[[int], bool] | None = None,
        policy: Policy | None = None,
    ) -> None:
        """Serve on `workers`, a list that is the engine's from now on.

        Args:
            make_text: called with prompt_token_ids and stop strings, gives what makes text of tokens; None: there is
                no tokenizer.
            replace: called with a worker that is dead or hung, which it has to end; whether a `revive` or `give_up` of
                it will follow. None: dead workers stay dead.
        """
        self.config = config
        self.model = model
        self.max_model_len = config.max_len_of(model)
        self.workers = workers
        self.clock = clock
        self.seqs: dict[str, Sequence] = {}  # unfinished, by request_id
        roles = config.roles
        self.schedulers = [self._new_scheduler(w, role) for w, role in enumerate(roles)]
        self._allowed = allowed_routes(roles)
        self.router = policy or make_policy(config)
        if (costs := self.router.costs) is not None:
            for scheduler in self.schedulers:
                scheduler.swap_pays = partial(_swap_pays, costs)
        self._pacer = Pacer(len(workers))
        self._watchdog = watchdog = Watchdog(len(workers), config.step_timeout_s)
        self._feedback = feedback = Feedback(self.router.costs, len(workers))

        def send(plan: TransferPlan) -> None:  # without `self`: no cycle keeps an engine and its descriptors alive
            send_plan(plan, workers)
            watchdog.sent(plan.dst_worker, True, clock())
            feedback.sent(plan.dst_worker, plan)

        self.handovers = Handovers(self.schedulers, send, config.handover_timeout_s)
        self._make_text = make_text
        self._replace = replace
        self._stranded: list[Sequence] = []  # on no worker; those of their routes are being replaced
        self._followers = Followers(self.schedulers)
        self._num_submitted = 0
        self._deadlines: list[tuple[float, int, bool, Sequence]] = []  # a heap; whether for the queue alone
        self._updates: list[Update] = []
        self._errors: dict[int, WorkerError] = {}  # of dead workers
        self._role_changes: list[tuple[int, Role]] = []  # that the router asks for
        self._returning: set[int] = set()  # dead workers that are being replaced
        self.peak_blocks = [0] * len(workers)
        self.busy_us = [0] * len(workers)  # spent on steps
        self.on_work: Callable[[Work], None] | None = None  # is told of each step and move that is done

    def _new_scheduler(self, worker: int, role: Role) -> Scheduler:
        blocks = BlockManager(self.workers[worker].num_blocks, self.config.block_size)
        return Scheduler(worker, role, self.config, blocks, self.model, self.max_model_len)

    # ------------------------------------------------------------------------------------------------ requests

    def submit(
        self,
        request_id: str,
        prompt_token_ids: list[int],
        params: SamplingParams,
        *,
        arrival_s: float | None = None,
        deadline_s: float | None = None,
        queue_timeout_s: float | None = None,
        priority: int = 0,
        is_streamed: bool = False,
        route: Route | None = None,
        parent: Sequence | None = None,
        chooser: Chooser | None = None,
        is_checked: bool = False,
    ) -> Sequence:
        """Queue a request.

        Args:
            arrival_s: when it was due, on the engine's clock; None: now.
            deadline_s: seconds from arrival after which it is aborted.
            queue_timeout_s: seconds from arrival after which it is aborted if its prefill has not started.
            priority: lower goes first, and is preempted last; among equals, who was submitted first.
            route: serve it on this route rather than one of the policy's.
            parent: one with the same prompt, which is computed once for both: this one joins where that one decodes.
            chooser: chooses its tokens; of its end the chooser hears in place of the caller of `step`.
            is_checked: `check` has let it pass; only the roles may have changed since.

        Raises:
            RequestError: it can never be served; nothing was queued.
        """
        limits = {"deadline_s": deadline_s, "queue_timeout_s": queue_timeout_s}
        if is_checked:
            self._check_route(route, len(prompt_token_ids), params.max_tokens)
        else:
            self.check(request_id, prompt_token_ids, params, **limits, priority=priority, route=route)
        arrival_s = self.clock() if arrival_s is None else arrival_s
        seq = self._new_sequence(request_id, prompt_token_ids, params, arrival_s, is_streamed, priority, chooser)
        seq.fixed_route = route
        for name, limit_s in limits.items():
            if limit_s is not None:
                entry = (arrival_s + limit_s, seq.seq_id, name == "queue_timeout_s", seq)
                heapq.heappush(self._deadlines, entry)
        self._follow(seq, parent)
        return seq

    def _new_sequence(
        self,
        request_id: str,
        prompt_token_ids: list[int],
        params: SamplingParams,
        arrival_s: float,
        is_streamed: bool = False,
        priority: int = 0,
        chooser: Chooser | None = None,
    ) -> Sequence:
        seq = Sequence(
            self._num_submitted,
            request_id,
            prompt_token_ids,
            params,
            max_model_len=self.max_model_len,
            eos_token_ids=self.model.eos_token_ids,
            arrival_s=arrival_s,
            seed=_mix(self.config.seed, self._num_submitted),
            is_streamed=is_streamed,
            priority=priority,
            chooser=chooser,
        )
        if self.config.num_speculative_tokens and chooser is None and not params.changes_logits:
            seq.drafter, seq.is_watched = Drafter(prompt_token_ids), True
        if (is_streamed or params.stop) and self._make_text is not None:
            seq.text = self._make_text(prompt_token_ids, params.stop)
        self._num_submitted += 1
        self.seqs[request_id] = seq
        return seq

    def abort(self, request_id: str) -> None:
        """End a request with what it has so far; one that is unknown or finished is left alone."""
        seq = self.seqs.get(request_id)
        if seq is not None:
            self._finish(seq, SequenceStatus.FINISHED_ABORTED)

    def fork(self, parent: Sequence, request_id: str, token_ids: list[int]) -> Sequence:
        """A request that goes on from `token_ids`: all but the last are tokens of `parent`, whose blocks it shares."""
        num_prompt, arrival_s = parent.num_prompt_tokens, parent.events[0].time_s
        child = self._new_sequence(request_id, token_ids[:num_prompt], parent.params, arrival_s, chooser=parent.chooser)
        child.token_ids, child.token_times_s = token_ids, parent.token_times_s[: len(token_ids) - num_prompt]
        child.rank = (*parent.rank[:2], child.seq_id)
        child.fixed_route = parent.fixed_route
        self._follow(child, parent)
        return child

    def choose(self, seq: Sequence, token_id: int) -> None:
        """Let a sequence that awaits it go on, with this token in place of the one it has sampled."""
        seq.token_ids[-1], seq.awaits_choice = token_id, False
        del seq.block_keys[(seq.num_tokens - 1) // self.config.block_size :]
        if seq.worker is None:
            self._route(seq)
        else:
            self.schedulers[seq.worker].resume(seq)

    def _follow(self, seq: Sequence, parent: Sequence | None) -> None:
        """Let a new sequence wait until its parent decodes; who has none is computed from the beginning."""
        if parent is None or parent.status.is_finished:
            self._route(seq)
        else:
            self._followers.add(seq, parent)

    @property
    def has_unfinished(self) -> bool:
        """Whether a request, or anything that was sent out for one, is still under way."""
        in_flight = any(s.in_flight and not s.is_dead for s in self.schedulers)
        return bool(self.seqs or in_flight or self.handovers.has_plans_out)

    def next_wakeup_s(self) -> float:
        """When, on the engine's clock, `step` has something to do even if no worker answers; inf: never."""
        while self._deadlines and self._deadlines[0][-1].status.is_finished:
            heapq.heappop(self._deadlines)
        deadline_s = self._deadlines[0][0] if self._deadlines else math.inf
        held_s = [self._pacer.due_s(worker) for worker in self._live_workers() if self._may_hold(worker)]
        return min(deadline_s, self.handovers.next_due_s(), self._watchdog.next_due_s(), *held_s)

    # ---------------------------------------------------------------------------------------------------- step

    def step(self) -> list[Update]:
        """Do what can be done now; returns what callers should hear. Never waits."""
        now_s = self.clock()
        for worker in self._live_workers():
            self._take_results(worker, now_s)
        for worker in self._watchdog.overdue(now_s):
            reason = f"has not done a step or a transfer within step_timeout_s={self.config.step_timeout_s}"
            self._bury(worker, WorkerError(worker, reason))
        while self._deadlines and self._deadlines[0][0] <= now_s:
            _, _, is_for_queue, seq = heapq.heappop(self._deadlines)
            if not (seq.status.is_finished or (is_for_queue and self._has_started(seq))):
                seq.error = "its queue_timeout_s has passed" if is_for_queue else "the deadline has passed"
                self._finish(seq, SequenceStatus.FINISHED_ABORTED)
        self._change_roles()
        self.handovers.tick(now_s)
        has_left = True
        while has_left:  # a sequence was preempted, and is queued on a worker that has had its turn already
            self._route_all(self._followers.join(now_s))
            has_left = sum(self._send_steps(worker) for worker in self._live_workers()) > 0
        self._route_all(self._followers.join(now_s))
        updates, self._updates = self._updates, []
        return updates

    def _has_started(self, seq: Sequence) -> bool:
        """Whether its prompt is being computed, or has been, for itself or who it follows."""
        return self._followers.leader_of(seq).status is not SequenceStatus.WAITING

    def _live_workers(self) -> list[int]:
        return [worker for worker, scheduler in enumerate(self.schedulers) if not scheduler.is_dead]

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
            self._watchdog.answered(worker, isinstance(message, TransferAck), now_s)
            self._feedback.done(worker, message)
            if self.on_work is not None:
                self.on_work(_work(scheduler, message, now_s))
            if isinstance(message, TransferAck):
                self.handovers.acknowledge(message, now_s)
                continue
            self.busy_us[worker] += message.duration_us
            self._pacer.ended(worker, message.duration_us / 1e6, now_s)
            outcome: StepOutcome | None = scheduler.complete(message, now_s)
            while outcome is not None:
                self._heed(outcome, now_s)
                outcome = scheduler.accept(now_s)

    def _heed(self, outcome: StepOutcome, now_s: float) -> None:
        self._watch(outcome.watched)
        for seq, num_computed in outcome.advanced:
            self.handovers.advance(seq, num_computed)
        for seq, status in outcome.finished:
            self._finish(seq, status)
        for seq in outcome.prefilled:
            self.handovers.prefilled(seq, now_s)

    def _send_steps(self, worker: int) -> bool:
        """Keep `steps_in_flight` steps out; returns whether a sequence was preempted and left for another worker."""
        scheduler, has_left = self.schedulers[worker], False
        while len(scheduler.in_flight) < self.config.steps_in_flight:
            if self._may_hold(worker) and self.clock() < self._pacer.due_s(worker):
                break
            if not scheduler.in_flight:
                self._pacer.started(worker, self.clock())
            batch = scheduler.schedule()
            for seq in scheduler.admitted:
                seq.log_event(self.clock(), EventKind.SCHEDULED, worker)
                self.handovers.start(seq, self.clock())
            for seq in scheduler.preempted:
                self._requeue(seq, scheduler)
                has_left |= seq.worker != worker
            if batch is None:
                break
            for extras in scheduler.extras:
                self.workers[worker].send(extras)
            self.workers[worker].send(batch)
            self._watchdog.sent(worker, False, self.clock())
            self._feedback.sent(worker, batch)
        used = scheduler.blocks.num_usable - scheduler.blocks.num_free
        self.peak_blocks[worker] = max(self.peak_blocks[worker], used)
        return has_left

    def _may_hold(self, worker: int) -> bool:
        """Whether the worker has something to do, and may have more of it when it needs its next step."""
        scheduler = self.schedulers[worker]
        return 0 < len(scheduler.in_flight) < self.config.steps_in_flight and scheduler.num_expected > 0

    def _requeue(self, seq: Sequence, scheduler: Scheduler) -> None:
        """A preempted sequence waits where it decoded, or elsewhere if that worker cannot bring it back by itself."""
        assert seq.route is not None
        self.handovers.cancel(seq)
        seq.log_event(self.clock(), EventKind.PREEMPTED, scheduler.worker)
        is_home = seq.route.decode_worker == scheduler.worker and not seq.awaits_choice
        if is_home and (seq.host_table or scheduler.role is Role.MIXED):
            if not seq.host_table:
                seq.route = Route(scheduler.worker, scheduler.worker)
            scheduler.add(seq)
        else:
            scheduler.forget_swapped(seq)
            self._route(seq)

    # ------------------------------------------------------------------------------------------ text and ends

    def _watch(self, seqs: list[Sequence]) -> None:
        """Make text of each one's newest token: for a stream, or to look for stop strings."""
        for seq in seqs:
            if seq.chooser is not None:
                seq.chooser.sampled(seq)
                continue
            new, stream, text = seq.token_ids[-1:], seq.text, ""
            if stream is not None and new[0] not in seq.stop_ids:  # a stop token is not part of the text
                text = stream.push(new, len(seq.token_ids) >= seq.min_len)
            if seq.is_streamed:
                self._updates.append(Update(seq, new, text, False))
            if stream is not None and stream.stopped_by is not None:
                seq.stop_reason = stream.stopped_by
                self._finish(seq, SequenceStatus.FINISHED_STOPPED)

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
        self.router.finished(seq)
        if seq.chooser is not None:
            seq.chooser.ended(seq)
        else:
            self._updates.append(Update(seq, [], seq.text.finish() if seq.text is not None else "", is_finished=True))
        self._route_all(self._followers.release(seq))

    # ------------------------------------------------------------------------------------- routes and workers

    def _route(self, seq: Sequence) -> None:
        """Choose a route and queue the sequence there; without one it waits for a worker, or ends with the reason.

        One that awaits a choice waits for that, and who follows it does so no longer.
        """
        seq.route = None  # it is nowhere now
        if seq.awaits_choice:
            self._route_all(self._followers.release(seq))
            return
        routes = self._feasible_routes(seq)
        if not routes:
            if any(self._may_serve(route, seq.end_len) for route in self._allowed):
                self._stranded.append(seq)
            else:
                self._fail(seq, f"no route is left: {'; '.join(map(str, self._errors.values()))}")
            return
        decision = self.router.choose(routes, seq, self.schedulers, self.clock())
        if not seq.token_times_s:  # else its predictions are of what is left
            seq.decision = decision
        self._role_changes += decision.roles
        if decision.route is None:
            self._fail(seq, _turned_away(decision))
            return
        seq.route = decision.route
        scheduler = self.schedulers[seq.route.prefill_worker]
        if decision.chunk_budget is not None:
            scheduler.max_num_batched_tokens = min(decision.chunk_budget, self.config.max_num_batched_tokens)
        seq.log_event(self.clock(), EventKind.ROUTED, scheduler.worker)
        if not seq.route.is_collocated:
            self.handovers.begin(seq)
        scheduler.add(seq)

    def _route_all(self, seqs: list[Sequence]) -> None:
        for seq in seqs:
            if not seq.status.is_finished:
                self._route(seq)

    def _feasible_routes(self, seq: Sequence) -> list[Route]:
        """Live routes of the policy, or the one asked for; failing those, whatever the roles allow."""
        asked_for = [seq.fixed_route] if seq.fixed_route in self._allowed else self.router.routes
        able = [not scheduler.is_dead and scheduler.can_hold(seq.end_len) for scheduler in self.schedulers]
        for routes in (asked_for, self._allowed):
            live = [route for route in routes if able[route.prefill_worker] and able[route.decode_worker]]
            if live:
                return live
        return []

    def _may_serve(self, route: Route, num_tokens: int) -> bool:
        """Whether the route is there, or will be if all replacements succeed."""
        lost = self._errors.keys() - self._returning
        return self._has_capacity(route, num_tokens) and not lost & {*_workers_of(route)}

    def _has_capacity(self, route: Route, num_tokens: int) -> bool:
        return all(self.schedulers[worker].can_hold(num_tokens) for worker in _workers_of(route))

    def _bury(self, worker: int, error: WorkerError) -> None:
        """A worker is gone: what it had is computed again elsewhere, from prompt and delivered tokens."""
        logger.error("%s", str(error))  # the record must not keep the traceback and all that it refers to
        scheduler = self.schedulers[worker]
        self._errors[worker] = error
        scheduler.is_dead = True
        self._watchdog.forget(worker)
        self._feedback.forget(worker)
        if self._replace is not None and self._replace(worker):
            self._returning.add(worker)
        for seq in scheduler.seqs_in_flight():
            seq.num_deaths += 1
        victims = [seq for seq in self.seqs.values() if seq.worker == worker]
        for seq in victims:
            self.handovers.cancel(seq)
        displaced = self.handovers.drop_worker(worker, self.clock())
        for seq in victims:
            if seq.slot is not None:
                scheduler.slots.deactivate(seq)
            seq.block_table, seq.host_table, seq.num_swapped = [], [], 0
        for seq in victims + displaced:
            seq.status, seq.route = SequenceStatus.PREEMPTED, None
            seq.log_event(self.clock(), EventKind.PREEMPTED, worker)
        for seq in victims + displaced:
            if seq.status.is_finished:  # with another one of these
                continue
            if seq.num_deaths > MAX_REPLAYS:
                self._fail(seq, f"{seq.num_deaths} workers died while they computed it; the last: {error}")
            else:
                self._route(seq)

    def revive(self, worker: int, client: WorkerClient, generation: int) -> None:
        """A dead worker has been replaced by `client`, whose KV cache is empty."""
        old = self.schedulers[worker]
        assert old.is_dead and generation > old.generation
        self.workers[worker] = client
        new = self.schedulers[worker] = self._new_scheduler(worker, old.role)
        new.generation, new.num_preemptions = generation, old.num_preemptions
        new.max_num_batched_tokens, new.swap_pays = old.max_num_batched_tokens, old.swap_pays
        del self._errors[worker]
        self._returning.remove(worker)
        self._route_stranded()

    def give_up(self, worker: int, error: WorkerError) -> None:
        """A dead worker could not be replaced."""
        logger.error("%s", str(error))
        self._errors[worker] = error
        self._returning.remove(worker)
        self._route_stranded()

    def _route_stranded(self) -> None:
        stranded, self._stranded = self._stranded, []
        self._route_all(stranded)

    def _fail(self, seq: Sequence, reason: str) -> None:
        """End a request that no live worker has."""
        seq.route, seq.error = None, reason
        self._finish(seq, SequenceStatus.FINISHED_ERROR)

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
        possible = [r.value for r in Role if self._can_serve_with(worker, r)]
        if role not in possible:
            raise RequestError("role", role.value, possible)
        self.schedulers[worker].role = role
        self._allowed = allowed_routes(self._roles)
        self.router.routes = routes_for_policy(self.config.policy, self._roles)
        for live in self._live_workers():
            self._reroute_waiting(self.schedulers[live])
        if not (role.may_decode or self.schedulers[worker].is_dead):
            self.handovers.vacate(worker, self.clock())
        self._route_stranded()

    def _change_roles(self) -> None:
        """As the router asked, where the requests under way allow it."""
        changes, self._role_changes = self._role_changes, []
        for worker, role in changes:
            if self._can_serve_with(worker, role):
                logger.info("worker %d: %s", worker, role.value)
                self.set_role(worker, role)

    @property
    def _roles(self) -> list[Role]:
        return [scheduler.role for scheduler in self.schedulers]

    def _can_serve_with(self, worker: int, role: Role) -> bool:
        roles = [*self._roles[:worker], role, *self._roles[worker + 1 :]]
        longest = max((seq.end_len for seq in self.seqs.values()), default=0)
        return any(self._may_serve(route, longest) for route in routes_for_policy(self.config.policy, roles))

    def _reroute_waiting(self, scheduler: Scheduler) -> None:
        for seq in list(scheduler.waiting):
            if seq.route not in self._allowed and self._feasible_routes(seq):
                self.handovers.cancel(seq)
                scheduler.remove(seq)
                self._route(seq)

    # --------------------------------------------------------------------------------------------- validation

    def check(
        self,
        request_id: str,
        prompt_token_ids: list[int],
        params: SamplingParams,
        *,
        deadline_s: float | None = None,
        queue_timeout_s: float | None = None,
        priority: int = 0,
        route: Route | None = None,
    ) -> None:
        """Raise RequestError if the request can never be served.

        Any thread may call it. The ids of unfinished requests and the roles may change until it is submitted.
        """
        vocab_size, max_len = self.model.vocab_size, self.max_model_len
        if request_id in self.seqs:
            raise RequestError("request_id", request_id, "an id that no unfinished request has")
        if not prompt_token_ids:
            raise RequestError("prompt", "", "at least one token")
        bad_words = [word for word in params.bad_words if not isinstance(word, str)]
        if len(bad_words) < len(params.bad_words):
            raise RequestError("bad_words", params.bad_words, "token ids, as the model has no tokenizer")
        for name, ids in (
            ("prompt_token_ids", prompt_token_ids),
            ("stop_token_ids", params.stop_token_ids),
            ("logit_bias", params.logit_bias),
            ("allowed_token_ids", params.allowed_token_ids),
            ("bad_words", [token for word in bad_words for token in word]),
        ):
            if ids and not 0 <= min(ids) <= max(ids) < vocab_size:
                bad = next(i for i in ids if not 0 <= i < vocab_size)
                raise RequestError(name, bad, f"token ids from 0 to {vocab_size - 1}")
        num_prompt, max_tokens = len(prompt_token_ids), params.max_tokens or max(1, params.min_tokens)
        if num_prompt + max_tokens > max_len:
            what = f"{num_prompt} prompt tokens + {max_tokens} output tokens"
            raise RequestError(
                "max_tokens" if num_prompt < max_len else "prompt", what, f"max_model_len={max_len} in all"
            )
        for name, limit_s in (("deadline_s", deadline_s), ("queue_timeout_s", queue_timeout_s)):
            if limit_s is not None and not limit_s > 0:
                raise RequestError(name, limit_s, "None, or more than 0 seconds")
        if not isinstance(priority, int):
            raise RequestError("priority", priority, "an integer")
        if params.stop and self._make_text is None:
            raise RequestError("stop", params.stop, "nothing, as the model has no tokenizer")
        self._check_route(route, num_prompt, params.max_tokens)

    def _check_route(self, route: Route | None, num_prompt: int, max_tokens: int | None) -> None:
        num_tokens = self.max_model_len if max_tokens is None else num_prompt + max_tokens
        routes = self.router.routes if route is None else [route]
        if route is not None and route not in self._allowed:
            raise RequestError("route", str(route), map(str, self._allowed))
        if not any(self._has_capacity(r, num_tokens) for r in routes):
            sizes = [s.blocks.num_usable * s.blocks.block_size for s in self.schedulers]
            raise RequestError("max_tokens", f"{num_tokens} tokens with the prompt", f"KV caches of {sizes} tokens")

    def check_integrity(self) -> None:
        """Raise AssertionError if a block or a slot of a live worker was lost."""
        for w, scheduler in enumerate(self.schedulers):
            if not scheduler.is_dead:
                scheduler.check_integrity(self.handovers.tables(w), self.handovers.pinned(w))


def _work(scheduler: Scheduler, message: StepResult | TransferAck, now_s: float) -> Work:
    work = Work(scheduler.worker, now_s, message.duration_us / 1e6)
    if isinstance(message, TransferAck):
        work.num_moved_bytes = message.num_bytes
    else:
        step = scheduler.in_flight[0]
        work.num_prompt_tokens = step.num_prompt_tokens
        work.num_decoding = len(step.row_slots) - len(step.chunks)
    return work


def _swap_pays(costs: CostModel, num_tokens: int) -> bool:
    """Whether the way of so many tokens out to host memory and back takes less time than to compute them again."""
    swap_ms = 2 * num_tokens * costs.parameters.kv_bytes_per_token / HOST_BYTES_PER_MS
    return swap_ms < costs.mixed_ms(0, 0, num_tokens, chunk_pairs(num_tokens, 0))


def _turned_away(decision: Decision) -> str:
    best = decision.taken
    assert best is not None
    figures = f"TTFT {best.ttft_ms:.0f} ms, first gap {best.first_gap_ms:.0f} ms, TPOT {best.tpot_ms:.1f} ms"
    return f"turned away: no route keeps the service levels; the best, {best.route}, would take {figures}"


def _workers_of(route: Route) -> tuple[int, int]:
    return route.prefill_worker, route.decode_worker


def _mix(seed: int, number: int) -> int:
    """A 64-bit seed for request `number` of an engine (the finaliser of splitmix64, Steele et al. 2014)."""
    mask = 2**64 - 1
    x = (seed + (number + 1) * 0x9E3779B97F4A7C15) & mask
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & mask
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & mask
    return x ^ (x >> 31)

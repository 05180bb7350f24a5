"""The control plane as a whole, against a model that is a hash: whatever happens, tokens are right, nothing is lost."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from symbolic_worker import EOS, POISON, VOCAB_SIZE, SymbolicWorker, generate, model_config, symbolic_workers

from nanopd.config import EngineConfig, routes_for_policy
from nanopd.core.block_manager import extend_keys
from nanopd.core.metrics import RequestMetrics
from nanopd.core.sequence import Sequence, SequenceStatus
from nanopd.engine import MAX_REPLAYS, Engine
from nanopd.errors import RequestError, WorkerError
from nanopd.messages import EventKind, Role, Route, SamplingParams, StepBatch, TransferPlan

TOPOLOGIES = {
    "mixed": ["mixed"],
    "1P1D": ["prefill", "decode"],
    "2P1D": ["prefill", "prefill", "decode"],
    "1P3D": ["prefill", "decode", "decode", "decode"],
    "all mixed": ["mixed", "mixed", "mixed"],
    "mixed and D": ["mixed", "decode"],
    "P and mixed": ["prefill", "mixed"],
}


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


class Replacements:
    """Ends workers and brings them back some time later, as processes would; now and then that fails."""

    def __init__(self, rng: Random | None = None) -> None:
        self.rng = rng
        self.coming: list[int] = []
        self.minds_poison = False
        self.engine: Engine  # when there is one

    def replace(self, worker: int) -> bool:
        client = self.engine.workers[worker]
        client.is_dead = client.is_buried = True
        if self.rng is not None and self.rng.random() < 0.2:
            return False
        self.coming.append(worker)
        return True

    def tick(self) -> None:
        for worker in self.coming[:]:
            if self.rng is None or self.rng.random() < 0.1:
                self.coming.remove(worker)
                if self.rng is not None and self.rng.random() < 0.2:
                    self.engine.give_up(worker, WorkerError(worker, "killed by the test again"))
                else:
                    self._revive(worker)

    def _revive(self, worker: int) -> None:
        old = self.engine.workers[worker]
        new = SymbolicWorker(self.engine.config, old.num_blocks, self.rng)
        new.peers, new.generation, new.minds_poison = old.peers, old.generation + 1, self.minds_poison
        self.engine.revive(worker, new, new.generation)


def make_engine(
    roles: list[str],
    policy: str,
    num_blocks: int = 40,
    rng: Random | None = None,
    replacements: Replacements | None = None,
    **keys,
) -> tuple[Engine, Clock]:
    workers = [{"device": "cpu", "role": role} for role in roles]
    config = EngineConfig(model="none", workers=workers, policy=policy, max_model_len=512, **keys)
    clock = Clock()
    clients = symbolic_workers(config, [num_blocks] * len(roles), rng)
    engine = Engine(
        config, model_config(), clients, clock, replace=None if replacements is None else replacements.replace
    )
    if replacements is not None:
        replacements.engine = engine
        for client in clients:
            client.minds_poison = replacements.minds_poison
    return engine, clock


def drain(engine: Engine, clock: Clock, replacements: Replacements | None = None, max_steps: int = 20_000) -> None:
    for _ in range(max_steps):
        if not engine.has_unfinished:
            break
        clock.now_s += 0.01
        if replacements is not None:
            replacements.tick()
        engine.step()
    assert not engine.has_unfinished, "the engine hangs"
    engine.check_integrity()
    for scheduler in engine.schedulers:
        if not scheduler.is_dead:
            assert scheduler.blocks.num_free == scheduler.blocks.num_usable
            assert scheduler.slots.num_free == len(scheduler.slots.seqs)
            assert scheduler.num_seqs == 0


def assert_right(seq: Sequence) -> None:
    expected = generate(seq.token_ids[: seq.num_prompt_tokens], seq.params.max_tokens)
    assert seq.output_token_ids == expected
    is_stop = expected[-1] == EOS
    assert seq.status is (SequenceStatus.FINISHED_STOPPED if is_stop else SequenceStatus.FINISHED_LENGTH)
    assert len(seq.token_times_s) == len(expected)


def make_prompt(rng: Random, seqs: list[Sequence], num_prompt: int) -> list[int]:
    """Random tokens, perhaps behind those of a request before, be it a prompt or a turn of a conversation."""
    old = rng.choice(seqs).token_ids if seqs and rng.random() < 0.7 else []
    prompt = old[: rng.choice([num_prompt, rng.randint(0, num_prompt)])][:num_prompt]
    return prompt + [rng.randrange(VOCAB_SIZE) for _ in range(num_prompt - len(prompt))]


def assert_caches_are_right(engine: Engine, seqs: list[Sequence]) -> None:
    """Whatever a worker's prefix cache would find holds the tokens that its key stands for."""
    block_size = engine.config.block_size
    for scheduler, worker in zip(engine.schedulers, engine.workers, strict=True):
        tokens_of = {}
        for seq in seqs:
            keys: list[bytes] = []
            extend_keys(keys, seq.token_ids, block_size, scheduler._root_key)
            for i, key in enumerate(keys):
                tokens_of[key] = seq.token_ids[i * block_size : (i + 1) * block_size]
        for key, tokens in tokens_of.items():
            for block in scheduler.blocks.find([key]):
                assert scheduler.is_dead or worker.kv[block].tolist() == tokens


def policies_for(roles: list[str]) -> list[str]:
    return [p for p in ("collocated", "disaggregated", "round_robin") if routes_for_policy(p, [Role(r) for r in roles])]


@pytest.mark.parametrize("steps_in_flight", [1, 2, 3])
@pytest.mark.parametrize("topology", TOPOLOGIES)
@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_load_on_any_topology(topology: str, steps_in_flight: int, data: st.DataObject) -> None:
    """Random requests, arrivals, aborts, deadlines, tiny pools and budgets, work done in any order; then a death."""
    roles = TOPOLOGIES[topology]
    rng = Random(data.draw(st.integers(0, 2**32)))
    engine, clock = make_engine(
        roles,
        rng.choice(policies_for(roles)),
        num_blocks=rng.randint(22, 60),
        rng=rng,
        block_size=(block_size := rng.choice([1, 3, 4, 16])),
        max_num_seqs=rng.randint(1, 6),
        max_num_batched_tokens=rng.choice([1, 2, 7, 16, 17, 512]),
        steps_in_flight=steps_in_flight,
        handover_timeout_s=rng.choice([0.001, 0.05, 1.0]),
        enable_prefix_caching=rng.random() < 0.9,
    )
    longest = 20 * block_size
    seqs: list[Sequence] = []
    victim = rng.randrange(len(roles)) if rng.random() < 0.3 else None
    for number in range(rng.randint(1, 14)):
        num_prompt = rng.randint(1, longest - 2)
        params = SamplingParams(temperature=0, max_tokens=rng.randint(1, min(30, longest - num_prompt)))
        prompt = make_prompt(rng, seqs, num_prompt)
        deadline_s = rng.choice([None, None, None, 0.5])
        seqs.append(engine.submit(str(number), prompt, params, deadline_s=deadline_s))
        for _ in range(rng.choice([0, 1, 3, 20])):
            clock.now_s += 0.01
            engine.step()
            engine.check_integrity()
        if rng.random() < 0.2:
            engine.abort(str(rng.randrange(number + 1)))
        if victim is not None and rng.random() < 0.2:
            engine.workers[victim].is_dead = True
    drain(engine, clock)
    assert_caches_are_right(engine, seqs)
    for seq in seqs:
        assert seq.status.is_finished
        if seq.status is SequenceStatus.FINISHED_ABORTED:
            expected = generate(seq.token_ids[: seq.num_prompt_tokens], seq.params.max_tokens)
            assert seq.output_token_ids == expected[: len(seq.output_token_ids)]
        elif seq.status is SequenceStatus.FINISHED_ERROR:
            assert engine.workers[victim].is_dead
            assert "killed by the test" in seq.error
        else:
            assert_right(seq)


@pytest.mark.parametrize("steps_in_flight", [1, 2, 3])
@pytest.mark.parametrize("topology", TOPOLOGIES)
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 2**32))
def test_any_load_while_workers_die_hang_return_and_change_roles(
    topology: str, steps_in_flight: int, seed: int
) -> None:
    """Restarts, replays, moves and roles in any order, beside what the test above does."""
    roles, rng = TOPOLOGIES[topology], Random(seed)
    replacements = Replacements(rng)
    replacements.minds_poison = rng.random() < 0.3
    engine, clock = make_engine(
        roles,
        rng.choice(policies_for(roles)),
        num_blocks=rng.randint(22, 60),
        rng=rng,
        replacements=replacements,
        block_size=(block_size := rng.choice([1, 3, 4, 16])),
        max_num_seqs=rng.randint(1, 6),
        max_num_batched_tokens=rng.choice([1, 2, 7, 16, 17, 512]),
        steps_in_flight=steps_in_flight,
        handover_timeout_s=rng.choice([0.001, 0.05, 1.0]),
        enable_prefix_caching=rng.random() < 0.9,
        step_timeout_s=0.5,
    )
    longest = 20 * block_size
    seqs: list[Sequence] = []
    for number in range(rng.randint(1, 14)):
        num_prompt = rng.randint(1, longest - 2)
        params = SamplingParams(temperature=0, max_tokens=rng.randint(1, min(30, longest - num_prompt)))
        prompt = make_prompt(rng, seqs, num_prompt)
        seqs.append(engine.submit(str(number), prompt, params, deadline_s=rng.choice([None, None, 0.5])))
        for _ in range(rng.choice([0, 1, 3, 20])):
            clock.now_s += 0.01
            replacements.tick()
            engine.step()
            engine.check_integrity()
            happen(engine, rng, number)
    drain(engine, clock, replacements)
    assert_caches_are_right(engine, seqs)
    for seq in seqs:
        assert seq.status.is_finished
        expected = generate(seq.token_ids[: seq.num_prompt_tokens], seq.params.max_tokens)
        if seq.status is SequenceStatus.FINISHED_ERROR:
            assert seq.num_deaths > MAX_REPLAYS or "no route is left" in seq.error
            assert "by the test" in seq.error or "step_timeout_s" in seq.error
            assert seq.output_token_ids == expected[: len(seq.output_token_ids)]
        elif seq.status is SequenceStatus.FINISHED_ABORTED:
            assert seq.output_token_ids == expected[: len(seq.output_token_ids)]
        else:
            assert_right(seq)


def happen(engine: Engine, rng: Random, last: int) -> None:
    """Perhaps something out of the ordinary."""
    worker, chance = rng.randrange(len(engine.workers)), rng.random()
    if chance < 0.01:
        engine.workers[worker].is_dead = True
    elif chance < 0.02:
        engine.workers[worker].is_hung = True
    elif chance < 0.04:
        engine.abort(str(rng.randrange(last + 1)))
    elif chance < 0.08:
        with suppress(RequestError):
            engine.set_role(worker, rng.choice(list(Role)))
    elif chance < 0.3:
        with suppress(RequestError):
            engine.move(str(rng.randrange(last + 1)), worker)


# ------------------------------------------------------------------------------------------------- one thing at a time

PARAMS = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
PROMPT = list(range(10, 30))


def run(engine: Engine, clock: Clock, num_steps: int = 1) -> None:
    for _ in range(num_steps):
        clock.now_s += 0.01
        engine.step()
        engine.check_integrity()


def expected_tokens(seq: Sequence) -> list[int]:
    return generate(seq.token_ids[: seq.num_prompt_tokens], seq.params.max_tokens, stop_ids=())


@pytest.mark.parametrize(("roles", "policy"), [(["mixed"], "collocated"), (["prefill", "decode"], "disaggregated")])
@pytest.mark.parametrize("is_on", [True, False])
def test_the_next_turn_finds_the_one_before(roles: list[str], policy: str, is_on: bool) -> None:
    engine, clock = make_engine(roles, policy, block_size=4, enable_prefix_caching=is_on)
    plans = count_moved_blocks(engine)
    first = engine.submit("a", PROMPT, PARAMS)  # 20 + 30 tokens
    drain(engine, clock)
    second = engine.submit("b", [*first.token_ids, 1, 2, 3], PARAMS)
    drain(engine, clock)
    assert [seq.output_token_ids for seq in (first, second)] == [expected_tokens(seq) for seq in (first, second)]
    num_cached = {"collocated": 48, "disaggregated": 20}[policy]  # the prefill worker has not seen the answer
    assert (first.log().num_cached_tokens, second.log().num_cached_tokens) == (0, num_cached * is_on)
    if policy == "disaggregated":
        assert sum(plans) == 5 + (14 - 12 * is_on)
    assert_caches_are_right(engine, [first, second])


def count_moved_blocks(engine: Engine) -> list[int]:
    counts: list[int] = []
    for worker in engine.workers:

        def send(message: StepBatch | TransferPlan, send: Callable = worker.send) -> None:
            if isinstance(message, TransferPlan):
                counts.append(len(message.dst_blocks))
            send(message)

        worker.send = send
    return counts


def test_blocks_that_the_destination_has_do_not_move() -> None:
    keys = {"block_size": 4, "max_num_batched_tokens": 6}
    engine, clock = make_engine(["prefill", "prefill", "decode"], "disaggregated", **keys)
    plans = count_moved_blocks(engine)
    for prefill_worker in (0, 1):
        seq = engine.submit("a", PROMPT, PARAMS, route=Route(prefill_worker, 2))
        drain(engine, clock)
        assert seq.output_token_ids == expected_tokens(seq)
        assert seq.log().num_cached_tokens == 0
    assert sum(plans) == 5 + 1


def test_blocks_that_are_still_moving_are_not_shared() -> None:
    engine, clock = make_engine(["prefill", "decode"], "disaggregated", block_size=4)
    plans = count_moved_blocks(engine)
    engine.workers[1].is_hung = True
    seqs = [engine.submit("a", PROMPT, PARAMS)]
    run(engine, clock, 4)
    seqs += [engine.submit("b", PROMPT, PARAMS)]
    run(engine, clock, 4)
    engine.workers[1].is_hung = False
    run(engine, clock, 4)
    seqs += [engine.submit("c", PROMPT, PARAMS)]
    drain(engine, clock)
    assert sum(plans) == 5 + 5 + 1
    assert [seq.log().num_cached_tokens for seq in seqs] == [0, 16, 16]
    assert [seq.output_token_ids for seq in seqs] == [expected_tokens(seq) for seq in seqs]


def test_a_moved_request_goes_on_elsewhere_with_the_same_tokens() -> None:
    engine, clock = make_engine(["mixed", "decode"], "collocated")
    seq = engine.submit("a", PROMPT, PARAMS)
    run(engine, clock, 5)
    assert seq.status is SequenceStatus.RUNNING
    engine.move("a", 1)
    drain(engine, clock)
    assert seq.output_token_ids == expected_tokens(seq)
    assert seq.route == Route(0, 1)
    kinds = [(event.kind, event.worker) for event in seq.events if event.kind in (EventKind.MOVING, EventKind.MOVED)]
    assert kinds == [(EventKind.MOVING, 0), (EventKind.MOVED, 1)]
    assert RequestMetrics.from_log(seq.log()).num_preemptions == 0


def test_a_move_that_finds_no_room_leaves_the_request_where_it_is() -> None:
    engine, clock = make_engine(["mixed", "mixed"], "collocated", max_num_seqs=1, handover_timeout_s=0.05)
    seqs = [engine.submit(name, PROMPT, PARAMS) for name in "ab"]
    run(engine, clock, 3)
    engine.move("a", 1)
    drain(engine, clock)
    assert [seq.route for seq in seqs] == [Route(0, 0), Route(1, 1)]
    assert [seq.output_token_ids for seq in seqs] == [expected_tokens(seq) for seq in seqs]
    assert not [event for event in seqs[0].events if event.kind is EventKind.MOVING]


@pytest.mark.parametrize("is_settled", [False, True])
def test_a_drained_worker_loses_its_requests_even_if_the_first_destination_dies(is_settled: bool) -> None:
    """The move is under way, its destination dies, the next one is full: it decodes at home until there is room."""
    keys = {"max_num_seqs": 1, "block_size": 1, "num_blocks": 120, "handover_timeout_s": 0.05}
    engine, clock = make_engine(["mixed", "decode", "mixed"], "round_robin", **keys)
    seq = engine.submit("a", PROMPT, PARAMS, route=Route(0, 0))
    engine.submit("b", PROMPT, PARAMS, route=Route(2, 2))
    run(engine, clock, 3)
    engine.set_role(0, Role.PREFILL)
    home, first, _ = engine.workers
    first.is_hung, home.is_hung = True, not is_settled
    run(engine, clock, 2)
    assert (seq.status, seq.route) == (SequenceStatus.MOVING, Route(0, 1))
    assert engine.handovers.has_plans_out == is_settled
    first.is_dead, home.is_hung = True, False
    run(engine, clock, 5)
    assert (seq.status, seq.route) == (SequenceStatus.RUNNING, Route(0, 0))
    home.is_hung = True
    engine.abort("b")
    run(engine, clock, 2)
    assert (seq.status, seq.route) == (SequenceStatus.MOVING, Route(0, 2))
    assert not engine.handovers.has_plans_out
    home.is_hung = False
    drain(engine, clock)
    assert seq.output_token_ids == expected_tokens(seq)


def test_a_request_told_to_stay_may_move_before_its_prompt_is_done() -> None:
    keys = {"max_num_seqs": 1, "block_size": 1, "num_blocks": 120}
    engine, clock = make_engine(["mixed", "decode", "mixed"], "disaggregated", **keys)
    engine.submit("b", PROMPT, PARAMS, route=Route(2, 2))
    seq = engine.submit("a", PROMPT, PARAMS, route=Route(0, 1))
    engine.step()  # its only chunk is in flight
    engine.workers[0].is_hung = engine.workers[1].is_dead = True
    run(engine, clock)
    assert (seq.status, seq.route) == (SequenceStatus.RUNNING, Route(0, 0))
    engine.move("a", 2)  # no room yet
    engine.workers[0].is_hung = False
    run(engine, clock)
    engine.abort("b")
    drain(engine, clock)
    assert seq.output_token_ids == expected_tokens(seq)
    assert seq.route == Route(0, 2)


def test_moves_that_are_impossible() -> None:
    engine, clock = make_engine(["mixed", "prefill", "decode"], "round_robin")
    seq = engine.submit("a", PROMPT, PARAMS, route=Route(0, 0))
    with pytest.raises(RequestError, match="request_id='a'"):
        engine.move("a", 2)
    run(engine, clock, 3)
    for worker in (0, 1, 3, -1):
        with pytest.raises(RequestError, match=rf"worker={worker} .* \[2\]"):
            engine.move("a", worker)
    with pytest.raises(RequestError, match="request_id='b'"):
        engine.move("b", 2)
    drain(engine, clock)
    assert seq.output_token_ids == expected_tokens(seq)


def test_roles_change_under_load() -> None:
    """Two mixed workers become a pair, the pair is turned round, and is mixed again."""
    engine, clock = make_engine(["mixed", "mixed"], "round_robin", max_num_seqs=4, max_num_batched_tokens=16)
    seqs = [engine.submit(str(n), [n, *PROMPT], PARAMS) for n in range(16)]
    changes = [(0, Role.PREFILL), (1, Role.DECODE), (1, Role.MIXED), (1, Role.PREFILL), (0, Role.MIXED)]
    for worker, role in changes:
        run(engine, clock, 6)
        try:
            engine.set_role(worker, role)
        except RequestError as error:
            assert (worker, role, error.field) == (1, Role.PREFILL, "role")  # nobody would decode
            assert "mixed" in error.allowed
    drain(engine, clock)
    assert [seq.output_token_ids for seq in seqs] == [expected_tokens(seq) for seq in seqs]
    assert {event.kind for seq in seqs for event in seq.events} >= {EventKind.MOVED, EventKind.ROUTED}
    assert not any(event.kind is EventKind.PREEMPTED for seq in seqs for event in seq.events)
    with pytest.raises(RequestError, match="worker=2"):
        engine.set_role(2, Role.MIXED)


def test_a_worker_that_may_not_prefill_any_more_gives_its_queue_away() -> None:
    engine, clock = make_engine(["mixed", "mixed"], "collocated", max_num_seqs=1)
    seqs = [engine.submit(str(n), PROMPT, PARAMS) for n in range(4)]
    run(engine, clock, 2)
    engine.set_role(0, Role.DECODE)
    drain(engine, clock)
    assert [seq.route for seq in seqs] == [Route(0, 0), Route(1, 1), Route(1, 1), Route(1, 1)]
    with pytest.raises(RequestError, match="route='0->0'"):
        engine.submit("late", PROMPT, PARAMS, route=Route(0, 0))


def test_requests_wait_for_the_worker_that_is_being_replaced() -> None:
    replacements = Replacements()
    engine, clock = make_engine(["prefill", "decode"], "disaggregated", replacements=replacements)
    seqs = [engine.submit("a", PROMPT, PARAMS)]
    run(engine, clock, 4)
    engine.workers[1].is_dead = True
    run(engine, clock, 3)
    seqs += [engine.submit("b", PROMPT, PARAMS), engine.submit("c", PROMPT, PARAMS, deadline_s=0.05)]
    run(engine, clock, 20)
    assert [seq.status.is_finished for seq in seqs] == [False, False, True]
    assert seqs[2].error == "the deadline has passed"
    drain(engine, clock, replacements)
    assert [seq.output_token_ids for seq in seqs[:2]] == [expected_tokens(seq) for seq in seqs[:2]]
    assert engine.schedulers[1].generation == 1


def test_what_waited_ends_with_the_reason_if_the_replacement_fails() -> None:
    replacements = Replacements()
    engine, clock = make_engine(["mixed"], "collocated", replacements=replacements)
    seq = engine.submit("a", PROMPT, PARAMS)
    engine.workers[0].is_dead = True
    run(engine, clock)
    engine.give_up(0, WorkerError(0, "no memory", "a traceback"))
    assert seq.status is SequenceStatus.FINISHED_ERROR
    assert seq.error == "no route is left: worker 0: no memory\na traceback"
    assert engine.submit("b", PROMPT, PARAMS).error == seq.error


def test_a_poison_request_ends_after_its_replays_and_a_later_one_is_served() -> None:
    replacements = Replacements()
    replacements.minds_poison = True
    engine, clock = make_engine(["mixed", "mixed"], "collocated", replacements=replacements)
    poison, innocent = engine.submit("p", [POISON], PARAMS), engine.submit("i", PROMPT, PARAMS)
    drain(engine, clock, replacements)
    assert poison.status is SequenceStatus.FINISHED_ERROR
    assert poison.num_deaths == MAX_REPLAYS + 1
    assert "3 workers died while they computed it" in poison.error
    assert "was poisoned by the test" in poison.error
    assert innocent.output_token_ids == expected_tokens(innocent)
    later = engine.submit("l", PROMPT, PARAMS)
    drain(engine, clock, replacements)
    assert later.output_token_ids == expected_tokens(later)


def test_a_hung_worker_is_noticed_in_time_and_a_held_parent_is_none() -> None:
    replacements = Replacements()
    engine, clock = make_engine(["mixed"], "collocated", replacements=replacements, step_timeout_s=60.0)
    seq = engine.submit("a", PROMPT, PARAMS)
    run(engine, clock, 3)
    engine.workers[0].is_hung = True
    run(engine, clock)
    clock.now_s += 300.0  # nobody looked meanwhile
    run(engine, clock)
    assert not replacements.coming
    noticed_s = engine.next_wakeup_s()
    assert 59.0 < noticed_s - clock.now_s <= 60.0
    while clock.now_s < noticed_s - 1.0:
        clock.now_s += 1.0
        engine.step()
    assert not replacements.coming
    clock.now_s = noticed_s
    engine.step()
    assert replacements.coming == [0]
    drain(engine, clock, replacements)
    assert seq.output_token_ids == expected_tokens(seq)

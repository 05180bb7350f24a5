"""The control plane as a whole, against a model that is a hash: whatever happens, tokens are right, nothing is lost."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from random import Random

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from submitting import start_search, submit
from symbolic_worker import (
    EOS,
    POISON,
    VOCAB_SIZE,
    SymbolicWorker,
    generate,
    logprobs_of,
    model_config,
    symbolic_workers,
)

from nanopd.config import EngineConfig, KVLayout, routes_for_policy
from nanopd.core.block_manager import extend_keys
from nanopd.core.sequence import Sequence, SequenceStatus
from nanopd.engine.beam_search import Beams, BeamSearch
from nanopd.engine.engine import MAX_REPLAYS, Engine
from nanopd.errors import RequestError, WorkerError
from nanopd.messages import EventKind, FinishReason, Role, Route, StepBatch, TransferPlan
from nanopd.metrics import RequestMetrics
from nanopd.request import BeamSearchParams, SamplingParams
from nanopd.routing.factory import find_parameters, make_policy

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
    max_len: int = 512,
    **keys,
) -> tuple[Engine, Clock]:
    workers = [{"device": "cpu", "role": role} for role in roles]
    config = EngineConfig(model="none", workers=workers, policy=policy, max_model_len=max_len, **keys)
    clock = Clock()
    clients = symbolic_workers(config, [num_blocks] * len(roles), rng, max_len)
    engine = Engine(
        config, model_config(max_len), clients, clock, replace=None if replacements is None else replacements.replace
    )
    if replacements is not None:
        replacements.engine = engine
        for client in clients:
            client.minds_poison = replacements.minds_poison
    return engine, clock


def swap_space_gb(num_blocks: int, block_size: int) -> float:
    return (num_blocks + 0.5) * KVLayout.of(model_config(), block_size).bytes_per_block / 1e9


def drain(engine: Engine, clock: Clock, replacements: Replacements | None = None, max_steps: int = 60_000) -> None:
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
            assert scheduler.residency.blocks.num_free == scheduler.residency.blocks.num_usable
            assert scheduler.residency.host_blocks.num_free == scheduler.residency.host_blocks.num_usable
            assert scheduler.residency.slots.num_free == len(scheduler.residency.slots.seqs)
            assert scheduler.queues.num_seqs == 0


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
            extend_keys(keys, seq.token_ids, block_size, engine._root_key)
            for i, key in enumerate(keys):
                tokens_of[key] = seq.token_ids[i * block_size : (i + 1) * block_size]
        for key, tokens in tokens_of.items():
            for block in scheduler.residency.blocks.find([key]):
                assert scheduler.is_dead or worker.kv[block].tolist() == tokens


class Load:
    """Requests of all kinds, and whether each got the right answer."""

    def __init__(self, engine: Engine, rng: Random, longest: int) -> None:
        self.engine, self.rng, self.longest = engine, rng, longest
        self.seqs: list[Sequence] = []
        self.searches: list[BeamSearch] = []
        self.num_ended = 0

    def submit(self, name: str) -> None:
        """A request, several answers to one prompt, or a beam search."""
        rng = self.rng
        num_prompt = rng.randint(1, self.longest - 2)
        prompt = make_prompt(rng, self.seqs, num_prompt)
        num_tokens = rng.randint(1, min(30, self.longest - num_prompt))
        if rng.random() < 0.15:
            early = rng.choice([False, True, "never"])
            params = BeamSearchParams(rng.randint(1, 4), min(num_tokens, 8), rng.choice([0.0, 1.0, 2.0]), early)
            search = start_search(self.engine, name, prompt, params, self._ended)
            self.searches.append(search)
            return
        limits = {
            "deadline_s": rng.choice([None, None, None, 0.5]),
            "queue_timeout_s": rng.choice([None, None, None, 0.2]),
            "priority": rng.choice([0, 0, 0, -1, 1]),
        }
        params, leader = SamplingParams(temperature=0, max_tokens=num_tokens), None
        for i in range(rng.choice([1, 1, 1, 2, 5])):
            seq = submit(self.engine, f"{name}/{i}" if i else name, prompt, params, parent=leader, **limits)
            leader = leader or seq
            self.seqs.append(seq)

    def _ended(self, search: BeamSearch) -> None:
        self.num_ended += 1
        assert not search.seqs

    def check(self, check_error: Callable[[str], None]) -> None:
        assert self.num_ended == len(self.searches)
        assert not self.engine.dispatcher.followers
        for search in self.searches:
            if search.reason is None:
                prompt = search.first.token_ids[: search.first.num_prompt_tokens]
                assert search.beams.complete == search_alone(prompt, search.beams.params)
            elif search.reason is FinishReason.ERROR:
                check_error(search.error)
        for seq in self.seqs:
            expected = generate(seq.token_ids[: seq.num_prompt_tokens], seq.params.max_tokens)
            if seq.status in (SequenceStatus.FINISHED_ABORTED, SequenceStatus.FINISHED_ERROR):
                assert seq.output_token_ids == expected[: len(seq.output_token_ids)]
                if seq.status is SequenceStatus.FINISHED_ERROR:
                    check_error(seq.error)
            else:
                assert_right(seq)


def search_alone(prompt: list[int], params: BeamSearchParams) -> list:
    """What any correct engine finds."""
    beams = Beams(params, (EOS,))
    while not beams.is_done:
        rows = [logprobs_of(np.array(prompt + beam.token_ids)) for beam in beams.running]
        beams.advance([{token: float(np.float32(value)) for token, value in row.items()} for row in rows])
    return beams.complete


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
        enable_prefix_caching=rng.random() < 0.6,
        swap_space_gb=swap_space_gb(rng.choice([0, 30, 200]), block_size),
    )
    load = Load(engine, rng, 20 * block_size)
    victim = rng.randrange(len(roles)) if rng.random() < 0.3 else None
    for number in range(rng.randint(1, 14)):
        load.submit(str(number))
        for _ in range(rng.choice([0, 1, 3, 20])):
            clock.now_s += 0.01
            engine.step()
            engine.check_integrity()
        if rng.random() < 0.2:
            engine.abort(str(rng.randrange(number + 1)))
        if victim is not None and rng.random() < 0.2:
            engine.workers[victim].is_dead = True
    drain(engine, clock)
    assert_caches_are_right(engine, load.seqs)

    def check_error(error: str) -> None:
        assert engine.workers[victim].is_dead
        assert "killed by the test" in error

    load.check(check_error)


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
        enable_prefix_caching=rng.random() < 0.6,
        swap_space_gb=swap_space_gb(rng.choice([0, 30, 200]), block_size),
        step_timeout_s=0.5,
    )
    load = Load(engine, rng, 20 * block_size)
    for number in range(rng.randint(1, 14)):
        load.submit(str(number))
        for _ in range(rng.choice([0, 1, 3, 20])):
            clock.now_s += 0.01
            replacements.tick()
            engine.step()
            engine.check_integrity()
            happen(engine, rng, number)
    drain(engine, clock, replacements)
    assert_caches_are_right(engine, load.seqs)

    def check_error(error: str) -> None:
        assert f"{MAX_REPLAYS + 1} workers died" in error or "no route is left" in error
        assert "by the test" in error or "step_timeout_s" in error

    load.check(check_error)


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
    first = submit(engine, "a", PROMPT, PARAMS)  # 20 + 30 tokens
    drain(engine, clock)
    second = submit(engine, "b", [*first.token_ids, 1, 2, 3], PARAMS)
    drain(engine, clock)
    assert [seq.output_token_ids for seq in (first, second)] == [expected_tokens(seq) for seq in (first, second)]
    num_cached = {"collocated": 48, "disaggregated": 20}[policy]  # the prefill worker has not seen the answer
    assert (first.log().num_cached_tokens, second.log().num_cached_tokens) == (0, num_cached * is_on)
    if policy == "disaggregated":
        assert sum(plans) == 5 + (14 - 12 * is_on)
    assert_caches_are_right(engine, [first, second])


@pytest.mark.parametrize(("roles", "policy"), [(["mixed"], "collocated"), (["prefill", "decode"], "disaggregated")])
@pytest.mark.parametrize("num_host_blocks", [0, 40])
def test_what_is_swapped_is_not_computed_again(roles: list[str], policy: str, num_host_blocks: int) -> None:
    keys = {"block_size": 4, "enable_prefix_caching": False, "swap_space_gb": swap_space_gb(num_host_blocks, 4)}
    engine, clock = make_engine(roles, policy, num_blocks=26, **keys)
    num_computed = count_computed_tokens(engine)
    seqs = [submit(engine, str(i), [i] * 10, PARAMS) for i in range(6)]  # 6 of 10 + 30 tokens: 60 blocks, of 25
    drain(engine, clock)
    assert [seq.output_token_ids for seq in seqs] == [expected_tokens(seq) for seq in seqs]
    num_again = sum(num_computed) - 6 * 39
    if num_host_blocks:  # what was in flight is lost in any case
        assert num_again <= engine.config.steps_in_flight * sum(s.num_preemptions for s in engine.schedulers)
        assert {str(seq.route) for seq in seqs} == ({"0->1"} if policy == "disaggregated" else {"0->0"})
        assert engine.workers[-1].num_swapped > 20
    else:
        assert num_again > 80, num_again


@pytest.mark.parametrize(("kv_bytes_per_token", "pays"), [(147_456, True), (1_474_560, False)])
def test_swapping_pays_where_it_takes_less_time_than_a_prefill(kv_bytes_per_token: int, pays: bool) -> None:
    """1,000 tokens take an H200 25 to 30 ms, and of Qwen3-8B 12 ms to go and come back."""
    parameters = replace(find_parameters("8xh200"), kv_bytes_per_token=kv_bytes_per_token)
    config = EngineConfig(model="none", policy="adaptive", max_model_len=512)
    policy = make_policy(config, parameters)
    engine = Engine(config, model_config(), symbolic_workers(config, [40], None), Clock(), policy=policy)
    assert engine.schedulers[0]._swap_pays(1000) is pays


def count_computed_tokens(engine: Engine) -> list[int]:
    counts: list[int] = []
    for worker in engine.workers:

        def send(message: StepBatch | TransferPlan, send: Callable = worker.send) -> None:
            if isinstance(message, StepBatch):
                counts.append(int(message.row_lens.sum()))
            send(message)

        worker.send = send
    return counts


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
        seq = submit(engine, "a", PROMPT, PARAMS, route=Route(prefill_worker, 2))
        drain(engine, clock)
        assert seq.output_token_ids == expected_tokens(seq)
        assert seq.log().num_cached_tokens == 0
    assert sum(plans) == 5 + 1


def test_blocks_that_are_still_moving_are_not_shared() -> None:
    engine, clock = make_engine(["prefill", "decode"], "disaggregated", block_size=4)
    plans = count_moved_blocks(engine)
    engine.workers[1].is_hung = True
    seqs = [submit(engine, "a", PROMPT, PARAMS)]
    run(engine, clock, 4)
    seqs += [submit(engine, "b", PROMPT, PARAMS)]
    run(engine, clock, 4)
    engine.workers[1].is_hung = False
    run(engine, clock, 4)
    seqs += [submit(engine, "c", PROMPT, PARAMS)]
    drain(engine, clock)
    assert sum(plans) == 5 + 5 + 1
    assert [seq.log().num_cached_tokens for seq in seqs] == [0, 16, 16]
    assert [seq.output_token_ids for seq in seqs] == [expected_tokens(seq) for seq in seqs]


def test_a_moved_request_goes_on_elsewhere_with_the_same_tokens() -> None:
    engine, clock = make_engine(["mixed", "decode"], "collocated")
    seq = submit(engine, "a", PROMPT, PARAMS)
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
    seqs = [submit(engine, name, PROMPT, PARAMS) for name in "ab"]
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
    seq = submit(engine, "a", PROMPT, PARAMS, route=Route(0, 0))
    submit(engine, "b", PROMPT, PARAMS, route=Route(2, 2))
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
    submit(engine, "b", PROMPT, PARAMS, route=Route(2, 2))
    seq = submit(engine, "a", PROMPT, PARAMS, route=Route(0, 1))
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
    seq = submit(engine, "a", PROMPT, PARAMS, route=Route(0, 0))
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
    seqs = [submit(engine, str(n), [n, *PROMPT], PARAMS) for n in range(16)]
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
    seqs = [submit(engine, str(n), PROMPT, PARAMS) for n in range(4)]
    run(engine, clock, 2)
    engine.set_role(0, Role.DECODE)
    drain(engine, clock)
    assert [seq.route for seq in seqs] == [Route(0, 0), Route(1, 1), Route(1, 1), Route(1, 1)]
    with pytest.raises(RequestError, match="route='0->0'"):
        submit(engine, "late", PROMPT, PARAMS, route=Route(0, 0))


def test_requests_wait_for_the_worker_that_is_being_replaced() -> None:
    replacements = Replacements()
    engine, clock = make_engine(["prefill", "decode"], "disaggregated", replacements=replacements)
    seqs = [submit(engine, "a", PROMPT, PARAMS)]
    run(engine, clock, 4)
    engine.workers[1].is_dead = True
    run(engine, clock, 3)
    seqs += [submit(engine, "b", PROMPT, PARAMS), submit(engine, "c", PROMPT, PARAMS, deadline_s=0.05)]
    run(engine, clock, 20)
    assert [seq.status.is_finished for seq in seqs] == [False, False, True]
    assert seqs[2].error == "the deadline has passed"
    drain(engine, clock, replacements)
    assert [seq.output_token_ids for seq in seqs[:2]] == [expected_tokens(seq) for seq in seqs[:2]]
    assert engine.schedulers[1].generation == 1


def test_what_waited_ends_with_the_reason_if_the_replacement_fails() -> None:
    replacements = Replacements()
    engine, clock = make_engine(["mixed"], "collocated", replacements=replacements)
    seq = submit(engine, "a", PROMPT, PARAMS)
    engine.workers[0].is_dead = True
    run(engine, clock)
    engine.give_up(0, WorkerError(0, "no memory", "a traceback"))
    assert seq.status is SequenceStatus.FINISHED_ERROR
    assert seq.error == "no route is left: worker 0: no memory\na traceback"
    assert submit(engine, "b", PROMPT, PARAMS).error == seq.error


def test_a_poison_request_ends_after_its_replays_and_a_later_one_is_served() -> None:
    replacements = Replacements()
    replacements.minds_poison = True
    engine, clock = make_engine(["mixed", "mixed"], "collocated", replacements=replacements)
    poison, innocent = submit(engine, "p", [POISON], PARAMS), submit(engine, "i", PROMPT, PARAMS)
    drain(engine, clock, replacements)
    assert poison.status is SequenceStatus.FINISHED_ERROR
    assert poison.num_deaths == MAX_REPLAYS + 1
    assert "3 workers died while they computed it" in poison.error
    assert "was poisoned by the test" in poison.error
    assert innocent.output_token_ids == expected_tokens(innocent)
    later = submit(engine, "l", PROMPT, PARAMS)
    drain(engine, clock, replacements)
    assert later.output_token_ids == expected_tokens(later)


def test_a_hung_worker_is_noticed_in_time_and_a_held_parent_is_none() -> None:
    replacements = Replacements()
    engine, clock = make_engine(["mixed"], "collocated", replacements=replacements, step_timeout_s=60.0)
    seq = submit(engine, "a", PROMPT, PARAMS)
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


# ---------------------------------------------------------------------------------- several answers, priorities, queues


def submit_group(
    engine: Engine, count: int, name: str = "g", prompt: list[int] = PROMPT, params: SamplingParams = PARAMS, **args
) -> list[Sequence]:
    first = submit(engine, name, prompt, params, **args)
    return [first, *(submit(engine, f"{name}/{i}", prompt, params, parent=first, **args) for i in range(1, count))]


def assert_all_right(seqs: list[Sequence]) -> None:
    assert [seq.output_token_ids for seq in seqs] == [expected_tokens(seq) for seq in seqs]


@pytest.mark.parametrize("is_on", [True, False])
@pytest.mark.parametrize(("roles", "policy"), [(["mixed"], "collocated"), (["prefill", "decode"], "disaggregated")])
def test_eight_answers_to_a_long_prompt_take_a_fifth_of_the_blocks(roles: list[str], policy: str, is_on: bool) -> None:
    engine, clock = make_engine(roles, policy, 400, max_len=2304, max_num_seqs=8, enable_prefix_caching=is_on)
    plans = count_moved_blocks(engine)
    prompt = [token % VOCAB_SIZE for token in range(2048)]
    params = SamplingParams(temperature=0, max_tokens=128, ignore_eos=True)
    seqs = submit_group(engine, 8, prompt=prompt, params=params)
    drain(engine, clock)
    assert_all_right(seqs)
    assert sum(plans) == (128 if policy == "disaggregated" else 0), "the prompt moves once"
    *prefilled, decoded = engine.fleet.peak_blocks
    assert decoded <= 0.2 * 8 * 136
    assert all(peak <= 0.2 * 8 * 129 for peak in prefilled)


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_answers_go_on_when_the_first_one_ends(topology: str) -> None:
    for num_steps in range(8):
        engine, clock = make_engine(TOPOLOGIES[topology], policies_for(TOPOLOGIES[topology])[0], max_num_seqs=2)
        seqs = submit_group(engine, 5)
        run(engine, clock, num_steps)
        engine.abort("g")
        engine.abort("g/2")
        drain(engine, clock)
        assert_all_right([seqs[1], *seqs[3:]])
        assert [seq.status for seq in seqs[::2][:2]] == [SequenceStatus.FINISHED_ABORTED] * 2


def test_answers_join_where_the_first_one_decodes_after_a_death() -> None:
    replacements = Replacements()
    engine, clock = make_engine(["prefill", "decode"], "disaggregated", replacements=replacements)
    seqs = submit_group(engine, 3)
    run(engine, clock, 6)
    assert all(seq.status is SequenceStatus.RUNNING for seq in seqs)
    engine.workers[1].is_dead = True
    drain(engine, clock, replacements)
    assert_all_right(seqs)


def test_lower_priorities_go_first_and_equals_in_order() -> None:
    engine, clock = make_engine(["mixed"], "collocated", max_num_seqs=1)
    running = submit(engine, "running", PROMPT, PARAMS)
    run(engine, clock, 2)
    priorities = [0, 1, -1, 0, 1, -1]
    seqs = [submit(engine, str(i), [i, *PROMPT], PARAMS, priority=p) for i, p in enumerate(priorities)]
    drain(engine, clock)
    assert_all_right([running, *seqs])
    ends = sorted(seqs, key=lambda seq: seq.events[-1].time_s)
    assert [seq.request_id for seq in ends] == ["2", "5", "0", "3", "1", "4"]
    assert running.events[-1].time_s < ends[0].events[-1].time_s
    with pytest.raises(RequestError, match="priority='high'"):
        submit(engine, "a", PROMPT, PARAMS, priority="high")


def test_the_lowest_priority_is_preempted_and_of_equals_the_latest() -> None:
    engine, clock = make_engine(["mixed"], "collocated", num_blocks=16, block_size=4)  # for a sequence and a bit
    params = SamplingParams(temperature=0, max_tokens=28, ignore_eos=True)
    priorities = [1, 0, 1, 0]
    seqs = [submit(engine, str(i), [i, i], params, priority=p) for i, p in enumerate(priorities)]
    drain(engine, clock)
    assert_all_right(seqs)
    first = {
        seq.request_id: min((e.time_s for e in seq.events if e.kind is EventKind.PREEMPTED), default=1e9)
        for seq in seqs
    }
    assert first["2"] < first["0"] < first["3"] < first["1"] == 1e9


def test_a_queue_timeout_ends_what_has_not_started() -> None:
    engine, clock = make_engine(["mixed"], "collocated", max_num_seqs=1)
    running = submit_group(engine, 3, "running", queue_timeout_s=0.05)  # one runs, the others belong to it
    waiting = submit_group(engine, 3, "waiting", queue_timeout_s=0.05)
    patient = submit(engine, "patient", PROMPT, PARAMS)
    run(engine, clock, 2)
    assert engine.next_wakeup_s() == pytest.approx(100.05)
    drain(engine, clock)
    assert_all_right([*running, patient])
    for seq in waiting:
        assert (seq.status, seq.output_token_ids) == (SequenceStatus.FINISHED_ABORTED, [])
        assert "queue_timeout_s" in seq.error
        assert seq.events[-1].time_s == pytest.approx(100.05)
    with pytest.raises(RequestError, match="queue_timeout_s=0"):
        submit(engine, "a", PROMPT, PARAMS, queue_timeout_s=0)


def test_a_long_prompt_is_not_passed_over_where_room_is_scarce() -> None:
    """Short ones come without end, and each would fit into what gets free at the decode worker."""
    engine, clock = make_engine(
        ["prefill", "decode"], "disaggregated", num_blocks=32, block_size=4, handover_timeout_s=0.05
    )
    shorts = [submit(engine, f"before {i}", [i, *PROMPT], PARAMS) for i in range(4)]
    run(engine, clock, 8)
    long = submit(engine, "long", list(range(60)), PARAMS)
    for number in range(60):
        shorts.append(submit(engine, str(number), [number, *PROMPT[:10]], PARAMS))
        run(engine, clock, 5)
    assert long.status.is_finished
    drain(engine, clock)
    assert_all_right([long, *shorts])
    assert sum(seq.events[-1].time_s < long.events[-1].time_s for seq in shorts) < 30

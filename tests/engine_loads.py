"""Engines over symbolic workers, and strategies for what they may live through, which shrink to the least that fails.

A `Life` is a value: workers and their roles, steps in flight, settings of the engine, requests, and what happens behind
each of them. Of a single seed come only the tokens of prompts and the order in which workers do what they were sent.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from random import Random
from typing import Any

import numpy as np
from hypothesis import strategies as st
from submitting import start_search, submit
from symbolic_worker import EOS, VOCAB_SIZE, SymbolicWorker, generate, logprobs_of, model_config, symbolic_workers

from nanopd.config import EngineConfig, KVLayout, routes_for_policy
from nanopd.core.block_manager import extend_keys
from nanopd.core.sequence import Sequence, SequenceStatus
from nanopd.engine.beam_search import Beams, BeamSearch
from nanopd.engine.engine import Engine
from nanopd.errors import RequestError, WorkerError
from nanopd.messages import FinishReason, Role
from nanopd.request import BeamSearchParams, SamplingParams

TOPOLOGIES = {
    "mixed": ["mixed"],
    "1P1D": ["prefill", "decode"],
    "2P1D": ["prefill", "prefill", "decode"],
    "1P3D": ["prefill", "decode", "decode", "decode"],
    "all mixed": ["mixed", "mixed", "mixed"],
    "mixed and D": ["mixed", "decode"],
    "P and mixed": ["prefill", "mixed"],
}
LONGEST = 20  # blocks

# Kinds of events, named as often as they are likely, and how many there may be behind a request.
QUIET = (["abort"] * 8 + ["die"], 1)
WILD = (["move"] * 22 + ["role"] * 4 + ["abort"] * 2 + ["die", "hang"], 20)


def policies_for(roles: list[str]) -> list[str]:
    return [p for p in ("collocated", "disaggregated", "round_robin") if routes_for_policy(p, [Role(r) for r in roles])]


# ------------------------------------------------------------------------------------------------------ the strategies


@dataclass(frozen=True)
class Ask:
    """A request, several answers to one prompt, or a beam search; sizes are cut to what the engine takes."""

    num_prompt: int
    num_tokens: int
    earlier: int | None  # the sequence whose tokens this prompt begins with, counted from the latest
    num_shared: int  # at most that many of them
    num_answers: int = 1
    beams: tuple[int, float, bool | str] | None = None  # width, length penalty, early stopping
    limits: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Event:
    kind: str  # move, abort, role, die or hang
    request: int  # of those submitted so far, counted from the latest
    worker: int
    role: Role = Role.MIXED


@dataclass(frozen=True)
class Arrival:
    ask: Ask
    num_steps: int  # until the next one
    events: list[tuple[int, Event]]  # the step behind which each happens


@dataclass(frozen=True)
class Life:
    topology: str
    policy: str
    num_blocks: int
    minds_poison: bool
    settings: dict[str, Any]  # of EngineConfig
    arrivals: list[Arrival]
    seed: int

    @property
    def roles(self) -> list[str]:
        return TOPOLOGIES[self.topology]


def swap_space_gb(num_blocks: int, block_size: int) -> float:
    return (num_blocks + 0.5) * KVLayout.of(model_config(), block_size).bytes_per_block / 1e9


def asks(longest: int) -> st.SearchStrategy[Ask]:
    limits = st.fixed_dictionaries(
        {
            "deadline_s": st.sampled_from([None, None, None, 0.5]),
            "queue_timeout_s": st.sampled_from([None, None, None, 0.2]),
            "priority": st.sampled_from([0, 0, 0, -1, 1]),
        }
    )
    beams = st.tuples(st.integers(1, 4), st.sampled_from([0.0, 1.0, 2.0]), st.sampled_from([False, True, "never"]))
    return st.builds(
        Ask,
        num_prompt=st.integers(1, longest - 2),
        num_tokens=st.integers(1, 30),
        earlier=st.sampled_from([None, 0, 0, 1, 2, 5]),
        num_shared=st.one_of(st.integers(0, longest), st.just(longest)),
        num_answers=st.sampled_from([1, 1, 1, 2, 5]),
        beams=st.one_of(*[st.none()] * 5, beams),
        limits=limits,
    )


def events(kinds: list[str], num_workers: int) -> st.SearchStrategy[Event]:
    return st.builds(
        Event,
        kind=st.sampled_from(kinds),
        request=st.integers(0, 13),
        worker=st.integers(0, num_workers - 1),
        role=st.sampled_from(Role),
    )


@st.composite
def lives(draw: st.DrawFn, kinds: list[str], max_events: int, **more: st.SearchStrategy) -> Life:
    """Tiny pools and budgets, 1 to 14 requests, and up to `max_events` behind each.

    `kinds` of events are named as often as they are likely; `more` are further fields of EngineConfig.
    """
    topology = draw(st.sampled_from(sorted(TOPOLOGIES, key=lambda name: len(TOPOLOGIES[name]))))
    roles, block_size = TOPOLOGIES[topology], draw(st.sampled_from([1, 3, 4, 16]))
    num_steps = st.sampled_from([0, 1, 3, 20])
    happening = st.lists(st.tuples(st.integers(0, 19), events(kinds, len(roles))), max_size=max_events)
    arrivals = st.builds(Arrival, asks(LONGEST * block_size), num_steps, happening)
    settings = {
        "block_size": block_size,
        "max_num_seqs": draw(st.integers(1, 6)),
        "max_num_batched_tokens": draw(st.sampled_from([512, 1, 2, 7, 16, 17])),
        "steps_in_flight": draw(st.sampled_from([1, 2, 3])),
        "handover_timeout_s": draw(st.sampled_from([1.0, 0.001, 0.05])),
        "enable_prefix_caching": draw(st.sampled_from([False, True, True])),
        "swap_space_gb": swap_space_gb(draw(st.sampled_from([0, 30, 200])), block_size),
        **{name: draw(strategy) for name, strategy in more.items()},
    }
    return Life(
        topology,
        policy=draw(st.sampled_from(policies_for(roles))),
        num_blocks=draw(st.integers(22, 60)),
        minds_poison=draw(st.sampled_from([False, False, True])),
        settings=settings,
        arrivals=draw(st.lists(arrivals, min_size=1, max_size=14)),
        seed=draw(st.integers(0, 2**32)),
    )


# --------------------------------------------------------------------------------------------------------- the engines


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


def assert_caches_are_right(engine: Engine, seqs: list[Sequence]) -> None:
    """Whatever a worker's prefix cache would find holds the tokens that its key stands for."""
    block_size = engine.config.block_size
    for scheduler, worker in zip(engine.schedulers, engine.workers, strict=True):
        tokens_of = {}
        for seq in seqs:
            keys: list[bytes] = []
            extend_keys(keys, seq.token_ids, block_size, engine._sequences._root_key)
            for i, key in enumerate(keys):
                tokens_of[key] = seq.token_ids[i * block_size : (i + 1) * block_size]
        for key, tokens in tokens_of.items():
            for block in scheduler.residency.blocks.find([key]):
                assert scheduler.is_dead or worker.kv[block].tolist() == tokens


def search_alone(prompt: list[int], params: BeamSearchParams) -> list:
    """What any correct engine finds."""
    beams = Beams(params, (EOS,))
    while not beams.is_done:
        rows = [logprobs_of(np.array(prompt + beam.token_ids)) for beam in beams.running]
        beams.advance([{token: float(np.float32(value)) for token, value in row.items()} for row in rows])
    return beams.complete


class Load:
    """Requests of all kinds, and whether each got the right answer."""

    def __init__(self, engine: Engine, rng: Random) -> None:
        self.engine, self.rng = engine, rng
        self.longest = LONGEST * engine.config.block_size
        self.seqs: list[Sequence] = []
        self.searches: list[BeamSearch] = []
        self.num_ended = 0

    def submit(self, name: str, ask: Ask) -> None:
        prompt = self._prompt(ask)
        num_tokens = min(ask.num_tokens, self.longest - len(prompt))
        if ask.beams is not None:
            width, penalty, early = ask.beams
            params = BeamSearchParams(width, min(num_tokens, 8), penalty, early)
            self.searches.append(start_search(self.engine, name, prompt, params, self._ended))
            return
        sampling, leader = SamplingParams(temperature=0, max_tokens=num_tokens), None
        for i in range(ask.num_answers):
            seq = submit(self.engine, f"{name}/{i}" if i else name, prompt, sampling, parent=leader, **ask.limits)
            leader = leader or seq
            self.seqs.append(seq)

    def _prompt(self, ask: Ask) -> list[int]:
        """Random tokens, perhaps behind those of a request before, be it a prompt or a turn of a conversation."""
        old: list[int] = []
        if ask.earlier is not None and self.seqs:
            old = self.seqs[-1 - ask.earlier % len(self.seqs)].token_ids[: min(ask.num_shared, ask.num_prompt)]
        return old + [self.rng.randrange(VOCAB_SIZE) for _ in range(ask.num_prompt - len(old))]

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


def happen(engine: Engine, event: Event, num_requests: int) -> None:
    worker = engine.workers[event.worker]
    request_id = str(num_requests - 1 - event.request % num_requests)
    if event.kind == "die":
        worker.is_dead = True
    elif event.kind == "hang":
        worker.is_hung = True
    elif event.kind == "abort":
        engine.abort(request_id)
    else:
        with suppress(RequestError):
            if event.kind == "role":
                engine.set_role(event.worker, event.role)
            else:
                engine.move(request_id, event.worker)


def live(life: Life, check_error: Callable[[Engine, str], None], are_replaced: bool) -> Engine:
    """An engine that goes through `life`; checked at every step, and at the end for every answer."""
    rng = Random(life.seed)
    replacements = Replacements(rng) if are_replaced else None
    if replacements is not None:
        replacements.minds_poison = life.minds_poison
    engine, clock = make_engine(life.roles, life.policy, life.num_blocks, rng, replacements, **life.settings)
    load = Load(engine, rng)
    for number, arrival in enumerate(life.arrivals):
        load.submit(str(number), arrival.ask)
        for step in range(arrival.num_steps):
            clock.now_s += 0.01
            if replacements is not None:
                replacements.tick()
            engine.step()
            engine.check_integrity()
            for when, event in arrival.events:
                if when % arrival.num_steps == step:
                    happen(engine, event, number + 1)
    drain(engine, clock, replacements)
    assert_caches_are_right(engine, load.seqs)
    load.check(lambda error: check_error(engine, error))
    return engine

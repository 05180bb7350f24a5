"""Time limits, routes that roles allow, and where sequences wait: the engine's parts, each by itself."""

from __future__ import annotations

import math

import pytest
from engine_loads import Replacements, drain, make_engine
from submitting import submit

from nanopd.core.sequence import Sequence, SequenceStatus
from nanopd.engine.deadlines import Deadlines
from nanopd.errors import RequestError, WorkerError
from nanopd.messages import Role, Route
from nanopd.request import Request, SamplingParams

PARAMS = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
PROMPT = list(range(10, 30))


def make_sequence(seq_id: int, **limits: float) -> Sequence:
    request = Request(str(seq_id), PROMPT, PARAMS, arrival_s=10.0, **limits)
    return Sequence(seq_id, request, max_model_len=64, eos_token_ids=(), seed=0)


# ------------------------------------------------------------------------------------------------------- deadlines


def test_the_earliest_limit_passes_first_and_each_once() -> None:
    deadlines = Deadlines()
    assert deadlines.next_s() == math.inf
    late, both = make_sequence(0, deadline_s=5.0), make_sequence(1, deadline_s=3.0, queue_timeout_s=1.0)
    for seq in (late, both):
        deadlines.add(seq)
    assert deadlines.next_s() == 11.0
    assert list(deadlines.passed(10.9)) == []
    assert list(deadlines.passed(11.0)) == [(both, "queue_timeout_s")]
    assert list(deadlines.passed(20.0)) == [(both, "deadline_s"), (late, "deadline_s")]
    assert deadlines.next_s() == math.inf


def test_limits_of_finished_sequences_are_nobodys() -> None:
    deadlines = Deadlines()
    done, waiting = make_sequence(0, deadline_s=1.0), make_sequence(1, deadline_s=2.0)
    for seq in (done, waiting):
        deadlines.add(seq)
    done.status = SequenceStatus.FINISHED_LENGTH
    assert deadlines.next_s() == 12.0
    assert list(deadlines.passed(99.0)) == [(waiting, "deadline_s")]


# ----------------------------------------------------------------------------------------------------------- roles


def test_routes_are_the_policys_else_whatever_roles_allow() -> None:
    engine, _ = make_engine(["mixed", "prefill", "decode"], "disaggregated")
    roles, seq = engine.dispatcher._roles, make_sequence(0)
    routes = roles.feasible(seq)
    assert routes and not any(route.is_collocated for route in routes)
    engine.schedulers[1].die()
    assert roles.feasible(seq) == [Route(0, 2)]
    engine.schedulers[2].die()
    assert roles.feasible(seq) == [Route(0, 0)], "not of the policy, but allowed"
    engine.schedulers[0].die()
    assert roles.feasible(seq) == []


def test_only_workers_that_can_hold_a_sequence_serve_it() -> None:
    engine, _ = make_engine(["mixed", "mixed"], "collocated", num_blocks=4, block_size=16)
    roles = engine.dispatcher._roles
    assert roles.can_serve(roles.allowed, 48) and not roles.can_serve(roles.allowed, 49)
    with pytest.raises(RequestError, match=r"max_tokens.*KV caches of \[48, 48\] tokens"):
        submit(engine, "a", PROMPT, SamplingParams(max_tokens=29))
    with pytest.raises(RequestError, match="route='0->2'"):
        roles.check(Request("b", PROMPT, PARAMS, 0.0, route=Route(0, 2)), 64)


def test_a_role_changes_what_is_allowed() -> None:
    engine, _ = make_engine(["mixed", "mixed"], "round_robin")
    roles = engine.dispatcher._roles
    assert roles.can_change(0, Role.DECODE, 50)
    roles.change(0, Role.DECODE)
    assert sorted(roles.allowed) == [Route(1, 0), Route(1, 1)]
    assert not roles.can_change(1, Role.DECODE, 50), "nobody would prefill"


# ------------------------------------------------------------------------------------------------------- dispatcher


def test_a_sequence_without_a_worker_waits_for_its_replacement_or_ends_with_the_reason() -> None:
    replacements = Replacements()
    engine, clock = make_engine(["mixed"], "collocated", replacements=replacements)
    engine.workers[0].is_dead = True
    engine.step()
    waiting = submit(engine, "a", PROMPT, PARAMS)
    assert (waiting.route, waiting.error) == (None, None)
    assert engine.dispatcher.route_stranded() == [], "it waits on"
    drain(engine, clock, replacements)
    assert len(waiting.output_token_ids) == 30
    engine.workers[0].is_dead = True
    engine.step()
    engine.give_up(0, WorkerError(0, "no memory"))
    assert submit(engine, "b", PROMPT, PARAMS).error == "no route is left: worker 0: no memory"


def test_a_preempted_sequence_waits_at_home_if_it_can_be_brought_back_there() -> None:
    engine, _ = make_engine(["mixed", "decode"], "round_robin")
    dispatcher, (home, decoder) = engine.dispatcher, engine.schedulers
    stays = engine._sequences.new(Request("a", PROMPT, PARAMS, 0.0))
    stays.route = Route(1, 0)
    assert dispatcher.requeue(stays, home) == []
    assert (stays.route, list(home.queues.waiting)) == (Route(0, 0), [stays])
    leaves = engine._sequences.new(Request("b", PROMPT, PARAMS, 0.0))
    leaves.route = Route(0, 1)
    assert dispatcher.requeue(leaves, decoder) == []
    assert list(decoder.queues.waiting) == [], "a worker that only decodes cannot compute its prompt"
    assert leaves in home.queues.waiting


def test_a_preempted_sequence_that_awaits_a_choice_waits_on_no_worker() -> None:
    engine, _ = make_engine(["mixed"], "collocated")
    seq = engine._sequences.new(Request("a", PROMPT, PARAMS, 0.0))
    seq.route, seq.awaits_choice = Route(0, 0), True
    assert engine.dispatcher.requeue(seq, engine.schedulers[0]) == []
    assert (seq.route, list(engine.schedulers[0].queues.waiting)) == (None, [])


def test_who_waits_for_a_route_that_is_gone_takes_another() -> None:
    engine, _ = make_engine(["mixed", "mixed"], "collocated")
    seqs = [submit(engine, str(i), PROMPT, PARAMS) for i in range(4)]
    assert engine.dispatcher.change_role(0, Role.DECODE) == []
    assert {seq.route for seq in seqs} == {Route(1, 1)}
    assert len(engine.schedulers[1].queues.waiting) == 4

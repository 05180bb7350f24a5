"""Virtual time: steps and moves take what the cost model says, jumps change nothing, every request is answered."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest

from nanopd.config import EngineConfig, ModelConfig, allowed_routes
from nanopd.config.files import config_dir
from nanopd.core.queues import Queues
from nanopd.lab.simulator import simulate
from nanopd.lab.workload import MIXED_PROMPTS, FixedLength, LogNormalLength, WorkloadRequest, synthetic_requests
from nanopd.messages import EventKind, RequestLog
from nanopd.metrics import SLO, summarize
from nanopd.routing.adaptive import AdaptivePolicy
from nanopd.routing.closed_form import ClosedFormPolicy
from nanopd.routing.cost_model import CostModel, Parameters, Terms, chunk_pairs
from nanopd.routing.factory import make_policy

MODEL = ModelConfig("qwen3", 1000, 4096, 12288, 36, 32, 8, 128, 8192, 1e-6, 1e6, dtype="bfloat16")
H200 = Parameters.load(config_dir() / "params" / "8xh200.json")
ROLES = {
    "4 mixed": ["mixed"] * 4,
    "2P2D": ["prefill", "prefill", "decode", "decode"],
    "P + 2 mixed": ["prefill", "mixed", "mixed"],
}


def config(roles: list[str], policy: str, **keys) -> EngineConfig:
    workers = [{"device": "cpu", "role": role} for role in roles]
    return EngineConfig(model="none", workers=workers, policy=policy, max_num_seqs=64, **keys)


def run(roles: list[str], policy: str, requests: list[WorkloadRequest], **keys) -> dict[str, RequestLog]:
    parameters = keys.pop("parameters", H200)
    chosen = keys.pop("chosen", None)
    may_jump = keys.pop("may_jump", True)
    engine, logs = simulate(config(roles, policy, **keys), MODEL, parameters, requests, chosen, may_jump)
    engine.check_integrity()
    assert len(logs) == len(requests)
    return {log.request_id: log for log in logs}


def test_one_request_takes_what_its_steps_take() -> None:
    (log,) = run(["mixed"], "collocated", [WorkloadRequest(2.0, 5000, 4, 0)], steps_in_flight=1).values()
    terms = H200.terms
    chunks = [(2048, 0), (2048, 2048), (904, 4096)]
    durations_ms = [sum(terms.step_ms(0, 0, new, chunk_pairs(new, cached), cached) for new, cached in chunks)]
    durations_ms += [terms.step_ms(1, 5000 + i) for i in (1, 2, 3)]
    assert log.token_times_s == pytest.approx(2.0 + np.cumsum(durations_ms) / 1e3)


def test_a_hand_over_takes_what_its_blocks_take() -> None:
    slow = replace(H200, terms=replace(H200.terms, bandwidth=1.0))
    (log,) = run(["prefill", "decode"], "disaggregated", [WorkloadRequest(0.0, 1000, 3, 0)], parameters=slow).values()
    moving, moved = (
        next(e.time_s for e in log.events if e.kind is kind) for kind in (EventKind.MOVING, EventKind.MOVED)
    )
    block_bytes = 16 * slow.kv_bytes_per_token
    plans_ms = slow.terms.move_ms(62 * block_bytes) + slow.terms.move_ms(block_bytes)  # full blocks, then the last one
    assert moved - moving == pytest.approx(plans_ms / 1e3)
    assert log.token_times_s[1] - moved == pytest.approx(slow.terms.step_ms(1, 1001) / 1e3)


def test_moves_between_the_same_workers_take_turns() -> None:
    slow = replace(H200, terms=replace(H200.terms, bandwidth=0.1))
    logs = run(
        ["prefill", "decode"], "disaggregated", [WorkloadRequest(0.0, 160, 2, i) for i in range(3)], parameters=slow
    )
    moved_s = sorted(next(e.time_s for e in log.events if e.kind is EventKind.MOVED) for log in logs.values())
    assert np.diff(moved_s) == pytest.approx([slow.terms.move_ms(160 * slow.kv_bytes_per_token) / 1e3] * 2)


@pytest.mark.parametrize("roles", ROLES)
@pytest.mark.parametrize("policy", ["fixed", "closed_form", "adaptive"])
def test_jumps_change_nothing(roles: str, policy: str) -> None:
    requests = synthetic_requests(150, MIXED_PROMPTS, LogNormalLength(80, 0.8, 400), 60.0, cv=2.0, seed=3)
    small = replace(H200, num_kv_tokens=30_000)  # sequences are preempted
    fixed = "disaggregated" if roles == "2P2D" else "round_robin"
    outcomes = []
    for may_jump in (False, True):
        settings = config(ROLES[roles], fixed)
        routes = allowed_routes(settings.roles)
        chosen = {
            "fixed": None,
            "closed_form": ClosedFormPolicy(routes, small),
            "adaptive": AdaptivePolicy(routes, len(settings.roles), CostModel(small), 2048, SLO(200, 10, 50)),
        }[policy]
        outcomes.append(run(ROLES[roles], fixed, requests, parameters=small, chosen=chosen, may_jump=may_jump))
    for stepped, jumped in zip(*(sorted(o.items()) for o in outcomes), strict=True):
        kinds, jumped_kinds = ([(e.kind, e.worker) for e in log.events] for _, log in (stepped, jumped))
        assert kinds == jumped_kinds
        # steps are held back by what the last one took, which after a jump is one some steps before
        assert jumped[1].token_times_s == pytest.approx(stepped[1].token_times_s, abs=5e-6)


def test_answers_have_the_lengths_of_the_workload() -> None:
    requests = synthetic_requests(100, FixedLength(300), LogNormalLength(50, 1.0, 300), 100.0)
    logs = run(ROLES["2P2D"], "disaggregated", requests)
    assert [len(logs[str(i)].token_times_s) for i in range(100)] == [r.num_output_tokens for r in requests]


def test_the_cost_model_follows_workers_that_are_slower_than_its_file() -> None:
    """And hears nothing new from workers that are as fast as it says."""
    terms = H200.terms
    scaled = {f.name: 1.3 * getattr(terms, f.name) for f in fields(terms)}
    slow = replace(
        H200, terms=Terms(**scaled | {"batch_thresh": terms.batch_thresh, "bandwidth": terms.bandwidth / 1.3})
    )
    requests = synthetic_requests(400, MIXED_PROMPTS, LogNormalLength(80, 0.8, 400), 40.0, seed=5)
    settings = config(ROLES["2P2D"], "adaptive", slo={"ttft_ms": 400, "tpot_ms": 15})
    for machine, factor in ((H200, 1.0), (slow, 1.3)):
        engine, logs = simulate(settings, MODEL, machine, requests, make_policy(settings, H200))
        assert len(logs) == len(requests)
        drift = engine.policy.costs.drift
        assert drift["step"] == pytest.approx(factor, rel=0.01)
        assert drift["prefill"] == pytest.approx(factor, rel=0.02)
        assert drift["move"] == pytest.approx(factor, rel=0.02)


@pytest.mark.slow
def test_roles_follow_the_load_when_it_pays() -> None:
    """One worker for prompts is too few, then one for generating is; each request is served once, where it started."""
    prompts = synthetic_requests(300, FixedLength(3000), FixedLength(20), 16.0, seed=2)
    answers = synthetic_requests(300, FixedLength(100), FixedLength(500), 10.0, seed=3)
    answers = [
        replace(r, arrival_s=r.arrival_s + prompts[-1].arrival_s, prompt_seed=r.prompt_seed + 1000) for r in answers
    ]
    levels = SLO(ttft_ms=200, tpot_ms=10, first_gap_ms=50)
    attainments = {}
    for policy in ("disaggregated", "adaptive"):
        slo = {"ttft_ms": 200, "tpot_ms": 10, "first_gap_ms": 50}
        logs = run(["prefill", "decode"], policy, prompts + answers, max_num_batched_tokens=2048, slo=slo)
        assert not any(event.kind is EventKind.PREEMPTED for log in logs.values() for event in log.events)
        attainments[policy] = summarize(logs.values(), levels).slo_attainment
        if policy == "adaptive":
            assert {str(log.route) for log in logs.values()} > {"0->1"}
    assert attainments["adaptive"] > attainments["disaggregated"] + 0.1


@pytest.mark.parametrize(
    ("num_output", "requests_per_s"),
    [(40, 16.0), *(pytest.param(*case, marks=pytest.mark.slow) for case in [(150, 11.8), (20, 45.0)])],
)
def test_two_adaptive_workers_serve_more_than_either_arrangement(num_output: int, requests_per_s: float) -> None:
    """Prompts that one worker cannot bear alone, and that cost decodes too much if they come in large chunks."""
    length = FixedLength(1000 if num_output == 20 else 3000)
    requests = synthetic_requests(200, length, FixedLength(num_output), requests_per_s, seed=2)
    slo, attainments = {"ttft_ms": 200, "tpot_ms": 10, "first_gap_ms": 50}, {}
    for policy in ("disaggregated", "collocated", "adaptive"):
        roles = ["prefill", "decode"] if policy == "disaggregated" else ["mixed"] * 2
        logs = run(roles, policy, requests, max_num_batched_tokens=2048, slo=slo)
        attainments[policy] = summarize(logs.values(), SLO(**slo)).slo_attainment
    assert attainments["adaptive"] > 1.02 * max(attainments["disaggregated"], attainments["collocated"])


def test_who_waits_for_room_asks_again_only_when_something_got_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """A decode worker that is far too small: a crowd waits behind it for most of the run."""
    num_asked, reserve = 0, Queues.reserve

    def count(self: Queues, num_tokens: int, block_keys: list[bytes]) -> tuple[list[int], int] | None:
        nonlocal num_asked
        num_asked += 1
        return reserve(self, num_tokens, block_keys)

    monkeypatch.setattr(Queues, "reserve", count)
    requests = synthetic_requests(150, FixedLength(1000), FixedLength(200), 100.0, seed=4)
    small = replace(H200, num_kv_tokens=60_000)
    keys = {"parameters": small, "handover_timeout_s": 0.1, "may_jump": False}
    logs = run(["prefill", "prefill", "decode"], "disaggregated", requests, **keys)
    waits_s = [
        next(e.time_s for e in log.events if e.kind is EventKind.MOVED) - log.token_times_s[0] for log in logs.values()
    ]
    assert np.median(waits_s) > 0.5
    assert num_asked < 3 * len(requests)

"""What the adaptive router chooses in situations with an obvious answer, and that its accounts balance."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanopd.config_files import config_dir
from nanopd.core.metrics import SLO
from nanopd.core.sequence import Sequence, SequenceStatus
from nanopd.messages import Role, Route, SamplingParams
from nanopd.routing.adaptive import AdaptiveRouter
from nanopd.routing.cost_model import CostModel, Parameters

H200 = Parameters.load(config_dir() / "params" / "8xh200.json")
LIMITS = SLO(ttft_ms=200, tpot_ms=10, first_gap_ms=50)


@dataclass
class Load:
    """A worker; idle unless said otherwise."""

    role: Role = Role.MIXED
    num_waiting_tokens: int = 0
    load: int = 0
    num_seqs: int = 0
    num_decoding: int = 0
    num_context_tokens: int = 0
    num_free_tokens: int = 500_000
    num_usable_tokens: int = 500_000


def busy(num_decoding: int, context: int) -> Load:
    return Load(load=num_decoding, num_seqs=num_decoding, num_decoding=num_decoding, num_context_tokens=context)


def sequence(seq_id: int, num_prompt: int = 1000) -> Sequence:
    return Sequence(
        seq_id,
        str(seq_id),
        [1] * num_prompt,
        SamplingParams(max_tokens=128),
        max_model_len=100_000,
        eos_token_ids=(),
        arrival_s=0.0,
        seed=0,
    )


def all_routes(num_workers: int) -> list[Route]:
    return [Route(p, d) for p in range(num_workers) for d in range(num_workers)]


def router_for(num_workers: int, **keys) -> AdaptiveRouter:
    router = AdaptiveRouter(all_routes(num_workers), num_workers, CostModel(H200), 8192, **{"slo": LIMITS, **keys})
    for _ in range(200):
        router.predictor.observe(1000, 128)
    return router


def finish(router: AdaptiveRouter, seq: Sequence, num_output: int = 128) -> None:
    seq.token_ids += [1] * num_output
    seq.status = SequenceStatus.FINISHED_LENGTH
    router.finished(seq)


def test_an_idle_machine_serves_on_one_worker() -> None:
    decision = router_for(2).choose(all_routes(2), sequence(0), [Load(), Load()], 0.0)
    assert decision.route is not None and decision.route.is_collocated
    terms = H200.terms
    assert decision.taken.ttft_ms == pytest.approx(terms.step_ms(0, 0, 1000, 500_000))
    assert decision.taken.tpot_ms == pytest.approx(terms.step_ms(1, 1064), rel=0.01)
    assert decision.num_output == pytest.approx(128, rel=0.05)
    assert decision.best_other.cost_ms >= decision.taken.cost_ms


def test_a_prompt_avoids_the_queue() -> None:
    workers = [replace(Load(), num_waiting_tokens=30_000), Load()]
    assert router_for(2).choose(all_routes(2), sequence(0), workers, 0.0).route.prefill_worker == 1


def test_a_long_prompt_avoids_decodes_that_it_would_disturb() -> None:
    workers = [busy(64, 64 * 1500), Load()]
    decision = router_for(2).choose(all_routes(2), sequence(0, 6000), workers, 0.0)
    assert decision.route.prefill_worker == 1


def test_an_answer_avoids_a_full_cache() -> None:
    router = router_for(2)
    finish(router, sequence(0))
    workers = [replace(busy(8, 8 * 2000), num_free_tokens=100, load=32), busy(8, 8 * 2000)]
    router.choose(all_routes(2), sequence(1), workers, 0.0)  # what a prompt is like
    assert router.choose(all_routes(2), sequence(2), workers, 0.1).route.decode_worker == 1


def test_chunks_beside_decodes_keep_the_tpot_limit_unless_the_queue_is_long() -> None:
    routes, terms = [Route(0, 0)], H200.terms
    gentle = router_for(1).choose(routes, sequence(0), [busy(16, 16_000)], 0.0).chunk_budget
    assert terms.step_ms(16, 16_000, gentle - 16) <= LIMITS.tpot_ms
    assert terms.step_ms(16, 16_000, gentle - 16 + 10) > LIMITS.tpot_ms
    crowd = replace(busy(16, 16_000), num_waiting_tokens=7000)
    assert router_for(1).choose(routes, sequence(0), [crowd], 0.0).chunk_budget > 2 * gentle
    assert router_for(1).choose(routes, sequence(0), [Load()], 0.0).chunk_budget == 8192
    assert router_for(1, slo=None).choose(routes, sequence(0), [crowd], 0.0).chunk_budget == 8192


def test_without_limits_the_cheapest_route_is_taken() -> None:
    decision = router_for(3, slo=None).choose(all_routes(3), sequence(0), [Load(), Load(), Load()], 0.0)
    assert decision.taken.excess == 0
    assert decision.taken.cost_ms == min(decision.taken.cost_ms, decision.best_other.cost_ms)


def test_what_no_route_can_serve_in_time_is_turned_away_if_asked_for() -> None:
    crowd = [replace(Load(), num_waiting_tokens=100_000)] * 2
    assert router_for(2).choose(all_routes(2), sequence(0), crowd, 0.0).route is not None
    strict = router_for(2, admission="reject")
    decision = strict.choose(all_routes(2), sequence(0), crowd, 0.0)
    assert decision.route is None
    assert decision.taken.ttft_ms > LIMITS.ttft_ms
    assert not strict.bound.any()
    assert strict.choose(all_routes(2), sequence(1), [Load(), Load()], 1.0).route is not None


@given(st.lists(st.tuples(st.integers(0, 19), st.booleans()), max_size=60))
def test_accounts_balance(events: list[tuple[int, bool]]) -> None:
    """Whatever is routed, routed again and finished: what is left on the accounts is what is unfinished."""
    router = AdaptiveRouter(all_routes(3), 3, CostModel(H200), 2048, LIMITS)
    seqs = [sequence(i, 100 + i) for i in range(20)]
    unfinished = set()
    for step, (i, is_end) in enumerate(events):
        if is_end:
            router.finished(seqs[i])
            unfinished.discard(i)
        else:
            router.choose(all_routes(3), seqs[i], [Load()] * 3, 0.1 * step)
            unfinished.add(i)
    assert router.bound[0].sum() == len(unfinished)
    if not unfinished:
        assert np.allclose(router.bound, 0)


def steady_roles(num_prompt: int, num_output: int, requests_per_s: float) -> int:
    """How many of eight workers are to be kept for prefill at such a load."""
    router = AdaptiveRouter(all_routes(8), 8, CostModel(H200), 2048, LIMITS)
    open_seqs: list[Sequence] = []
    for i in range(400):
        seq = sequence(i, num_prompt)
        router.choose(all_routes(8), seq, [Load()] * 8, i / requests_per_s)
        open_seqs.append(seq)
        if len(open_seqs) > 50:
            finish(router, open_seqs.pop(0), num_output)
    return router.roles(500_000).count(Role.PREFILL)


def test_roles_follow_the_mix_of_requests() -> None:
    assert steady_roles(8000, 8, 40) >= 6  # prompts need the machine
    assert steady_roles(64, 512, 100) <= 1  # answers do
    assert steady_roles(64, 512, 100) < steady_roles(2000, 128, 100) < steady_roles(8000, 8, 40)


def test_roles_do_not_flicker() -> None:
    router = AdaptiveRouter(all_routes(8), 8, CostModel(H200), 2048, LIMITS)
    rng, counts = np.random.default_rng(0), []
    for i, now_s in enumerate(np.cumsum(rng.exponential(1 / 100, 1500))):
        seq = sequence(i, int(rng.integers(500, 3500)))
        router.choose(all_routes(8), seq, [Load()] * 8, float(now_s))
        finish(router, seq, int(rng.integers(16, 240)))
        counts.append(router.split.num_prefill)
    assert np.count_nonzero(np.diff(counts[200:])) < 100
    assert max(counts[200:]) - min(counts[200:]) <= 3

"""What the adaptive policy chooses in situations with an obvious answer, and that its accounts balance."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanopd.config.files import config_dir
from nanopd.core.scheduler import Load
from nanopd.core.sequence import Sequence, SequenceStatus
from nanopd.messages import Role, Route
from nanopd.metrics import SLO
from nanopd.request import Request, SamplingParams
from nanopd.routing.adaptive import AdaptivePolicy
from nanopd.routing.cost_model import CostModel, Parameters, chunk_pairs
from nanopd.routing.forecast import VIOLATION_STEP, ExpectedRequest, Forecast
from nanopd.routing.policy import RouteSet

H200 = Parameters.load(config_dir() / "params" / "8xh200.json")
LIMITS = SLO(ttft_ms=200, tpot_ms=10, first_gap_ms=50)


IDLE = Load(0, 0, 0, 0, 256, 0, 500_000, 500_000)


@dataclass
class Worker:
    """Idle unless said otherwise."""

    now: Load = IDLE
    role: Role = Role.MIXED
    cached: int = 0

    @property
    def load(self) -> int:
        return self.now.num_bound

    def snapshot(self) -> Load:
        return self.now

    def num_cached(self, seq: Sequence) -> int:
        return min(self.cached, seq.num_tokens - 1)


def worker(**keys: int) -> Worker:
    return Worker(IDLE._replace(**keys))


def busy(num_decoding: int, context: int, **keys: int) -> Worker:
    counts = {"num_bound": num_decoding, "num_seqs": num_decoding, "num_decoding": num_decoding}
    return worker(**{**counts, "num_context_tokens": context, **keys})


def sequence(seq_id: int, num_prompt: int = 1000) -> Sequence:
    request = Request(str(seq_id), [1] * num_prompt, SamplingParams(max_tokens=128), 0.0)
    return Sequence(seq_id, request, max_model_len=100_000, eos_token_ids=(), seed=0)


def all_routes(num_workers: int) -> list[Route]:
    return [Route(p, d) for p in range(num_workers) for d in range(num_workers)]


def policy_for(num_workers: int, **keys) -> AdaptivePolicy:
    policy = AdaptivePolicy(all_routes(num_workers), num_workers, CostModel(H200), 8192, **{"slo": LIMITS, **keys})
    for _ in range(200):
        policy.predictor.observe(1000, 128)
    return policy


def finish(policy: AdaptivePolicy, seq: Sequence, num_output: int = 128) -> None:
    seq.token_ids += [1] * num_output
    seq.status = SequenceStatus.FINISHED_LENGTH
    policy.finished(seq)


def test_an_idle_machine_serves_on_one_worker() -> None:
    decision = policy_for(2).choose(all_routes(2), sequence(0), [Worker(), Worker()], 0.0)
    assert decision.route is not None and decision.route.is_collocated
    terms = H200.terms
    assert decision.taken.ttft_ms == pytest.approx(terms.step_ms(0, 0, 1000, 500_000))
    assert decision.taken.tpot_ms == pytest.approx(terms.step_ms(1, 1064), rel=0.01)
    assert decision.num_output == pytest.approx(128, rel=0.05)
    assert decision.best_other.cost_ms >= decision.taken.cost_ms


def test_a_prompt_avoids_the_queue() -> None:
    workers = [worker(num_waiting_tokens=30_000), Worker()]
    assert policy_for(2).choose(all_routes(2), sequence(0), workers, 0.0).route.prefill_worker == 1


def test_a_long_prompt_avoids_decodes_that_it_would_disturb() -> None:
    workers = [busy(64, 64 * 1500), Worker()]
    decision = policy_for(2).choose(all_routes(2), sequence(0, 6000), workers, 0.0)
    assert decision.route.prefill_worker == 1


def test_an_answer_avoids_a_full_cache() -> None:
    policy = policy_for(2)
    finish(policy, sequence(0))
    workers = [busy(8, 8 * 2000, num_free_tokens=100, num_bound=32), busy(8, 8 * 2000)]
    policy.choose(all_routes(2), sequence(1), workers, 0.0)  # what a prompt is like
    assert policy.choose(all_routes(2), sequence(2), workers, 0.1).route.decode_worker == 1


def test_a_prompt_avoids_a_worker_without_a_place() -> None:
    full = busy(64, 64 * 1500, max_num_seqs=64)
    decision = policy_for(1).choose([Route(0, 0)], sequence(0), [full], 0.0)
    end_ms = 128 * H200.terms.step_ms(64, 64 * 1500) / 64  # from one end of an answer to the next
    assert decision.taken.ttft_ms >= 0.9 * end_ms
    free = policy_for(1).choose([Route(0, 0)], sequence(0), [busy(64, 64 * 1500)], 0.0)
    crowd = busy(64, 64 * 1500, max_num_seqs=64, num_bound=264)
    late = policy_for(1).choose([Route(0, 0)], sequence(0), [crowd], 0.0)
    assert late.taken.ttft_ms > free.taken.ttft_ms + 100 * end_ms
    assert policy_for(2).choose(all_routes(2), sequence(0), [crowd, busy(64, 64 * 1500)], 0.0).route == Route(1, 1)


def test_a_prompt_goes_where_its_beginning_is_cached_unless_the_queue_there_is_long() -> None:
    holder, others = Worker(cached=6000), [Worker(), Worker()]
    decision = policy_for(3).choose(all_routes(3), sequence(0, 8000), [*others, holder], 0.0)
    assert decision.route == Route(2, 2)
    assert decision.taken.ttft_ms == pytest.approx(H200.terms.step_ms(0, 0, 2000, chunk_pairs(2000, 6000), 6000))
    holder.now = IDLE._replace(num_waiting_tokens=30_000)
    assert policy_for(3).choose(all_routes(3), sequence(0, 8000), [*others, holder], 0.0).route != Route(2, 2)


def test_what_a_decode_worker_has_cached_is_not_moved() -> None:
    pairs = [[Worker(), Worker(cached=num_cached)] for num_cached in (0, 6000)]
    first, again = (policy_for(2).choose([Route(0, 1)], sequence(0, 8000), workers, 0.0).taken for workers in pairs)
    moved_ms = 6000 * H200.kv_bytes_per_token / H200.terms.bandwidth / 1e6
    assert first.first_gap_ms - again.first_gap_ms == pytest.approx(moved_ms, rel=0.01)


def test_the_tokens_before_a_long_prompts_chunks_count() -> None:
    """What the simulated worker takes for it, chunk by chunk, beside decodes."""
    terms, crowd = H200.terms, busy(32, 32 * 1000)
    decision = policy_for(1).choose([Route(0, 0)], sequence(0, 12_000), [crowd], 0.0)
    chunk, start, total_ms = decision.chunk_budget - 32, 0, 0.0
    while start < 12_000:
        num_new = min(chunk, 12_000 - start)
        total_ms += terms.step_ms(32, 32_000, num_new, chunk_pairs(num_new, start), start)
        start += num_new
    assert decision.taken.ttft_ms == pytest.approx(total_ms + 1.5 * terms.decode_ms(32, 32_000), rel=0.02)


def test_chunks_grow_until_the_prompt_keeps_its_ttft() -> None:
    """Chunks that the decodes would hardly notice take too long, as a small one costs nearly what a larger one does."""
    crowd, limit_ms = busy(8, 8 * 3000), LIMITS.ttft_ms
    decision = policy_for(1).choose([Route(0, 0)], sequence(0, 3000), [crowd], 0.0)
    assert 0.6 * limit_ms < decision.taken.ttft_ms < 0.9 * limit_ms


def test_a_prompt_that_is_late_anyhow_joins_the_queue_that_is_lost() -> None:
    """Where all will miss their TTFT, rather than in a queue whose next ones could still keep it."""
    policy = policy_for(2, slo=SLO(ttft_ms=200))
    for i in range(50):  # requests come and go
        policy.choose(all_routes(2), sequence(i), [Worker(), Worker()], 0.01 * i)
        finish(policy, sequence(i))
    workers = [worker(num_waiting_tokens=60_000), worker(num_waiting_tokens=3000)]
    assert policy.choose(all_routes(2), sequence(50, 12_000), workers, 0.5).route.prefill_worker == 0
    assert policy.choose(all_routes(2), sequence(51, 1000), workers, 0.5).route.prefill_worker == 1


def test_one_that_keeps_its_ttft_is_not_sacrificed_for_those_to_come() -> None:
    policy = policy_for(2, slo=SLO(ttft_ms=200))
    for i in range(50):
        policy.choose(all_routes(2), sequence(i, 6000), [Worker(), Worker()], 0.01 * i)
        finish(policy, sequence(i))
    workers = [worker(num_waiting_tokens=60_000), Worker()]
    assert policy.choose(all_routes(2), sequence(50, 6000), workers, 0.5).route == Route(1, 1)


loads = st.builds(
    lambda batch, waiting, more, free: busy(
        batch, batch * 1500, num_waiting_tokens=waiting, num_bound=batch + more, num_free_tokens=free
    ),
    st.integers(0, 200),
    st.integers(0, 20_000),
    st.integers(0, 50),
    st.integers(0, 100_000),
)


@given(st.lists(loads, min_size=6, max_size=6), st.integers(1, 8000))
def test_the_best_of_the_promising_routes_is_the_best_of_all(workers: list[Worker], num_prompt: int) -> None:
    policy, routes = policy_for(6), RouteSet(all_routes(6))
    snapshots, request = [w.snapshot() for w in workers], ExpectedRequest(num_prompt, [0] * 6, 128.0, (0.5, 1.0, 1.5))
    forecast = Forecast(policy.costs, LIMITS, 2048, policy.demand, snapshots, request)
    best, _ = forecast.best(routes)
    every = [forecast._predict(route) for route in routes.routes]
    least = min(every, key=lambda p: (round(p.slo_violation / VIOLATION_STEP), p.cost_ms))
    assert best.slo_violation <= least.slo_violation + 2 * VIOLATION_STEP


def test_chunks_beside_decodes_keep_the_tpot_limit_unless_the_queue_is_long() -> None:
    routes, terms = [Route(0, 0)], H200.terms
    gentle = policy_for(1).choose(routes, sequence(0), [busy(16, 16_000)], 0.0).chunk_budget
    assert terms.step_ms(16, 16_000, gentle - 16) <= LIMITS.tpot_ms
    assert terms.step_ms(16, 16_000, gentle - 16 + 10) > LIMITS.tpot_ms
    crowd = busy(16, 16_000, num_waiting_tokens=7000)
    assert policy_for(1).choose(routes, sequence(0), [crowd], 0.0).chunk_budget > 2 * gentle
    assert policy_for(1).choose(routes, sequence(0), [Worker()], 0.0).chunk_budget == 8192
    assert policy_for(1, slo=None).choose(routes, sequence(0), [crowd], 0.0).chunk_budget == 8192


def test_without_limits_the_cheapest_route_is_taken() -> None:
    decision = policy_for(3, slo=None).choose(all_routes(3), sequence(0), [Worker(), Worker(), Worker()], 0.0)
    assert decision.taken.slo_violation == pytest.approx(0, abs=1e-6)
    assert decision.taken.cost_ms == min(decision.taken.cost_ms, decision.best_other.cost_ms)


def test_what_no_route_can_serve_in_time_is_turned_away_if_asked_for() -> None:
    crowd = [worker(num_waiting_tokens=100_000)] * 2
    assert policy_for(2).choose(all_routes(2), sequence(0), crowd, 0.0).route is not None
    strict = policy_for(2, admission="reject")
    decision = strict.choose(all_routes(2), sequence(0), crowd, 0.0)
    assert decision.route is None
    assert decision.taken.ttft_ms > LIMITS.ttft_ms
    assert not np.any(strict.demand.bound)
    assert strict.choose(all_routes(2), sequence(1), [Worker(), Worker()], 1.0).route is not None


@given(st.lists(st.tuples(st.integers(0, 19), st.booleans()), max_size=60))
def test_accounts_balance(events: list[tuple[int, bool]]) -> None:
    """Whatever is routed, routed again and finished: what is left on the accounts is what is unfinished."""
    policy = AdaptivePolicy(all_routes(3), 3, CostModel(H200), 2048, LIMITS)
    seqs = [sequence(i, 100 + i) for i in range(20)]
    unfinished = set()
    for step, (i, is_end) in enumerate(events):
        if is_end:
            policy.finished(seqs[i])
            unfinished.discard(i)
        else:
            policy.choose(all_routes(3), seqs[i], [Worker()] * 3, 0.1 * step)
            unfinished.add(i)
    assert sum(bound.num_requests for bound in policy.demand.bound) == len(unfinished)
    if not unfinished:
        assert np.allclose(policy.demand.bound, 0)


def steady_roles(num_prompt: int, num_output: int, requests_per_s: float) -> int:
    """How many of eight workers are to be kept for prefill at such a load."""
    policy = AdaptivePolicy(all_routes(8), 8, CostModel(H200), 2048, LIMITS)
    open_seqs: list[Sequence] = []
    for i in range(400):
        seq = sequence(i, num_prompt)
        policy.choose(all_routes(8), seq, [Worker()] * 8, i / requests_per_s)
        open_seqs.append(seq)
        if len(open_seqs) > 50:
            finish(policy, open_seqs.pop(0), num_output)
    return policy.dedicated.num_workers


def test_roles_follow_the_mix_of_requests() -> None:
    assert steady_roles(8000, 8, 40) >= 6  # prompts need the machine
    assert steady_roles(64, 512, 100) <= 1  # answers do
    assert steady_roles(64, 512, 100) < steady_roles(2000, 128, 100) < steady_roles(8000, 8, 40)


def test_roles_do_not_flicker() -> None:
    policy = AdaptivePolicy(all_routes(8), 8, CostModel(H200), 2048, LIMITS)
    rng, counts = np.random.default_rng(0), []
    for i, now_s in enumerate(np.cumsum(rng.exponential(1 / 100, 1500))):
        seq = sequence(i, int(rng.integers(500, 3500)))
        policy.choose(all_routes(8), seq, [Worker()] * 8, float(now_s))
        finish(policy, seq, int(rng.integers(16, 240)))
        counts.append(policy.dedicated.num_workers)
    assert np.count_nonzero(np.diff(counts[200:])) < 100
    assert max(counts[200:]) - min(counts[200:]) <= 3

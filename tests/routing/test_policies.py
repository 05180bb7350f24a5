"""The policies that predict, in the live engine: roles that change under load, requests turned away, decisions kept."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from math import inf
from pathlib import Path

import pytest
import torch
from local_worker import local_engine, run_to_end
from model_zoo import load_hf, make_tiny_model
from submitting import submit
from symbolic_worker import generate, model_config, symbolic_workers

from nanopd import LLM, ConfigError, SamplingParams
from nanopd.config import EngineConfig
from nanopd.core.sequence import Sequence
from nanopd.engine.engine import Engine
from nanopd.messages import EventKind, FinishReason, Role, Route
from nanopd.metrics import SLO, RequestMetrics
from nanopd.routing.factory import find_parameters, make_policy

H200 = find_parameters("8xh200")
LEVELS = {"ttft_ms": 50, "tpot_ms": 10, "first_gap_ms": 30}
NUM_REQUESTS = 1000
# By request number. The policy changes roles too, but when it does depends on how fast this machine is.
CHANGES = {200: (0, Role.MIXED), 400: (1, Role.MIXED), 600: (0, Role.PREFILL), 800: (1, Role.DECODE)}


def workers(*roles: str) -> list[dict[str, str]]:
    return [{"device": "cpu", "role": role} for role in roles]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(
        tmp_path_factory.mktemp("model"), "llama", num_heads=1, num_kv_heads=1, num_layers=1, vocab_size=64
    )


# ------------------------------------------------------------------------------------------------ role changes


def serve(model: Path, policy: str) -> tuple[Engine, dict[str, Sequence]]:
    """Prompts that are long, then answers that are, and so on; on CPU workers in this process."""
    config = EngineConfig(
        model=str(model),
        policy=policy,
        slo=LEVELS,
        workers=workers("prefill", "decode"),
        num_blocks=1500,
        max_num_seqs=64,
        max_num_batched_tokens=256,
        max_model_len=128,
    )
    engine = local_engine(config, model, policy=make_policy(config, H200))
    rng, finished, number = random.Random(0), {}, 0
    while number < NUM_REQUESTS or engine.has_unfinished:
        for _ in range(min(rng.randrange(8), NUM_REQUESTS - number)):
            is_prompt = number // 250 % 2 == 0
            num_prompt, max_tokens = (rng.randrange(20, 40), 2) if is_prompt else (rng.randrange(2, 6), 8)
            prompt = [rng.randrange(64) for _ in range(num_prompt)]
            params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
            submit(engine, str(number), prompt, params)
            if policy == "adaptive" and number in CHANGES:
                engine.set_role(*CHANGES[number])
            number += 1
        for update in engine.step():
            assert update.is_finished and update.seq.request_id not in finished, "answered twice"
            finished[update.seq.request_id] = update.seq
    run_to_end(engine)
    return engine, finished


@pytest.mark.slow
def test_roles_change_under_load_and_nobody_notices(model: Path) -> None:
    """The same 1,000 requests, with roles that change and with fixed ones."""
    engine, finished = serve(model, "adaptive")
    _, expected = serve(model, "disaggregated")
    assert {seq.route for seq in expected.values()} == {Route(0, 1)}
    assert len({seq.route for seq in finished.values()}) > 1, "roles have changed"
    assert len(finished) == NUM_REQUESTS
    for request_id, seq in finished.items():
        kinds = [event.kind for event in seq.events]
        assert kinds.count(EventKind.SCHEDULED) == kinds.count(EventKind.FINISHED) == 1
        assert EventKind.PREEMPTED not in kinds
        assert seq.output_token_ids == expected[request_id].output_token_ids
        assert len(seq.token_times_s) == len(seq.output_token_ids)
    assert all(scheduler.num_preemptions == 0 for scheduler in engine.schedulers)


def test_workers_that_die_leave_the_others_measured() -> None:
    engine = symbolic_engine(workers=workers("prefill", "mixed", "decode", "mixed"), steps_in_flight=2)
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    seqs = []
    for number in range(40):
        seqs.append(submit(engine, str(number), [1 + number % 8] * (10 + number), params))
        if number % 2:
            engine.step()
        if number in (15, 25):
            victim = number // 10  # 1, then 2
            engine.workers[victim].is_dead = engine.workers[victim].is_buried = True
    engine.drain(lambda: None)
    assert [seq.error for seq in seqs] == [None] * len(seqs)
    for seq in seqs:
        assert seq.output_token_ids == generate(seq.token_ids[: seq.num_prompt_tokens], 12, ())
    assert engine.policy.costs.drift["step"] < 1.0, "these workers are faster than any"
    assert all(ledger.since_s == inf for ledger in engine.fleet.ledger.of_worker), "nothing is out"
    engine.check_integrity()


# --------------------------------------------------------------------------------------------------- admission


def symbolic_engine(**keys) -> Engine:
    keys = {"policy": "adaptive", "slo": LEVELS, "workers": workers("mixed", "mixed"), **keys}
    config = EngineConfig(model="none", max_num_seqs=8, **keys)
    clients = symbolic_workers(config, [200] * len(config.workers), None)
    return Engine(config, model_config(), list(clients), lambda: 0.0, policy=make_policy(config, H200))


def test_what_cannot_be_served_in_time_is_turned_away_with_a_reason() -> None:
    engine = symbolic_engine(admission="reject")
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    seqs = [submit(engine, str(i), [1 + i % 8] * 200, params) for i in range(60)]
    updates = engine.drain(lambda: None)
    assert len(updates) == len(seqs), "everybody hears"
    served = [seq for seq in seqs if seq.error is None]
    turned_away = [seq for seq in seqs if seq.error is not None]
    assert len(served) > 10 and len(turned_away) > 10
    for seq in turned_away:
        assert seq.log().finish_reason is FinishReason.ERROR
        assert "turned away" in seq.error and "TTFT" in seq.error
        assert seq.decision.route is None
        assert any(getattr(seq.decision.taken, name) > limit_ms for name, limit_ms in LEVELS.items())
        assert not seq.output_token_ids
    assert all(len(seq.output_token_ids) == 4 for seq in served)
    engine.check_integrity()


def test_who_waits_is_not_turned_away_by_a_change_of_roles() -> None:
    engine = symbolic_engine(admission="reject", slo={"ttft_ms": 5000})
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    seqs = [submit(engine, str(i), [2] * 400, params) for i in range(20)]
    engine.policy.slo = SLO(ttft_ms=0.1)  # no request from now on can be served in time
    engine.set_role(1, Role.DECODE)  # what waits there is routed again
    late = submit(engine, "late", [3] * 400, params)
    engine.drain(lambda: None)
    assert late.error is not None
    assert [seq.error for seq in seqs] == [None] * len(seqs)


def test_chunk_budgets_follow_decisions_and_keep_the_limit() -> None:
    engine = symbolic_engine(workers=workers("mixed"), max_num_batched_tokens=16, slo={"ttft_ms": 1e4, "tpot_ms": 5})
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    budgets = set()
    for number in range(8):
        submit(engine, str(number), [1 + number] * 20, params)
        engine.step()
        budgets.add(engine.schedulers[0].max_num_batched_tokens)
    assert max(budgets) <= 16
    engine.drain(lambda: None)


# --------------------------------------------------------------------------------------------------------- LLM


@pytest.fixture(scope="module")
def llm(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    keys = {"workers": workers("prefill", "mixed"), "max_num_seqs": 8, "num_blocks": 200}
    path = tmp_path_factory.mktemp("params") / "mine.json"
    replace(H200, kv_bytes_per_token=512).save(path)  # of one layer with one head of 64 in float32
    with LLM(str(model), policy="adaptive", params=path, slo=LEVELS, **keys) as llm:
        yield llm


@pytest.mark.process
def test_an_llm_that_adapts_answers_as_transformers_and_tells_what_it_expected(llm: LLM, model: Path) -> None:
    hf = load_hf(model)
    prompts = [[5, 6, 7], list(range(60)), [9] * 40]
    outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=8, ignore_eos=True), use_tqdm=False)
    for prompt, output in zip(prompts, outputs, strict=True):
        expected = hf.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False, eos_token_id=None)
        assert output.outputs[0].token_ids == expected[0, len(prompt) :].tolist()
        assert output.decision.taken.route in (Route(0, 1), Route(1, 1))
        assert output.decision.best_other.route != output.decision.taken.route
        for key in ("ttft_ms", "first_gap_ms", "tpot_ms"):
            assert getattr(output.decision.taken, key) > 0
            assert getattr(output.metrics, key) >= 0  # two tokens may be read at once
    drift = llm.stats().drift
    assert set(drift) == {"prefill", "step", "mixed", "move"}
    assert drift["prefill"] != 1.0, "steps of real workers were heard of"


@pytest.mark.process
def test_lengths_of_answers_are_known_in_the_next_run(model: Path, tmp_path: Path) -> None:
    machine, lengths = tmp_path / "machine.json", tmp_path / "lengths.json"
    replace(H200, kv_bytes_per_token=512).save(machine)
    keys = {"policy": "adaptive", "params": machine, "workers": workers("mixed"), "num_blocks": 200}
    predicted = []
    for _ in range(2):
        with LLM(str(model), answer_lengths=lengths, **keys) as llm:
            params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
            first, *_ = llm.generate([[5 + i, 6, 7] for i in range(20)], params, use_tqdm=False)
            predicted.append(first.decision.num_output)
    assert predicted[0] > 50 > 30 > predicted[1], "a belief about anything, then twenty answers of 8 tokens"
    with pytest.raises(ConfigError, match="answer_lengths.*directory"):
        LLM(str(model), answer_lengths=tmp_path / "nowhere" / "lengths.json", **keys)
    lengths.write_text("something else")
    with pytest.raises(ConfigError, match="answer_lengths.*saved counts"):
        LLM(str(model), answer_lengths=lengths, **keys)


@pytest.mark.process
def test_a_stream_that_is_turned_away_ends(llm: LLM) -> None:
    def restrict(engine: Engine) -> None:
        engine.policy.admission, engine.policy.slo = "reject", SLO(ttft_ms=1e-3)

    llm._thread.call(restrict)  # rather than another LLM
    (delta,) = llm.stream([1, 2, 3], SamplingParams(max_tokens=4))
    assert delta.finish_reason == "error" and "turned away" in delta.error
    (output,) = llm.generate([[1, 2, 3]], use_tqdm=False)
    assert (output.outputs[0].finish_reason, output.route) == ("error", None)
    assert output.decision.route is None


@pytest.mark.process
@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({}, "launch.py profile"),
        ({"params": "9xh900"}, "one of 8x4090"),
        ({"params": "8xh200"}, "512 bytes of KV cache per token"),
    ],
)
def test_parameters_that_do_not_fit_are_refused(
    model: Path, keys: dict, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(ConfigError) as error:
        LLM(str(model), policy="closed_form", **keys)
    assert error.value.field == "params"
    assert message in str(error.value)


def test_closed_form_serves_and_explains(model: Path) -> None:
    config = EngineConfig(model=str(model), policy="closed_form", workers=workers("mixed", "mixed"), num_blocks=100)
    engine = local_engine(config, model, policy=make_policy(config, H200))
    seq = submit(engine, "a", [1] * 100, SamplingParams(temperature=0, max_tokens=3, ignore_eos=True))
    run_to_end(engine)
    taken = seq.decision.taken
    # the seed's formula on idle workers: alpha * prompt, beta a step
    assert (taken.route, taken.ttft_ms) == (Route(0, 0), pytest.approx(100 * H200.terms.a1))
    assert taken.tpot_ms == taken.first_gap_ms == pytest.approx(H200.terms.beta)
    assert RequestMetrics.from_log(seq.log()).is_completed

"""The planner: arrangements as they are written, goodput as a scan over all rates finds it, a whole plan."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanopd.cli import BAD_USAGE, main
from nanopd.config import EngineConfig, ModelConfig
from nanopd.errors import ConfigError
from nanopd.lab.planner import (
    RESOLUTION,
    TARGET,
    Arrangement,
    Goodput,
    Scenario,
    at_rate,
    candidates,
    draw,
    find_goodput,
    search,
)
from nanopd.lab.workload import FixedLength, synthetic_requests
from nanopd.metrics import SLO, summarize
from nanopd.routing.factory import find_parameters

MODEL = ModelConfig("qwen3", 1000, 4096, 12288, 36, 32, 8, 128, 8192, 1e-6, 1e6, dtype="bfloat16")
H200 = find_parameters("8xh200")
LIMITS = SLO(ttft_ms=200, tpot_ms=10, first_gap_ms=50)


def scenario(count: int = 200, num_prompt: int = 1000) -> Scenario:
    requests = synthetic_requests(count, FixedLength(num_prompt), FixedLength(32), 1.0, seed=2)
    return Scenario(EngineConfig(model="none", max_num_seqs=64), MODEL, H200, requests, LIMITS)


def test_arrangements_are_read() -> None:
    found = Arrangement.parse("adaptive:1P2D1M/512")
    assert [worker["role"] for worker in found.workers] == ["prefill", "decode", "decode", "mixed"]
    config = found.config(EngineConfig(model="none"), LIMITS)
    assert (config.policy, config.max_num_batched_tokens) == ("adaptive", 512)
    assert config.slo == {"ttft_ms": 200, "tpot_ms": 10, "first_gap_ms": 50}
    fixed = [Arrangement.parse(text).config(config, LIMITS) for text in ("2M", "3P1D")]
    assert [c.policy for c in fixed] == ["collocated", "disaggregated"]
    assert [c.max_num_batched_tokens for c in fixed] == [512, 512]


@pytest.mark.parametrize("text", ["", "M", "8X", "fastest:8M", "8M/", "8M/512/2"])
def test_what_is_no_arrangement(text: str) -> None:
    with pytest.raises(ConfigError, match="arrangement"):
        Arrangement.parse(text)


def test_rates_change_nothing_but_times() -> None:
    requests = scenario(50).requests
    timed = at_rate(requests, 20.0)
    assert np.diff([r.arrival_s for r in timed]).mean() == pytest.approx(1 / 20)
    assert [replace(r, arrival_s=0.0) for r in timed] == [replace(r, arrival_s=0.0) for r in requests]


@given(st.floats(0.1, 100), st.floats(0.05, 20), st.floats(3, 40))
def test_goodput_is_what_a_scan_of_all_rates_finds(limit: float, start: float, steepness: float) -> None:
    def attainment(rate: float) -> float:
        return 1 / (1 + math.exp(min(steepness * (rate / limit - 1), 700)))

    best = max(rate for rate in np.geomspace(limit / 10, 2 * limit, 2000) if attainment(rate) >= TARGET)
    found = find_goodput(attainment, start * limit)
    assert found.rate == pytest.approx(best, rel=RESOLUTION - 1) and not found.is_bound


def test_what_is_never_or_always_attained_is_given_up() -> None:
    assert find_goodput(lambda rate: 0.5, start=10.0).is_bound
    assert find_goodput(lambda rate: 1.0, start=10.0).rate > 1000


def test_what_loses_clearly_is_run_once() -> None:
    found = find_goodput(lambda rate: float(rate < 5), start=6.0, least=6.0)
    assert found.is_bound and found.rate == 6.0 and len(found.points) == 1


def test_a_run_that_fails_ends_early() -> None:
    tiny, arrangement = scenario(), Arrangement.parse("2M")
    full = summarize(tiny.run(arrangement, 20.0), LIMITS).slo_attainment
    assert tiny.attainment(arrangement, 20.0) == pytest.approx(full) and full > TARGET
    assert tiny.attainment(arrangement, 500.0) == pytest.approx(2 * TARGET - 1, abs=0.01)
    assert summarize(tiny.run(arrangement, 500.0), LIMITS).slo_attainment < 2 * TARGET - 1


@pytest.fixture(scope="module")
def plan() -> dict[str, tuple[Arrangement, Goodput]]:
    """Long prompts and short answers with a strict TPOT: workers that decode must not be disturbed."""
    texts = ("3M/2048", "adaptive:3M", "1P2D", "2P1D")
    found = search(scenario(200, num_prompt=3000), [Arrangement.parse(text) for text in texts])
    return {arrangement.text: (arrangement, goodput) for arrangement, goodput in found}


def test_a_plan_finds_what_prompts_need(plan: dict[str, tuple[Arrangement, Goodput]]) -> None:
    goodputs = {name: goodput.rate for name, (_, goodput) in plan.items()}
    split = max(goodputs["2P1D"], goodputs["1P2D"])
    assert split > 1.05 * goodputs["3M/2048"]
    assert goodputs["adaptive:3M"] > 0.95 * split


def test_a_plan_is_drawn(plan: dict[str, tuple[Arrangement, Goodput]], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    draw([*plan.values()], "three workers", tmp_path / "plan.png")
    assert (tmp_path / "plan.png").stat().st_size > 5000


def test_candidates_are_all_splits_and_policies() -> None:
    texts = [arrangement.text for arrangement in candidates(3, budgets=(256,))]
    assert texts == ["3M/256", "closed_form:3M", "adaptive:3M", "1P2D", "2P1D"]


def test_the_command_plans(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = tmp_path / "trace.csv"
    rows = [f"2023-11-16 18:00:{i:02}.0,1500,{16 + i}" for i in range(20)] + [
        "2023-11-16 18:01:00.0,9000,1"
    ]  # too long
    trace.write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *rows]))
    assert main(["plan", "--config", "2xh200", "--trace", str(trace), "--slo", "ttft=200,tpot=10"]) == 0
    out = capsys.readouterr().out
    assert "adaptive:2M" in out and "1P1D" in out and "recommended: " in out
    assert main(["plan", "--config", "2xh200", "--trace", str(trace), "--slo", "ttft=fast"]) == BAD_USAGE


def test_neighbours_behind_a_clear_loser_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    goodputs = {"8M": 10.0, "1P7D": 4.0, "2P6D": 9.5, "3P5D": 4.0, "4P4D": 4.0}
    tried: list[str] = []

    def attainment(self: Scenario, arrangement: Arrangement, rate: float) -> float:
        tried.append(arrangement.text)
        return float(rate < goodputs[arrangement.text])

    monkeypatch.setattr(Scenario, "attainment", attainment)
    monkeypatch.setattr(Scenario, "likely_split", 0.25)

    def search_all(known: dict[str, Goodput]) -> dict[str, Goodput]:
        arrangements = [Arrangement.parse(text) for text in goodputs]
        return {a.text: g for a, g in search(scenario(10), arrangements, known)}

    found = search_all(known={})
    assert list(found) == ["8M", "2P6D", "1P7D", "3P5D"]
    assert [g.is_bound for g in found.values()] == [False, False, True, True]
    assert tried.count("1P7D") == 1
    tried.clear()
    assert search_all(known=found) == found and not tried
    del found["8M"]
    assert search_all(known=found)["8M"].rate == pytest.approx(10, rel=RESOLUTION - 1)
    assert {*tried} == {"8M"}

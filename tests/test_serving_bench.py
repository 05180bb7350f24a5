"""The serving benches: arrivals that wait for nobody, figures worked out by hand, a sweep that can go on later."""

from __future__ import annotations

import itertools
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import psutil
import pytest
from model_zoo import make_tiny_model

from bench import report, run, scaling
from bench.lib import load
from bench.lib.report import Row, make_report
from bench.lib.rows import attainment
from nanopd import LLM, ConfigError, EngineConfig, Route
from nanopd.lab.planner import Arrangement
from nanopd.lab.workload import prompt_token_ids
from nanopd.messages import EventKind, FinishReason, RequestEvent, RequestLog, Work
from nanopd.metrics import SLO
from nanopd.routing.factory import find_parameters

STALL_S = 0.8


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"), "llama")


@pytest.fixture(scope="module")
def llm(model: Path) -> Iterator[LLM]:
    with LLM(str(model), num_blocks=200, max_num_seqs=8) as llm:
        yield llm


# ----------------------------------------------------------------------------------------------------- arrivals


@pytest.mark.process
def test_arrivals_do_not_wait_for_a_stalled_worker(llm: LLM) -> None:
    jobs = load.Workload("16/8", 60).jobs(llm, 1.2)
    worker = next(p for p in psutil.Process().children() if "spawn_main" in " ".join(p.cmdline()))
    timers = [threading.Timer(0.2, worker.suspend), threading.Timer(0.2 + STALL_S, worker.resume)]
    for timer in timers:
        timer.start()
    run = load.play(llm, jobs)
    arrived = sorted(log.events[0].time_s for log in run.logs)
    assert arrived == [run.start_s + job.due_s for job in jobs]  # the clock starts when a request was due
    assert max(run.late_s) < STALL_S / 2  # and it was sent then, as busy as the engine might be
    row = load.result_row(run, {}, SLO(ttft_ms=1e3 * STALL_S / 2), (0.0, 1.2))
    assert row["offered_per_s"] == len(jobs) / 1.2
    assert row["num_completed"] == len(jobs)
    assert row["ttft_ms"]["p99"] > 1e3 * STALL_S / 2  # who arrived early in the stall waited for its end
    assert 0 < row["slo_attainment"] < 1


@pytest.mark.process
def test_interrupted_run_tells_what_was_done(llm: LLM) -> None:
    short, endless = load.Workload("16/4", 1000).jobs(llm, 1.0, 4), load.Workload("16/400", 1000).jobs(llm, 1.0, 2)
    threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT)).start()
    run = load.play(llm, [*short, *(load.Job(0.9, job.prompt, job.params) for job in endless), load.Job(60, [1], LONG)])
    row = load.result_row(run, {}, None, (0.0, 60.0))
    assert (row["is_interrupted"], row["num_completed"], row["num_requests"]) == (True, 4, 4)
    end_s = time.monotonic() + 10  # blocks are free when the steps in flight are done
    while any(blocks.used for blocks in llm.stats().blocks):
        assert time.monotonic() < end_s


LONG = load.greedy(400)


@pytest.mark.process
def test_one_by_one_finds_the_engine_idle(llm: LLM) -> None:
    run = load.play(llm, load.Workload("16/4", float("inf")).jobs(llm, float("inf"), 3), one_by_one=True)
    logs = sorted(run.logs, key=lambda log: log.events[0].time_s)
    assert len(logs) == 3
    assert all(a.events[-1].time_s <= b.events[0].time_s for a, b in itertools.pairwise(logs))


# ---------------------------------------------------------------------------------------------------- workloads


def test_other_seeds_and_rates_share_no_prompts_and_equal_ones_are_equal() -> None:
    requests = [load.Workload("16/4", rate, seed).requests(512, 10.0) for rate, seed in ((5, 0), (6, 0), (5, 1))]
    assert len({r.prompt_seed for workload in requests for r in workload}) == sum(map(len, requests))
    assert requests[0] == load.Workload("16/4", 5, 0).requests(512, 10.0)
    assert all(r.arrival_s < 10.0 for workload in requests for r in workload)


def test_trace_keeps_its_shared_prefixes_and_is_cut_to_the_engine(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    rows = [{"timestamp": 1000 * i, "input_length": 600, "output_length": 900, "hash_ids": [7, i]} for i in range(4)]
    path.write_text("\n".join(map(json.dumps, rows)))
    requests = load.Workload(str(path), 2.0).requests(1000, 1.6)
    assert [r.arrival_s for r in requests] == [0.0, 0.5, 1.0, 1.5]
    assert {(r.num_prompt_tokens, r.num_output_tokens) for r in requests} == {(600, 250)}
    prompts = [prompt_token_ids(r, 100) for r in requests]
    assert all(prompt[:512] == prompts[0][:512] for prompt in prompts)
    assert len({tuple(prompt[512:]) for prompt in prompts}) == 4


@pytest.mark.parametrize("name", ["medium", "16", "16/", "/4", "a/b"])
def test_unknown_workload_is_named(name: str) -> None:
    with pytest.raises(ConfigError) as error:
        load.Workload(name, 1.0).requests(512, 1.0)
    assert (error.value.field, error.value.value) == ("workload", name)


@pytest.mark.parametrize(
    ("text", "policy", "roles"),
    [
        ("2M", "collocated", ["mixed", "mixed"]),
        ("1P1D", "disaggregated", ["prefill", "decode"]),
        ("round_robin:1P1M", "round_robin", ["prefill", "mixed"]),
    ],
)
def test_arrangements_use_the_same_devices(text: str, policy: str, roles: list[str]) -> None:
    base = EngineConfig("any", workers=({"device": "cuda:0"}, {"device": "cuda:1"}))
    arrangement = Arrangement.parse(text)
    config = arrangement.applied(base)
    assert (config.policy, [worker.role.value for worker in config.workers]) == (policy, roles)
    assert [worker.device for worker in config.workers] == ["cuda:0", "cuda:1"]
    assert Arrangement.of(config) == arrangement


@pytest.mark.parametrize("text", ["", "2", "M2", "2X", "fastest:2M", "3M"])
def test_bad_arrangement_is_named(text: str) -> None:
    base = EngineConfig("any", workers=({"device": "cpu", "count": 2},))
    with pytest.raises(ConfigError) as error:
        Arrangement.parse(text).applied(base)
    assert error.value.field == "arrangement"


# ------------------------------------------------------------------------------------------------------ figures


def make_log(name: str, arrived_s: float, tokens_s: list[float], route: Route, reason: FinishReason) -> RequestLog:
    events = [RequestEvent(arrived_s, EventKind.ARRIVED), RequestEvent(tokens_s[-1], EventKind.FINISHED)]
    return RequestLog(name, 10, events, np.array(tokens_s), route, finish_reason=reason)


@pytest.fixture
def row() -> Row:
    """Two requests of a window from 1 to 3 s and an error, one of the warm-up; times are exact in binary."""
    done, there = FinishReason.LENGTH, Route(0, 1)
    logs = [
        make_log("late", 102.0, [102.5, 102.75, 103.5], there, done),  # TTFT 500, TPOT 500
        make_log("warm-up", 100.5, [101.0], there, done),
        make_log("first", 101.0, [101.25, 101.5, 101.75], Route(1, 1), done),  # TTFT 250, TPOT 250
        make_log("failed", 101.5, [101.75], there, FinishReason.ERROR),
        make_log("after", 103.0, [103.5], there, done),
    ]
    blocks = {"num_blocks": [100, 100], "num_peak": [40, 60]}
    run = load.Run(100.0, [0.0, 0.25], logs, busy_s=[2.0, 3.0], num_devices=2, seconds=4.0, **blocks)
    return load.result_row(run, {"workload": "x", "policy": "p"}, SLO(ttft_ms=300), (1.0, 3.0))


def test_row_of_a_window_by_hand(row: Row) -> None:
    assert (row["num_requests"], row["num_completed"], row["offered_per_s"], row["late_ms_max"]) == (3, 2, 1.5, 250.0)
    assert row["duration_s"] == 2.5  # 101 to 103.5, the drain included
    assert (row["output_tokens_per_s"], row["output_tokens_per_s_per_device"]) == (6 / 2.5, 3 / 2.5)
    assert (row["slo_attainment"], row["goodput_per_s"]) == (1 / 3, 1 / 2.5)
    assert row["routes"] == {"0->1": 2 / 3, "1->1": 1 / 3}
    assert (row["busy"], row["kv_peak"]) == ([0.5, 0.75], [0.4, 0.6])
    assert row["samples"]["ttft_ms"] == [250.0, 500.0]
    assert row["samples"]["tpot_ms"] == [250.0, 500.0]
    gaps = row["samples"]["itl_ms_percentiles"]  # 250, 250, 250, 750
    assert (gaps[0], gaps[50], gaps[100]) == (250.0, 250.0, 750.0)
    json.dumps(row)


@pytest.mark.parametrize(
    ("limits", "scale", "num_good"),
    [({"ttft_ms": 250}, 1, 1), ({"ttft_ms": 250}, 2, 2), ({"ttft_ms": 999, "tpot_ms": 300}, 1, 1), ({}, 1, 2)],
)
def test_attainment_under_other_levels_counts_all_arrivals(
    row: Row, limits: dict[str, float], scale: float, num_good: int
) -> None:
    assert attainment(row, SLO(**limits), scale) == num_good / 3


def test_page_holds_rows_of_others_and_their_source(row: Row) -> None:
    other = {"workload": "x", "policy": "peer", "rate": 4, "ttft_ms": {"p50": 33, "p99": 68}}
    beside = {"device": "a GPU", "config": {"source": "a log"}, "rows": [other]}
    page = report.markdown(make_report("poisson", {}, [row]), [beside], {"a.png": "A figure"})
    assert "33.0 / 68.0" in page or "33 / 68" in page
    assert "peer: a GPU; a log." in page
    assert "![A figure](a.png)" in page


def test_timeline_names_what_workers_did(tmp_path: Path) -> None:
    config = EngineConfig("any", policy="disaggregated", workers=({"role": "prefill"}, {"role": "decode"}))
    work = [
        Work(0, 11.0, 0.5, num_prompt_tokens=64),
        Work(1, 11.5, 0.25, num_moved_bytes=1000),
        Work(1, 12.0, 0.5, num_decoding=3),
        Work(1, 20.0, 0.5, num_decoding=3),
    ]
    path = tmp_path / "timeline.json"
    load.save_timeline(load.Run(10.0, work=work), config, "title", path, (0.0, 5.0))
    events = [e for e in json.loads(path.read_text())["traceEvents"] if e["ph"] == "X"]
    assert [(e["name"], e["tid"], e["ts"], e["dur"]) for e in events] == [
        ("prefill", 0, 500_000, 500_000),
        ("move", 3, 1_250_000, 250_000),
        ("decode", 2, 1_500_000, 500_000),
    ]


# -------------------------------------------------------------------------------------------------------- sweep


@pytest.mark.slow
def test_quick_sweep_goes_on_where_it_was(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "results" / "sweep.json"
    base = ["--config", "cpu-demo", "--quick", "--set", f"model={model}", "--set", "max_model_len=512"]
    base += ["--window", "0.5", "--warm-up", "0.2", "--out", str(out), "--figures", str(tmp_path / "figures")]
    assert run.main(["sweep", *base, "--policies", "2M", "--points", "32/8@20"]) == 0
    first = json.loads(out.read_text())["rows"]
    assert run.main(["sweep", *base, "--policies", "2M", "1P1D", "--points", "32/8@20,30"]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert rows[:1] == first
    keys = [(row["split"], row["rate"]) for row in rows]
    assert keys == [("2M", 20.0), ("2M", 30.0), ("1P1D", 20.0), ("1P1D", 30.0)]
    assert all(row["num_completed"] == row["num_requests"] > 0 for row in rows)
    assert rows[0]["num_requests"] == rows[2]["num_requests"]  # the same arrivals
    assert {route for row in rows[2:] for route in row["routes"]} == {"0->1"}
    printed = json.loads(capsys.readouterr().out.splitlines()[-2])
    assert asdict(SLO(ttft_ms=1000, tpot_ms=100)).items() >= printed["rows"][0]["slo"].items()
    assert "| 30.0 | disaggregated 1P1D |" in out.with_suffix(".md").read_text()
    with pytest.raises(ConfigError, match="settings"):
        run.main(["sweep", *base, "--set", "block_size=32"])


@pytest.mark.slow
def test_the_peer_serves_the_same_requests_one_by_one(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "sweep.json"
    args = ["--config", "cpu-demo", "--set", f"model={model}", "--set", "max_model_len=512", "--policies", "2M"]
    args += ["--points", "32/8@30", "--window", "0.5", "--warm-up", "0.2", "--peer", "transformers"]
    assert run.main(["sweep", *args, "--out", str(out)]) == 0
    own, peer = json.loads(out.read_text())["rows"]
    assert (peer["policy"], peer["split"]) == ("transformers", "one by one")
    for name in ("num_requests", "num_completed", "num_prompt_tokens", "num_output_tokens", "offered_per_s"):
        assert own[name] == peer[name] > 3, name
    assert len(peer["samples"]["tpot_ms"]) == peer["num_requests"]


@pytest.mark.slow
def test_one_command_serves_three_sources(model: Path, tmp_path: Path) -> None:
    trace, out = tmp_path / "trace.jsonl", tmp_path / "report.json"
    lines = [{"timestamp": 100 * i, "input_length": 40, "output_length": 4, "hash_ids": [i]} for i in range(3)]
    trace.write_text("\n".join(map(json.dumps, lines)))
    base = ["--config", "cpu-demo", "--set", f"model={model}", "--set", "max_model_len=512", "--json", str(out)]
    sources = {
        "static": (["--workloads", "16/4", "--requests", "2", "--batches", "3"], [2, 3]),
        "poisson": (["--workload", "16/4", "--rate", "20", "--warm-up", "0.1", "--window", "0.5"], [None]),
        "trace": (["--trace", str(trace), "--speed", "2"], [3]),
    }
    for source, (options, counts) in sources.items():
        assert run.main([source, *base, "--policy", "2M", *options]) == 0
        found = json.loads(out.read_text())
        assert found["bench"] == source
        for count, row in zip(counts, found["rows"], strict=True):
            assert row["num_completed"] == (count or row["num_requests"]) > 0
            assert row["split"] == "2M"
    assert run.main([]) == 0  # prints what there is
    assert run.main(["nothing"]) == 2


def test_a_moment_without_work_has_no_timeline(row: Row, tmp_path: Path) -> None:
    plots = pytest.importorskip("bench.lib.plots", exc_type=ImportError)
    quiet = tmp_path / "x-timeline-quiet.json"
    quiet.write_text(json.dumps({"otherData": {"title": "nothing"}, "traceEvents": []}))
    saved = plots.save_all([{**row, "rate": 1.0}], [quiet], tmp_path, "x")
    assert saved and not any("timeline" in path.name for path in saved)


def test_simulated_sweep_is_that_of_the_parameters(model: Path, tmp_path: Path) -> None:
    """Requests that hardly ever meet, where neither rows nor context cost anything."""
    out = tmp_path / "simulated.json"
    args = ["--config", "cpu-demo", "--simulate", "--set", f"model={model}", "--set", "params=8x4090"]
    args += ["--policies", "2M", "1P1D", "--points", "64/8@0.05", "--window", "300", "--out", str(out)]
    assert run.main(["sweep", *args, "--figures", str(tmp_path)]) == 0
    collocated, split = json.loads(out.read_text())["rows"]
    terms = find_parameters("8x4090").terms
    assert collocated["num_requests"] == collocated["num_completed"] == split["num_completed"] > 3
    for row in (collocated, split):
        assert row["ttft_ms"]["p50"] == pytest.approx(64 * terms.a1)
        assert row["itl_without_first_gap_ms"]["p50"] == pytest.approx(terms.beta)
    assert split["first_gap_ms"]["p50"] > collocated["first_gap_ms"]["p50"]
    assert split["routes"] == {"0->1": 1.0}


def test_comparison_by_hand() -> None:
    key = {"workload": "x", "rate": 1.0, "seed": 0, "cv": 1.0, "policy": "adaptive", "split": "2M", "window_s": 9.0}

    def row(tokens_per_s: float, ms: float, share: float, **other: object) -> Row:
        latency = {"p50": ms, "p99": 2 * ms}
        figures = {"output_tokens_per_s": tokens_per_s, "slo_attainment": share, "ttft_ms": latency, "tpot_ms": latency}
        return {**key, **figures, "first_gap_ms": None, "itl_ms": latency, **other}

    real = [row(100.0, 40.0, 0.9), row(1.0, 1.0, 0.5, rate=2.0)]
    simulated = [row(1.0, 1.0, 0.5, split="1P1D"), row(105.0, 30.0, 1.0)]
    (found,) = report.compare(real, simulated)
    assert found["output_tokens_per_s"]["difference"] == pytest.approx(0.05)
    assert found["ttft_ms.p99"] == {"real": 80.0, "simulated": 60.0, "difference": -0.25}
    assert found["slo_attainment"]["difference"] == pytest.approx(0.1)
    assert found["first_gap_ms.p50"] is None
    table = report.comparison_tables([found])
    assert "80 / 60 -25%" in table
    assert "90% / 100% +10%" in table
    (line,) = [line for line in table.splitlines() if line.startswith("ttft_ms.p99")]
    assert line.split() == ["ttft_ms.p99", "20.0%", "25.0%", "25.0%", "0/1"]


# ------------------------------------------------------------------------------------------------------ scaling


def test_what_a_death_did_to_others_by_hand() -> None:
    done, route = FinishReason.LENGTH, Route(1, 1)
    hit = make_log("hit", 99.0, [99.5, 99.75, 101.75, 102.0], route, done)
    hit.events.insert(1, RequestEvent(100.0, EventKind.PREEMPTED, 1))
    elsewhere = make_log("preempted by another", 99.0, [99.5, 100.5, 100.75], route, done)
    elsewhere.events.insert(1, RequestEvent(100.0, EventKind.PREEMPTED, 0))
    run = load.Run(95.0, logs=[hit, elsewhere, make_log("later", 101.0, [101.5], route, done)])
    rows = {row["what"]: row["value"] for row in scaling.aftermath_rows(run, 1, 100.0)}
    assert rows["requests that the worker had"] == 1
    assert rows["the last of them was answered after"] == 2.0
    assert rows["longest gap of each of them, p50"] == 2000.0
    assert rows["others, 3 s before: gap, p50"] is None
    assert rows["others, 3 s after: longest gap"] == 1000.0
    assert rows["others, 3 s after: gap, p50"] == 625.0
    assert (rows["others, 3 s before: TTFT, p50"], rows["others, 3 s after: TTFT, p50"]) == (500.0, 500.0)


@pytest.mark.slow
def test_scaling_of_two_workers(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "scaling.json"
    args = ["--config", "cpu-demo", "--set", f"model={model}", "--set", "max_model_len=512", "--tokens", "32"]
    args += ["--sections", "start", "hops", "feed", "transfer", "--batches", "2", "--context", "32"]
    scaling.main([*args, "--json", str(out)])
    rows = {row["what"]: row for row in json.loads(out.read_text())["rows"]}
    assert {row["workers"] for row in rows.values()} == {2}
    assert rows["tokens as without 6 hops"]["value"] == 100.0
    assert 0 <= rows["2 x 32 on each: no work, most of a worker"]["value"] < 100
    assert rows["0->1: 32 tokens, shm"]["value"] > 0
    assert rows["1->0: 32 tokens, shm"]["value"] > 0


@pytest.mark.slow
def test_every_figure_is_drawn(model: Path, row: Row, tmp_path: Path) -> None:
    plots = pytest.importorskip("bench.lib.plots", exc_type=ImportError)
    rows = [{**row, "rate": rate, "policy": policy} for rate in (1.0, 2.0) for policy in ("collocated", "adaptive")]
    saved = plots.save_all(rows, [], tmp_path, "x")
    assert {path.name for path in saved} == {f"x-{n}.png" for n in ("latency", "attainment")}
    assert all(path.stat().st_size > 10_000 for path in saved)

"""Requests from one of three sources through one engine, or a sweep over many: `python -m bench.run SOURCE ...`.

static   Requests one after the other, which find the engine idle, then batches that are submitted at once. E2E of a
         batch is that of its requests, tokens/s are over the whole batch.
poisson  Requests that arrive at random: a warm-up that does not count, a window that does, its drain. Gaps are Gamma
         distributed; --cv 1 is a Poisson process. Rates are over the time to the end of the last request of the window.
trace    Azure's LLM inference traces (*.csv) or Mooncake's (*.jsonl), at their own times made faster by --speed, or
         stretched to a mean --rate. Lengths are cut to what the engine allows; equal hash ids are equal tokens.
sweep    Policies x workloads x rates x seeds, see bench/sweep.py.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from math import inf
from pathlib import Path

from bench import sweep
from bench.lib import load
from bench.lib.report import Row, arguments, device_name, emit
from bench.lib.rows import figures_of
from nanopd import LLM
from nanopd.errors import ConfigError
from nanopd.lab.planner import Arrangement
from nanopd.metrics import SLO


def static(llm: LLM, args: argparse.Namespace, key: Row) -> list[Row]:
    rows = []
    for name in args.workloads:
        workload = load.Workload(name, inf, args.seed, output_len=args.output_len)
        for batch in (None, *args.batches):
            label = f"{workload.label}, {f'{batch} at once' if batch else 'one by one'}"
            jobs = replace(workload, seed=args.seed + (batch or 0)).jobs(llm, inf, batch or args.requests)
            run = load.play(llm, jobs, label, one_by_one=batch is None)
            rows.append(load.result_row(run, {**key, "workload": label}, args.slo))
    return rows


def poisson(llm: LLM, args: argparse.Namespace, key: Row) -> list[Row]:
    workload = load.Workload(args.workload, args.rate, args.seed, args.cv, args.output_len)
    window_s = args.warm_up, args.warm_up + args.window
    run = load.play(llm, workload.jobs(llm, window_s[1]), workload.label)
    if args.timeline:
        load.save_timeline(run, llm.config, f"{workload.label} at {args.rate:g}/s", args.timeline, window_s)
    row = {**key, "workload": workload.label, "rate": args.rate, "cv": args.cv, "window_s": args.window}
    return [load.result_row(run, row, args.slo, window_s)]


def trace(llm: LLM, args: argparse.Namespace, key: Row) -> list[Row]:
    workload, speed = load.Workload(args.trace, args.rate, args.seed), None if args.rate else args.speed
    jobs = [replace(j, due_s=j.due_s / (speed or 1.0)) for j in workload.jobs(llm, inf, args.max_requests)]
    run = load.play(llm, jobs, workload.label)
    rate = args.rate or (len(jobs) - 1) / jobs[-1].due_s
    row = {**key, "workload": workload.label, "rate": rate, "speed": speed}
    return [load.result_row(run, row, args.slo, (args.warm_up, jobs[-1].due_s + 1e-3))]


def trace_file(text: str) -> str:
    if not load.Workload(text).is_trace:
        raise ConfigError("trace", text, "*.csv (Azure), *.jsonl (Mooncake)")
    return text


def parser_of(source: str) -> argparse.ArgumentParser:
    parser = load.serving_arguments(arguments(__doc__))
    parser.prog = f"python -m bench.run {source}"
    add = parser.add_argument
    add("--policy", help="[policy:]split, as 2M, 1P1D, adaptive:2M; default: the configuration's own")
    add("--slo", type=SLO.parse, help="limits in ms, as ttft=200,tpot=10")
    add("--seed", type=int, default=0)
    if source == "trace":
        add("--trace", required=True, type=trace_file, help="*.csv (Azure) or *.jsonl (Mooncake)")
        add("--max-requests", type=int, default=300, help="the first ones of the trace")
        pace = parser.add_mutually_exclusive_group()
        pace.add_argument("--rate", type=float, help="requests per second, on average")
        pace.add_argument("--speed", type=float, default=1.0, help="times as fast as the trace")
        add("--warm-up", type=float, default=0.0, help="seconds whose arrivals do not count")
        return parser
    add("--output-len", type=int, default=128, help="tokens of an answer (of text: at most)")
    if source == "static":
        add("--workloads", nargs="+", default=["short", "long"], help=load.WORKLOADS)
        add("--requests", type=int, default=5, help="of the serial row")
        add("--batches", type=int, nargs="*", default=[4, 16])
    else:
        add("--workload", default="mixed", help=load.WORKLOADS)
        add("--rate", type=float, default=1.0, help="requests per second")
        add("--cv", type=float, default=1.0, help="coefficient of variation of the gaps between arrivals")
        add("--warm-up", type=float, default=10.0, help="seconds")
        add("--window", type=float, default=60.0, help="seconds")
        add("--timeline", type=Path, help="write what workers did in the window here, for Perfetto")
    return parser


SOURCES: dict[str, Callable[[LLM, argparse.Namespace, Row], list[Row]]] = {
    "static": static,
    "poisson": poisson,
    "trace": trace,
}
SETTINGS = {"warm_up": "warm_up_s", "output_len": "output_len", "max_requests": "max_requests"}  # in a report


def main(argv: Sequence[str] | None = None) -> int:
    source, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if source == "sweep":
        return sweep.main(rest)
    if source not in SOURCES:
        print(__doc__, file=sys.stderr)
        return 2 * (source not in ("-h", "--help"))
    args = parser_of(source).parse_args(rest)
    base = load.engine_config(args)
    arrangement = Arrangement.parse(args.policy) if args.policy else Arrangement.of(base)
    config = arrangement.applied(base)
    with load.serving(config) as llm:
        rows = SOURCES[source](llm, args, {**load.names_of(arrangement), "seed": args.seed})
    settings = {"engine": load.settings_of(config), **{SETTINGS[k]: v for k, v in vars(args).items() if k in SETTINGS}}
    table = [figures_of(row) for row in rows]
    emit(source, settings, rows, device=device_name(config), table=table, path=args.json)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

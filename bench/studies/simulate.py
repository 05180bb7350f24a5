"""A trace or made-up requests on a machine that is not at hand: real engine, virtual clock, steps of the cost model.

One run per `--split` and policy, all with the same requests: `8M` are eight mixed workers, `5P3D` five that prefill and
three that decode, `8M/512` eight mixed ones with chunk budget 512. Fixed policies follow from the split; `adaptive:8M`
and `closed_form:8M` name theirs, and `oracle:8M` is the adaptive router told every answer's length. Attainment and
goodput count all arrivals. With several `--rates` the same requests come at other times.
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from bench.lib.report import Row, arguments, emit
from nanopd.config import EngineConfig, load_config
from nanopd.lab.planner import Arrangement, Scenario, at_rate, default_slo
from nanopd.lab.workload import MIXED_PROMPTS, FixedLength, WorkloadRequest, read_trace, synthetic_requests
from nanopd.metrics import SLO, summarize
from nanopd.routing.factory import find_parameters

MAX_LEN = 18432


def workload(trace: str, count: int | None) -> list[WorkloadRequest]:
    """`trace` is a path, `mixed` (one per second), or several of them joined by +, which take turns."""
    parts = trace.split("+")
    if len(parts) > 1:
        return shifting([at_rate(workload(part, (count or 3000) // len(parts)), 1.0) for part in parts])
    if trace == "mixed":
        return synthetic_requests(count or 3000, MIXED_PROMPTS, FixedLength(128), 1.0, seed=1)
    return read_trace(trace, max_requests=count, max_prompt_tokens=MAX_LEN - 2048, drop_long=True).requests


def shifting(parts: list[list[WorkloadRequest]]) -> list[WorkloadRequest]:
    """The first halves of all parts, then the second halves, each at the rate that costs what the others cost."""
    requests: list[WorkloadRequest] = []
    weights = [float(np.mean([r.num_prompt_tokens + 25 * r.num_output_tokens for r in part])) for part in parts]
    mean = float(np.mean(weights))
    start_s = 0.0
    for half in (0, 1):
        for number, (part, weight) in enumerate(zip(parts, weights, strict=True)):
            middle = len(part) // 2
            chosen = part[half * middle : (half + 1) * middle]
            scale, first_s = weight / mean, chosen[0].arrival_s
            seed = (2 * number + half) << 40  # parts must not have prompts in common
            for r in chosen:
                arrival_s = start_s + (r.arrival_s - first_s) * scale
                requests.append(replace(r, arrival_s=arrival_s, prompt_seed=r.prompt_seed + seed))
            start_s = requests[-1].arrival_s + scale
    return requests


def base_config() -> EngineConfig:
    return EngineConfig(model="none", handover_timeout_s=0.1, max_model_len=MAX_LEN)


def run(scenario: Scenario, arrangement: Arrangement, rate: float) -> Row:
    start = time.perf_counter()
    logs = scenario.run(arrangement, rate or None)
    s = summarize(logs, scenario.slo)
    assert s.ttft_ms and s.tpot_ms
    offered = rate or (len(scenario.requests) - 1) / scenario.requests[-1].arrival_s
    row = {"arrangement": arrangement.text, "rate": offered, "attainment": s.slo_attainment}
    row |= {"goodput/s": s.goodput_per_s, "ttft p50": s.ttft_ms.p50, "ttft p99": s.ttft_ms.p99}
    row |= {"tpot p50": s.tpot_ms.p50, "tpot p99": s.tpot_ms.p99, "gap p99": s.first_gap_ms and s.first_gap_ms.p99}
    row |= {"tok/s": s.output_tokens_per_s, "preempted": s.num_preemptions}
    collocated = float(np.mean([log.route is not None and log.route.is_collocated for log in logs]))
    return {**row, "collocated": collocated, "wall s": time.perf_counter() - start}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--params", default="8x4090", help="a parameter file, or the name of a shipped one")
    parser.add_argument("--config", help="takes block size and limits from there; default: those of EngineConfig")
    parser.add_argument("--trace", default="mixed", help="*.csv, *.jsonl, mixed, or several joined by + (shifting)")
    parser.add_argument("--max-requests", type=int)
    parser.add_argument("--rates", type=float, nargs="*", default=[1.0], help="requests/s; 0: the trace's own times")
    parser.add_argument("--split", nargs="+", default=["8M", "5P3D", "closed_form:8M", "adaptive:8M"])
    parser.add_argument("--budget", type=int, default=2048, help="tokens per step")
    parser.add_argument("--slo", help="ttft=200,tpot=10,first_gap=50; default: from the parameters")
    args = parser.parse_args()
    parameters = find_parameters(args.params)
    base = load_config(args.config) if args.config else base_config()
    base = base.replace(max_model_len=MAX_LEN, max_num_batched_tokens=args.budget)
    requests = workload(args.trace, args.max_requests)
    slo = SLO.parse(args.slo) if args.slo else default_slo(parameters, requests)
    scenario = Scenario.of(base, parameters, requests, slo)
    rows = [run(scenario, Arrangement.parse(text), rate) for rate in args.rates for text in args.split]
    emit("simulate", {"params": args.params, "trace": Path(args.trace).name, "slo": str(slo)}, rows, path=args.json)


if __name__ == "__main__":
    main()

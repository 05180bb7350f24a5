"""A trace or made-up requests on a machine that is not at hand: real engine, virtual clock, steps of the cost model.

One run per `--split` and policy, all with the same requests: `8M` are eight mixed workers, `5P3D` five that prefill and
three that decode, `8M/512` eight mixed ones with chunk budget 512. Fixed policies follow from the split; `adaptive:8M`
and `closed_form:8M` name theirs, and `oracle:8M` is the adaptive router told every answer's length. Attainment and
goodput count all arrivals. With several `--rates` the same requests come at other times.
"""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from report import Row, emit

from nanopd.config import EngineConfig, ModelConfig, allowed_routes, load_config
from nanopd.config_files import config_dir
from nanopd.core.metrics import SLO, summarize
from nanopd.core.sequence import Sequence as Request
from nanopd.core.workload import MIXED_PROMPTS, FixedLength, WorkloadRequest, read_trace, synthetic_requests
from nanopd.messages import Role
from nanopd.model_files import read_model_config, resolve
from nanopd.routing.adaptive import QUANTILES, AdaptiveRouter
from nanopd.routing.closed_form import ClosedFormRouter
from nanopd.routing.cost_model import CostModel, Parameters, chunk_pairs
from nanopd.routing.decision import Policy
from nanopd.simulator import simulate

LETTERS = {"P": Role.PREFILL, "D": Role.DECODE, "M": Role.MIXED}
MAX_LEN = 18432


@dataclass(frozen=True, slots=True)
class Arrangement:
    """`[policy:]split[/chunk budget]`."""

    text: str
    policy: str | None  # None: a fixed one
    workers: tuple[dict[str, str], ...]
    budget: int

    @classmethod
    def parse(cls, text: str, budget: int) -> Arrangement:
        match = re.fullmatch(r"(?:(adaptive|closed_form|oracle):)?((?:\d+[PDM])+)(?:/(\d+))?", text)
        if match is None:
            raise SystemExit(f"--split {text}: like 8M, 5P3D, 8M/512 or adaptive:8M")
        parts = re.findall(r"(\d+)([PDM])", match[2])
        workers = tuple(
            {"device": "cpu", "role": LETTERS[kind].value} for count, kind in parts for _ in range(int(count))
        )
        return cls(text, match[1], workers, int(match[3] or budget))

    def config(self, base: EngineConfig) -> EngineConfig:
        has_pair = {worker["role"] for worker in self.workers} > {"prefill"}
        return base.replace(
            workers=self.workers,
            policy="disaggregated" if has_pair else "collocated",
            max_num_batched_tokens=self.budget,
        )

    def router(self, config: EngineConfig, parameters: Parameters, slo: SLO) -> Policy | None:
        routes = allowed_routes(config.roles)
        if self.policy == "closed_form":
            return ClosedFormRouter(routes, parameters)
        if self.policy is None:
            return None
        kind = Oracle if self.policy == "oracle" else AdaptiveRouter
        return kind(routes, len(config.roles), CostModel(parameters), self.budget, slo)


class Oracle(AdaptiveRouter):
    """Knows what nobody can: how long each answer will be."""

    def foresee(self, seq: Request) -> tuple[float, np.ndarray]:
        num_left = float(seq.end_len - seq.num_tokens)
        return num_left, np.full(len(QUANTILES), num_left)


def workload(trace: str, count: int | None) -> list[WorkloadRequest]:
    """`trace` is a path, `mixed` (one per second), or several of them joined by +, which take turns."""
    parts = trace.split("+")
    if len(parts) > 1:
        return shifting([at_rate(workload(part, (count or 3000) // len(parts)), 1.0) for part in parts])
    if trace == "mixed":
        return synthetic_requests(count or 3000, MIXED_PROMPTS, FixedLength(128), 1.0, seed=1)
    return read_trace(trace, max_requests=count, max_prompt_tokens=MAX_LEN - 2048, drop_long=True).requests


def at_rate(requests: list[WorkloadRequest], requests_per_s: float) -> list[WorkloadRequest]:
    scale = (len(requests) - 1) / (requests[-1].arrival_s - requests[0].arrival_s) / requests_per_s
    return [replace(request, arrival_s=request.arrival_s * scale) for request in requests]


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
            requests += [
                replace(r, arrival_s=start_s + (r.arrival_s - first_s) * scale, prompt_seed=r.prompt_seed + seed)
                for r in chosen
            ]
            start_s = requests[-1].arrival_s + scale
    return requests


def default_slo(parameters: Parameters, requests: Sequence[WorkloadRequest]) -> SLO:
    """TTFT: four prefills of a long prompt (90th percentile); TPOT: 1.55 idle steps (2.25 if context costs); gap: 5."""
    long = float(np.percentile([r.num_prompt_tokens for r in requests], 90))
    terms = parameters.terms
    tpot_ms = round(terms.beta * (1.55 if terms.kv == 0 else 2.25))
    return SLO(4 * terms.step_ms(0, 0, long, chunk_pairs(long, 0)), tpot_ms, 5 * tpot_ms)


def run(
    arrangement: Arrangement,
    base: EngineConfig,
    model: ModelConfig,
    parameters: Parameters,
    requests: Sequence[WorkloadRequest],
    slo: SLO,
) -> Row:
    config = arrangement.config(base)
    start = time.perf_counter()
    _, logs = simulate(config, model, parameters, requests, arrangement.router(config, parameters, slo))
    s = summarize(logs, slo)
    assert s.ttft_ms and s.tpot_ms
    return {
        "arrangement": arrangement.text,
        "rate": (len(requests) - 1) / requests[-1].arrival_s,
        "attainment": s.slo_attainment,
        "goodput/s": s.goodput_per_s,
        "ttft p50": s.ttft_ms.p50,
        "ttft p99": s.ttft_ms.p99,
        "tpot p50": s.tpot_ms.p50,
        "tpot p99": s.tpot_ms.p99,
        "gap p99": s.first_gap_ms.p99 if s.first_gap_ms else None,
        "tok/s": s.output_tokens_per_s,
        "preempted": s.num_preemptions,
        "collocated": float(np.mean([log.route is not None and log.route.is_collocated for log in logs])),
        "wall s": time.perf_counter() - start,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--params", default="8x4090", help="a parameter file, or the name of a shipped one")
    parser.add_argument("--config", help="takes block size and limits from there; default: those of EngineConfig")
    parser.add_argument("--model", default="Qwen3-8B")
    parser.add_argument("--trace", default="mixed", help="*.csv, *.jsonl, mixed, or several joined by + (shifting)")
    parser.add_argument("--max-requests", type=int)
    parser.add_argument("--rates", type=float, nargs="*", default=[1.0], help="requests/s; 0: the trace's own times")
    parser.add_argument("--split", nargs="+", default=["8M", "5P3D", "closed_form:8M", "adaptive:8M"])
    parser.add_argument("--budget", type=int, default=2048, help="tokens per step")
    parser.add_argument("--slo", help="ttft=200,tpot=10,first_gap=50; default: from the parameters")
    args = parser.parse_args()
    shipped = config_dir() / "params" / f"{args.params}.json"
    parameters = Parameters.load(shipped if shipped.is_file() else Path(args.params))
    model = read_model_config(resolve(args.model, load_format="dummy"), "auto", device_is_cpu=False)
    base = load_config(args.config) if args.config else EngineConfig(model=args.model, handover_timeout_s=0.1)
    base = base.replace(max_model_len=MAX_LEN)
    requests = workload(args.trace, args.max_requests)
    slo = SLO.parse(args.slo) if args.slo else default_slo(parameters, requests)
    rows = []
    for rate in args.rates:
        timed = at_rate(requests, rate) if rate else requests
        rows += [run(Arrangement.parse(text, args.budget), base, model, parameters, timed, slo) for text in args.split]
    emit("simulate", {"params": args.params, "trace": Path(args.trace).name, "slo": str(slo)}, rows)


if __name__ == "__main__":
    main()

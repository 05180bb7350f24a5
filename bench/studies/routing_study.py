"""Is the adaptive router as good as the best static arrangement, whichever that is for a workload and a machine?

For each machine (a parameter file) and workload: the goodput of static arrangements, `closed_form`, `adaptive` and
`oracle` (the adaptive router told every answer's length), all with the same requests at other times. Each is run at
about five rates around its own saturation, see nanopd/lab/planner.py; clear losers only until that is clear. What the
result file has already is not run again. `--predict` measures the length predictor on the Azure traces instead.

The traces azure_2023_code.csv, azure_2023_conv.csv and mooncake_conversation.jsonl lie in the directory NANOPD_TRACES.
"""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from bench.lib.report import Row, arguments, emit, load, make_report, save
from nanopd.config import EngineConfig
from nanopd.lab.planner import Arrangement, Goodput, Scenario, at_rate, default_slo, search
from nanopd.lab.tables import format_table
from nanopd.lab.workload import MIXED_PROMPTS, FixedLength, WorkloadRequest, read_trace, synthetic_requests
from nanopd.routing.factory import find_parameters
from nanopd.routing.length_predictor import LengthPredictor

TRACES = Path(os.environ.get("NANOPD_TRACES", "traces"))
AZURE = {name: str(TRACES / f"azure_2023_{name}.csv") for name in ("code", "conv")}
WORKLOADS = {"mixed": "mixed", **AZURE, "mooncake": str(TRACES / "mooncake_conversation.jsonl")}
WORKLOADS["shifting"] = "+".join(WORKLOADS.values())
NUM_WORKERS = 8
STATICS = ("8M/512", "8M/2048", *(f"{k}P{8 - k}D" for k in range(1, 8)))
ROUTERS = ("adaptive:8M", "oracle:8M", "closed_form:8M")
RESULT = Path(__file__).parents[1] / "results" / "simulated" / "routing_study.json"
QUANTILES = (0.1, 0.5, 0.9)
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


def study(params: str, name: str, count: int, rows: Sequence[Row]) -> Iterator[Row]:
    """A row for each arrangement of the machine; those that `rows` has already as they are."""
    parameters, requests = find_parameters(params), workload(WORKLOADS[name], count)
    scenario = Scenario.of(base_config(), parameters, requests, default_slo(parameters, requests))
    arrangements = [Arrangement.parse(text) for text in (*ROUTERS, *STATICS)]
    done = {row["arrangement"]: row for row in rows if (row["machine"], row["workload"]) == (params, name)}
    known = {
        text: Goodput(row["goodput per worker"] * NUM_WORKERS, row["is bound"], tuple(map(tuple, row["rates"])))
        for text, row in done.items()
    }
    start = time.perf_counter()
    for arrangement, found in search(scenario, arrangements, known):
        row = {"machine": params, "workload": name, "arrangement": arrangement.text}
        row |= {"goodput per worker": found.rate / NUM_WORKERS, "is bound": found.is_bound}
        row |= {"rates": [[round(rate, 3), round(attainment, 4)] for rate, attainment in found.points]}
        row |= {"requests": len(scenario.requests), "slo": str(scenario.slo)}
        yield done.get(arrangement.text) or {**row, "wall s": round(time.perf_counter() - start, 1)}
        start = time.perf_counter()


def compare(rows: Sequence[Row]) -> Row:
    """Of the rows of one machine and workload: how the adaptive router does."""
    found = {row["arrangement"]: row["goodput per worker"] for row in rows}
    best = max((name for name in found if ":" not in name), key=lambda name: found[name])
    adaptive = found["adaptive:8M"]
    over = {r["arrangement"]: f"{'>' * r['is bound']}{adaptive / r['goodput per worker']:.3f}" for r in rows}
    cell = {"machine": rows[0]["machine"], "workload": rows[0]["workload"], "adaptive": adaptive, "best static": best}
    ratios = {"adaptive / best static": over[best], "adaptive / closed_form": over["closed_form:8M"]}
    return {**cell, **ratios, "regret": 1 - adaptive / found["oracle:8M"]}


def predictions(name: str, requests: Sequence[WorkloadRequest]) -> Row:
    """How well lengths are foretold in order of arrival, beside the mean so far of a prompt's bucket (from 128 on)."""
    predictor, sums = LengthPredictor(), defaultdict(lambda: np.array((128.0, 1.0)))
    num_covered, losses = 0, np.zeros(2)
    for request in requests:
        length, bucket = request.num_output_tokens, sums[request.num_prompt_tokens.bit_length()]
        predicted = predictor.quantiles(request.num_prompt_tokens, QUANTILES)
        num_covered += predicted[0] <= length <= predicted[2]
        for probability, quantile in zip(QUANTILES, predicted, strict=True):
            errors = length - np.array((quantile, bucket[0] / bucket[1]))
            losses += np.maximum(probability * errors, (probability - 1) * errors)
        predictor.observe(request.num_prompt_tokens, length)
        bucket += length, 1
    pinball, bucket_pinball = losses / len(requests)
    coverage = num_covered / len(requests)
    return {"trace": name, "80 % covers": coverage, "pinball": pinball, "of the bucket mean": bucket_pinball}


def show(rows: Sequence[Row]) -> None:
    """Every arrangement's goodput per worker, then what they say of the router."""
    cells: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        cells[row["machine"], row["workload"]].append(row)
    names = list(dict.fromkeys(row["arrangement"] for row in rows))
    values = [
        [*cell, *(next((_shown(row) for row in group if row["arrangement"] == name), None) for name in names)]
        for cell, group in cells.items()
    ]
    compared = [compare(group) for group in cells.values() if {*ROUTERS} < {row["arrangement"] for row in group}]
    print(format_table(["machine", "workload", *names], values), "", sep="\n")
    print(format_table(list(compared[0]) if compared else [], [list(row.values()) for row in compared]))


def _shown(row: Row) -> str:
    return f"{'<' * row['is bound']}{row['goodput per worker']:.3f}"


def main() -> None:
    parser = arguments(__doc__)
    parser.set_defaults(json=RESULT)
    parser.add_argument("--params", nargs="+", default=["8x4090", "8xh20", "8xh200"])
    parser.add_argument("--workloads", nargs="+", default=[*WORKLOADS], choices=[*WORKLOADS])
    parser.add_argument("--max-requests", type=int, default=3000)
    parser.add_argument("--predict", action="store_true", help="measure the length predictor instead")
    args = parser.parse_args()
    if args.predict:
        emit("predictor", {}, [predictions(name, read_trace(path).requests) for name, path in AZURE.items()])
        return
    rows: list[Row] = load(args.json)["rows"] if args.json.exists() else []
    cells = [(params, name) for name in args.workloads for params in args.params]
    for params, name in tqdm(cells):
        for row in study(params, name, args.max_requests, rows):
            if row not in rows:
                rows.append(row)
                save(make_report("routing_study", {"requests": args.max_requests}, rows, "simulated"), args.json)
    show(rows)


if __name__ == "__main__":
    main()

"""A public trace, replayed: Azure's LLM inference traces (*.csv) or Mooncake's (*.jsonl).

Requests come at the trace's own times, made faster by --speed, or stretched to a mean --rate. Lengths are the trace's,
cut to what the engine allows; tokens are made up, the same for equal hash ids, so prefixes are shared as they were.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from math import inf

from load import Workload, add_run_arguments, play, result_row, serve_and_report
from report import Row

from nanopd import LLM


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_run_arguments(parser)
    parser.add_argument("--trace", required=True, help="*.csv (Azure) or *.jsonl (Mooncake)")
    parser.add_argument("--max-requests", type=int, default=300, help="the first ones of the trace")
    pace = parser.add_mutually_exclusive_group()
    pace.add_argument("--rate", type=float, help="requests per second, on average")
    pace.add_argument("--speed", type=float, default=1.0, help="times as fast as the trace")
    parser.add_argument("--warm-up", type=float, default=0.0, help="seconds whose arrivals do not count")
    args = parser.parse_args()
    workload = Workload(args.trace, args.rate, args.seed)
    if not workload.is_trace:
        parser.error(f"argument --trace: {args.trace}, allowed: *.csv (Azure), *.jsonl (Mooncake)")

    def measure(llm: LLM, key: Row) -> list[Row]:
        jobs = workload.jobs(llm, inf, args.max_requests)
        jobs = [replace(job, due_s=job.due_s / (1.0 if args.rate else args.speed)) for job in jobs]
        run = play(llm, jobs, workload.label)
        rate = args.rate or (len(jobs) - 1) / jobs[-1].due_s
        row = {**key, "workload": workload.label, "rate": rate, "speed": None if args.rate else args.speed}
        return [result_row(run, row, args.slo, (args.warm_up, jobs[-1].due_s + 1e-3))]

    serve_and_report("trace", args, measure, warm_up_s=args.warm_up, max_requests=args.max_requests)


if __name__ == "__main__":
    main()

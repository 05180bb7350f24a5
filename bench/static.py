"""Latency without arrivals: requests one after the other, then batches that are submitted at once.

The first row of a workload is serial: each request finds the engine idle. Batches show what a full engine makes of the
same lengths; E2E of a batch is that of its requests, tokens/s are over the whole batch.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from math import inf

from load import WORKLOADS, Workload, add_run_arguments, play, result_row, serve_and_report
from report import Row

from nanopd import LLM


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_run_arguments(parser)
    parser.add_argument("--workloads", nargs="+", default=["short", "long"], help=WORKLOADS)
    parser.add_argument("--output-len", type=int, default=128, help="tokens of an answer")
    parser.add_argument("--requests", type=int, default=5, help="of the serial row")
    parser.add_argument("--batches", type=int, nargs="*", default=[4, 16])
    args = parser.parse_args()

    def measure(llm: LLM, key: Row) -> list[Row]:
        rows = []
        for name in args.workloads:
            workload = Workload(name, inf, args.seed, output_len=args.output_len)
            for batch in (None, *args.batches):
                label = f"{workload.label}, {f'{batch} at once' if batch else 'one by one'}"
                jobs = replace(workload, seed=args.seed + (batch or 0)).jobs(llm, inf, batch or args.requests)
                run = play(llm, jobs, label, one_by_one=batch is None)
                rows.append(result_row(run, {**key, "workload": label}, args.slo))
        return rows

    serve_and_report("static", args, measure, output_len=args.output_len)


if __name__ == "__main__":
    main()

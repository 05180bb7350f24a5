"""Requests that arrive at random, one run: a warm-up that does not count, a window that does, and its drain.

Gaps between arrivals are Gamma distributed; --cv 1 is a Poisson process. Latencies count from when a request was due,
rates are over the time to the end of the last request that arrived in the window.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from load import WORKLOADS, Workload, add_run_arguments, play, result_row, save_timeline, serve_and_report
from report import Row

from nanopd import LLM


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_run_arguments(parser)
    parser.add_argument("--workload", default="mixed", help=WORKLOADS)
    parser.add_argument("--rate", type=float, default=1.0, help="requests per second")
    parser.add_argument("--cv", type=float, default=1.0, help="coefficient of variation of the gaps between arrivals")
    parser.add_argument("--output-len", type=int, default=128, help="tokens of an answer (of text: at most)")
    parser.add_argument("--warm-up", type=float, default=10.0, help="seconds")
    parser.add_argument("--window", type=float, default=60.0, help="seconds")
    parser.add_argument("--timeline", type=Path, help="write what workers did in the window here, for Perfetto")
    args = parser.parse_args()
    workload = Workload(args.workload, args.rate, args.seed, args.cv, args.output_len)
    window_s = args.warm_up, args.warm_up + args.window

    def measure(llm: LLM, key: Row) -> list[Row]:
        run = play(llm, workload.jobs(llm, window_s[1]), workload.label)
        if args.timeline:
            save_timeline(run, llm.config, f"{workload.label} at {args.rate:g}/s", args.timeline, window_s)
        row = {**key, "workload": workload.label, "rate": args.rate, "cv": args.cv, "window_s": args.window}
        return [result_row(run, row, args.slo, window_s)]

    serve_and_report("poisson", args, measure, warm_up_s=args.warm_up, output_len=args.output_len)


if __name__ == "__main__":
    main()

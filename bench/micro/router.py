"""What a decision costs the parent: eight workers, a thousand requests in the system, the real engine.

The workers only take the time that the cost model says, under a virtual clock, step by step; the time of each `choose`
is the parent's own. A thousand long answers are under way while the requests come whose decisions are counted.
"""

from __future__ import annotations

import time
from collections.abc import Sequence as Workers

import numpy as np

from bench.lib.report import Row, arguments, emit
from nanopd.checkpoints.model_files import read_model_config, resolve
from nanopd.config import EngineConfig
from nanopd.core.sequence import Sequence
from nanopd.lab.simulator import simulate
from nanopd.lab.workload import WorkloadRequest
from nanopd.messages import Route
from nanopd.routing.factory import find_parameters, make_policy
from nanopd.routing.policy import Decision, Policy, WorkerLoad

BAR_US = 200
LEVELS = {"ttft_ms": 200, "tpot_ms": 10, "first_gap_ms": 50}
SPLITS = {"8 mixed": ["mixed"] * 8, "4 prefill + 4 decode": ["prefill"] * 4 + ["decode"] * 4}


class Timed:
    """A `Policy` that notes how long each choice of another one takes, and how many requests there are."""

    def __init__(self, policy: Policy) -> None:
        self.costs, self.routes = policy.costs, policy.routes
        self._policy, self._unfinished = policy, set[int]()
        self.notes: list[tuple[int, float]] = []  # requests in the system, microseconds

    def choose(self, feasible: list[Route], seq: Sequence, workers: Workers[WorkerLoad], now_s: float) -> Decision:
        start = time.perf_counter()
        decision = self._policy.choose(feasible, seq, workers, now_s)
        self.notes.append((len(self._unfinished), 1e6 * (time.perf_counter() - start)))
        self._unfinished.add(seq.seq_id)
        return decision

    def finished(self, seq: Sequence) -> None:
        self._unfinished.discard(seq.seq_id)
        self._policy.finished(seq)


def measure(policy: str, split: str, num_present: int, num_counted: int) -> Row:
    parameters = find_parameters("8xh200")
    model = read_model_config(resolve("Qwen3-8B", load_format="dummy"), "auto", device_is_cpu=False)
    workers = [{"device": "cpu", "role": role} for role in SPLITS[split]]
    config = EngineConfig(model="Qwen3-8B", policy=policy, workers=workers, slo=LEVELS, max_model_len=8192)
    present = [WorkloadRequest(0.002 * i, 100, 4000, i) for i in range(num_present)]
    start_s = present[-1].arrival_s
    counted = [WorkloadRequest(start_s + 0.01 * i, 100 + i % 1900, 20, num_present + i) for i in range(num_counted)]
    timed = Timed(make_policy(config, parameters))
    simulate(config, model, parameters, present + counted, timed, may_jump=False)
    times_us = [us for count, us in timed.notes if count >= num_present]
    p50, p99 = np.percentile(times_us, (50, 99))
    row = {"policy": policy, "workers": split, "decisions": len(times_us), "p50_us": p50, "p99_us": p99}
    return {**row, "mean_us": float(np.mean(times_us)), "bar_us": BAR_US}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--present", type=int, default=1000, help="requests in the system")
    parser.add_argument("--counted", type=int, default=500, help="decisions")
    args = parser.parse_args()
    cases = (("adaptive", "8 mixed"), ("adaptive", "4 prefill + 4 decode"), ("closed_form", "8 mixed"))
    rows = [measure(policy, split, args.present, args.counted) for policy, split in cases]
    emit("router", {"params": "8xh200"}, rows, path=args.json)


if __name__ == "__main__":
    main()

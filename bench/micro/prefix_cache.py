"""What the prefix cache finds of a Mooncake trace.

All lengths of the trace are divided by `--scale`, so that it fits; equal hash ids stay equal tokens. The whole trace
goes through the real engine, scheduler and block manager in its order, `--at-once` requests at a time, before a worker
that computes nothing (that of bench.micro.scheduler). Its pool has `--pools` percent of the blocks that the prompts
hold (full and distinct ones); the first row is a pool in which nothing is ever lost. `hit_rate` is of all prompt
tokens.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from bench.lib.report import Row, arguments, emit, greedy
from bench.micro.scheduler import InstantWorker
from nanopd.config import EngineConfig, ModelConfig
from nanopd.core.block_manager import extend_keys
from nanopd.engine.engine import Engine
from nanopd.lab.workload import WorkloadRequest, prompt_token_ids, read_trace
from nanopd.request import Request

BAR = 0.95  # of the hits of an endless cache, with room for all blocks
VOCAB_SIZE = 150_000


def serve(requests: Sequence[tuple[list[int], int]], num_blocks: int, block_size: int, at_once: int) -> Row:
    """All `requests`, in their order, before a pool of `num_blocks`."""
    longest = max(len(prompt) + num_output for prompt, num_output in requests)
    model = ModelConfig("llama", VOCAB_SIZE, 8, 8, 1, 1, 1, 8, longest, 1e-5, 1e4)
    config = EngineConfig(model="none", block_size=block_size, max_num_seqs=at_once)
    engine = Engine(config, model, [InstantWorker(1 + num_blocks, [0], 0)], time.monotonic)
    arrivals, logs = enumerate(requests), []
    start = time.perf_counter()
    while len(logs) < len(requests):
        for number, (prompt, num_output) in islice(arrivals, at_once - len(engine.seqs)):
            engine.submit(Request(str(number), prompt, greedy(num_output), time.monotonic()))
        logs += [update.seq.log() for update in engine.step() if update.is_finished]
    hit_rate = sum(log.num_cached_tokens for log in logs) / sum(log.num_prompt_tokens for log in logs)
    preempted = engine.schedulers[0].num_preemptions
    return {"blocks": num_blocks, "hit_rate": hit_rate, "preempted": preempted, "s": time.perf_counter() - start}


def curve(trace: Sequence[WorkloadRequest], args: argparse.Namespace) -> list[Row]:
    # every scale-th token, so that a hash id stands for as many fewer
    requests = [(prompt_token_ids(r, VOCAB_SIZE)[:: args.scale], -(-r.num_output_tokens // args.scale)) for r in trace]
    num_tokens, distinct = 0, set[bytes]()
    for prompt, num_output in requests:
        keys: list[bytes] = []
        extend_keys(keys, prompt, args.block_size, b"")
        distinct.update(keys)
        num_tokens += len(prompt) + num_output
    pools = {None: num_tokens // args.block_size + 2 * len(requests)}
    pools |= {percent: len(distinct) * percent // 100 for percent in args.pools}
    rows: list[Row] = []
    for percent, num_blocks in pools.items():
        row = serve(requests, num_blocks, args.block_size, args.at_once)
        share = row["hit_rate"] / rows[0]["hit_rate"] if rows else 1.0
        rows.append({"pool_percent": percent, **row, "of_endless": share, "bar": BAR if percent == 100 else None})
    return rows


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("trace", type=Path, help="a Mooncake trace, *.jsonl")
    parser.add_argument("--scale", type=int, default=32, help="what all lengths are divided by")
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--pools", type=int, nargs="*", default=[25, 50, 100], help="percent of the distinct blocks")
    parser.add_argument("--at-once", type=int, default=32, help="requests under way")
    parser.add_argument("--max-requests", type=int, help="the first ones of the trace")
    args = parser.parse_args()
    trace = read_trace(args.trace, max_requests=args.max_requests).requests
    settings = {"trace": args.trace.name, "scale": args.scale}
    settings |= {"block_size": args.block_size, "at_once": args.at_once, "requests": len(trace)}
    emit("prefix_cache", settings, curve(trace, args), path=args.json)


if __name__ == "__main__":
    main()

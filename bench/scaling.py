"""What changes with the number of workers, a GPU each: start, transfers, a sequence on its way, the parent, a death.

start     Seconds until N workers have given first answers.
hops      A sequence that is handed around all workers while it decodes; its tokens should be those of one left alone.
          `moved` is the time from MOVING to MOVED in its log, in which its steps in flight come back and its blocks
          move; the gap is what its reader sees. The first round does not count.
feed      Whether one parent feeds N workers: GPU time without work while all decode as many sequences, by the workers'
          events, and what a step of one worker costs the engine's thread.
kill      kill -9 of the last worker under load: what the others notice, and how long until all is as before.
transfer  KV blocks between each ordered pair, and between all pairs at once, by workers without weights.

All but the last run on one collocated engine; `--workers 1 2 4` takes so many of the configuration's devices in turn.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from math import inf
from typing import Any

import numpy as np

from bench.lib.load import Run, Workload, engine_config, play, serving, serving_arguments, settings_of
from bench.lib.report import Row, abort_all, arguments, device_name, emit, make_report, median_and_p99, save
from bench.micro.transfer import BLOCK_SIZE, Pool, pool_config
from nanopd import LLM, EngineConfig, Route
from nanopd.checkpoints.model_files import read_model_config, resolve
from nanopd.config import KVLayout
from nanopd.core.sequence import SequenceStatus
from nanopd.engine.engine import Engine
from nanopd.messages import EventKind, FinishReason, RequestLog
from nanopd.workers.process import WorkerProcess

SECTIONS = ("start", "hops", "feed", "kill", "transfer")
MAX_IDLE = 5.0  # %
MIN_GB_S = 300.0  # between two H200
NUM_ROUNDS, STAY = 3, 8  # of the walk around all workers; tokens between two hops
STEADY_S = 2.0
KILL_AT_S, AROUND_S = 5.0, 3.0  # the load before the kill; what of it is looked at before and after
WAIT_S = 300.0
REPEATS = 10


def row(what: str, value: float | None, unit: str, bar: float | None = None) -> Row:
    return {"what": what, "value": value, "unit": unit, "bar": bar}


def percentile_rows(what: str, values: Sequence[float] | np.ndarray) -> Iterator[Row]:
    for name, value in zip(("p50", "p99"), median_and_p99(values), strict=True):
        yield row(f"{what}, {name}", value, "ms")


def ask(llm: LLM, question: Callable[[Engine], Any]) -> Any:
    """What the engine, in its own thread, answers."""
    return llm._thread.call(question)


def wait_until(llm: LLM, condition: Callable[[Engine], bool]) -> float:
    """When, on the engine's clock, it was first seen to hold."""
    end_s = time.monotonic() + WAIT_S
    while not ask(llm, condition):
        assert time.monotonic() < end_s, "waited in vain"
        time.sleep(0.001)
    return time.monotonic()


def pid_of(engine: Engine, worker: int) -> int:
    process = engine.workers[worker]
    assert isinstance(process, WorkerProcess) and process._process.pid is not None
    return process._process.pid


def hop_rows(llm: LLM, num_tokens: int) -> Iterator[Row]:
    num_workers, num_hops = len(llm.config.workers), NUM_ROUNDS * len(llm.config.workers)
    (job,) = Workload(f"{num_tokens}/{(num_hops + 2) * 4 * STAY}", inf).jobs(llm, inf, 1)
    alone = llm.submit(job.prompt, job.params, route=Route(0, 0)).result()
    llm.stats(reset=True)
    handle = llm.submit(job.prompt, job.params, route=Route(0, 0), request_id="walker", stream=True)
    steps = iter(handle)
    for hop in range(num_hops):
        list(islice(steps, STAY))
        worker = (hop + 1) % num_workers
        ask(llm, lambda engine: engine.move("walker", worker))  # noqa: B023
        wait_until(llm, lambda engine: engine.seqs["walker"].worker == worker)  # noqa: B023
    tokens = handle.result().outputs[0].token_ids
    is_same = [a == b for a, b in zip(tokens, alone.outputs[0].token_ids, strict=True)]
    (log,) = llm.stats(reset=True).logs
    moving, moved = (event_times(log, kind)[num_workers:] for kind in (EventKind.MOVING, EventKind.MOVED))
    after = np.searchsorted(log.token_times_s, moved)
    gaps_ms = np.diff(log.token_times_s) * 1e3
    yield row(f"tokens as without {num_hops} hops", 100 * float(np.mean(is_same)), "%", 100.0)
    yield from percentile_rows(f"hop of {num_tokens} tokens and more: moved", (moved - moving) * 1e3)
    yield from percentile_rows("gap between tokens over a hop", gaps_ms[after - 1])
    yield row("gap between tokens otherwise, p50", float(np.median(gaps_ms)), "ms")


def event_times(log: RequestLog, kind: EventKind, worker: int | None = None) -> np.ndarray:  # [*] float64
    return np.array([e.time_s for e in log.events if e.kind is kind and worker in (None, e.worker)])


@contextmanager
def decoding(llm: LLM, batch: int, num_tokens: int) -> Iterator[None]:
    """`batch` sequences on each worker, all of them decoding."""
    num_workers, room = len(llm.config.workers), llm.config.max_len_of(llm.model_config) - num_tokens
    jobs = Workload(f"{num_tokens}/{min(room, 4096)}", inf).jobs(llm, inf, batch * num_workers)
    routes = [Route(worker, worker) for worker in range(num_workers)] * batch
    handles = [llm.submit(job.prompt, job.params, route=route) for job, route in zip(jobs, routes, strict=True)]
    wait_until(llm, lambda engine: all(seq.status is SequenceStatus.RUNNING for seq in engine.seqs.values()))
    yield
    abort_all(handles)
    wait_until(llm, lambda engine: not engine.has_unfinished)


def feed_rows(llm: LLM, batch: int, num_tokens: int) -> Iterator[Row]:
    ends: list[float] = []
    with decoding(llm, batch, num_tokens):
        llm.stats(reset=True)
        start_s, start_cpu_s = time.monotonic(), ask(llm, lambda _: time.thread_time())
        llm.observe(lambda work: ends.append(work.duration_s))
        time.sleep(STEADY_S)
        cpu_s = ask(llm, lambda _: time.thread_time()) - start_cpu_s
        stats, seconds = llm.stats(), time.monotonic() - start_s
        llm.observe(None)
    idle = [100 * (1 - busy_s / seconds) for busy_s in stats.busy_s]
    name = f"{batch} x {num_tokens} on each"
    yield row(f"{name}: decode step, p50", 1e3 * float(np.median(ends)), "ms")
    yield row(f"{name}: no work, mean of the workers", float(np.mean(idle)), "%")
    yield row(f"{name}: no work, most of a worker", max(idle), "%", MAX_IDLE)
    yield row(f"{name}: parent, per step of a worker", 1e6 * cpu_s / len(ends), "us")
    yield row(f"{name}: parent, share of a core", 100 * cpu_s / seconds, "%")


class Kill(threading.Thread):
    """Kills a worker after a while, and sees it come back."""

    def __init__(self, llm: LLM, worker: int) -> None:
        super().__init__(daemon=True)
        self._llm, self._worker = llm, worker
        self.killed_s = self.back_s = 0.0

    def run(self) -> None:
        worker = self._worker
        pid, generation = ask(self._llm, lambda e: (pid_of(e, worker), e.schedulers[worker].generation))
        time.sleep(KILL_AT_S)
        self.killed_s = time.monotonic()
        os.kill(pid, signal.SIGKILL)
        self.back_s = wait_until(self._llm, lambda engine: engine.schedulers[worker].generation > generation)


def kill_rows(llm: LLM, load: str, rate: float, seconds: float) -> Iterator[Row]:
    worker = len(llm.config.workers) - 1
    jobs = Workload(load, rate * len(llm.config.workers)).jobs(llm, seconds)
    kill = Kill(llm, worker)
    kill.start()
    run = play(llm, jobs, "kill")
    kill.join()
    yield row(f"{load} at {rate:g}/s per worker for {seconds:g} s: requests", len(run.logs), "")
    failed = [log for log in run.logs if log.finish_reason is not FinishReason.LENGTH]
    yield row("requests that failed", len(failed), "", 0.0)
    yield from aftermath_rows(run, worker, kill.killed_s)
    yield row("the worker serves again after", kill.back_s - kill.killed_s, "s")


def aftermath_rows(run: Run, worker: int, killed_s: float) -> Iterator[Row]:
    """What happened to those that the worker had, and to those that it had not."""
    hit = [log for log in run.logs if len(event_times(log, EventKind.PREEMPTED, worker))]
    spared = [log for log in run.logs if log not in hit]
    ends_s = [event_times(log, EventKind.FINISHED)[0] - killed_s for log in hit]
    yield row("requests that the worker had", len(hit), "")
    yield row("the last of them was answered after", max(ends_s, default=None), "s")
    silences = [gaps_ms(log, killed_s - AROUND_S, killed_s + WAIT_S).max(initial=0.0) for log in hit]
    yield from percentile_rows("longest gap of each of them", silences)
    for name, start_s in (("before", killed_s - AROUND_S), ("after", killed_s)):
        gaps = np.concatenate([np.empty(0), *(gaps_ms(log, start_s, start_s + AROUND_S) for log in spared)])
        yield from percentile_rows(f"others, {AROUND_S:g} s {name}: gap", gaps)
        yield row(f"others, {AROUND_S:g} s {name}: longest gap", gaps.max(initial=0.0), "ms")
        arrivals = [(event_times(log, EventKind.ARRIVED)[0], log.token_times_s) for log in spared]
        ttft = [1e3 * (times[0] - at) for at, times in arrivals if 0 <= at - start_s < AROUND_S and len(times)]
        yield from percentile_rows(f"others, {AROUND_S:g} s {name}: TTFT", ttft)


def gaps_ms(log: RequestLog, start_s: float, end_s: float) -> np.ndarray:  # [*] float64
    """Between tokens, of those that end within a time."""
    ends = log.token_times_s[1:]
    return 1e3 * np.diff(log.token_times_s)[(ends >= start_s) & (ends < end_s)]


def transfer_rows(config: EngineConfig, num_tokens: int) -> Iterator[Row]:
    path = resolve(config.model, load_format="dummy")
    devices = [worker.device for worker in config.workers]
    model = read_model_config(path, config.dtype, devices[0] == "cpu")
    num_workers, num_blocks = len(devices), -(-num_tokens // BLOCK_SIZE)
    bar = None if "cpu" in devices else MIN_GB_S
    num_mb = num_blocks * KVLayout.of(model, BLOCK_SIZE).bytes_per_block / 1e6
    pool = Pool(pool_config(config.model, devices, num_tokens, config.transfer), model, path)
    pairs = [((dst - shift) % num_workers, dst) for shift in range(1, num_workers) for dst in range(num_workers)]
    for src, dst in sorted(pairs):
        ms, _ = pool.median(num_blocks, REPEATS, pairs=[(src, dst)])
        name = f"{src}->{dst}: {num_tokens} tokens, {pool.path(src, dst).value}"
        yield row(name, num_mb / max(ms, 1e-3), "GB/s", bar)
    _, seen_ms = pool.median(num_blocks, REPEATS, pairs=pairs)  # each from another source at any time
    yield row("all pairs at once: into each worker", (num_workers - 1) * num_mb / seen_ms, "GB/s")
    yield row("all pairs at once: in all", len(pairs) * num_mb / seen_ms, "GB/s")
    pool.close()


def rows_of(config: EngineConfig, args: argparse.Namespace) -> Iterator[Row]:
    """What is asked for, of workers on all devices of `config`."""
    is_many = len(config.workers) > 1
    if set(args.sections) != {"transfer"}:
        start_s = time.perf_counter()
        # blocks found in a cache were computed in other steps: in 16 bits, with other last digits
        with serving(config.replace(enable_prefix_caching=False)) as llm:
            seconds = time.perf_counter() - start_s
            if "start" in args.sections:
                yield row("ready, with first answers, after", seconds, "s")
            if "hops" in args.sections and is_many:
                yield from hop_rows(llm, args.tokens)
            for batch in args.batches if "feed" in args.sections else ():
                yield from feed_rows(llm, batch, args.context)
            if "kill" in args.sections and is_many:
                yield from kill_rows(llm, args.load, args.rate, args.seconds)
    if "transfer" in args.sections and is_many:
        yield from transfer_rows(config, args.tokens)


def main(argv: Sequence[str] | None = None) -> None:
    parser = serving_arguments(arguments(__doc__))
    parser.add_argument("--workers", type=int, nargs="+", help="how many; default: all of the configuration")
    parser.add_argument("--sections", nargs="+", default=SECTIONS, choices=SECTIONS)
    parser.add_argument("--tokens", type=int, default=2048, help="of what is moved")
    parser.add_argument("--batches", type=int, nargs="+", default=[64, 256], help="sequences that decode on a worker")
    parser.add_argument("--context", type=int, default=512, help="their tokens when they begin")
    parser.add_argument("--load", default="1024/128", help="IN/OUT, tokens of the requests beside the kill")
    parser.add_argument("--rate", type=float, default=8.0, help="of these, requests/s per worker")
    parser.add_argument("--seconds", type=float, default=30.0, help="in which they arrive")
    args = parser.parse_args(argv)
    base = engine_config(args)
    device = device_name(base)
    devices = [worker.device for worker in base.workers]
    rows: list[Row] = []
    settings = {"engine": settings_of(base)}
    for count in args.workers or [len(devices)]:
        config = base.replace(policy="collocated", workers=[{"device": device} for device in devices[:count]])
        for found in rows_of(config, args):
            rows.append({"workers": count, **found})
            print(*rows[-1].values(), sep="  ", file=sys.stderr, flush=True)
            if args.json:
                save(make_report("scaling", settings, rows, device), args.json)  # anew after each row
    emit("scaling", settings, rows, device=device)


if __name__ == "__main__":
    main()

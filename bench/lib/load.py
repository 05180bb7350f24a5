"""The open-loop driver of the serving benches: requests in when they are due, one row of figures out.

Every bench that serves requests over time plays them here, through `LLM.submit`. The clock of a request starts when its
arrival is due, whether or not anybody is ready to take it. Prompts and arrivals follow from a workload's name, its rate
and a seed alone, so each policy is given the same. Ctrl-C ends a run early: its row tells of what was done by then.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from bench.lib.report import Row, greedy
from bench.lib.rows import limits_of
from nanopd import LLM, EngineConfig, SamplingParams
from nanopd.commands.run import DEMO_PROMPTS
from nanopd.config import ModelConfig, load_config, routes_for_policy
from nanopd.errors import ConfigError
from nanopd.lab import workload as lengths
from nanopd.lab.planner import ORACLE, Arrangement, Oracle
from nanopd.lab.simulator import simulate
from nanopd.lab.workload import FixedLength, WorkloadRequest
from nanopd.messages import FinishReason, RequestLog, Work
from nanopd.metrics import SLO, RequestMetrics, summarize
from nanopd.routing.adaptive import AdaptivePolicy
from nanopd.routing.cost_model import Parameters
from nanopd.routing.factory import make_policy

PROMPTS = {"short": lengths.SHORT_PROMPTS, "long": lengths.LONG_PROMPTS, "mixed": lengths.MIXED_PROMPTS}
NATURAL = "natural"
WORKLOADS = f"{', '.join(PROMPTS)}, IN/OUT (tokens), {NATURAL}, a *.txt file with a prompt per line"
WARM_UP_TOKENS = 64
SAMPLES = ("ttft_ms", "first_gap_ms", "tpot_ms", "e2e_ms")  # of each request, in a row's `samples`


@dataclass(frozen=True, slots=True)
class Job:
    """A request that is ready to be submitted."""

    due_s: float  # since the start of the run
    prompt: str | list[int]
    params: SamplingParams


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests by name: a distribution of lengths, a trace (*.csv Azure, *.jsonl Mooncake), or prompts of text."""

    name: str
    rate: float | None = None  # requests/s; None: the trace's own times
    seed: int = 0
    cv: float = 1.0  # of the gaps between arrivals; 1: Poisson
    output_len: int = 128  # of what has no output lengths of its own

    @property
    def label(self) -> str:
        return Path(self.name).stem if self.is_trace else self.name

    @property
    def is_trace(self) -> bool:
        return self.name.endswith((".csv", ".jsonl"))

    def jobs(self, llm: LLM, seconds: float, max_requests: int | None = None) -> list[Job]:
        """What arrives within `seconds`, and of that the first `max_requests`."""
        if self.name == NATURAL or self.name.endswith(".txt"):
            return self._text_jobs(llm, seconds, max_requests)
        requests = self.requests(llm.config.max_len_of(llm.model_config), seconds, max_requests)
        prompts = (lengths.prompt_token_ids(r, llm.model_config.vocab_size) for r in requests)
        return [Job(r.arrival_s, p, greedy(r.num_output_tokens)) for r, p in zip(requests, prompts)]

    def requests(self, max_len: int, seconds: float, max_requests: int | None = None) -> list[WorkloadRequest]:
        """As `jobs`, with lengths in place of tokens, `max_len` at most of prompt and answer.

        Runs in one engine share no prompts, unless a trace does.
        """
        salt = zlib.crc32(f"{self.label} {self.rate} {self.seed}".encode()) << 40
        traced = self.is_trace
        requests = self._trace(max_len, seconds, max_requests) if traced else self._synthetic(seconds, max_requests)
        return [
            replace(r, prompt_seed=r.prompt_seed + salt, hash_ids=tuple(h + salt for h in r.hash_ids))
            for r in requests
            if r.arrival_s < seconds
        ]

    def _synthetic(self, seconds: float, max_requests: int | None) -> list[WorkloadRequest]:
        num_in, _, num_out = self.name.partition("/")
        if self.name not in PROMPTS and not (num_in.isdecimal() and num_out.isdecimal()):
            raise ConfigError("workload", self.name, WORKLOADS)
        if self.rate is None:
            raise ConfigError("rate", None, "requests per second, for what is no trace")
        prompts = PROMPTS.get(self.name) or FixedLength(int(num_in))
        outputs = FixedLength(int(num_out or self.output_len))
        count = max_requests or int(1.5 * self.rate * seconds) + 20  # more than will arrive
        return lengths.synthetic_requests(count, prompts, outputs, self.rate, self.cv, self.seed)

    def _trace(self, max_len: int, seconds: float, max_requests: int | None) -> list[WorkloadRequest]:
        """What is longer than the engine allows is cut: answers to a quarter of it, prompts to the rest."""
        if max_requests is None and self.rate is not None:
            max_requests = ceil(seconds * self.rate)
        limits = {"max_prompt_tokens": max_len - max_len // 4, "max_output_tokens": max_len // 4}
        paced = {"max_requests": max_requests, "requests_per_s": self.rate, "seed": self.seed}
        return lengths.read_trace(self.name, **paced, **limits).requests

    def _text_jobs(self, llm: LLM, seconds: float, max_requests: int | None) -> list[Job]:
        lines = DEMO_PROMPTS if self.name == NATURAL else Path(self.name).read_text(encoding="utf-8").splitlines()
        texts: list[Any] = [line for line in lines if line.strip()]
        if llm.tokenizer is not None and llm.tokenizer.chat_template is not None:
            texts = [llm.encode_chat([{"role": "user", "content": text}]) for text in texts]
        params = SamplingParams(temperature=0, max_tokens=self.output_len)
        timed = replace(self, name="1/1")._synthetic(seconds, max_requests)  # only the times are used
        return [Job(r.arrival_s, texts[i % len(texts)], params) for i, r in enumerate(timed) if r.arrival_s < seconds]


@dataclass(slots=True)
class Run:
    """What came of jobs; times are of the engine's clock."""

    start_s: float
    late_s: list[float] = field(default_factory=list)  # how long after each job was due it had been submitted
    logs: list[RequestLog] = field(default_factory=list)
    work: list[Work] = field(default_factory=list)
    busy_s: list[float] = field(default_factory=list)  # per worker
    num_devices: int = 1  # GPUs, or workers on the CPU
    num_blocks: list[int] = field(default_factory=list)  # per worker
    num_peak: list[int] = field(default_factory=list)  # blocks per worker
    seconds: float = 0.0  # to the end of the last request
    is_interrupted: bool = False


def play(llm: LLM, jobs: Sequence[Job], label: str = "", one_by_one: bool = False) -> Run:
    """Submit each job when it is due, or `one_by_one` when the one before has ended, and wait for all.

    The engine must be idle. Ctrl-C aborts what is under way.
    """
    llm.stats(reset=True)
    run = Run(time.monotonic() + (0.0 if one_by_one else 0.1), num_devices=num_devices(llm.config))
    llm.observe(run.work.append)
    handles = []
    try:
        for job in tqdm(jobs, label, unit="req", file=sys.stderr, disable=None):
            due_s = time.monotonic() if one_by_one else run.start_s + job.due_s
            time.sleep(max(0.0, due_s - time.monotonic()))
            handles.append(llm.submit(job.prompt, job.params, arrival_time_s=due_s))
            run.late_s.append(time.monotonic() - due_s)
            if one_by_one:
                handles[-1].result()
        while not all(handle.done() for handle in handles):
            time.sleep(0.02)
    except KeyboardInterrupt:
        run.is_interrupted = True
        for handle in handles:
            if not handle.done():
                handle.abort()
    run.seconds = time.monotonic() - run.start_s
    llm.observe(None)
    stats = llm.stats(reset=True)
    run.logs, run.busy_s = stats.logs, stats.busy_s
    if run.is_interrupted:  # what was aborted would count as missed
        run.logs = [log for log in run.logs if log.finish_reason is not FinishReason.ABORT]
    run.num_blocks, run.num_peak = [b.total for b in stats.blocks], [b.peak for b in stats.blocks]
    return run


class Simulation:
    """In place of an LLM: workers that take the time that `parameters` say. Its router too knows what was played."""

    def __init__(
        self, base: EngineConfig, arrangement: Arrangement, model: ModelConfig, parameters: Parameters
    ) -> None:
        self._config, self._model, self._parameters = arrangement.applied(base), model, parameters
        adaptive = Oracle if arrangement.policy == ORACLE else AdaptivePolicy
        self._policy = make_policy(self._config, parameters, adaptive)
        self._end_s = 0.0
        self.play([WorkloadRequest(0.0, WARM_UP_TOKENS, 8, seed) for seed in range(8)])  # as `serving` does

    def requests(self, workload: Workload, seconds: float) -> list[WorkloadRequest]:
        return workload.requests(self._config.max_len_of(self._model), seconds)

    def play(self, requests: Sequence[WorkloadRequest]) -> Run:
        start_s = self._end_s
        later = [replace(r, arrival_s=start_s + r.arrival_s) for r in requests]
        self._policy.routes = routes_for_policy(self._config.policy, self._config.roles)
        # jumps would leave out busy times
        engine, logs = simulate(self._config, self._model, self._parameters, later, self._policy, may_jump=False)
        self._end_s = engine.clock()
        run = Run(start_s, logs=logs, seconds=self._end_s - start_s, num_devices=num_devices(self._config))
        run.busy_s = [ledger.busy_us / 1e6 for ledger in engine.fleet.ledger.of_worker]
        run.num_peak = engine.fleet.peak_blocks
        run.num_blocks = [scheduler.residency.blocks.num_usable for scheduler in engine.schedulers]
        return run


def names_of(arrangement: Arrangement) -> dict[str, str]:
    """What a row says of it."""
    return {"policy": arrangement.policy, "split": arrangement.text.rpartition(":")[2]}


def num_devices(config: EngineConfig) -> int:
    return len({worker.device for worker in config.workers} - {"cpu"}) or len(config.workers)


def result_row(run: Run, key: Row, slo: SLO | None, window_s: tuple[float, float] | None = None) -> Row:
    """Figures of the requests that were due within `window_s` of the run (None: of all), the same for every bench.

    `samples` are of completed requests, in order of arrival; latencies in milliseconds.
    """
    start_s, end_s = window_s or (0.0, run.seconds)
    end_s = run.seconds if run.is_interrupted else end_s
    clock_s = run.start_s + start_s, run.start_s + end_s
    summary = summarize(run.logs, slo, clock_s)
    requests = [r for r in map(RequestMetrics.from_log, run.logs) if clock_s[0] <= r.arrived_s < clock_s[1]]
    done = sorted((r for r in requests if r.is_completed), key=lambda r: r.arrived_s)
    routes = Counter(str(r.route) for r in requests)
    gaps = np.concatenate([np.empty(0), *(r.itl_ms for r in done)])
    figures = {name: [getattr(r, name) for r in done] for name in SAMPLES}
    samples = {name: [None if x is None else round(x, 2) for x in values] for name, values in figures.items()}
    quantiles = np.percentile(gaps, range(101)).round(3).tolist() if len(gaps) else []
    return {
        **key,
        "num_devices": run.num_devices,
        "offered_per_s": len(requests) / (end_s - start_s) if window_s else None,
        "late_ms_max": 1e3 * max(run.late_s, default=0.0),
        "slo": slo and limits_of(slo),
        **asdict(summary),
        "output_tokens_per_s_per_device": summary.output_tokens_per_s / run.num_devices,
        "requests_per_s_per_device": summary.requests_per_s / run.num_devices,
        "routes": {route: count / len(requests) for route, count in sorted(routes.items())},
        "busy": [busy_s / run.seconds for busy_s in run.busy_s],
        "kv_peak": [n / total for n, total in zip(run.num_peak, run.num_blocks)],
        "is_interrupted": run.is_interrupted,
        "samples": {**samples, "itl_ms_percentiles": quantiles},
    }


def save_timeline(run: Run, config: EngineConfig, title: str, path: Path, window_s: tuple[float, float]) -> None:
    """What each worker did within `window_s` of the run, for Perfetto (ui.perfetto.dev) and `plots.timeline`.

    The format is Chrome's trace events: times in microseconds, a thread for a worker's steps, one for what moves to it.
    """
    names = [(2 * w, f"worker {w} ({worker.role.value})") for w, worker in enumerate(config.workers)]
    names += [(2 * w + 1, f"moves to {w}") for w, worker in enumerate(config.workers) if worker.role.may_decode]
    events: list[dict[str, Any]] = [
        {"name": "thread_name", "ph": "M", "pid": 0, "tid": tid, "args": {"name": name}} for tid, name in names
    ]
    for work in run.work:
        start_s, end_s = work.end_s - run.start_s - work.duration_s, work.end_s - run.start_s
        if end_s > window_s[0] and start_s < window_s[1]:
            num_in, num_out = work.num_prompt_tokens, work.num_decoding
            name = "mixed" if num_in and num_out else "prefill" if num_in else "decode" if num_out else "move"
            times = {"ts": round((start_s - window_s[0]) * 1e6), "dur": round(work.duration_s * 1e6)}
            args = {"prompt_tokens": num_in, "decoding": num_out, "bytes": work.num_moved_bytes}
            events.append({"name": name, "ph": "X", "pid": 0, "tid": 2 * work.worker + (name == "move"), **times})
            events[-1]["args"] = args
    path.write_text(json.dumps({"otherData": {"title": title}, "traceEvents": events}) + "\n", encoding="utf-8")


def serving_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """The parser with what says which engine serves."""
    parser.add_argument("--config", default="cpu-demo", help="a shipped configuration, or a YAML file")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key; repeatable")
    return parser


def engine_config(args: argparse.Namespace, defaults: Sequence[str] = ()) -> EngineConfig:
    """The configuration of a command line; `defaults` are overrides too, unless their keys are given."""
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    given = {override.partition("=")[0] for override in args.set}
    return load_config(args.config, [*args.set, *(d for d in defaults if d.partition("=")[0] not in given)])


@contextmanager
def serving(config: EngineConfig) -> Iterator[LLM]:
    """An engine whose workers have all done something."""
    with LLM(config=config, show_progress=sys.stderr.isatty()) as llm:
        ids = np.random.default_rng(1).integers(llm.model_config.vocab_size, size=(8, WARM_UP_TOKENS)).tolist()
        llm.generate(ids, greedy(8), False)
        yield llm


def settings_of(config: EngineConfig) -> dict[str, Any]:
    """What a report says of an engine; the arrangement is the rows' own."""
    rest = {name: value for name, value in asdict(config).items() if name not in ("policy", "workers")}
    return {**rest, "devices": [worker.device for worker in config.workers]}

"""Measures what steps and moves of blocks cost on the workers of a configuration, and fits the cost model to it.

Real workers do real steps, through the same messages as when they serve. Only the sequences are made up, of random
tokens, since a GPU's clock is higher while it multiplies equal numbers, which needs less power. Times are the workers'
own (on a GPU from event to event). All workers are taken to be alike: steps are measured on the first, whatever its
role, and moves between every pair of workers that a route has.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path

import numpy as np
import psutil
from tqdm import tqdm

from nanopd.config import ITEMSIZES, EngineConfig, ModelConfig, allowed_routes
from nanopd.errors import WorkerError
from nanopd.ipc.doorbell import Doorbell
from nanopd.messages import BLOCK_COPY, SLOT_INIT, TABLE_UPDATE, Route, RowFlag, StepBatch, TransferPlan
from nanopd.routing import cost_model
from nanopd.routing.closed_form import ClosedForm
from nanopd.routing.cost_model import MoveSample, Parameters, Sample, StepSample, Terms, rows_of
from nanopd.workers.paths import send_plan
from nanopd.workers.process import WorkerProcess
from nanopd.workers.supervisor import WorkerSupervisor

REPEATS = 5  # after a warm-up; the shortest counts, since whatever disturbs a measurement makes it longer
ANSWER_TIMEOUT_S = 120.0
COLUMNS = ("term", "value", "+-", "unit", "")
ERROR_COLUMNS = ("relative error", "fitted: median", "p90", "not fitted: median", "p90")
START = Terms(1.0, 0.1, 1e-6, 1e-4, 10.0, 0.1, 0.1, 0.1, 16.0, 1e-4, 0.1, 0.1, 0.1, 10.0)  # where fits begin
PEAKS = {  # By a part of the device's name, from data sheets: TFLOP/s of dense 16-bit products, GB/s of memory.
    "H200": (989.0, 4800.0),
    "H100": (989.0, 3350.0),
    "H20": (148.0, 4000.0),
    "RTX 4090": (165.2, 1008.0),
}


@dataclass(frozen=True, slots=True)
class Grid:
    """What to measure, as far as it fits the limits and the KV cache."""

    batches: tuple[int, ...]
    contexts: tuple[int, ...]
    chunks: tuple[int, ...]
    cached: tuple[int, ...]  # tokens before every other chunk
    mixed: tuple[tuple[int, int], ...]  # batch and context beside every other chunk
    moved: tuple[int, ...]  # tokens


FITTED = Grid(
    (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256),
    (64, 256, 1024, 4096, 16384),
    (16, 64, 128, 256, 500, 1000, 1500, 2048, 3000, 4096, 6000, 8192),  # few are multiples of a kernel's tile
    (1024, 4096, 16384),
    ((4, 512), (16, 256), (32, 1024), (64, 512), (128, 512)),
    (16, 64, 256, 512, 1024, 2048, 4096, 8192),
)
HELD_OUT = Grid(  # Other lengths and batches: the fit has to predict them.
    (3, 6, 12, 20, 40, 80, 160, 224),
    (128, 640, 2560, 8192),
    (32, 96, 384, 750, 1300, 2560, 5000, 7000),
    (512, 2048, 8192),
    ((2, 1024), (8, 384), (24, 768), (48, 256), (96, 640)),
    (32, 128, 384, 1536, 3072, 6144),
)


@dataclass(frozen=True, slots=True)
class StepShape:
    """A step: decode rows that have the same context, and at most one chunk of a prompt."""

    batch: int
    context: int
    num_new: int = 0
    num_cached: int = 0

    def rows(self) -> Iterator[tuple[int, int]]:
        """Start and length of each row."""
        yield from itertools.repeat((self.context - 1, 1), self.batch)
        if self.num_new:
            yield self.num_cached, self.num_new


def profile(
    config: EngineConfig, model: ModelConfig, path: Path, show_progress: bool = False
) -> tuple[Parameters, cost_model.Fit]:
    """Start the workers, measure, and stop them.

    Returns:
        Parameters, whose errors are those over the samples of HELD_OUT; and the fit to the samples of FITTED.

    Raises:
        WorkerError: a worker has failed, or does not answer.
    """
    with closing(WorkerSupervisor(config, model, path, Doorbell())) as processes:
        workers = processes.start()
        steps, moves = _measure(workers, FITTED, config, model, show_progress)
        held_steps, held_moves = _measure(workers, HELD_OUT, config, model, show_progress)
        num_kv_tokens = _num_kv_tokens(workers, config)
    fitted = cost_model.fit([*steps, *itertools.chain(*moves.values())], START)
    held_out: list[Sample] = [*held_steps, *itertools.chain(*held_moves.values())]
    parameters = Parameters(
        machine=machine(config),
        model=Path(config.model).name,
        provenance=f"measured by nanopd profile on {time.strftime('%Y-%m-%d')}",
        kv_bytes_per_token=config.kv_layout(model).bytes_per_token,
        num_kv_tokens=num_kv_tokens,
        terms=fitted.terms,
        pair_bandwidth={str(r): cost_model.fit(of_pair, START).terms.bandwidth for r, of_pair in moves.items()},
        stderr=fitted.stderr,
        errors=cost_model.prediction_errors(held_out, fitted.terms),
    )
    return parameters, fitted


def error_rows(
    fitted: Mapping[str, Mapping[str, float]], held_out: Mapping[str, Mapping[str, float]]
) -> list[list[str]]:
    """Rows of ERROR_COLUMNS, by kind of work; both arguments as `cost_model.prediction_errors` returns them."""
    return [[kind, *(f"{e:.1%}" for e in (*fitted[kind].values(), *held_out[kind].values()))] for kind in held_out]


def _measure(
    workers: Sequence[WorkerProcess], grid: Grid, config: EngineConfig, model: ModelConfig, show_progress: bool
) -> tuple[list[StepSample], dict[Route, list[MoveSample]]]:
    num_kv_tokens = _num_kv_tokens(workers, config)
    shapes = step_shapes(grid, config, config.max_len_of(model), num_kv_tokens)
    routes = [route for route in allowed_routes(config.roles) if not route.is_collocated]
    # In blocks. The largest move comes first, since the first of a round includes the time in which workers wake up.
    counts = [-(-n // config.block_size) for n in reversed(grid.moved) if n <= num_kv_tokens]
    moves = list(itertools.product(routes, counts))
    steps = [step_of(shape, config.block_size, model.vocab_size) for shape in shapes]
    tasks = [partial(_step_ms, workers[0], step) for step in steps]
    tasks += [partial(_move_ms, workers, *move) for move in moves]
    # All tasks come once in each round, so that a disturbance of some seconds spoils one repeat of each, not all.
    calls = tqdm(tasks * (REPEATS + 1), desc="profiling", disable=not show_progress)
    times_ms = np.array([call() for call in calls]).reshape(REPEATS + 1, len(tasks))
    best_ms = times_ms[1:].min(axis=0).tolist()
    block_bytes = config.kv_layout(model).bytes_per_block
    of_routes: dict[Route, list[MoveSample]] = {route: [] for route in routes}
    for (route, count), ms in zip(moves, best_ms[len(steps) :], strict=True):
        of_routes[route].append(MoveSample(count * block_bytes, ms))
    return [StepSample(*rows_of(step), ms) for step, ms in zip(steps, best_ms, strict=False)], of_routes


def _num_kv_tokens(workers: Sequence[WorkerProcess], config: EngineConfig) -> int:
    return (min(worker.num_blocks for worker in workers) - 1) * config.block_size


def machine(config: EngineConfig) -> str:
    """The devices in words, as "2 x NVIDIA H200"."""
    name = f"workers on {len(psutil.Process().cpu_affinity())} CPU cores"
    if config.workers[0].device != "cpu":
        import torch

        name = torch.cuda.get_device_name(config.workers[0].device)
    return f"{len(config.workers)} x {name}"


def cache_file(config: EngineConfig, model: ModelConfig) -> Path:
    """The path at which the parameters of these devices, this model and these versions are kept."""
    version = f"nanopd {_version('nanopd')}, torch {_version('torch')}"
    name = f"{machine(config)}, {Path(config.model).name}, {model.dtype}, {version}.json"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return cache / "nanopd" / "profiles" / name.replace(" ", "-")


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # a checkout that is not installed
        return "source"


def step_shapes(grid: Grid, config: EngineConfig, max_len: int, num_kv_tokens: int) -> list[StepShape]:
    """The steps of `grid` that fit: decode steps, prompt chunks with and without history, and both together."""
    chunks = [n for n in grid.chunks if n <= min(config.max_num_batched_tokens, max_len)]
    shapes = [StepShape(b, c) for b, c in itertools.product(grid.batches, grid.contexts)]
    shapes += [StepShape(0, 0, n) for n in chunks]
    shapes += [StepShape(0, 0, n, c) for n, c in itertools.product(chunks[1::2], grid.cached)]
    shapes += [StepShape(b, c, n) for (b, c), n in itertools.product(grid.mixed, chunks[1::2])]
    return [shape for shape in shapes if _fits(shape, config, max_len, num_kv_tokens)]


def _fits(shape: StepShape, config: EngineConfig, max_len: int, num_kv_tokens: int) -> bool:
    num_blocks = sum(-(-(start + length) // config.block_size) for start, length in shape.rows())
    return (
        shape.batch < config.max_num_seqs
        and shape.batch + shape.num_new <= config.max_num_batched_tokens
        and all(start + length <= max_len for start, length in shape.rows())
        and num_blocks * config.block_size <= num_kv_tokens
    )


def step_of(shape: StepShape, block_size: int, vocab_size: int) -> StepBatch:
    """A step of made-up sequences, each with a slot and blocks of its own."""
    rows = np.array(list(shape.rows()), np.int32)  # [num_rows, (start, length)]
    slots = np.arange(len(rows), dtype=np.int32)
    inits = np.zeros(len(rows), SLOT_INIT)
    inits["slot"], inits["top_p"], inits["num_logprobs"] = slots, 1.0, -1
    counts = -(-rows.sum(1) // block_size)
    updates = np.empty(counts.sum(), TABLE_UPDATE)
    updates["slot"] = np.repeat(slots, counts)
    updates["index"] = np.arange(len(updates)) - np.repeat(np.cumsum(counts) - counts, counts)
    updates["block_id"] = 1 + np.arange(len(updates))
    flags = np.full(len(rows), RowFlag.SAMPLE, np.int32)
    tokens = np.random.default_rng(0).integers(0, vocab_size, rows[:, 1].sum(), np.int32)
    no_ids = np.empty(0, np.int32)
    starts, lengths = rows.T.copy()
    return StepBatch(0, inits, no_ids, updates, np.empty(0, BLOCK_COPY), slots, starts, lengths, flags, tokens)


def _step_ms(worker: WorkerProcess, step: StepBatch) -> float:
    worker.send(step)
    return _answer_ms(worker)


def _move_ms(workers: Sequence[WorkerProcess], route: Route, num_blocks: int) -> float:
    blocks = 1 + np.random.default_rng(num_blocks).permutation(num_blocks).astype(np.int32)
    src, dst = route.prefill_worker, route.decode_worker
    send_plan(TransferPlan(0, src, 0, dst, 0, blocks, blocks), workers)
    return _answer_ms(workers[dst])


def _answer_ms(worker: WorkerProcess) -> float:
    """Wait for the one answer that a worker owes; how long its work took, by its own clock, and at least 1 us."""
    end_s = time.monotonic() + ANSWER_TIMEOUT_S
    while not (answers := worker.poll()):
        if time.monotonic() > end_s:
            raise WorkerError(worker.index, "has not answered while it was profiled")
        time.sleep(0)
    return max(answers[0].duration_us, 1) / 1e3


def table(parameters: Parameters, model: ModelConfig) -> list[list[object]]:
    """Rows of COLUMNS: the seed's terms first, then the others; each with its error, and some as a rate per second."""
    terms, seed = parameters.terms, ClosedForm.of(parameters)
    weights = model.num_matrix_weights()
    peaks = next((peaks for name, peaks in PEAKS.items() if name in parameters.machine), (None, None))

    def rate(amount: float, term: str, what: str, peak: float | None) -> str:
        """`amount` per ms of a term, if the term is above its standard error."""
        ms = getattr(terms, term)
        share = f", {amount / ms / peak:.0%} of the device's peak" if peak and ms else ""
        return f"{amount / ms:.4g} {what}{share}" if ms > parameters.stderr.get(term, 0.0) else ""

    tflops = rate(2 * weights / 1e9, "a1", "TFLOP/s of matrix products", peaks[0])
    reading = rate(weights * ITEMSIZES[model.dtype] / 1e6, "beta", "GB/s of weights", peaks[1])
    context = rate(parameters.kv_bytes_per_token / 1e6, "kv", "GB/s", peaks[1])
    jumps = f"ms per step above {terms.batch_thresh:g} rows"
    fitted = [
        ("alpha", "a1", 1, "ms per prompt token", tflops),
        ("beta", "beta", 1, "ms per decode step", reading),
        ("gamma", "gamma", 1, "ms per prompt token beside decodes", ""),
        ("bandwidth", "bandwidth", 1, "GB/s between two workers", ""),
        ("a0", "a0", 1, "ms per prefill step", ""),
        ("a2", "a2", 1e6, "ns per query-key pair", ""),
        ("a3", "a3", 1e3, "us per cached token before a chunk", ""),
        ("row", "row", 1, "ms per decode row", ""),
        ("jump", "jump", 1, jumps, ""),
        ("excess", "excess", 1, "ms per row more than those", ""),
        ("kv", "kv", 1e3, "us per token of context", context),
        ("m0", "m0", 1, "ms per mixed step", ""),
        ("c0", "c0", 1, "ms per move", ""),
    ]
    rows: list[list[object]] = []
    for name, term, scale, unit, note in fitted:
        deviation = parameters.stderr.get(term)
        rows.append([name, scale * getattr(terms, term), deviation and scale * deviation, unit, note])
    rows.insert(2, ["batch_thresh", seed.batch_thresh, None, "rows", "as many as cost what beta is"])
    rows.insert(5, ["transfer rate", seed.transfer_rate, None, "ms per token moved", ""])
    rows.insert(6, ["disaggregated wins", seed.winning_load(), None, "sequences and more", "by the closed form"])
    return rows

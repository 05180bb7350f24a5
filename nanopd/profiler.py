"""Measures what steps and moves of blocks cost on the workers of a configuration, and fits the cost model to it.

Real workers do real steps, through the same messages as when they serve; only the sequences are made up, all zeros.
Times are the workers' own (on a GPU from event to event). All workers are taken to be alike: steps are measured on one
that prefills and decodes as told, whatever its role; moves between every pair of workers that a route has.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
from tqdm import tqdm

from nanopd.config import EngineConfig, ModelConfig, allowed_routes
from nanopd.errors import WorkerError
from nanopd.ipc.doorbell import Doorbell
from nanopd.links import send_plan
from nanopd.messages import (
    BLOCK_COPY,
    SLOT_INIT,
    TABLE_UPDATE,
    Route,
    RowFlag,
    StepBatch,
    StepResult,
    TransferAck,
    TransferPlan,
)
from nanopd.routing.closed_form import ClosedForm
from nanopd.routing.cost_model import (
    Fit,
    MoveSample,
    Parameters,
    Sample,
    StepSample,
    Terms,
    chunk_pairs,
    fit,
    prediction_errors,
)
from nanopd.worker_process import WorkerProcess, WorkerProcesses

REPEATS = 5  # of which the median counts, after one that does not
HELD_OUT = 4  # every so many-th sample is predicted, not fitted
BATCHES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
CONTEXTS = (64, 256, 1024, 4096, 16384)
CHUNKS = (16, 64, 128, 256, 512, 1024, 1536, 2048, 3072, 4096, 6144, 8192)
MIXED = ((4, 512), (16, 256), (32, 1024), (64, 512), (128, 512))  # batch, context
MOVED_TOKENS = (16, 64, 256, 512, 1024, 2048, 4096, 8192)
ANSWER_TIMEOUT_S = 120.0
COLUMNS = ("term", "value", "+-", "unit", "")
START = Terms(1.0, 0.1, 1e-6, 10.0, 0.1, 0.1, 16.0, 1e-4, 0.1, 0.1, 10.0)  # any terms of the right kind


@dataclass(frozen=True, slots=True)
class StepShape:
    """A step: decode rows of one context each, and at most one chunk of a prompt."""

    batch: int
    context: int
    num_new: int = 0
    num_cached: int = 0

    def sample(self, ms: float) -> StepSample:
        pairs = chunk_pairs(self.num_new, self.num_cached)
        return StepSample(self.batch, self.batch * self.context, self.num_new, pairs, ms)

    def rows(self) -> Iterator[tuple[int, int]]:
        """Start and length of each row."""
        yield from itertools.repeat((self.context - 1, 1), self.batch)
        if self.num_new:
            yield self.num_cached, self.num_new


@dataclass(frozen=True, slots=True)
class Profile:
    """What was measured and what was made of it."""

    samples: list[Sample]
    fit: Fit  # to all samples
    held_out: dict[str, dict[str, float]]  # kind -> {median, p90} relative error where a quarter was not fitted
    pair_bandwidth: dict[str, float]  # "p->d": GB/s
    num_kv_tokens: int

    def parameters(self, config: EngineConfig, model: ModelConfig) -> Parameters:
        return Parameters(
            machine=_machine(config),
            model=Path(config.model).name,
            provenance=f"measured by nanopd profile on {time.strftime('%Y-%m-%d')}",
            kv_bytes_per_token=model.kv_bytes_per_token(),
            num_kv_tokens=self.num_kv_tokens,
            terms=self.fit.terms,
            pair_bandwidth=self.pair_bandwidth,
            stderr=self.fit.stderr,
            errors=self.held_out,
        )


def profile(config: EngineConfig, model: ModelConfig, path: Path, show_progress: bool = False) -> Profile:
    """Start the workers, measure, stop them.

    Raises:
        WorkerError: one failed, or does not answer.
    """
    with closing(WorkerProcesses(config, model, path, Doorbell())) as processes:
        workers = processes.start()
        num_blocks = min(worker.num_blocks for worker in workers)
        shapes = step_shapes(config, config.max_len_of(model), (num_blocks - 1) * config.block_size)
        routes = [route for route in allowed_routes(config.roles) if not route.is_collocated]
        counts = [n for n in MOVED_TOKENS if n <= (num_blocks - 1) * config.block_size]
        block_bytes = config.block_size * model.kv_bytes_per_token()
        samples: list[Sample] = []
        moves: dict[Route, list[MoveSample]] = {route: [] for route in routes}
        with tqdm(total=len(shapes) + len(routes) * len(counts), desc="profiling", disable=not show_progress) as bar:
            for shape in shapes:
                samples.append(shape.sample(_median(_step_ms, workers[0], step_of(shape, config.block_size))))
                bar.update()
            for route, count in itertools.product(routes, counts):
                ms = _median(_move_ms, workers, route, -(-count // config.block_size))
                moves[route].append(MoveSample(-(-count // config.block_size) * block_bytes, ms))
                bar.update()
    samples += itertools.chain.from_iterable(moves.values())
    held_out = samples[HELD_OUT - 1 :: HELD_OUT]
    fitted = fit([sample for sample in samples if sample not in held_out], START)
    rates = {str(route): fit(of_pair, START).terms.bandwidth for route, of_pair in moves.items()}
    return Profile(
        samples,
        fit(samples, START),
        prediction_errors(held_out, fitted.terms),
        rates,
        (num_blocks - 1) * config.block_size,
    )


def _machine(config: EngineConfig) -> str:
    if config.workers[0].device == "cpu":
        return f"{len(psutil.Process().cpu_affinity())} CPU cores"
    import torch

    return torch.cuda.get_device_name(config.workers[0].device)


def step_shapes(config: EngineConfig, max_len: int, num_kv_tokens: int) -> list[StepShape]:
    """What fits the limits and the cache: decode steps, chunks with and without history, both together."""
    chunks = [n for n in CHUNKS if n <= min(config.max_num_batched_tokens, max_len)]
    shapes = [StepShape(b, c) for b, c in itertools.product(BATCHES, CONTEXTS)]
    shapes += [StepShape(0, 0, n) for n in chunks]
    shapes += [StepShape(0, 0, n, c) for n, c in itertools.product(chunks[1::2], CONTEXTS[2:])]
    shapes += [StepShape(b, c, n) for (b, c), n in itertools.product(MIXED, chunks[1::2])]
    return [shape for shape in shapes if _fits(shape, config, max_len, num_kv_tokens)]


def _fits(shape: StepShape, config: EngineConfig, max_len: int, num_kv_tokens: int) -> bool:
    num_blocks = sum(-(-(start + length) // config.block_size) for start, length in shape.rows())
    return (
        shape.batch < config.max_num_seqs
        and shape.batch + shape.num_new <= config.max_num_batched_tokens
        and all(start + length <= max_len for start, length in shape.rows())
        and num_blocks * config.block_size <= num_kv_tokens
    )


def step_of(shape: StepShape, block_size: int) -> StepBatch:
    """A step of made-up sequences, each in a slot and blocks of its own."""
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
    tokens, no_ids = np.zeros(rows[:, 1].sum(), np.int32), np.empty(0, np.int32)
    starts, lengths = rows.T.copy()
    return StepBatch(0, inits, no_ids, updates, np.empty(0, BLOCK_COPY), slots, starts, lengths, flags, tokens)


def _step_ms(worker: WorkerProcess, step: StepBatch) -> float:
    worker.send(step)
    result = _answer(worker)
    assert isinstance(result, StepResult)
    return result.duration_us / 1e3


def _move_ms(workers: Sequence[WorkerProcess], route: Route, num_blocks: int) -> float:
    blocks = 1 + np.random.default_rng(num_blocks).permutation(num_blocks).astype(np.int32)
    src, dst = route.prefill_worker, route.decode_worker
    send_plan(TransferPlan(0, src, 0, dst, 0, blocks, blocks), workers)
    ack = _answer(workers[dst])
    assert isinstance(ack, TransferAck)
    return max(ack.duration_us, 1) / 1e3


def _answer(worker: WorkerProcess) -> StepResult | TransferAck:
    end_s = time.monotonic() + ANSWER_TIMEOUT_S
    while not (answers := worker.poll()):
        if time.monotonic() > end_s:
            raise WorkerError(worker.index, "has not answered while it was profiled")
        time.sleep(0)
    (answer,) = answers
    return answer


def _median(measure_ms: Callable[..., float], *args: object) -> float:
    return statistics.median([measure_ms(*args) for _ in range(REPEATS + 1)][1:])


def table(parameters: Parameters, model: ModelConfig) -> list[list[object]]:
    """Rows for people: the seed's terms first, each with its error, then the rest and what it means per second."""
    terms, seed = parameters.terms, ClosedForm.of(parameters)
    weights = model.num_matrix_weights()
    itemsize = 4 if model.dtype == "float32" else 2
    rows = [
        ("alpha", terms.a1, "ms per prompt token", f"{2 * weights / terms.a1 / 1e9:.1f} TFLOP/s of matrix products"),
        ("beta", terms.beta, "ms per decode step", f"{weights * itemsize / terms.beta / 1e6:.0f} GB/s of weights"),
        ("batch_thresh", terms.batch_thresh, "rows", ""),
        ("gamma", terms.gamma, "ms per prompt token beside decodes", ""),
        ("bandwidth", terms.bandwidth, "GB/s between two workers", ""),
        ("transfer rate", seed.transfer_rate, "ms per token moved", ""),
        ("disaggregated wins", seed.winning_load(), "sequences and more", "by the closed form"),
        ("a0", terms.a0, "ms per prefill step", ""),
        ("a2", terms.a2 * 1e6, "ns per query-key pair", ""),
        ("row", terms.row, "ms per decode row", ""),
        ("excess", terms.excess, "ms per row above batch_thresh", ""),
        ("kv", terms.kv * 1e3, "us per token of context", f"{parameters.kv_bytes_per_token / terms.kv / 1e6:.0f} GB/s"),
        ("c0", terms.c0, "ms per move", ""),
    ]
    names = {"alpha": "a1"}
    return [[name, value, parameters.stderr.get(names.get(name, name)), unit, note] for name, value, unit, note in rows]

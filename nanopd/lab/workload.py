"""Requests for benches and the simulator: when they arrive, how long they are, which tokens they hold.

A workload is a list of `WorkloadRequest` in order of arrival, drawn from distributions (`synthetic_requests`) or read
from a public trace (`read_trace`). The same arguments give the same requests on every machine; other arrival rates give
the same requests at other times. Knows no engine, no clock and no tokenizer.
"""

from __future__ import annotations

import csv
import json
import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

from nanopd.errors import FieldError

HASH_BLOCK_SIZE = 512  # tokens that one hash id of a Mooncake trace stands for
RATES = "a rate above 0; inf: all at once"

T = TypeVar("T")
logger = logging.getLogger(__name__)


class WorkloadError(FieldError):
    """A workload that cannot be made."""


class TraceError(WorkloadError):
    """A row of a trace that cannot be used; `line_number` counts from 1."""

    def __init__(self, path: Path, line_number: int, field: str, value: object, allowed: str) -> None:
        super().__init__(field, value, allowed)
        self.path = path
        self.line_number = line_number
        self.args = (f"{path}, line {line_number}: {self}",)

    def __reduce__(self) -> tuple:
        return type(self), (self.path, self.line_number, self.field, self.value, self.allowed)


def _check(field: str, value: object, ok: bool, allowed: str) -> None:
    if not ok:
        raise WorkloadError(field, value, allowed)


@dataclass(frozen=True, slots=True)
class WorkloadRequest:
    arrival_s: float  # since the start of the workload
    num_prompt_tokens: int
    num_output_tokens: int
    prompt_seed: int  # of the prompt tokens that no hash id stands for
    hash_ids: tuple[int, ...] = ()  # of the prompt's first blocks of HASH_BLOCK_SIZE tokens; equal ids, equal tokens


def prompt_token_ids(request: WorkloadRequest, vocab_size: int) -> list[int]:
    """The `num_prompt_tokens` token ids of a request, uniform in [0, vocab_size).

    Requests that share their first n hash ids share their first n * HASH_BLOCK_SIZE tokens.
    """
    # The seeds of the two kinds of tokens start differently, so that a prompt's seed never equals a hash id.
    parts = [np.random.default_rng((0, h)).integers(vocab_size, size=HASH_BLOCK_SIZE) for h in request.hash_ids]
    num_rest = max(0, request.num_prompt_tokens - HASH_BLOCK_SIZE * len(parts))
    parts.append(np.random.default_rng((1, request.prompt_seed)).integers(vocab_size, size=num_rest))
    token_ids: list[int] = np.concatenate(parts)[: request.num_prompt_tokens].tolist()
    return token_ids


# ------------------------------------------------------------------------------------------------ distributions


class LengthDistribution(Protocol):
    def sample(self, rng: np.random.Generator, count: int) -> np.ndarray:  # [count] int64, each at least 1
        ...


@dataclass(frozen=True, slots=True)
class FixedLength:
    length: int

    def __post_init__(self) -> None:
        _check("length", self.length, self.length >= 1, "at least 1")

    def sample(self, rng: np.random.Generator, count: int) -> np.ndarray:  # [count] int64
        return np.full(count, self.length, np.int64)


@dataclass(frozen=True, slots=True)
class UniformLength:
    low: int
    high: int  # included

    def __post_init__(self) -> None:
        _check("low", self.low, 1 <= self.low <= self.high, f"1 <= low <= high ({self.high})")

    def sample(self, rng: np.random.Generator, count: int) -> np.ndarray:  # [count] int64
        return rng.integers(self.low, self.high, size=count, endpoint=True)


@dataclass(frozen=True, slots=True)
class LogNormalLength:
    """A log-normal distribution, rounded, and clipped to 1 .. `high`."""

    median: float
    sigma: float  # of the logarithm
    high: int

    def __post_init__(self) -> None:
        _check("median", self.median, 1 <= self.median <= self.high, f"1 <= median <= high ({self.high})")
        _check("sigma", self.sigma, 0 <= self.sigma < math.inf, "a finite number >= 0")

    def sample(self, rng: np.random.Generator, count: int) -> np.ndarray:  # [count] int64
        lengths = rng.lognormal(math.log(self.median), self.sigma, count)
        return np.clip(np.rint(lengths), 1, self.high).astype(np.int64)


@dataclass(frozen=True, slots=True)
class MixedLength:
    """Each length comes from one of `parts`, chosen with probability proportional to `weights`."""

    parts: tuple[LengthDistribution, ...]
    weights: tuple[float, ...]

    def __post_init__(self) -> None:
        is_sound = len(self.weights) == len(self.parts) and all(0 <= w < math.inf for w in self.weights)
        _check("weights", self.weights, is_sound and sum(self.weights) > 0, "one per part, >= 0, with a sum above 0")

    def sample(self, rng: np.random.Generator, count: int) -> np.ndarray:  # [count] int64
        chosen = rng.choice(len(self.parts), count, p=np.array(self.weights) / sum(self.weights))
        lengths = np.stack([part.sample(rng, count) for part in self.parts])  # [num_parts, count]
        return lengths[chosen, np.arange(count)]


SHORT_PROMPTS = UniformLength(64, 256)
LONG_PROMPTS = UniformLength(1024, 2048)
MIXED_PROMPTS = MixedLength((SHORT_PROMPTS, LONG_PROMPTS), (1, 1))


def arrival_times(rng: np.random.Generator, count: int, requests_per_s: float, cv: float = 1.0) -> np.ndarray:
    """Arrival times in seconds, [count] float64, ascending, with independent gaps of mean 1 / requests_per_s.

    The gaps are Gamma distributed with coefficient of variation `cv`: 1 is a Poisson process, above 1 comes in bursts,
    0 is a metronome. With `requests_per_s=inf` all arrive at 0.
    """
    _check("requests_per_s", requests_per_s, requests_per_s > 0, RATES)
    _check("cv", cv, 0 <= cv < math.inf, "a finite number >= 0")
    gaps = rng.gamma(cv**-2, cv**2, count) if cv > 0 else np.ones(count)
    return np.cumsum(gaps) / requests_per_s


def synthetic_requests(
    count: int,
    prompt_lengths: LengthDistribution,
    output_lengths: LengthDistribution,
    requests_per_s: float = math.inf,
    cv: float = 1.0,
    seed: int = 0,
) -> list[WorkloadRequest]:
    """`count` requests with `arrival_times` and independent lengths.

    Raises:
        WorkloadError: a rate or `cv` out of range.
    """
    # Each column has a random stream of its own, so that another rate or distribution leaves the others as they were.
    arrival_rng, prompt_rng, output_rng = map(np.random.default_rng, np.random.SeedSequence(seed).spawn(3))
    columns = (
        arrival_times(arrival_rng, count, requests_per_s, cv).tolist(),
        prompt_lengths.sample(prompt_rng, count).tolist(),
        output_lengths.sample(output_rng, count).tolist(),
    )
    return [WorkloadRequest(*row, _prompt_seed(seed, i)) for i, row in enumerate(zip(*columns))]


# ------------------------------------------------------------------------------------------------ traces


@dataclass(frozen=True, slots=True)
class Trace:
    """Requests of a trace, the first at 0 s, and what the length limits did to it."""

    requests: list[WorkloadRequest]
    num_clipped: int  # requests that were shortened to a limit
    num_dropped: int  # requests that were left out for a limit


def read_trace(
    path: str | Path,
    *,
    max_requests: int | None = None,
    requests_per_s: float | None = None,
    max_prompt_tokens: int | None = None,
    max_output_tokens: int | None = None,
    drop_long: bool = False,
    seed: int = 0,
) -> Trace:
    """The first `max_requests` requests of an Azure LLM inference trace (.csv) or a Mooncake trace (.jsonl).

    Columns of Azure: TIMESTAMP (UTC, with up to 9 digits of second), ContextTokens, GeneratedTokens. Keys of Mooncake:
    timestamp (ms), input_length, output_length, hash_ids. Requests above a length limit are clipped to it, or dropped
    with `drop_long`; both are counted and logged. With `requests_per_s` all times are stretched evenly, so that the
    mean gap between the requests that are left is 1 / requests_per_s. Rows that are out of order in time are sorted.

    Raises:
        TraceError: a row that cannot be used, up to the last one that is needed.
        WorkloadError: another kind of file, or a rate that cannot be reached.
        OSError: the file cannot be read.
    """
    path = Path(path)
    _check("path", str(path), path.suffix in (".csv", ".jsonl"), "*.csv (Azure), *.jsonl (Mooncake)")
    if requests_per_s is not None:
        _check("requests_per_s", requests_per_s, requests_per_s > 0, RATES)
    for name, limit in (("max_prompt_tokens", max_prompt_tokens), ("max_output_tokens", max_output_tokens)):
        _check(name, limit, limit is None or limit >= 1, "None, or at least 1")
    rows = _azure_requests(path, seed) if path.suffix == ".csv" else _mooncake_requests(path, seed)
    requests: list[WorkloadRequest] = []
    num_clipped = num_dropped = 0
    while len(requests) != max_requests and (request := next(rows, None)):
        num_prompt_tokens = min(request.num_prompt_tokens, max_prompt_tokens or request.num_prompt_tokens)
        num_output_tokens = min(request.num_output_tokens, max_output_tokens or request.num_output_tokens)
        limited = replace(request, num_prompt_tokens=num_prompt_tokens, num_output_tokens=num_output_tokens)
        if limited != request and drop_long:
            num_dropped += 1
        else:
            num_clipped += limited != request
            requests.append(limited)
    if num_clipped or num_dropped:
        logger.warning("%s: %d requests clipped, %d dropped", path, num_clipped, num_dropped)
    return Trace(_retime(requests, requests_per_s), num_clipped, num_dropped)


def _retime(requests: list[WorkloadRequest], requests_per_s: float | None) -> list[WorkloadRequest]:
    requests = sorted(requests, key=lambda request: request.arrival_s)
    first_s = requests[0].arrival_s if requests else 0.0
    scale = 1.0
    if requests_per_s is not None and len(requests) > 1:
        span_s = requests[-1].arrival_s - first_s
        _check("requests_per_s", requests_per_s, span_s > 0, "None, since all requests arrive at the same time")
        scale = (len(requests) - 1) / requests_per_s / span_s
    return [replace(request, arrival_s=(request.arrival_s - first_s) * scale) for request in requests]


@dataclass(frozen=True, slots=True)
class _Row:
    path: Path
    line_number: int
    values: dict[str, Any]

    def get(self, name: str, convert: Callable[[Any], T], allowed: str) -> T:
        try:
            return convert(self.values.get(name))
        except (TypeError, ValueError, AttributeError):
            raise TraceError(self.path, self.line_number, name, self.values.get(name), allowed) from None


def _azure_requests(path: Path, seed: int) -> Iterator[WorkloadRequest]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        for values in reader:
            row = _Row(path, reader.line_num, values)
            yield WorkloadRequest(
                arrival_s=row.get("TIMESTAMP", _utc_seconds, "a time like 2023-11-16 18:17:03.9799600"),
                num_prompt_tokens=row.get("ContextTokens", _count, "an integer >= 1"),
                num_output_tokens=row.get("GeneratedTokens", _count, "an integer >= 1"),
                prompt_seed=_prompt_seed(seed, reader.line_num),
            )


def _mooncake_requests(path: Path, seed: int) -> Iterator[WorkloadRequest]:
    with path.open(encoding="utf-8") as file:
        for line_number, line in enumerate(file, 1):
            values = _Row(path, line_number, {"line": line.rstrip("\n")}).get("line", _json_object, "a JSON object")
            row = _Row(path, line_number, values)
            yield WorkloadRequest(
                arrival_s=row.get("timestamp", _number, "milliseconds") / 1000,
                num_prompt_tokens=row.get("input_length", _count, "an integer >= 1"),
                num_output_tokens=row.get("output_length", _count, "an integer >= 1"),
                prompt_seed=_prompt_seed(seed, line_number),
                hash_ids=row.get("hash_ids", _hash_ids, "a list of integers >= 0"),
            )


def _prompt_seed(seed: int, index: int) -> int:
    return (seed << 32) + index


def _utc_seconds(text: str) -> float:
    # datetime reads at most 6 digits of a second, and traces have up to 9.
    whole, _, fraction = text.removesuffix("+00:00").partition(".")
    return datetime.fromisoformat(whole).replace(tzinfo=timezone.utc).timestamp() + float(f"0.{fraction or 0}")


def _count(value: object) -> int:
    number = int(value) if isinstance(value, str) else value
    if type(number) is not int or number < 1:
        raise ValueError
    return number


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError
    return float(value)


def _hash_ids(values: list[int]) -> tuple[int, ...]:
    if not all(type(value) is int and value >= 0 for value in values):
        raise ValueError
    return tuple(values)


def _json_object(line: str) -> dict[str, Any]:
    return {**json.loads(line)}  # a TypeError for what is no object

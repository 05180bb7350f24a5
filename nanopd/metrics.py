"""From the event logs of requests to latencies, throughput and goodput.

Pure functions over `RequestLog`s: no clock, no I/O. The definitions are those of `vllm bench serve` (TTFT, TPOT, ITL,
E2E, request goodput), with two differences: time starts when a request's arrival was *due*, and `first_gap`, which in
disaggregated serving holds the hand-over, is a figure of its own. Undefined figures are None, never 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from nanopd.errors import ConfigError
from nanopd.messages import EventKind, FinishReason, RequestLog, Route

# Figures of requests: those that a summary adds up, and those that it gives percentiles of.
SUMMED = ("num_prompt_tokens", "num_cached_tokens", "num_draft_tokens", "num_accepted_tokens", "num_output_tokens")
LATENCIES = ("queue_ms", "ttft_ms", "first_gap_ms", "tpot_ms", "e2e_ms")


@dataclass(frozen=True, slots=True, eq=False)
class RequestMetrics:
    """Figures of one request with output tokens 1..n; all times in milliseconds."""

    request_id: str
    route: Route | None  # the last one; None: the request never got one
    finish_reason: FinishReason | None  # None: the request has not finished
    arrived_s: float  # when the arrival was due, by the engine's clock
    finished_s: float | None
    queue_ms: float | None  # first scheduled - arrived
    ttft_ms: float | None  # token 1 - arrived; n >= 1
    first_gap_ms: float | None  # token 2 - token 1; n >= 2
    tpot_ms: float | None  # (token n - token 1) / (n - 1); n >= 2
    itl_ms: np.ndarray  # [max(n - 1, 0)] float64, token i+1 - token i, the first gap included
    e2e_ms: float | None  # finished - arrived
    num_prompt_tokens: int
    num_output_tokens: int
    num_cached_tokens: int
    num_draft_tokens: int  # draft tokens that steps have verified
    num_accepted_tokens: int  # draft tokens that were accepted
    num_preemptions: int

    @classmethod
    def from_log(cls, log: RequestLog) -> RequestMetrics:
        first_s = {event.kind: event.time_s for event in reversed(log.events)}  # the first event of each kind
        arrived_s, finished_s = first_s[EventKind.ARRIVED], first_s.get(EventKind.FINISHED)
        times_s = log.token_times_s
        itl_ms = np.diff(times_s) * 1e3
        return cls(
            arrived_s=arrived_s,
            finished_s=finished_s,
            queue_ms=_span_ms(arrived_s, first_s.get(EventKind.SCHEDULED)),
            ttft_ms=_span_ms(arrived_s, float(times_s[0])) if len(times_s) else None,
            first_gap_ms=float(itl_ms[0]) if len(itl_ms) else None,
            tpot_ms=float(itl_ms.mean()) if len(itl_ms) else None,
            itl_ms=itl_ms,
            e2e_ms=_span_ms(arrived_s, finished_s),
            num_output_tokens=len(times_s),
            num_preemptions=sum(event.kind is EventKind.PREEMPTED for event in log.events),
            **{name: getattr(log, name) for name in COPIED},
        )

    @property
    def is_completed(self) -> bool:
        """Whether the request got its answer: not aborted, failed or unfinished."""
        return self.finish_reason in (FinishReason.STOP, FinishReason.LENGTH)


# What a request's figures have from its log, under the same names.
COPIED = [field.name for field in fields(RequestMetrics) if field.name in RequestLog.__dataclass_fields__]


@dataclass(frozen=True, slots=True)
class SLO:
    """The service level objective: inclusive upper limits of a request's figures in milliseconds; None: no limit."""

    ttft_ms: float | None = None
    tpot_ms: float | None = None
    first_gap_ms: float | None = None
    e2e_ms: float | None = None

    @classmethod
    def parse(cls, text: str) -> SLO:
        """Read "ttft=200,tpot=10": names of the fields without `_ms`, limits in milliseconds.

        Raises:
            ConfigError: an unknown or repeated name, or a limit that is not a positive number.
        """
        names = [field.name.removesuffix("_ms") for field in fields(cls)]
        limits: dict[str, float] = {}
        for item in text.split(","):
            name, _, value = (part.strip() for part in item.partition("="))
            if name not in names or f"{name}_ms" in limits:
                raise ConfigError("slo", text, f"NAME=MILLISECONDS,..., each name once, of {', '.join(names)}")
            try:
                limit = float(value)
            except ValueError:
                limit = math.nan
            if not 0 < limit < math.inf:
                raise ConfigError(f"slo.{name}", value, "milliseconds, a number above 0")
            limits[f"{name}_ms"] = limit
        return cls(**limits)

    def is_met(self, request: RequestMetrics) -> bool:
        """Whether the request completed within all limits. A figure that it lacks, having one token, breaks none."""
        limits = ((getattr(request, field.name), getattr(self, field.name)) for field in fields(self))
        return request.is_completed and all(value <= limit for value, limit in limits if None not in (value, limit))


@dataclass(frozen=True, slots=True)
class Percentiles:
    """The mean and percentiles of a non-empty sample, interpolated linearly as numpy does by default."""

    mean: float
    p50: float
    p90: float
    p95: float
    p99: float

    @classmethod
    def of(cls, values: Sequence[float | None] | np.ndarray) -> Percentiles | None:
        """Those of all values that are not None; None if there is no such value."""
        sample = np.asarray(values, np.float64)  # numpy reads None as NaN.
        sample = sample[~np.isnan(sample)]
        if not len(sample):
            return None
        return cls(float(sample.mean()), *map(float, np.percentile(sample, (50, 90, 95, 99))))


@dataclass(frozen=True, slots=True)
class Summary:
    """Figures of a set of requests. `dataclasses.asdict` makes it JSON.

    Latencies, tokens and throughput count completed requests only, attainment and goodput count all arrivals.
    """

    num_requests: int  # all arrivals
    num_completed: int
    num_preemptions: int  # summed over all arrivals
    num_prompt_tokens: int
    num_cached_tokens: int
    num_draft_tokens: int
    num_accepted_tokens: int
    num_output_tokens: int
    duration_s: float  # from the first arrival to the last finish
    queue_ms: Percentiles | None
    ttft_ms: Percentiles | None
    first_gap_ms: Percentiles | None
    tpot_ms: Percentiles | None
    itl_ms: Percentiles | None  # over the gaps of all requests together
    itl_without_first_gap_ms: Percentiles | None
    e2e_ms: Percentiles | None
    requests_per_s: float
    output_tokens_per_s: float
    total_tokens_per_s: float  # prompt and output
    slo_attainment: float | None  # share of all arrivals that completed and met the SLO; None: no SLO
    goodput_per_s: float | None  # requests that completed and met the SLO, per second of duration_s


def summarize(
    logs: Iterable[RequestLog], slo: SLO | None = None, window_s: tuple[float, float] | None = None
) -> Summary:
    """Figures of the requests that arrived within `window_s`, a start and an end by the engine's clock; None: of all.

    Aborted, failed and unfinished requests count as misses of the SLO. A window leaves out warm-up and late arrivals;
    requests that arrived in it are followed to their end.
    """
    requests = _arrived_within(logs, window_s)
    return _summarize(requests, _duration_s(requests), slo)


def by_route(
    logs: Iterable[RequestLog], slo: SLO | None = None, window_s: tuple[float, float] | None = None
) -> dict[Route | None, Summary]:
    """`summarize` for each (last) route, in order; requests that never got one come last, under None.

    All rows share the duration of the whole, so rates add up to those of `summarize`.
    """
    requests = _arrived_within(logs, window_s)
    routes: list[Route | None] = [*sorted({r.route for r in requests if r.route is not None}), None]
    groups = {route: [request for request in requests if request.route == route] for route in routes}
    return {route: _summarize(group, _duration_s(requests), slo) for route, group in groups.items() if group}


def _arrived_within(logs: Iterable[RequestLog], window_s: tuple[float, float] | None) -> list[RequestMetrics]:
    start_s, end_s = window_s or (-math.inf, math.inf)
    return [request for request in map(RequestMetrics.from_log, logs) if start_s <= request.arrived_s < end_s]


def _duration_s(requests: Sequence[RequestMetrics]) -> float:
    finished_s = [request.finished_s for request in requests if request.finished_s is not None]
    return max(finished_s) - min(request.arrived_s for request in requests) if finished_s else 0.0


def _summarize(requests: Sequence[RequestMetrics], duration_s: float, slo: SLO | None) -> Summary:
    completed = [request for request in requests if request.is_completed]
    num_good = sum(map(slo.is_met, requests)) if slo else None
    figures: dict[str, Any] = {name: sum(getattr(request, name) for request in completed) for name in SUMMED}
    figures |= {name: Percentiles.of([getattr(request, name) for request in completed]) for name in LATENCIES}
    return Summary(
        num_requests=len(requests),
        num_completed=len(completed),
        num_preemptions=sum(request.num_preemptions for request in requests),
        duration_s=duration_s,
        itl_ms=Percentiles.of(_concatenate(request.itl_ms for request in completed)),
        itl_without_first_gap_ms=Percentiles.of(_concatenate(request.itl_ms[1:] for request in completed)),
        requests_per_s=_ratio(len(completed), duration_s),
        output_tokens_per_s=_ratio(figures["num_output_tokens"], duration_s),
        total_tokens_per_s=_ratio(figures["num_prompt_tokens"] + figures["num_output_tokens"], duration_s),
        slo_attainment=None if num_good is None else _ratio(num_good, len(requests)),
        goodput_per_s=None if num_good is None else _ratio(num_good, duration_s),
        **figures,
    )


def _span_ms(start_s: float, end_s: float | None) -> float | None:
    return None if end_s is None else (end_s - start_s) * 1e3


def _concatenate(arrays: Iterable[np.ndarray]) -> np.ndarray:  # [*] float64
    return np.concatenate([np.empty(0), *arrays])


def _ratio(count: float, total: float) -> float:
    return count / total if total else 0.0

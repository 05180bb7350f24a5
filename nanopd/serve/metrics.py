"""What the server tells Prometheus, in its text format.

`Metrics` adds up the logs of finished requests, whoever made them, and puts the engine's present state beside them.
The engine's thread may add a log while the event loop asks for the text.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable
from itertools import accumulate

from nanopd.frontend.outputs import EngineStats
from nanopd.messages import FinishReason, RequestLog
from nanopd.metrics import RequestMetrics

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
REQUEST_BOUNDS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
TOKEN_BOUNDS_S = (0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.1, 0.25, 0.5, 1.0)

Samples = dict[str, float]  # what follows the metric's name (labels, or a suffix such as _sum) -> value


class Histogram:
    """Counts of the values up to each of some ascending bounds, and the sum of all values."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)  # the last one counts the values above all bounds
        self._sum = 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def samples(self) -> Samples:
        totals = list(accumulate(self._counts))
        buckets = {f'_bucket{{le="{bound}"}}': total for bound, total in zip((*self._bounds, "+Inf"), totals)}
        return {**buckets, "_sum": self._sum, "_count": totals[-1]}


class Metrics:
    """The figures of all requests that have finished."""

    def __init__(self) -> None:
        self._requests = Counter({reason.value: 0 for reason in FinishReason})
        self._num_prompt_tokens = self._num_cached_tokens = self._num_output_tokens = 0
        self._ttft = Histogram(REQUEST_BOUNDS_S)
        self._tpot = Histogram(TOKEN_BOUNDS_S)
        self._e2e = Histogram(REQUEST_BOUNDS_S)

    def add(self, log: RequestLog) -> None:
        request = RequestMetrics.from_log(log)
        assert request.finish_reason is not None
        self._requests[request.finish_reason.value] += 1
        self._num_prompt_tokens += request.num_prompt_tokens
        self._num_cached_tokens += request.num_cached_tokens
        self._num_output_tokens += request.num_output_tokens
        times_ms = (request.ttft_ms, request.tpot_ms, request.e2e_ms)
        for histogram, value_ms in zip((self._ttft, self._tpot, self._e2e), times_ms, strict=True):
            if value_ms is not None:
                histogram.observe(value_ms / 1e3)

    def text(self, stats: EngineStats) -> str:
        """All there is to tell, with the engine's state in `stats`."""
        about_tpot = "Mean of a request, without its first token."
        metrics: list[tuple[str, str, str, Samples]] = [
            ("requests_total", "counter", "Finished requests.", _labelled("finish_reason", self._requests.items())),
            ("prompt_tokens_total", "counter", "Of finished requests.", {"": self._num_prompt_tokens}),
            ("cached_prompt_tokens_total", "counter", "Taken from the prefix cache.", {"": self._num_cached_tokens}),
            ("output_tokens_total", "counter", "Of finished requests.", {"": self._num_output_tokens}),
            ("preemptions_total", "counter", "Requests put back by a scheduler.", {"": stats.num_preemptions}),
            ("worker_restarts_total", "counter", "Of dead workers.", _by_worker(stats.num_restarts)),
            ("worker_busy_seconds_total", "counter", "Spent on steps.", _by_worker(stats.busy_s)),
            ("requests_running", "gauge", "Requests on a worker.", {"": stats.num_running}),
            ("requests_waiting", "gauge", "Requests waiting for their turn.", {"": stats.num_waiting}),
            ("kv_blocks_used", "gauge", "KV blocks in use.", _by_worker(b.used for b in stats.blocks)),
            ("kv_blocks", "gauge", "KV blocks there are.", _by_worker(b.total for b in stats.blocks)),
            ("time_to_first_token_seconds", "histogram", "From arrival.", self._ttft.samples()),
            ("time_per_output_token_seconds", "histogram", about_tpot, self._tpot.samples()),
            ("request_seconds", "histogram", "From arrival to the end.", self._e2e.samples()),
        ]
        lines = []
        for name, kind, meaning, samples in metrics:
            lines += [f"# HELP nanopd_{name} {meaning}", f"# TYPE nanopd_{name} {kind}"]
            lines += [f"nanopd_{name}{rest} {value}" for rest, value in samples.items()]
        return "\n".join(lines) + "\n"


def _labelled(label: str, values: Iterable[tuple[object, float]]) -> Samples:
    return {f'{{{label}="{key}"}}': value for key, value in values}


def _by_worker(values: Iterable[float]) -> Samples:
    return _labelled("worker", enumerate(values))

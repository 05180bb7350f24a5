"""What the server tells Prometheus, in its text format.

`Metrics` adds up the logs of finished requests, whoever made them, and puts the engine's present state beside them.
Another thread may add while it tells.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator

from nanopd.frontend.outputs import EngineStats
from nanopd.messages import FinishReason, RequestLog
from nanopd.metrics import RequestMetrics

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
REQUEST_BOUNDS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
TOKEN_BOUNDS_S = (0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.1, 0.25, 0.5, 1.0)


class Histogram:
    """Counts of values up to each of ascending bounds."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)  # the last one: above all bounds
        self.sum = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def lines(self, name: str) -> Iterator[str]:
        total = 0
        for bound, count in zip((*self.bounds, "+Inf"), self.counts, strict=True):
            total += count
            yield f'{name}_bucket{{le="{bound}"}} {total}'
        yield f"{name}_sum {self.sum}"
        yield f"{name}_count {total}"


class Metrics:
    """Of all requests that have finished."""

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
        """All there is to tell, with the present state of `stats`."""
        lines: list[str] = []

        def tell(name: str, kind: str, meaning: str, samples: Iterable[str]) -> None:
            lines.extend([f"# HELP nanopd_{name} {meaning}", f"# TYPE nanopd_{name} {kind}", *samples])

        def number(name: str, kind: str, meaning: str, value: int) -> None:
            tell(name, kind, meaning, [f"nanopd_{name} {value}"])

        def each(name: str, kind: str, meaning: str, label: str, values: Iterable[tuple[object, float]]) -> None:
            tell(name, kind, meaning, [f'nanopd_{name}{{{label}="{key}"}} {value}' for key, value in values])

        each("requests_total", "counter", "Finished requests.", "finish_reason", self._requests.items())
        number("prompt_tokens_total", "counter", "Of finished requests.", self._num_prompt_tokens)
        number("cached_prompt_tokens_total", "counter", "Taken from the prefix cache.", self._num_cached_tokens)
        number("output_tokens_total", "counter", "Of finished requests.", self._num_output_tokens)
        number("preemptions_total", "counter", "Requests put back by a scheduler.", stats.num_preemptions)
        each("worker_restarts_total", "counter", "Of dead workers.", "worker", enumerate(stats.num_restarts))
        each("worker_busy_seconds_total", "counter", "Spent on steps.", "worker", enumerate(stats.busy_s))
        number("requests_running", "gauge", "Requests on a worker.", stats.num_running)
        number("requests_waiting", "gauge", "Requests waiting for their turn.", stats.num_waiting)
        used, total = ([(w, getattr(b, name)) for w, b in enumerate(stats.blocks)] for name in ("used", "total"))
        each("kv_blocks_used", "gauge", "KV blocks in use.", "worker", used)
        each("kv_blocks", "gauge", "KV blocks there are.", "worker", total)
        for name, meaning, histogram in (
            ("time_to_first_token_seconds", "From arrival.", self._ttft),
            ("time_per_output_token_seconds", "Mean of a request, without its first token.", self._tpot),
            ("request_seconds", "From arrival to the end.", self._e2e),
        ):
            tell(name, "histogram", meaning, histogram.lines(f"nanopd_{name}"))
        return "\n".join(lines) + "\n"

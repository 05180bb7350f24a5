"""Metrics against figures worked out by hand."""

from __future__ import annotations

import json
from dataclasses import asdict

import numpy as np
import pytest

from nanopd.errors import ConfigError
from nanopd.lab.tables import format_table
from nanopd.messages import EventKind, FinishReason, RequestEvent, RequestLog, Route
from nanopd.metrics import SLO, Percentiles, RequestMetrics, by_route, summarize


def make_log(
    request_id: str,
    arrived_s: float,
    token_times_s: list[float],
    finish_reason: FinishReason | None = FinishReason.LENGTH,
    route: Route | None = Route(0, 1),  # noqa: B008
    num_preemptions: int = 0,
) -> RequestLog:
    """Scheduled half a second after it arrived, finished with its last token (or at once)."""
    events = [RequestEvent(arrived_s, EventKind.ARRIVED), RequestEvent(arrived_s + 0.5, EventKind.SCHEDULED, 0)]
    events += [RequestEvent(arrived_s + 0.6, EventKind.PREEMPTED)] * num_preemptions
    events += [RequestEvent(arrived_s + 0.7, EventKind.SCHEDULED, 0)] * num_preemptions
    if finish_reason is not None:
        events.append(RequestEvent(max([arrived_s, *token_times_s]), EventKind.FINISHED))
    return RequestLog(request_id, 10, events, np.array(token_times_s), route, finish_reason=finish_reason)


@pytest.fixture
def logs() -> list[RequestLog]:
    """All times are exact in binary, so that figures can be compared with ==."""
    return [
        make_log("a", 100.0, [101.0, 103.0, 103.5, 104.0], num_preemptions=2),
        make_log("b", 101.0, [103.0], FinishReason.STOP, Route(1, 1)),
        make_log("c", 102.0, [104.0, 105.0], FinishReason.ABORT),
        make_log("d", 103.0, [], FinishReason.ERROR, route=None),
        make_log("e", 104.0, [105.0, 107.0, 108.0]),
        make_log("f", 107.0, [107.5], finish_reason=None),
    ]


def test_figures_of_one_request(logs: list[RequestLog]) -> None:
    request = RequestMetrics.from_log(logs[0])
    assert (request.queue_ms, request.ttft_ms, request.first_gap_ms) == (500.0, 1000.0, 2000.0)
    assert (request.tpot_ms, request.e2e_ms) == (1000.0, 4000.0)
    assert request.itl_ms.tolist() == [2000.0, 500.0, 500.0]
    assert (request.num_prompt_tokens, request.num_output_tokens, request.num_preemptions) == (10, 4, 2)


def test_undefined_figures_are_none(logs: list[RequestLog]) -> None:
    one_token, no_token, unfinished = (RequestMetrics.from_log(logs[i]) for i in (1, 3, 5))
    assert (one_token.ttft_ms, one_token.first_gap_ms, one_token.tpot_ms) == (2000.0, None, None)
    assert (no_token.ttft_ms, no_token.e2e_ms, len(no_token.itl_ms)) == (None, 0.0, 0)
    assert (unfinished.ttft_ms, unfinished.e2e_ms, unfinished.is_completed) == (500.0, None, False)


def test_summary_counts_completed_requests(logs: list[RequestLog]) -> None:
    summary = summarize(logs)
    assert (summary.num_requests, summary.num_completed, summary.num_preemptions) == (6, 3, 2)
    assert summary.duration_s == 8.0  # 100 to 108
    assert summary.requests_per_s == 3 / 8
    assert summary.output_tokens_per_s == (4 + 1 + 3) / 8
    assert summary.total_tokens_per_s == (30 + 8) / 8
    assert summary.ttft_ms is not None and summary.tpot_ms is not None and summary.itl_ms is not None
    assert summary.ttft_ms.p50 == 1000.0  # 1000, 2000, 1000
    assert summary.ttft_ms.mean == pytest.approx(4000 / 3)
    assert summary.tpot_ms.mean == (1000 + 1500) / 2
    assert summary.itl_ms.mean == (2000 + 500 + 500 + 2000 + 1000) / 5
    assert summary.itl_without_first_gap_ms is not None
    assert summary.itl_without_first_gap_ms.mean == pytest.approx((500 + 500 + 1000) / 3)
    assert (summary.slo_attainment, summary.goodput_per_s) == (None, None)
    json.dumps(asdict(summary))


@pytest.mark.parametrize(
    ("slo", "num_good"),
    [
        (SLO(), 3),  # whoever completes
        (SLO(ttft_ms=1000), 2),  # a and e, on the limit; b is late, f is unfinished
        (SLO(ttft_ms=999), 0),
        (SLO(tpot_ms=1200), 2),  # a, and b, which has no second token
        (SLO(ttft_ms=1000, tpot_ms=1200), 1),  # a
        (SLO(first_gap_ms=1999), 1),  # b
        (SLO(e2e_ms=2000), 1),  # b; d failed in less
    ],
)
def test_goodput_is_over_all_arrivals(logs: list[RequestLog], slo: SLO, num_good: int) -> None:
    summary = summarize(logs, slo)
    assert summary.slo_attainment == num_good / 6
    assert summary.goodput_per_s == num_good / 8


def test_window_takes_requests_by_their_arrival(logs: list[RequestLog]) -> None:
    summary = summarize(logs, SLO(), window_s=(101.0, 107.0))
    assert (summary.num_requests, summary.num_completed) == (4, 2)  # b, c, d, e
    assert summary.duration_s == 7.0  # b arrives at 101, e ends at 108
    assert summary.slo_attainment == 0.5


def test_rows_by_route_add_up(logs: list[RequestLog]) -> None:
    rows = by_route(logs, SLO())
    assert list(rows) == [Route(0, 1), Route(1, 1), None]
    assert [row.num_requests for row in rows.values()] == [4, 1, 1]
    assert [row.output_tokens_per_s for row in rows.values()] == [7 / 8, 1 / 8, 0.0]
    assert rows[None].ttft_ms is None and rows[None].slo_attainment == 0.0


def test_nothing_finished() -> None:
    summary = summarize([make_log("a", 1.0, [], finish_reason=None)], SLO(ttft_ms=1))
    assert (summary.duration_s, summary.requests_per_s, summary.slo_attainment) == (0.0, 0.0, 0.0)
    assert summarize([]).num_requests == 0


def test_percentiles_interpolate_linearly() -> None:
    assert Percentiles.of([*range(101), None]) == Percentiles(mean=50.0, p50=50.0, p90=90.0, p95=95.0, p99=99.0)
    two = Percentiles.of([0.0, 10.0])
    assert two is not None and two.p90 == pytest.approx(9.0)
    assert Percentiles.of([None]) is None


def test_slo_is_read_from_text() -> None:
    assert SLO.parse("ttft=200, tpot=10") == SLO(ttft_ms=200.0, tpot_ms=10.0)
    assert SLO.parse("first_gap=1e3,e2e=5000.5") == SLO(first_gap_ms=1000.0, e2e_ms=5000.5)


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("", "slo"),
        ("itl=3", "slo"),
        ("ttft=1,ttft=2", "slo"),
        ("ttft=1,", "slo"),
        ("ttft", "slo.ttft"),
        ("ttft=fast", "slo.ttft"),
        ("tpot=0", "slo.tpot"),
        ("tpot=nan", "slo.tpot"),
        ("tpot=inf", "slo.tpot"),
    ],
)
def test_bad_slo_names_what_is_wrong(text: str, field: str) -> None:
    with pytest.raises(ConfigError) as error:
        SLO.parse(text)
    assert error.value.field == field


def test_table_is_aligned() -> None:
    table = format_table(["route", "requests", "ttft p50"], [("0->1", 7, 1234.56), ("collocated", 12, None)])
    assert table.splitlines() == [
        "route       requests  ttft p50",
        "----------  --------  --------",
        "0->1               7      1235",
        "collocated        12         -",
    ]
    numbers = (0.1234, -1.234, np.float32(12.34), 0.0, np.int32(7), float("nan"))
    assert format_table(["x"], [[x] for x in numbers]).split()[2:] == ["0.123", "-1.23", "12.3", "0.000", "7", "nan"]

"""Workloads: exact where they must be, statistics of large samples where they are random."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path

import numpy as np
import pytest

from nanopd.lab.workload import (
    HASH_BLOCK_SIZE,
    LONG_PROMPTS,
    MIXED_PROMPTS,
    SHORT_PROMPTS,
    FixedLength,
    LengthDistribution,
    LogNormalLength,
    MixedLength,
    TraceError,
    UniformLength,
    WorkloadError,
    WorkloadRequest,
    arrival_times,
    prompt_token_ids,
    read_trace,
    synthetic_requests,
)

AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9951690,396,109
2023-11-16 18:16:06.6805900,5000,55
"""


def write(path: Path, text: str) -> Path:
    path.write_bytes(text.encode())
    return path


def mooncake_line(**changes: object) -> str:
    row = {"timestamp": 3000, "input_length": 700, "output_length": 5, "hash_ids": [0, 7]}
    return json.dumps(row | changes) + "\n"


def rng() -> np.random.Generator:
    return np.random.default_rng(1)


# ------------------------------------------------------------------------------------------------ synthetic


@pytest.mark.parametrize("cv", [0.0, 0.5, 1.0, 3.0])
def test_gaps_have_the_mean_and_the_variation_asked_for(cv: float) -> None:
    gaps = np.diff(arrival_times(rng(), 200_000, requests_per_s=4.0, cv=cv), prepend=0.0)
    assert gaps.min() >= 0
    assert gaps.mean() == pytest.approx(0.25, rel=0.03)
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.03, abs=1e-6)


def test_counts_of_a_poisson_process_vary_like_their_mean() -> None:
    counts = np.bincount(arrival_times(rng(), 100_000, requests_per_s=5.0).astype(int))[:-1]
    assert counts.var() / counts.mean() == pytest.approx(1.0, rel=0.05)


def test_infinite_rate_is_all_at_once() -> None:
    assert arrival_times(rng(), 3, math.inf).tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("lengths", "low", "high", "mean"),
    [
        (FixedLength(128), 128, 128, 128),
        (UniformLength(3, 5), 3, 5, 4),
        (SHORT_PROMPTS, 64, 256, 160),
        (LONG_PROMPTS, 1024, 2048, 1536),
        (MIXED_PROMPTS, 64, 2048, 848),
        (MixedLength((FixedLength(1), FixedLength(5)), (3, 1)), 1, 5, 2),
        (LogNormalLength(median=100, sigma=0.5, high=100_000), 1, 100_000, 100 * math.exp(0.125)),
        (LogNormalLength(median=1, sigma=3.0, high=4), 1, 4, None),
    ],
)
def test_lengths_lie_in_their_range(lengths: LengthDistribution, low: int, high: int, mean: float | None) -> None:
    sample = lengths.sample(rng(), 100_000)
    assert sample.dtype == np.int64 and sample.shape == (100_000,)
    assert low <= sample.min() and sample.max() <= high
    if mean is not None:
        assert sample.mean() == pytest.approx(mean, rel=0.02)


def test_same_seed_same_requests_and_another_rate_only_moves_them() -> None:
    slow = synthetic_requests(50, MIXED_PROMPTS, FixedLength(128), requests_per_s=1.0, seed=3)
    fast = synthetic_requests(50, MIXED_PROMPTS, FixedLength(128), requests_per_s=4.0, seed=3)
    assert slow == synthetic_requests(50, MIXED_PROMPTS, FixedLength(128), requests_per_s=1.0, seed=3)
    assert slow != synthetic_requests(50, MIXED_PROMPTS, FixedLength(128), requests_per_s=1.0, seed=4)
    assert [r.arrival_s / 4 for r in slow] == [r.arrival_s for r in fast]
    assert [(r.num_prompt_tokens, r.prompt_seed) for r in slow] == [(r.num_prompt_tokens, r.prompt_seed) for r in fast]
    assert len({tuple(prompt_token_ids(r, 1000)[:20]) for r in slow}) == 50


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: FixedLength(0), "length"),
        (lambda: UniformLength(5, 4), "low"),
        (lambda: UniformLength(0, 4), "low"),
        (lambda: LogNormalLength(0.5, 1.0, 10), "median"),
        (lambda: LogNormalLength(5, math.inf, 10), "sigma"),
        (lambda: MixedLength((SHORT_PROMPTS,), (1, 2)), "weights"),
        (lambda: MixedLength((SHORT_PROMPTS,), (0,)), "weights"),
        (lambda: arrival_times(rng(), 3, 0.0), "requests_per_s"),
        (lambda: arrival_times(rng(), 3, 1.0, cv=-1.0), "cv"),
        (lambda: read_trace("trace.txt"), "path"),
        (lambda: read_trace("trace.csv", max_prompt_tokens=0), "max_prompt_tokens"),
        (lambda: read_trace("trace.csv", requests_per_s=-1), "requests_per_s"),
    ],
)
def test_settings_out_of_range_are_named(make, field: str) -> None:
    with pytest.raises(WorkloadError) as error:
        make()
    assert error.value.field == field


# ------------------------------------------------------------------------------------------------ prompts


def test_equal_hash_ids_give_equal_prefixes() -> None:
    a, b, c = (
        prompt_token_ids(WorkloadRequest(0.0, length, 1, seed, hash_ids), 32_000)
        for length, seed, hash_ids in [(1500, 1, (4, 9, 2)), (1400, 2, (4, 9, 3)), (1500, 1, (4, 9))]
    )
    assert (len(a), len(b), len(c)) == (1500, 1400, 1500)
    assert a[: 2 * HASH_BLOCK_SIZE] == b[: 2 * HASH_BLOCK_SIZE] == c[: 2 * HASH_BLOCK_SIZE]
    assert a[:HASH_BLOCK_SIZE] != a[HASH_BLOCK_SIZE : 2 * HASH_BLOCK_SIZE]
    assert a[2 * HASH_BLOCK_SIZE :][:20] != b[2 * HASH_BLOCK_SIZE :][:20]
    assert a[2 * HASH_BLOCK_SIZE :][:20] != c[2 * HASH_BLOCK_SIZE :][:20]
    assert all(type(token) is int and 0 <= token < 32_000 for token in a)


# ------------------------------------------------------------------------------------------------ traces


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_azure_trace(tmp_path: Path, newline: str) -> None:
    path = write(tmp_path / "azure.csv", AZURE.replace("\n", newline).rstrip())
    trace = read_trace(path)
    assert [r.arrival_s for r in trace.requests] == pytest.approx([0.0, 4.314579, 20.0], abs=1e-6)
    assert [(r.num_prompt_tokens, r.num_output_tokens) for r in trace.requests] == [(374, 44), (396, 109), (5000, 55)]
    assert (trace.num_clipped, trace.num_dropped) == (0, 0)
    assert len({r.prompt_seed for r in trace.requests}) == 3


def test_azure_times_with_a_zone_or_whole_seconds(tmp_path: Path) -> None:
    rows = "2024-05-10 00:00:00.009930+00:00,1,1\n2024-05-10 00:00:01+00:00,1,1\n2024-05-10 00:00:03,1,1\n"
    trace = read_trace(write(tmp_path / "azure.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\n" + rows))
    assert [r.arrival_s for r in trace.requests] == pytest.approx([0.0, 0.99007, 2.99007], abs=1e-6)


def test_mooncake_trace(tmp_path: Path) -> None:
    text = mooncake_line() + mooncake_line(timestamp=3500.5, input_length=512, hash_ids=[0])
    requests = read_trace(write(tmp_path / "mooncake.jsonl", text)).requests
    assert [(round(r.arrival_s, 9), r.num_prompt_tokens, r.num_output_tokens, r.hash_ids) for r in requests] == [
        (0.0, 700, 5, (0, 7)),
        (0.5005, 512, 5, (0,)),
    ]
    assert prompt_token_ids(requests[0], 99)[:512] == prompt_token_ids(requests[1], 99)


def test_rows_out_of_order_are_sorted(tmp_path: Path) -> None:
    text = mooncake_line(timestamp=9000) + mooncake_line(timestamp=8000, output_length=2)
    requests = read_trace(write(tmp_path / "mooncake.jsonl", text)).requests
    assert [(r.arrival_s, r.num_output_tokens) for r in requests] == [(0.0, 2), (1.0, 5)]


def test_time_is_stretched_to_the_rate(tmp_path: Path) -> None:
    path = write(tmp_path / "azure.csv", AZURE)
    arrivals = [r.arrival_s for r in read_trace(path, requests_per_s=2.0).requests]
    assert arrivals == pytest.approx([0.0, 4.314579 / 20, 1.0])
    assert [r.arrival_s for r in read_trace(path, requests_per_s=math.inf).requests] == [0.0, 0.0, 0.0]
    one = read_trace(path, requests_per_s=2.0, max_requests=1).requests
    assert [r.arrival_s for r in one] == [0.0]


def test_a_burst_cannot_be_stretched(tmp_path: Path) -> None:
    path = write(tmp_path / "mooncake.jsonl", mooncake_line() * 2)
    with pytest.raises(WorkloadError, match=r"requests_per_s=2\.0 .* same time"):
        read_trace(path, requests_per_s=2.0)


def test_limits_clip_or_drop_and_say_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path / "azure.csv", AZURE)
    with caplog.at_level(logging.WARNING):
        clipped = read_trace(path, max_prompt_tokens=390, max_output_tokens=50)
        dropped = read_trace(path, max_prompt_tokens=390, drop_long=True)
    assert [(r.num_prompt_tokens, r.num_output_tokens) for r in clipped.requests] == [(374, 44), (390, 50), (390, 50)]
    assert (clipped.num_clipped, clipped.num_dropped) == (2, 0)
    assert (len(dropped.requests), dropped.num_clipped, dropped.num_dropped) == (1, 0, 2)
    assert [record.args[1:] for record in caplog.records] == [(2, 0), (0, 2)]


def test_max_requests_counts_what_is_kept(tmp_path: Path) -> None:
    path = write(tmp_path / "azure.csv", AZURE)
    trace = read_trace(path, max_requests=1, max_prompt_tokens=380)
    assert (len(trace.requests), trace.num_clipped) == (1, 0)
    trace = read_trace(path, max_requests=1, max_output_tokens=60, drop_long=True)
    assert (trace.requests[0].num_prompt_tokens, trace.num_dropped) == (374, 0)


@pytest.mark.parametrize(
    ("row", "field"),
    [
        ("yesterday,10,10", "TIMESTAMP"),
        ("2023-11-16 18:15:46.68x,10,10", "TIMESTAMP"),
        ("2023-11-16 18:15:46.68,ten,10", "ContextTokens"),
        ("2023-11-16 18:15:46.68,-1,10", "ContextTokens"),
        ("2023-11-16 18:15:46.68,10,0", "GeneratedTokens"),
        ("2023-11-16 18:15:46.68,10", "GeneratedTokens"),
    ],
)
def test_bad_azure_row_is_named_with_its_line(tmp_path: Path, row: str, field: str) -> None:
    path = write(tmp_path / "azure.csv", AZURE + row + "\n")
    with pytest.raises(TraceError, match="line 5: ") as error:
        read_trace(path)
    assert (error.value.line_number, error.value.field) == (5, field)
    assert len(read_trace(path, max_requests=3).requests) == 3


@pytest.mark.parametrize(
    ("line", "field"),
    [
        ("{", "line"),
        ("[1, 2]", "line"),
        ("", "line"),
        ("{}", "timestamp"),
        (mooncake_line(timestamp=math.nan), "timestamp"),
        (mooncake_line(timestamp="0"), "timestamp"),
        (mooncake_line(input_length=0), "input_length"),
        (mooncake_line(input_length=1.5), "input_length"),
        (mooncake_line(output_length=True), "output_length"),
        (mooncake_line(hash_ids=None), "hash_ids"),
        (mooncake_line(hash_ids=[1, -1]), "hash_ids"),
    ],
)
def test_bad_mooncake_row_is_named_with_its_line(tmp_path: Path, line: str, field: str) -> None:
    path = write(tmp_path / "mooncake.jsonl", mooncake_line() + line.rstrip("\n") + "\n")
    with pytest.raises(TraceError) as error:
        read_trace(path)
    assert (error.value.line_number, error.value.field) == (2, field)
    assert str(error.value).startswith(f"{path}, line 2: {field}=")

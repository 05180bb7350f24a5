"""Coverage and loss on answers of known distribution, and on public traces where they are at hand."""

from __future__ import annotations

import csv
import os
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from nanopd.errors import ConfigError
from nanopd.routing.length_predictor import LengthPredictor

QUANTILES = (0.1, 0.5, 0.9)
TRACES = Path(os.environ.get("NANOPD_TRACES", "traces"))


def pinball(probability: float, predicted: float, actual: float) -> float:
    return max(probability * (actual - predicted), (probability - 1) * (actual - predicted))


def replay(answers: list[tuple[int, int]]) -> tuple[float, float, float]:
    """Prompt and answer lengths in order -> coverage of the 80 % interval, pinball loss, that of a bucket's mean."""
    predictor, sums = LengthPredictor(), defaultdict(lambda: [128.0, 1.0])
    num_covered, loss, mean_loss = 0, 0.0, 0.0
    for num_prompt, num_output in answers:
        predicted = predictor.quantiles(num_prompt, QUANTILES)
        bucket = sums[num_prompt.bit_length()]
        num_covered += predicted[0] <= num_output <= predicted[2]
        loss += sum(pinball(q, value, num_output) for q, value in zip(QUANTILES, predicted, strict=True))
        mean_loss += sum(pinball(q, bucket[0] / bucket[1], num_output) for q in QUANTILES)
        predictor.observe(num_prompt, num_output)
        bucket[0] += num_output
        bucket[1] += 1
    return num_covered / len(answers), loss / len(answers), mean_loss / len(answers)


def lognormal_answers(count: int, seed: int = 0) -> list[tuple[int, int]]:
    """Longer prompts, longer answers."""
    rng = np.random.default_rng(seed)
    prompts = rng.integers(16, 4096, count)
    outputs = np.ceil(np.exp(3 + 0.25 * np.log(prompts) + 0.8 * rng.normal(size=count))).astype(int)
    return list(zip(prompts.tolist(), outputs.tolist(), strict=True))


def test_interval_covers_and_beats_the_bucket_mean() -> None:
    coverage, loss, mean_loss = replay(lognormal_answers(4000))
    assert 0.76 < coverage < 0.84
    assert loss < 0.8 * mean_loss


@pytest.mark.parametrize("name", ["azure_2023_code.csv", "azure_2023_conv.csv"])
def test_public_traces_in_order_of_arrival(name: str) -> None:
    path = TRACES / name
    if not path.is_file():
        pytest.skip(f"no {path}; NANOPD_TRACES names the directory")
    with path.open(encoding="utf-8") as file:
        answers = [(int(row["ContextTokens"]), int(row["GeneratedTokens"])) for row in csv.DictReader(file)]
    coverage, loss, mean_loss = replay(answers)
    assert 0.75 <= coverage <= 0.85
    assert loss < mean_loss


def test_quantiles_and_mean_come_close_to_the_truth() -> None:
    predictor, truth = LengthPredictor(), stats.lognorm(0.5, scale=200)
    for length in truth.rvs(3000, random_state=0):
        predictor.observe(700, round(length))
    assert predictor.quantiles(700, (0.2, 0.5, 0.8)) == pytest.approx(truth.ppf([0.2, 0.5, 0.8]), rel=0.12)
    assert predictor.mean(700) == pytest.approx(truth.mean(), rel=0.1)


def test_what_has_been_generated_is_known() -> None:
    predictor = LengthPredictor()
    for length in [10, 10, 10, 500] * 100:
        predictor.observe(100, length)
    assert predictor.quantiles(100, (0.5,)) == pytest.approx([10], abs=1)
    assert predictor.quantiles(100, (0.5,), num_generated=20) == pytest.approx([500], rel=0.1)
    assert predictor.mean(100, num_generated=20) > 400
    for num_generated in (1, 10, 499, 600, 10_000, 2_000_000):  # also where no answer has been so long
        assert predictor.mean(100, num_generated) > num_generated
        assert min(predictor.quantiles(100, QUANTILES, num_generated)) > num_generated


def test_a_bucket_without_answers_looks_like_the_whole() -> None:
    predictor = LengthPredictor()
    for _ in range(1000):
        predictor.observe(100, 64)
    assert predictor.quantiles(5000, (0.5,)) == pytest.approx([64], abs=4)
    for _ in range(200):
        predictor.observe(5000, 512)
    assert predictor.quantiles(5000, (0.5,)) == pytest.approx([512], rel=0.1)
    assert predictor.quantiles(100, (0.5,)) == pytest.approx([64], abs=4)


def test_it_follows_a_change() -> None:
    predictor = LengthPredictor()
    for length in [50] * 3000 + [400] * 1500:
        predictor.observe(100, length)
    assert predictor.quantiles(100, (0.5,)) == pytest.approx([400], rel=0.1)


def test_saved_and_restored(tmp_path: Path) -> None:
    predictor, path = LengthPredictor(), tmp_path / "lengths.json"
    for answer in lognormal_answers(500):
        predictor.observe(*answer)
    predictor.save(path)
    restored = LengthPredictor.load(path)
    assert all(restored.quantiles(n, QUANTILES) == predictor.quantiles(n, QUANTILES) for n in (20, 300, 5000))


@pytest.mark.parametrize("text", [None, "no JSON", "[1, 2]", '{"a": 1}', "[[]]"])
def test_what_cannot_be_restored(text: str | None, tmp_path: Path) -> None:
    path = tmp_path / "lengths.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError):
        LengthPredictor.load(path)

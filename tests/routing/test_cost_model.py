"""Fitted terms against terms that samples were made from; parameter files; the online correction."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from nanopd.config.files import config_dir
from nanopd.errors import ConfigError
from nanopd.routing.cost_model import (
    CostModel,
    MoveSample,
    Parameters,
    Sample,
    StepSample,
    Terms,
    chunk_pairs,
    corrected,
    fit,
    prediction_errors,
)

TERMS = Terms(4.4, 0.02, 1.4e-6, 5e-4, 4.4, 0.012, 0.3, 0.03, 96, 3.5e-5, 0.018, 1.1, 0.013, 390)
START = Terms(1, 0.1, 1e-7, 1e-4, 10, 0.001, 0.001, 0.001, 32, 1e-5, 0.1, 0.1, 0.1, 10)
H200 = config_dir() / "params" / "8xh200.json"
SHIPPED = sorted((config_dir() / "params").glob("*.json"))


def samples(terms: Terms, noise: float, batches: tuple[int, ...], lengths: tuple[int, ...]) -> list[Sample]:
    rng = np.random.default_rng(0)
    shapes = [(0, 0, n, chunk_pairs(n, c), c) for n in lengths for c in (0, 4 * n, 4000)]
    shapes += [(b, b * c, 0, 0.0, 0) for b in batches for c in (256, 2048)]
    shapes += [(b, b * 512, n, chunk_pairs(n, 0), 0) for b in batches for n in lengths]
    steps = [StepSample(*shape, ms=terms.step_ms(*shape) * math.exp(noise * rng.normal())) for shape in shapes]
    sizes = [2**k for k in range(16, 31, 2)]
    return [*steps, *(MoveSample(n, terms.move_ms(n) * math.exp(noise * rng.normal())) for n in sizes)]


def test_chunks_of_a_prompt_have_as_many_pairs_as_the_prompt() -> None:
    assert sum(chunk_pairs(100, start) for start in range(0, 1000, 100)) == chunk_pairs(1000, 0)


def test_fit_finds_the_terms_behind_the_samples() -> None:
    fitted = fit(samples(TERMS, 0.0, (1, 4, 16, 64, 96, 128, 256), (128, 512, 2048, 8192)), START)
    assert asdict(fitted.terms) == pytest.approx(asdict(TERMS), rel=1e-3)


def test_fit_of_noisy_samples_predicts_others_and_knows_its_uncertainty() -> None:
    fitted = fit(samples(TERMS, 0.03, (1, 4, 16, 64, 96, 128, 256), (128, 512, 2048, 8192)), START)
    held_out = samples(TERMS, 0.0, (2, 24, 80, 200), (300, 1500, 5000))
    for errors in prediction_errors(held_out, fitted.terms).values():
        assert errors["median"] < 0.03
        assert errors["p90"] < 0.06
    for name in ("a1", "beta", "gamma", "bandwidth"):
        deviation = fitted.stderr[name]
        assert 0 < deviation < 0.2 * getattr(TERMS, name)
        assert abs(getattr(fitted.terms, name) - getattr(TERMS, name)) < 4 * deviation


def test_a_kind_without_samples_keeps_its_terms() -> None:
    fitted = fit([s for s in samples(TERMS, 0.0, (1, 8, 32), (128, 512, 2048)) if s.kind == "prefill"], START)
    assert replace(fitted.terms, a0=START.a0, a1=START.a1, a2=START.a2, a3=START.a3) == START
    assert set(fitted.stderr) == {"a0", "a1", "a2", "a3"}
    assert set(fitted.errors) == {"prefill"}


def test_a_step_grows_with_everything_in_it() -> None:
    shapes = [(1, 100, 0, 0.0), (1, 200, 0, 0.0), (97, 200, 0, 0.0), (97, 200, 64, 2048.0), (97, 200, 64, 9000.0)]
    shapes.append((97, 200, 64, 9000.0, 100))
    times = [TERMS.step_ms(*shape) for shape in shapes]
    assert times == sorted(times)
    assert TERMS.step_ms(0, 0) == 0
    assert TERMS.step_ms(1, 10, 2048) >= TERMS.step_ms(0, 0, 2048)  # whatever gamma is


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_parameters(path: Path, tmp_path: Path) -> None:
    parameters = Parameters.load(path)
    assert parameters.provenance
    parameters.save(tmp_path / "copy.json")
    assert Parameters.load(tmp_path / "copy.json") == parameters


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"kv_bytes_per_token": 0}, "kv_bytes_per_token"),
        ({"num_kv_tokens": "many"}, "num_kv_tokens"),
        ({"terms": {}}, "terms"),
        ({"terms": asdict(TERMS) | {"beta": -1}}, "terms.beta"),
        ({"terms": asdict(TERMS) | {"bandwidth": 0}}, "terms.bandwidth"),
        ({"terms": asdict(TERMS) | {"gamma": None}}, "terms.gamma"),
        ({"pair_bandwidth": {"0->1": math.inf}}, "pair_bandwidth.0->1"),
        ({"surprise": 1}, "parameters"),
    ],
)
def test_bad_parameters_are_named(change: dict, field: str, tmp_path: Path) -> None:
    path = tmp_path / "params.json"
    path.write_text(json.dumps(json.loads(SHIPPED[0].read_text()) | change))
    with pytest.raises(ConfigError) as error:
        Parameters.load(path)
    assert error.value.field == field


@pytest.mark.parametrize("text", [None, "{", "[]"])
def test_no_parameters(text: str | None, tmp_path: Path) -> None:
    path = tmp_path / "params.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError):
        Parameters.load(path)


def test_a_correction_follows_what_is_measured_within_bounds() -> None:
    factor = corrected(1.0, 10.0, 12.0)
    assert 1.0 < factor < 1.02  # one measurement moves it little
    for _ in range(500):
        factor = corrected(factor, 10.0, 12.0)
    assert factor == pytest.approx(1.2, rel=1e-3)
    for _ in range(1000):
        factor = corrected(factor, 10.0, 1000.0)
    assert factor == pytest.approx(2.0, rel=1e-3)


def test_predictions_follow_the_corrections_kind_by_kind() -> None:
    costs = CostModel(replace(Parameters.load(SHIPPED[0]), pair_bandwidth={"0->1": 1.0}))
    step, mixed, prefill = (
        costs.terms.decode_ms(8, 4000),
        costs.mixed_ms(8, 4000, 512, 1e5),
        costs.mixed_ms(0, 0, 512, 1e5),
    )
    for _ in range(500):
        costs.observe(StepSample(8, 4000, 0, 0.0, 0, ms=1.5 * step))
        costs.observe(StepSample(8, 4000, 512, 1e5, 0, ms=0.8 * mixed))
    assert costs.terms.decode_ms(8, 4000) == pytest.approx(1.5 * step, rel=0.01)
    assert costs.mixed_ms(8, 4000, 512, 1e5) == pytest.approx(0.8 * mixed, rel=1e-3)
    assert costs.mixed_ms(0, 0, 512, 1e5) == prefill
    slow, usual = costs.move_ms(0, 1, 1000), costs.move_ms(1, 0, 1000)
    assert usual == pytest.approx(costs.terms.move_ms(1000 * costs.parameters.kv_bytes_per_token))
    assert slow == pytest.approx(costs.terms.c0 + 1000 * costs.parameters.kv_bytes_per_token / 1e6)


def test_corrected_terms_are_those_of_the_slower_machine() -> None:
    """Everything takes 1.3 times as long: single terms too, whoever reckons with them."""
    costs = CostModel(Parameters.load(H200))
    steps = [(0, 0, 512, 1e5, 0), (64, 40_000, 0, 0.0, 0), (64, 40_000, 512, 1e5, 0)]
    fitted = costs.terms
    for _ in range(400):
        for step in steps:
            costs.observe(StepSample(*step, ms=1.3 * fitted.step_ms(*step)))
        costs.observe(MoveSample(10**8, 1.3 * fitted.move_ms(10**8)), (0, 1))
    for step in steps:
        assert costs.terms.step_ms(*step) == pytest.approx(1.3 * fitted.step_ms(*step), rel=0.015)
    assert costs.terms.move_ms(10**8) == pytest.approx(1.3 * fitted.move_ms(10**8), rel=0.015)
    assert costs.terms.batch_thresh == fitted.batch_thresh
    assert costs.drift == {kind: pytest.approx(1.3, rel=0.002) for kind in ("prefill", "step", "mixed", "move")}


def test_what_a_clock_cannot_tell_is_no_drift() -> None:
    costs = CostModel(Parameters.load(H200))
    costs.observe(StepSample(8, 4000, 0, 0.0, 0, round(costs.terms.decode_ms(8, 4000), 3)))
    assert costs.drift["step"] == 1.0


def test_arrays_and_numbers_have_one_formula() -> None:
    rng = np.random.default_rng(0)
    columns = [rng.integers(0, high, 50) for high in (200, 100_000, 4096, 1_000_000)]
    columns[0][:10] = columns[2][5:15] = 0
    together = TERMS.step_ms(*columns, maximum=np.maximum)
    assert together == pytest.approx([TERMS.step_ms(*map(int, row)) for row in zip(*columns, strict=True)])


def test_a_step_that_is_too_long_already_leaves_no_room_for_a_chunk() -> None:
    """Also where rounding puts the square of a0 in an array below the square of a0 as a number."""
    rng = np.random.default_rng(0)
    for factor in rng.uniform(0.5, 2.0, 20_000):
        terms = replace(START, a0=factor * START.a0, gamma=0.0)
        full = np.array([64.0, 128.0])
        assert (terms.chunk_within(1.0, full, full * 1000, maximum=np.maximum) == 0).all()

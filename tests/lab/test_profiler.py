"""Profiling: what is measured fits the limits, and real workers' times become a parameter file."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from model_zoo import make_tiny_model

from nanopd import LLM, ConfigError, SamplingParams, cli
from nanopd.config import EngineConfig, ModelConfig
from nanopd.config.files import config_dir
from nanopd.lab.profiler import FITTED, HELD_OUT, Grid, StepShape, step_of, step_shapes, table
from nanopd.messages import Route, RowFlag
from nanopd.routing.cost_model import Parameters, StepSample, rows_of


@pytest.mark.parametrize("grid", [FITTED, HELD_OUT], ids=["fitted", "held out"])
def test_shapes_fit_limits_and_cache(grid: Grid) -> None:
    config = EngineConfig(model="any", max_num_seqs=40, max_num_batched_tokens=300, block_size=16)
    shapes = step_shapes(grid, config, max_len=2000, num_kv_tokens=8000)
    kinds = {StepSample(*rows_of(step_of(shape, 16, 100)), 1.0).kind for shape in shapes}
    assert kinds == {"prefill", "step", "mixed"}
    for shape in shapes:
        rows = list(shape.rows())
        assert len(rows) <= 40
        assert sum(length for _, length in rows) <= 300
        assert max(sum(row) for row in rows) <= 2000
        assert sum(-(-sum(row) // 16) for row in rows) * 16 <= 8000


def test_what_is_held_out_has_lengths_and_batches_of_its_own() -> None:
    for field in dataclasses.fields(Grid):
        assert not set(getattr(FITTED, field.name)) & set(getattr(HELD_OUT, field.name))


@pytest.mark.parametrize("shape", [StepShape(3, 33), StepShape(0, 0, 40, 16), StepShape(2, 16, 5)])
def test_a_step_has_blocks_for_all_that_it_reads_and_writes(shape: StepShape) -> None:
    step = step_of(shape, 16, 100)
    assert len(np.unique(step.table_updates["block_id"])) == len(step.table_updates)
    assert step.table_updates["block_id"].min() == 1, "block 0 is the null block"
    for slot, start, length in zip(step.row_slots, step.row_starts, step.row_lens, strict=True):
        held = step.table_updates[step.table_updates["slot"] == slot]["index"]
        assert held.tolist() == list(range(-(-(start + length) // 16)))
    assert (step.row_flags == RowFlag.SAMPLE).all()
    assert len(step.token_ids) == step.row_lens.sum()
    assert step.row_lens.sum() == shape.batch + shape.num_new


def test_a_table_beside_the_peaks_of_the_device() -> None:
    parameters = Parameters.load(config_dir() / "params" / "8xh200.json")
    shape = ModelConfig("qwen3", 151936, 4096, 12288, 36, 32, 8, 128, 8192, 1e-6, 1e6, dtype="bfloat16")
    rows = {row[0]: row for row in table(parameters, shape)}
    # 8 x H200: 7.57e9 weights; 2 * 7.57e9 / 20.9 us = 725 TFLOP/s of 989; 15.1 GB / 4.11 ms = 3683 GB/s of 4800
    assert rows["alpha"][-1] == "724.9 TFLOP/s of matrix products, 73% of the device's peak"
    assert rows["beta"][-1].endswith("77% of the device's peak")
    assert rows["a2"][2] == pytest.approx(1e6 * parameters.stderr["a2"])
    assert rows["disaggregated wins"][1] == 9  # 436 rows * 0.393 us per token moved / 19.7 us = 8.7


@pytest.mark.process
def test_a_profile_is_kept_and_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model = make_tiny_model(tmp_path, "llama")
    config = tmp_path / "pair.yaml"
    config.write_text(
        f"model: {model}\npolicy: adaptive\nslo: {{ttft_ms: 1000}}\n"
        "max_num_seqs: 6\nmax_model_len: 200\nmax_num_batched_tokens: 128\n"
        "num_blocks: 100\nworkers: [{device: cpu, role: prefill}, {device: cpu, role: decode}]\n"
    )
    with pytest.raises(ConfigError, match=r"launch\.py profile") as error:
        LLM(config=config)
    assert error.value.field == "params"
    assert cli.main(["profile", "--config", str(config)]) == 0
    (target,) = (tmp_path / "cache" / "nanopd" / "profiles").iterdir()
    found = Parameters.load(target)
    assert found.num_kv_tokens == 99 * 16
    assert list(found.pair_bandwidth) == ["0->1"]
    assert found.terms.beta > 0
    assert found.terms.a1 + found.terms.a0 > 0
    out = capsys.readouterr().out
    assert "disaggregated wins" in out and str(target) in out
    assert set(found.errors) == {"prefill", "step", "move"}  # no mixed step fits the limits
    with LLM(config=config) as llm:
        (output,) = llm.generate([[1, 2, 3]], SamplingParams(temperature=0, max_tokens=4), use_tqdm=False)
    assert output.decision is not None and output.decision.taken.route == output.route == Route(0, 1)
    assert output.metrics.ttft_ms is not None and output.decision.taken.ttft_ms > 0

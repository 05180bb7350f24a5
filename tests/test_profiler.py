"""Profiling: what is measured fits the limits, and real workers' times become a parameter file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from model_zoo import make_tiny_model

from nanopd import cli
from nanopd.config import EngineConfig
from nanopd.messages import RowFlag
from nanopd.profiler import StepShape, step_of, step_shapes
from nanopd.routing.cost_model import Parameters


def test_shapes_fit_limits_and_cache() -> None:
    config = EngineConfig(model="any", max_num_seqs=40, max_num_batched_tokens=300, block_size=16)
    shapes = step_shapes(config, max_len=2000, num_kv_tokens=8000)
    kinds = {shape.sample(1.0).kind for shape in shapes}
    assert kinds == {"prefill", "step", "mixed"}
    for shape in shapes:
        rows = list(shape.rows())
        assert len(rows) <= 40
        assert sum(length for _, length in rows) <= 300
        assert max(sum(row) for row in rows) <= 2000
        assert sum(-(-sum(row) // 16) for row in rows) * 16 <= 8000


@pytest.mark.parametrize("shape", [StepShape(3, 33), StepShape(0, 0, 40, 16), StepShape(2, 16, 5)])
def test_a_step_has_blocks_for_all_that_it_reads_and_writes(shape: StepShape) -> None:
    step = step_of(shape, 16)
    assert len(np.unique(step.table_updates["block_id"])) == len(step.table_updates)
    assert step.table_updates["block_id"].min() == 1, "block 0 is the null block"
    for slot, start, length in zip(step.row_slots, step.row_starts, step.row_lens, strict=True):
        held = step.table_updates[step.table_updates["slot"] == slot]["index"]
        assert held.tolist() == list(range(-(-(start + length) // 16)))
    assert (step.row_flags == RowFlag.SAMPLE).all()
    assert len(step.token_ids) == step.row_lens.sum()
    assert step.row_lens.sum() == shape.batch + shape.num_new


def test_profile_of_two_workers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = make_tiny_model(tmp_path, "llama")
    (tmp_path / "pair.yaml").write_text(
        f"model: {model}\npolicy: disaggregated\nmax_num_seqs: 6\nmax_model_len: 200\nmax_num_batched_tokens: 128\n"
        "num_blocks: 100\nworkers: [{device: cpu, role: prefill}, {device: cpu, role: decode}]\n"
    )
    target = tmp_path / "params.json"
    assert cli.main(["profile", "--config", str(tmp_path / "pair.yaml"), "--params", str(target)]) == 0
    found = Parameters.load(target)
    assert found.num_kv_tokens == 99 * 16
    assert list(found.pair_bandwidth) == ["0->1"]
    assert found.terms.beta > 0
    assert found.terms.a1 + found.terms.a0 > 0
    assert "disaggregated wins" in capsys.readouterr().out

"""Pictures of every shipped parameter file are drawn, with what they must show; needs matplotlib."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from nanopd.config.files import config_dir

ROOT = Path(__file__).parents[1]
NAMES = sorted(path.stem for path in (config_dir() / "params").glob("*.json"))


def test_figures_of_parameter_files(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    command = [sys.executable, "-m", "bench.studies.figures", "--out", str(tmp_path), "--params", *NAMES]
    subprocess.run(command, cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, check=True, timeout=120)
    pictures = sorted(tmp_path.glob("*.png"))
    assert [path.stem for path in pictures] == NAMES
    assert all(path.stat().st_size > 30_000 for path in pictures)

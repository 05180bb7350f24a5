"""How every bench reports: a table for people, then one JSON object as the last line of standard output.

A report names the bench, the device, the versions, the command and the commit of what was measured; `--json` writes it
to a file too. This module knows no bench. Nothing here runs before a bench calls it.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from nanopd import EngineConfig, RequestHandle, SamplingParams
from nanopd.lab.tables import format_table
from nanopd.metrics import Percentiles

PACKAGES = ("numpy", "numba", "numba-cuda", "torch", "transformers")

Row = Mapping[str, Any]


def arguments(description: str | None) -> argparse.ArgumentParser:
    """The parser of a bench, whose docstring describes it."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the report to this file too")
    return parser


def emit(
    bench: str,
    config: Mapping[str, object],
    rows: Sequence[Row],
    columns: Sequence[str] | None = None,
    device: str | None = None,
    table: Sequence[Row] | None = None,
    path: Path | None = None,
) -> dict[str, Any]:
    """Print `table` (None: `rows`), write the report to `path` and return it.

    The table has `columns` (None: the first row's keys), the JSON line everything but samples.
    `device` names what was measured (None: the CPU). The command and the commit are added to `config`.
    """
    table = table or rows
    columns = columns or list(table[0])
    print(format_table(columns, [[row.get(column) for column in columns] for row in table]))
    report = make_report(bench, config, rows, device)
    print(json.dumps({**report, "rows": [{k: v for k, v in row.items() if k != "samples"} for row in rows]}))
    if path is not None:
        save(report, path)
    return report


def make_report(
    bench: str, config: Mapping[str, object], rows: Sequence[Row], device: str | None = None
) -> dict[str, Any]:
    packages = {name: _version(name) for name in PACKAGES}
    return {
        "bench": bench,
        "device": device or cpu_name(),
        "versions": {"python": platform.python_version()} | {name: v for name, v in packages.items() if v},
        "config": {**config, "command": _command(), "commit": _commit()},
        "rows": [dict(row) for row in rows],
    }


def save(report: Mapping[str, Any], path: Path) -> None:
    """Write the report with a line for each row; the file is whole at any time."""
    head = json.dumps({key: value for key, value in report.items() if key != "rows"}, indent=1).removesuffix("\n}")
    rows = ",\n".join(json.dumps(row) for row in report["rows"])
    part = path.with_name(f"{path.name}.part")
    part.write_text(f'{head},\n "rows": [\n{rows}\n ]\n}}\n', encoding="utf-8")
    part.replace(path)


def load(path: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return report


def cpu_name() -> str:
    """The model name that Linux gives the first core, and how many there are."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]}, {len(names)} cores" if names else platform.processor() or platform.machine()


def gpu_name(device: str) -> str | None:
    """None: the CPU."""
    if device == "cpu":
        return None
    import torch  # not at the top: who only simulates does without

    return torch.cuda.get_device_name(device)


def device_name(config: EngineConfig) -> str | None:
    """Of all GPUs of a configuration; None: the CPU."""
    name = gpu_name(config.workers[0].device)
    return name and f"{len(config.workers)} x {name}"


def _command() -> str:
    """The command line behind `python`, without the directory of the checkout."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    name = sys.argv[0] if spec is None else f"-m {spec.name.removesuffix('.__main__')}"
    return " ".join([name, *sys.argv[1:]])


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Of the checkout that this file lies in, marked if files were changed; None outside of one."""
    describe = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    done = subprocess.run(describe, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return done.stdout.strip() or None


def prompts(count: int, length: int, vocab_size: int) -> list[list[int]]:
    """`count` prompts of `length` random tokens, the same at each call."""
    return np.random.default_rng(count + length).integers(10, vocab_size, (count, length)).tolist()


def greedy(max_tokens: int, **params: Any) -> SamplingParams:
    """Sampling parameters of an answer that has exactly `max_tokens` tokens."""
    return SamplingParams(**{"temperature": 0, "max_tokens": max_tokens, "ignore_eos": True, **params})


def abort_all(handles: Sequence[RequestHandle]) -> None:
    """Abort what is under way, and wait until the engine has let go of it."""
    for handle in handles:
        handle.abort()
    for handle in handles:
        handle.result()


def seconds_of(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def median_and_p99(values: Sequence[float] | np.ndarray) -> tuple[float | None, float | None]:
    """(None, None) of no values."""
    found = Percentiles.of(np.asarray(values))
    return (found.p50, found.p99) if found else (None, None)

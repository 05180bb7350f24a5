"""How every bench reports: a table for people, then one JSON object as the last line of standard output."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path

from nanopd.core.tables import format_table

PACKAGES = ("numpy", "numba", "numba-cuda", "torch", "transformers")

Row = Mapping[str, object]


def emit(
    bench: str,
    config: Mapping[str, object],
    rows: Sequence[Row],
    columns: Sequence[str] | None = None,
    device: str | None = None,
) -> dict[str, object]:
    """Print `rows` and return the report.

    The table has `columns` (None: the first row's keys), the JSON line everything.
    `device` names what was measured (None: the CPU). The command and the commit are added to `config`.
    """
    columns = columns or list(rows[0])
    print(format_table(columns, [[row.get(column) for column in columns] for row in rows]))
    report = {
        "bench": bench,
        "device": device or cpu_name(),
        "versions": _versions(),
        "config": {**config, "command": " ".join(sys.argv), "commit": _commit()},
        "rows": [dict(row) for row in rows],
    }
    print(json.dumps(report))
    return report


def cpu_name() -> str:
    """The model name that Linux gives the first core, and how many there are."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]}, {len(names)} cores" if names else platform.processor() or platform.machine()


def _versions() -> dict[str, str]:
    found = {name: _version(name) for name in PACKAGES}
    return {"python": platform.python_version()} | {name: version for name, version in found.items() if version}


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

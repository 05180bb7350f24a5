"""What a row of served requests says to people, and its attainment under other service levels.

Rows are those of `load.result_row`; rows of other engines have some of their figures and no samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

import numpy as np

from bench.lib.report import Row
from nanopd.metrics import SLO

LATENCIES = {"TTFT": "ttft_ms", "first gap": "first_gap_ms", "TPOT": "tpot_ms", "ITL": "itl_ms", "E2E": "e2e_ms"}


def figures_of(row: Row) -> dict[str, object]:
    """A row as people read it; latencies are p50 / p99 in ms, None is what was not measured."""
    return {
        "workload": row["workload"],
        "requests/s": row.get("rate"),
        "policy": policy_of(row),
        "served": f"{row['num_completed']}/{row['num_requests']}" if "num_requests" in row else None,
        **{name: _pair(row.get(key)) for name, key in LATENCIES.items()},
        "tokens/s": _decimal(row.get("output_tokens_per_s")),
        "per device": _decimal(row.get("output_tokens_per_s_per_device")),
        "attained": share(row.get("slo_attainment")),
        "goodput/s": _decimal(row.get("goodput_per_s")),
        "routes": ", ".join(f"{route} {part:.0%}" for route, part in row.get("routes", {}).items()) or None,
        "busy": _shares(row.get("busy")),
        "KV peak": _shares(row.get("kv_peak")),
    }


def policy_of(row: Row) -> str:
    return f"{row['policy']} {row.get('split', '')}".strip()


def limits_of(slo: SLO) -> dict[str, float]:
    """The limits that are set, in milliseconds."""
    return {name: limit for name, limit in asdict(slo).items() if limit is not None}


def attainment(row: Row, slo: SLO, scale: float = 1.0) -> float:
    """Share of all arrivals of a row that kept `slo` with its limits times `scale`."""
    kept = np.ones(row["num_completed"], bool)
    for name, limit in limits_of(slo).items():
        kept &= ~(np.array(row["samples"][name], float) > scale * limit)  # a figure that a request lacks breaks none
    return float(kept.sum()) / row["num_requests"] if row["num_requests"] else 0.0


def share(value: float | None) -> str | None:
    return None if value is None else f"{value:.1%}"


def _pair(found: dict[str, float] | None) -> str | None:
    return f"{found['p50']:.{found['p50'] < 20:d}f} / {found['p99']:.{found['p99'] < 20:d}f}" if found else None


def _decimal(value: float | None) -> float | None:
    return None if value is None else round(value, 1 if value < 100 else None)


def _shares(values: Sequence[float] | None) -> str | None:
    return None if values is None else " ".join(f"{value:.0%}" for value in values)

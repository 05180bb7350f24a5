"""Figures of serving benches: latency over the rate, attainment, what workers did when.

Each function takes rows as `load.result_row` makes them and returns a matplotlib figure. Rows of others, which have no
samples, are drawn where their figures allow. Only bench.report imports this module, as matplotlib is an extra.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from bench.lib.report import Row
from bench.lib.rows import attainment, policy_of
from nanopd.metrics import SLO

COLOURS = {
    "collocated": "#4477aa",
    "disaggregated": "#ee6677",
    "adaptive": "#228833",
    "closed_form": "#aa3377",
    "round_robin": "#ccbb44",
}
OTHER = "#777777"
PHASES = {"prefill": "#ee6677", "mixed": "#ccbb44", "decode": "#4477aa", "move": "#228833"}
GOAL = 0.9  # of attainment
SHOWN_STEPS = 60  # of a timeline
SCALES = np.geomspace(0.25, 4, 61)
LATENCIES = {"ttft_ms": "TTFT", "first_gap_ms": "first gap", "tpot_ms": "TPOT", "itl_ms": "ITL (gaps, all)"}


def save_all(rows: Sequence[Row], timelines: Sequence[Path], directory: Path, stem: str) -> dict[Path, str]:
    """Every figure that the rows allow, as `directory`/`stem`-*.png, with captions."""
    own = [row for row in rows if "samples" in row]
    measured = {row["workload"] for row in own}
    rated = [row for row in rows if row["workload"] in measured and row.get("rate")]
    figures: dict[str, tuple[Figure, str]] = {}
    if rated:
        figures["latency"] = latency(rated), "Latency over the rate: lines p50, bands up to p99."
    if any(row.get("slo") for row in own):
        figures["attainment"] = attained(own), "Share of all arrivals that kept their service levels."
    traces = [json.loads(path.read_text(encoding="utf-8")) for path in timelines]
    if traces := [trace for trace in traces if any(event["ph"] == "X" for event in trace["traceEvents"])]:
        figures["timeline"] = timeline(traces), "What each worker did, at the same moment of the same load."
    saved = {}
    for name, (figure, caption) in figures.items():
        path = directory / f"{stem}-{name}.png"
        figure.savefig(path, dpi=110)
        plt.close(figure)
        saved[path] = caption
    return saved


def latency(rows: Sequence[Row]) -> Figure:
    """A row of panels for each workload, a column for each latency."""
    found = _by_workload(rows)
    size = (3.6 * len(LATENCIES), 2.9 * len(found))
    figure, axes = plt.subplots(len(found), len(LATENCIES), figsize=size, squeeze=False)
    for line, (workload, mine) in zip(axes, found.items(), strict=True):
        for axis, (key, title) in zip(line, LATENCIES.items(), strict=True):
            _by_policy(axis, [r for r in mine if r.get(key)], _band(key))
            axis.set(title=f"{workload}: {title}", ylabel="ms", yscale="log")
            _plain_ticks(axis.yaxis)
            _rate_ticks(axis, mine)
    return _finished(figure, "lines: p50, upper edge of the bands: p99")


def attained(rows: Sequence[Row]) -> Figure:
    """Above: over the rate. Below: with all limits made tighter or looser, at the highest rate."""
    found = _by_workload([row for row in rows if row.get("slo")])
    figure, axes = plt.subplots(2, len(found), figsize=(3.8 * len(found) + 3, 6), squeeze=False)
    for column, (workload, mine) in enumerate(found.items()):
        limits = ", ".join(f"{name.removesuffix('_ms').upper()} {ms:g} ms" for name, ms in mine[0]["slo"].items())
        over_rate, over_scale = axes[0][column], axes[1][column]
        _by_policy(over_rate, mine, _line("slo_attainment", 100))
        over_rate.set(title=f"{workload}\n{limits}", ylabel="attained, % of arrivals")
        _rate_ticks(over_rate, mine)
        busiest, at = _busiest(mine)
        _by_policy(over_scale, busiest, _over_scale)
        over_scale.set(xscale="log", xlabel="limits, times those above", ylabel="attained, % of arrivals", title=at)
        over_scale.set_xticks([0.25, 0.5, 1, 2, 4], ["1/4", "1/2", "1", "2", "4"], minor=False)
        over_scale.minorticks_off()
        for axis in (over_rate, over_scale):
            axis.axhline(100 * GOAL, linestyle="--", linewidth=1, color="black", label=f"{GOAL:.0%}")
            axis.set_ylim(-3, 103)
    return _finished(figure)


def timeline(traces: Sequence[dict[str, Any]]) -> Figure:
    """A panel for each, as `load.save_timeline` has written it: a lane for each worker and for what moves to it."""
    figure, axes = plt.subplots(len(traces), 1, figsize=(12, 2.2 * len(traces) + 0.5), squeeze=False)
    spans = [[event for event in trace["traceEvents"] if event["ph"] == "X"] for trace in traces]
    typical_ms = np.median([event["dur"] / 1e3 for events in spans for event in events if event["name"] != "move"])
    end_ms = min(SHOWN_STEPS * typical_ms, max(event["ts"] / 1e3 for events in spans for event in events))
    for axis, trace, events in zip(axes[:, 0], traces, spans, strict=True):
        used = {event["tid"] for event in events}
        names = {e["tid"]: e["args"]["name"] for e in trace["traceEvents"] if e["ph"] == "M" and e["tid"] in used}
        for place, tid in enumerate(sorted(names)):
            for phase, colour in PHASES.items():
                mine = [(e["ts"] / 1e3, e["dur"] / 1e3) for e in events if (e["name"], e["tid"]) == (phase, tid)]
                axis.broken_barh(mine, (place - 0.4, 0.8), color=colour, edgecolor="white", linewidth=0.4, label=phase)
        axis.set(title=trace["otherData"]["title"], xlabel="ms", xlim=(0, end_ms))
        axis.set_yticks(range(len(names)), [names[tid] for tid in sorted(names)])
        axis.invert_yaxis()
    return _finished(figure)


Draw = Callable[[Axes, Sequence[Row], str, str], None]  # of one policy, with a colour and a label


def _by_policy(axis: Axes, rows: Sequence[Row], draw: Draw) -> None:
    """Policies side by side where there is but one rate."""
    policies = list(dict.fromkeys(policy_of(row) for row in rows))
    is_single = len({row.get("rate") for row in rows}) == 1
    for place, policy in enumerate(policies):
        mine = [row for row in rows if policy_of(row) == policy]
        if is_single and mine[0].get("rate"):
            shift = 1 + 0.04 * (place - (len(policies) - 1) / 2)
            mine = [{**row, "rate": row["rate"] * shift} for row in mine]
        draw(axis, mine, _colour(mine[0], policies[:place]), policy)


def _colour(row: Row, earlier: Sequence[str]) -> str:
    """Darker for each earlier split of the same policy."""
    num_splits = sum(policy.startswith(row["policy"]) for policy in earlier)
    return to_hex([0.55**num_splits * part for part in to_rgb(COLOURS.get(row["policy"], OTHER))])


def _means(rows: Sequence[Row], value: Callable[[Row], float]) -> tuple[list[float], list[float]]:
    """Over seeds: rates, and the mean of each."""
    rates = sorted({row["rate"] for row in rows})
    return rates, [float(np.mean([value(row) for row in rows if row["rate"] == rate])) for rate in rates]


def _band(key: str) -> Draw:
    def draw(axis: Axes, rows: Sequence[Row], colour: str, label: str) -> None:
        rates, low = _means(rows, lambda row: row[key]["p50"])
        _, high = _means(rows, lambda row: row[key]["p99"])
        axis.plot(rates, low, "o-", color=colour, markersize=4, label=label)
        axis.plot(rates, high, "_", color=colour, markersize=9)
        axis.fill_between(rates, low, high, color=colour, alpha=0.15, linewidth=0)
        if len(rates) == 1:
            axis.vlines(rates, low, high, color=colour, alpha=0.4)

    return draw


def _line(key: str, scale: float = 1.0) -> Draw:
    def draw(axis: Axes, rows: Sequence[Row], colour: str, label: str) -> None:
        rates, values = _means([row for row in rows if row.get(key) is not None], lambda row: scale * row[key])
        axis.plot(rates, values, "o-", color=colour, markersize=4, label=label)

    return draw


def _over_scale(axis: Axes, rows: Sequence[Row], colour: str, label: str) -> None:
    slo = SLO(**rows[0]["slo"])
    shares = [np.mean([attainment(row, slo, scale) for row in rows]) for scale in SCALES]
    axis.plot(SCALES, 100 * np.array(shares), color=colour, label=label)


def _plain_ticks(axis: Axis) -> None:
    """1, 2, 5, 10, ... of a logarithmic axis, or powers of ten of a long one, written out."""
    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,)))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(NullFormatter())


def _rate_ticks(axis: Axes, rows: Sequence[Row]) -> None:
    rates = sorted({row["rate"] for row in rows})
    axis.set_xticks(rates, [f"{rate:g}" for rate in rates])
    axis.set_xlabel("requests/s")
    if len(rates) == 1:
        axis.set_xlim(0.9 * rates[0], 1.1 * rates[0])


def _by_workload(rows: Sequence[Row]) -> dict[str, list[Row]]:
    return {name: [r for r in rows if r["workload"] == name] for name in dict.fromkeys(r["workload"] for r in rows)}


def _busiest(rows: Sequence[Row]) -> tuple[list[Row], str]:
    """The rows of the highest rate, and which that is."""
    rate = max(row.get("rate") or 0 for row in rows)
    return [row for row in rows if (row.get("rate") or 0) == rate], f"at {rate:g} requests/s" if rate else ""


def _finished(figure: Figure, note: str = "") -> Figure:
    """One legend above all panels, thin grids, no overlap."""
    found: dict[str, Artist] = {}
    for axis in figure.axes:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        for handle, label in zip(*axis.get_legend_handles_labels()):
            found.setdefault(label, handle)
    height = figure.get_figheight()
    figure.legend(found.values(), found.keys(), ncols=len(found), loc="upper center", frameon=False, title=note or None)
    figure.tight_layout(rect=(0, 0, 1, 1 - (0.6 if note else 0.4) / height))
    return figure

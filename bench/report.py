"""Markdown and figures of files that serving benches wrote with --json (or `bench.run sweep` with --out):

    python -m bench.report bench/results/2xh200/sweep.json --beside bench/results/h200/vllm.json --figures docs/figures

With --against it compares a real run with its simulation (`bench.run sweep --simulate`), or any two, run by run.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from importlib import util
from pathlib import Path
from typing import Any

import numpy as np

from bench.lib.report import Row, load
from bench.lib.rows import figures_of, policy_of, share
from nanopd.lab.tables import format_table

KEY = ("workload", "rate", "seed", "cv", "policy", "split", "window_s")  # of a run of a sweep
COMPARED = {  # figure -> how near a simulation should come; None: shown only
    "output_tokens_per_s": 0.1,
    "ttft_ms.p50": 0.1,
    "ttft_ms.p99": 0.2,
    "first_gap_ms.p50": None,
    "tpot_ms.p50": 0.1,
    "tpot_ms.p99": 0.2,
    "itl_ms.p99": None,
    "slo_attainment": None,
}
INTRODUCTION = """\
Latencies are p50 / p99 in milliseconds, from the moment a request was due; ITL holds the first gap. Rates are over the\
 time to the end of the last request; attainment and goodput count all arrivals."""


def markdown(report: Mapping[str, Any], beside: Sequence[Mapping[str, Any]], images: Mapping[str, str]) -> str:
    """A page: what ran, a table per workload, `images` (path -> caption), and where the other rows come from."""
    config = report["config"]
    model = config.get("engine", {}).get("model", "-")
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    lines = [f"# {report['bench']}: {report['device']}", "", f"Model {model}, commit {config['commit']}, {versions}."]
    lines += ["", f"```console\npython {config['command']}\n```", "", INTRODUCTION]
    rows = [*report["rows"], *(row for other in beside for row in other["rows"])]
    for workload in dict.fromkeys(row["workload"] for row in report["rows"]):
        mine = sorted((r for r in rows if r["workload"] == workload), key=lambda r: r.get("rate") or 0)
        lines += ["", f"## {workload}{_levels(mine)}", "", _markdown_table([figures_of(row) for row in mine])]
    for path, caption in images.items():
        lines += ["", f"![{caption}]({path})", "", f"*{caption}*"]
    for other in beside:
        if other["rows"]:
            lines += ["", f"{other['rows'][0]['policy']}: {other['device']}; {other['config']['source']}."]
    return "\n".join(lines) + "\n"


def _levels(rows: Sequence[Row]) -> str:
    slo = next((row["slo"] for row in rows if row.get("slo")), None)
    limits = ", ".join(f"{name.removesuffix('_ms')} {limit:g} ms" for name, limit in (slo or {}).items())
    return f" (service levels: {limits})" if limits else ""


def _markdown_table(rows: Sequence[Mapping[str, object]]) -> str:
    columns = [name for name in rows[0] if name != "workload" and any(row[name] is not None for row in rows)]
    cells = [columns, ["---"] * len(columns), *(["-" if r[c] is None else str(r[c]) for c in columns] for r in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def compare(real: Sequence[Row], simulated: Sequence[Row]) -> list[Row]:
    """For each run that both have: its key, and `{real, simulated, difference}` of each figure in COMPARED.

    Differences are relative to what was real; of attainment, which is a share itself, they are plain.
    """
    others = {tuple(row[name] for name in KEY): row for row in simulated}
    pairs = [(row, others[key]) for row in real if (key := tuple(row[name] for name in KEY)) in others]
    return [
        {**{name: row[name] for name in KEY}, **{figure: _difference(figure, row, other) for figure in COMPARED}}
        for row, other in pairs
    ]


def _difference(figure: str, *rows: Row) -> dict[str, float] | None:
    name, _, percentile = figure.partition(".")
    real, simulated = (row[name] and row[name][percentile] if percentile else row[name] for row in rows)
    if None in (real, simulated):
        return None
    difference = simulated - real if figure == "slo_attainment" else simulated / real - 1
    return {"real": real, "simulated": simulated, "difference": difference}


def comparison_tables(rows: Sequence[Row]) -> str:
    """Real / simulated and the difference, of each run; then how near the simulation came, by figure."""
    cells = [[row["workload"], row["rate"], policy_of(row), *(_compared(row[f], f) for f in COMPARED)] for row in rows]
    names = [figure.removesuffix("_per_s").replace("_ms.", " ").replace("_", " ") for figure in COMPARED]
    summary = []
    for figure, bar in COMPARED.items():
        if found := [abs(row[figure]["difference"]) for row in rows if row[figure]]:
            within = None if bar is None else f"{sum(x <= bar for x in found)}/{len(found)}"
            summary.append([figure, share(bar), share(float(np.median(found))), share(max(found)), within])
    columns = ("figure", "bar", "median difference", "largest", "runs within the bar")
    runs = format_table(["workload", "requests/s", "policy", *names], cells)
    return f"{runs}\n\n{format_table(columns, summary)}"


def _compared(found: Mapping[str, float] | None, figure: str) -> str | None:
    if found is None:
        return None
    values = (found["real"], found["simulated"])
    real, simulated = (f"{x:.0%}" if figure == "slo_attainment" else f"{x:.{x < 20:d}f}" for x in values)
    return f"{real} / {simulated} {found['difference']:+.0%}"


def write_page(path: Path, out: Path, figures: Path | None, beside: Sequence[Path] = ()) -> dict[str, str]:
    """Markdown at `out` of the report at `path`, with figures in the directory `figures`, if matplotlib is there.

    Returns the figures by path, relative to the page, with their captions.
    """
    report, others = load(path), [load(other) for other in beside]
    measured = {(row["workload"], row.get("rate")) for row in report["rows"]}
    for other in others:
        other["rows"] = [row for row in other["rows"] if (row["workload"], row["rate"]) in measured]
    images: dict[str, str] = {}
    if figures and util.find_spec("matplotlib"):
        from bench.lib import plots  # imports matplotlib, which is an extra

        figures.mkdir(parents=True, exist_ok=True)
        rows = [*report["rows"], *(row for other in others for row in other["rows"])]
        saved = plots.save_all(rows, sorted(path.parent.glob(f"{path.stem}-timeline-*.json")), figures, path.stem)
        images = {os.path.relpath(image, out.parent): caption for image, caption in saved.items()}
    elif figures:
        print("no figures: they need `pip install nanopd[plot]`; then run python -m bench.report", file=sys.stderr)
    out.write_text(markdown(report, others, images), encoding="utf-8")
    return images


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path)
    parser.add_argument("--beside", type=Path, nargs="*", default=[], help="reports of others, for the same workloads")
    parser.add_argument("--figures", type=Path, help="directory for figures (needs matplotlib)")
    parser.add_argument("--out", type=Path, help="the page; default: beside the report, with suffix .md")
    parser.add_argument("--against", type=Path, metavar="SIMULATED", help="print real / simulated and the difference")
    args = parser.parse_args()
    if args.against:
        rows = compare(load(args.report)["rows"], load(args.against)["rows"])
        print(comparison_tables(rows))
        print(json.dumps({"bench": "comparison", "rows": rows}))
        return
    out = args.out or args.report.with_suffix(".md")
    print(*write_page(args.report, out, args.figures, args.beside), out, sep="\n")


if __name__ == "__main__":
    main()

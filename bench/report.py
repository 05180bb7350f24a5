"""How every bench reports: a table for people, then one JSON object as the last line of standard output.

As a command it makes Markdown and figures of files that serving benches wrote with --json (or sweep.py with --out):

    python bench/report.py bench/results/sweep-2xh200.json --beside bench/results/vllm-h200.json --figures docs/figures

With --against it compares a real run with its simulation (sweep.py --simulate), or any two, run by run.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib import metadata, util
from pathlib import Path
from typing import Any

import numpy as np

from nanopd.lab.tables import format_table
from nanopd.metrics import SLO

PACKAGES = ("numpy", "numba", "numba-cuda", "torch", "transformers")
LATENCIES = {
    "TTFT": "ttft_ms",
    "first gap": "first_gap_ms",
    "TPOT": "tpot_ms",
    "ITL": "itl_ms",
    "E2E": "e2e_ms",
}

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

Row = Mapping[str, Any]


def emit(
    bench: str,
    config: Mapping[str, object],
    rows: Sequence[Row],
    columns: Sequence[str] | None = None,
    device: str | None = None,
    table: Sequence[Row] | None = None,
) -> dict[str, Any]:
    """Print `table` (None: `rows`) and return the report.

    The table has `columns` (None: the first row's keys), the JSON line everything but samples.
    `device` names what was measured (None: the CPU). The command and the commit are added to `config`.
    """
    table = table or rows
    columns = columns or list(table[0])
    print(format_table(columns, [[row.get(column) for column in columns] for row in table]))
    report = make_report(bench, config, rows, device)
    print(json.dumps({**report, "rows": [{k: v for k, v in row.items() if k != "samples"} for row in rows]}))
    return report


def make_report(
    bench: str, config: Mapping[str, object], rows: Sequence[Row], device: str | None = None
) -> dict[str, Any]:
    return {
        "bench": bench,
        "device": device or cpu_name(),
        "versions": _versions(),
        "config": {**config, "command": " ".join(sys.argv), "commit": _commit()},
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


# ----------------------------------------------------------------------------------------------- serving benches


def figures_of(row: Row) -> dict[str, object]:
    """A row of a serving bench as people read it; latencies are p50 / p99 in ms, "-" what was not measured."""
    served = f"{row['num_completed']}/{row['num_requests']}" if "num_requests" in row else None
    return {
        "workload": row["workload"],
        "requests/s": row.get("rate"),
        "policy": policy_of(row),
        "served": served,
        **{name: _pair(row.get(key)) for name, key in LATENCIES.items()},
        "tokens/s": _decimal(row.get("output_tokens_per_s")),
        "per device": _decimal(row.get("output_tokens_per_s_per_device")),
        "attained": _share(row.get("slo_attainment")),
        "goodput/s": _decimal(row.get("goodput_per_s")),
        "routes": ", ".join(f"{route} {share:.0%}" for route, share in row.get("routes", {}).items()) or None,
        "busy": _shares(row.get("busy")),
        "KV peak": _shares(row.get("kv_peak")),
    }


def policy_of(row: Row) -> str:
    return f"{row['policy']} {row.get('split', '')}".strip()


def with_slo(row: Row, slo: SLO | None) -> Row:
    """The row with attainment and goodput under other service levels, by its samples."""
    if slo is None or "samples" not in row:
        return row
    share = attainment(row, slo)
    limits = {name: limit for name, limit in asdict(slo).items() if limit is not None}
    goodput = share * row["num_requests"] / row["duration_s"] if row["duration_s"] else 0.0
    return {**row, "slo": limits, "slo_attainment": share, "goodput_per_s": goodput}


def attainment(row: Row, slo: SLO, scale: float = 1.0) -> float:
    """Share of all arrivals of a row that kept `slo` with its limits times `scale`."""
    limits = {name: limit * scale for name, limit in asdict(slo).items() if limit is not None}
    kept = np.ones(row["num_completed"], bool)
    for name, limit in limits.items():
        kept &= ~(np.array(row["samples"][name], float) > limit)  # a figure that a request lacks breaks none
    return float(kept.sum()) / row["num_requests"] if row["num_requests"] else 0.0


def markdown(report: Mapping[str, Any], beside: Sequence[Mapping[str, Any]], images: Mapping[str, str]) -> str:
    """A page: what ran, a table per workload, `images` (path -> caption), and where the other rows come from."""
    config = report["config"]
    lines = [
        f"# {report['bench']}: {report['device']}",
        "",
        f"Model {config.get('engine', {}).get('model', '-')}, commit {config['commit']}, "
        + ", ".join(f"{name} {version}" for name, version in report["versions"].items())
        + ".",
        "",
        f"```console\npython {config['command']}\n```",
        "",
        "Latencies are p50 / p99 in milliseconds, from the moment a request was due; ITL holds the first gap. Rates are"
        " over the time to the end of the last request; attainment and goodput count all arrivals.",
    ]
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


# ---------------------------------------------------------------------------------------------------- comparison


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
        found = [abs(row[figure]["difference"]) for row in rows if row[figure]]
        if found:
            within = None if bar is None else f"{sum(x <= bar for x in found)}/{len(found)}"
            summary.append([figure, _share(bar), _share(float(np.median(found))), _share(max(found)), within])
    columns = ("figure", "bar", "median difference", "largest", "runs within the bar")
    return "\n\n".join(
        [format_table(["workload", "requests/s", "policy", *names], cells), format_table(columns, summary)]
    )


def _compared(found: Mapping[str, float] | None, figure: str) -> str | None:
    if found is None:
        return None
    values = (found["real"], found["simulated"])
    real, simulated = (f"{x:.0%}" if figure == "slo_attainment" else f"{x:.{x < 20:d}f}" for x in values)
    return f"{real} / {simulated} {found['difference']:+.0%}"


def _pair(found: Mapping[str, float] | None) -> str | None:
    return f"{found['p50']:.{found['p50'] < 20:d}f} / {found['p99']:.{found['p99'] < 20:d}f}" if found else None


def _decimal(value: float | None) -> float | None:
    return None if value is None else round(value, 1 if value < 100 else None)


def _share(value: float | None) -> str | None:
    return None if value is None else f"{value:.1%}"


def _shares(values: Sequence[float] | None) -> str | None:
    return None if values is None else " ".join(f"{value:.0%}" for value in values)


def write_page(
    path: Path, out: Path, figures: Path | None, beside: Sequence[Path] = (), slo: SLO | None = None
) -> dict[str, str]:
    """Markdown at `out` of the report at `path`, with figures in the directory `figures`, if matplotlib is there.

    Returns the figures by path, relative to the page, with their captions.
    """
    report = load(path)
    report["rows"] = [with_slo(row, slo) for row in report["rows"]]
    measured = {(row["workload"], row.get("rate")) for row in report["rows"]}
    others = [load(other) for other in beside]
    for other in others:
        other["rows"] = [row for row in other["rows"] if (row["workload"], row["rate"]) in measured]
    images: dict[str, str] = {}
    if figures and util.find_spec("matplotlib"):
        import plots

        figures.mkdir(parents=True, exist_ok=True)
        rows = [*report["rows"], *(row for other in others for row in other["rows"])]
        saved = plots.save_all(rows, sorted(path.parent.glob(f"{path.stem}-timeline-*.json")), figures, path.stem)
        images = {os.path.relpath(image, out.parent): caption for image, caption in saved.items()}
    elif figures:
        print("no figures: they need `pip install nanopd[plot]`; then run bench/report.py", file=sys.stderr)
    out.write_text(markdown(report, others, images), encoding="utf-8")
    return images


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path)
    parser.add_argument("--beside", type=Path, nargs="*", default=[], help="reports of others, for the same workloads")
    parser.add_argument("--figures", type=Path, help="directory for figures (needs matplotlib)")
    parser.add_argument("--slo", type=SLO.parse, help="other service levels, as ttft=200,tpot=10")
    parser.add_argument("--out", type=Path, help="the page; default: beside the report, with suffix .md")
    parser.add_argument("--against", type=Path, metavar="SIMULATED", help="print real / simulated and the difference")
    args = parser.parse_args()
    if args.against:
        rows = compare(load(args.report)["rows"], load(args.against)["rows"])
        print(comparison_tables(rows))
        print(json.dumps({"bench": "comparison", "rows": rows}))
        return
    out = args.out or args.report.with_suffix(".md")
    for image in write_page(args.report, out, args.figures, args.beside, args.slo):
        print(image)
    print(out)


if __name__ == "__main__":
    main()

"""Tables of what an engine has served, printed on standard error when it is done."""

from __future__ import annotations

import sys
from collections.abc import Iterable

import nanopd
from nanopd.frontend.jsonl import PREDICTED_KEYS, Row
from nanopd.lab.tables import format_table
from nanopd.metrics import Summary, by_route, summarize

ROUTE_COLUMNS = ("route", "completed", "TTFT ms p50 / p99", "first gap", "TPOT", "E2E", "output tokens/s")
PREDICTED_COLUMNS = ("request", "route", "TTFT ms predicted / actual", "first gap", "TPOT")
DECISION_COLUMNS = (*PREDICTED_COLUMNS, "best other", *PREDICTED_KEYS)
WORKER_COLUMNS = ("worker", "device", "role", "peak blocks", "still used", "of blocks")


def report(llm: nanopd.LLM, explained: Iterable[Row] = ()) -> None:
    """Print what was served, by route, and the KV blocks that it took.

    Before that comes what was predicted of the `explained` answers, after it by how much the cost model was wrong.
    """
    stats, tables = llm.stats(), []
    if decisions := [_explained_cells(row) for row in explained if "decision" in row]:
        tables.append(format_table(DECISION_COLUMNS, decisions))
    routes = [_route_cells(str(route or "no route"), summary) for route, summary in by_route(stats.logs).items()]
    whole = summarize(stats.logs)
    if len(routes) > 1:
        routes.append(_route_cells("all", whole))
    found = enumerate(zip(llm.config.workers, stats.roles, stats.blocks))
    workers = [(i, worker.device, role.value, b.peak, b.used, b.total) for i, (worker, role, b) in found]
    if routes:
        tables += [format_table(ROUTE_COLUMNS, routes), format_table(WORKER_COLUMNS, workers)]
    if whole.num_draft_tokens:
        tables.append(f"drafts: {whole.num_accepted_tokens} of {whole.num_draft_tokens} accepted")
    if routes and stats.drift:
        tables.append(format_table(("cost model of", "measured / predicted"), stats.drift.items()))
    if tables:
        print(*tables, sep="\n\n", file=sys.stderr)


def _explained_cells(row: Row) -> list[object]:
    taken, other = row["decision"]["taken"], row["decision"]["best_other"] or {}
    cells = [row["request_id"], row["route"] or "turned away"]
    for key in PREDICTED_KEYS:
        actual = row["metrics"][key]
        cells.append(f"{taken[key]:.1f} / " + ("-" if actual is None else f"{actual:.1f}"))
    return [*cells, *(other.get(key) for key in ("route", *PREDICTED_KEYS))]


def _route_cells(name: str, summary: Summary) -> list[object]:
    cells: list[object] = [name, f"{summary.num_completed}/{summary.num_requests}"]
    for latency in (summary.ttft_ms, summary.first_gap_ms, summary.tpot_ms, summary.e2e_ms):
        cells.append(f"{latency.p50:.1f} / {latency.p99:.1f}" if latency else None)
    return [*cells, summary.output_tokens_per_s]

"""The reports in bench/results: each shown by a page, and marked stale where the measured code has changed."""

from __future__ import annotations

import pytest

from bench import stale
from bench.lib.report import load


def test_every_report_has_a_line() -> None:
    found = {str(path.relative_to(stale.RESULTS).with_suffix("")) for path in stale.RESULTS.rglob("*.json")}
    assert found == set(stale.RESULT_OF)
    text = stale.README.read_text(encoding="utf-8")
    assert [name for name in found if text.count(f"({name}.json)") != 1] == []


@pytest.mark.parametrize("name", stale.RESULT_OF)
def test_pages_and_measured_paths_exist(name: str) -> None:
    result = stale.RESULT_OF[name]
    assert (stale.ROOT / "docs" / "en" / f"{result.page}.md").exists()
    assert all((stale.ROOT / path).exists() for path in result.measures)
    assert load(stale.RESULTS / f"{name}.json")["rows"]


def test_stale_reports_are_marked() -> None:
    if not stale.has_history():
        pytest.skip("git's history is not here, so nothing is known of the reports' commits")
    written = stale.README.read_text(encoding="utf-8").splitlines()
    assert written[-len(stale.RESULT_OF) - 2 :] == list(stale.lines()), "python -m bench.stale brings it up to date"

"""The reports in bench/results: each shown by a page, and marked stale where the measured code has changed."""

from __future__ import annotations

import re

import pytest

from bench import stale


def test_every_report_is_shown_by_a_page() -> None:
    table = stale.table()
    assert set(table) == {
        str(path.relative_to(stale.RESULTS).with_suffix("")) for path in stale.RESULTS.rglob("*.json")
    }
    for name, (link, _, page, *_) in table.items():
        assert link == f"[{name}]({name}.json)"
        assert (stale.RESULTS / re.findall(r"\((.*)\)", page)[0]).exists()


def test_measured_paths_exist() -> None:
    assert all((stale.ROOT / path).exists() for paths in stale.MEASURED.values() for path in paths)


def test_a_change_makes_a_report_stale() -> None:
    if not stale.has_history():
        pytest.skip("git's history is not here, so nothing is known of the reports' commits")
    first = stale._git("rev-list", "--max-parents=0", "HEAD").split()[0]
    assert stale.is_stale(first, ("bench",))
    assert stale.is_stale(None, ("bench",))
    assert stale.is_stale("0123456789ab", ("bench",))
    assert not stale.is_stale("HEAD", ("bench/no such path",))
    assert not stale.is_stale(None, ())


def test_stale_reports_are_marked() -> None:
    if not stale.has_history():
        pytest.skip("git's history is not here, so nothing is known of the reports' commits")
    written = stale.table()
    current = {name: stale.current_line(name, cells) for name, cells in written.items()}
    assert written == current, "python -m bench.stale brings bench/results/README.md up to date"

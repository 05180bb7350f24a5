"""Plain-text tables for what launch and the benches print. Knows no meaning of what it formats."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def format_table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Columns separated by two spaces, under a header and a rule; text flush left, columns that hold a number flush right.

    Floats are shown with three significant digits at least, None as "-". No newline at the end.
    """
    rows = [list(row) for row in rows]
    cells = [list(columns), *([_cell(value) for value in row] for row in rows)]
    assert all(len(row) == len(columns) for row in cells), "a row and the columns differ in length"
    widths = [max(map(len, column)) for column in zip(*cells)]
    is_number = [any(isinstance(row[i], (int, float)) for row in rows) for i in range(len(columns))]
    cells.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "  ".join(cell.rjust(w) if right else cell.ljust(w) for cell, w, right in zip(row, widths, is_number)).rstrip()
        for row in cells
    )


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        num_digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2 if abs(value) >= 1 else 3
        return f"{value:.{num_digits}f}"
    return str(value)

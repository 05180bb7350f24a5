"""Plain-text tables for what launch and the benches print. Knows no meaning of what it formats."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from numbers import Integral, Real


def format_table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A header, a rule and a line per row; columns that hold a number are flush right, others flush left.

    Floats are shown with up to three decimals, the fewer the larger they are, None as "-". No newline at the end.
    """
    rows = [list(row) for row in rows]
    cells = [list(columns), *([_cell(value) for value in row] for row in rows)]
    assert all(len(row) == len(columns) for row in cells), "a row and the columns differ in length"
    widths = [max(map(len, column)) for column in zip(*cells)]
    is_number = [any(isinstance(row[i], Real) for row in rows) for i in range(len(columns))]
    cells.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "  ".join(cell.rjust(w) if right else cell.ljust(w) for cell, w, right in zip(row, widths, is_number)).rstrip()
        for row in cells
    )


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, Real) and not isinstance(value, Integral):
        number = float(value)
        num_decimals = sum(abs(number) < limit for limit in (1, 10, 100))
        return f"{number:.{num_decimals}f}"
    return str(value)

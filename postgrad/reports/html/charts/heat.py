"""Heat table: numbers on a ground that darkens with the rise above the best value."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from postgrad.reports.html.notation import escape_html, finite, format_fixed


def heat_table(
    row_names: Sequence[str], column_names: Sequence[str], values: Sequence[Sequence[float | None]], *,
    caption: str, corner: str, outlined_rows: Sequence[int | None] = (), 
    format_cell: Callable[[float | None], str] = format_fixed,
) -> str:  # fmt: skip
    """A table whose ground darkens with the rise above the lowest value so far in its column.

    `own[column]` is the row in which that column's set was learnt: its cell is outlined. Numbers stay text,
    so the table reads without colour.
    """
    rise: dict[tuple[int, int], float] = {}
    for j in range(len(column_names)):
        best = math.inf
        for i, row in enumerate(values):
            value = finite(row[j]) if j < len(row) else None
            if value is not None:
                best = min(best, value)
                rise[i, j] = value - best
    reach = max(rise.values(), default=0.0)
    head = "".join(f'<th scope="col"><bdi>{escape_html(n, 60)}</bdi></th>' for n in column_names)
    body = []
    for i, name in enumerate(row_names):
        line = []
        for j in range(len(column_names)):
            value = finite(values[i][j]) if i < len(values) and j < len(values[i]) else None
            if value is None:
                line.append('<td class="h">\u2013</td>')
                continue
            shade = round(8 * rise[i, j] / reach) if reach > 0 else 0
            mine = " own" if j < len(outlined_rows) and outlined_rows[j] == i else ""
            line.append(
                f'<td class="h h{shade}{mine}"><data value="{value!r}">{escape_html(format_cell(value))}</data></td>'
            )
        body.append(f'<tr><th scope="row"><bdi>{escape_html(name, 80)}</bdi></th>{"".join(line)}</tr>')
    return (
        f'<table class="heat"><caption>{escape_html(caption)}</caption><thead><tr><th scope="col">'
        f"{escape_html(corner)}</th>"
        f"{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"
    )

"""Tables of a report, rendered for a terminal, a page and a spreadsheet.

A number keeps its exact value beside its rounded text: the page carries it in `<data value>`, the CSV file writes it in full.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from postgrad.foreign_text import plain_text, truncate
from postgrad.reports.html.notation import (
    ABSENT,
    HasEnds,
    display_width,
    escape_html,
    escape_markdown,
    finite,
    format_count,
    format_fixed,
    format_percent,
    format_signed,
    no_interval,
)

_MAX_NARROW_COLUMNS = 3
"""A table of more columns is stacked on a narrow screen."""


@dataclass(frozen=True)
class Number:
    """A rounded text and its exact value (None: unknown)."""

    text: str
    value: float | int | None


@dataclass(frozen=True)
class Cell:
    """Text and numbers in reading order; `below` goes in brackets or on a second line.

    `tone` colours the cell: good, bad, even or open. `link`: where its text leads on a page.
    """

    parts: tuple[str | Number, ...]
    tone: str = ""
    below: tuple[str | Number, ...] = ()
    link: str = ""

    @property
    def text(self) -> str:
        first, second = _join_parts(self.parts), _join_parts(self.below)
        return f"{first}  ({second})" if second else first


def _join_parts(parts: Sequence[str | Number]) -> str:
    return "".join(plain_text(p) if isinstance(p, str) else p.text for p in parts)


@dataclass(frozen=True)
class Column:
    """A column heading. `group` is a heading over several columns; `fields` name its numbers in a CSV file."""

    title: str
    group: str = ""
    unit: str = ""
    is_text: bool = False
    fields: tuple[str, ...] = ()


@dataclass(frozen=True)
class Table:
    """Rows under columns with a caption above and notes below; the first cell of a row names it."""

    caption: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    notes: tuple[str, ...] = ()
    last_is_total: bool = False

    def text(self, width: int = 0, max_characters: int = 40) -> str:
        """Plain text for a terminal of `width` cells (0: unlimited).

        A table that is too wide continues below, its first column repeated. Cells are cut after `max_characters`.
        """
        head = [plain_text(f"{c.title} ({c.unit})" if c.unit else c.title, max_characters) for c in self.columns]
        body = [[truncate(cell.text, max_characters) for cell in row] for row in self.rows]
        wide = [max([display_width(h), *(display_width(r[i]) for r in body)]) for i, h in enumerate(head)]
        blocks: list[list[int]] = [[0]]
        for i in range(1, len(wide)):
            taken = sum(wide[j] + 2 for j in blocks[-1])
            group = plain_text(self.columns[i].group)
            starts = group != plain_text(self.columns[blocks[-1][-1]].group)
            if width and len(blocks[-1]) > 1 and taken + max(wide[i], display_width(group) * starts) > width:
                blocks.append([0])
            blocks[-1].append(i)
        lines = [plain_text(self.caption)]
        for number_of_block, block in enumerate(blocks):
            lines += [""] * (number_of_block > 0) + self._text_block(block, head, body, wide)
        return "\n".join([*lines, *(plain_text(note) for note in self.notes)])

    def _text_block(
        self, block: Sequence[int], head: Sequence[str], body: Sequence[Sequence[str]], widths: list[int]
    ) -> list[str]:
        spans = self._group_spans(block)
        for group, span in spans:  # a group heading may be wider than its columns
            room = sum(widths[i] for i in span) + 2 * (len(span) - 1)
            widths[span[-1]] += max(0, display_width(group) - room)

        def line(texts: Sequence[str]) -> str:
            padded = []
            for i in block:
                space = " " * (widths[i] - display_width(texts[i]))
                padded.append(texts[i] + space if self.columns[i].is_text else space + texts[i])
            return "  ".join(padded).rstrip()

        rule = "\u2500" * (sum(widths[i] for i in block) + 2 * (len(block) - 1))
        above = []
        if any(group for group, _ in spans):
            texts = []
            for group, span in spans:
                room = sum(widths[i] for i in span) + 2 * (len(span) - 1) - display_width(group)
                texts.append(" " * (room // 2) + group + " " * (room - room // 2))
            above = ["  ".join(texts).rstrip()]
        lines = [*above, line(head), rule, *(line(row) for row in body)]
        if self.last_is_total and len(body) > 1:
            lines.insert(len(lines) - 1, rule)
        return lines

    def html(self) -> str:
        """A `<table>` with scoped headings, in a region the keyboard can scroll.

        The style sheet stacks a wide one on a narrow screen: a block for each row, its change first, each value with its label.
        """
        caption = escape_html(self.caption)
        head = "".join(
            f'<th scope="col"{_cell_classes(c)}>{escape_html(c.title)}'
            + (f"<small> {escape_html(c.unit)}</small>" if c.unit else "")
            + "</th>"
            for c in self.columns
        )
        body = []
        for i, row in enumerate(self.rows):
            total = ' class="total"' if self.last_is_total and i == len(self.rows) - 1 and i else ""
            line = [f'<th scope="row"><bdi>{_cell_html(row[0])}</bdi></th>'] if row else []
            line += [
                f"<td{_cell_classes(column, cell.tone)}{_cell_label(column)}>{_cell_html(cell)}</td>"
                for column, cell in zip(self.columns[1:], row[1:], strict=True)
            ]
            body.append(f"<tr{total}>{''.join(line)}</tr>")
        notes = "".join(f'<p class="note">{escape_html(note)}</p>' for note in self.notes)
        stack = ' class="stack"' if len(self.columns) > _MAX_NARROW_COLUMNS else ""
        return (
            f'<div class="scroll" tabindex="0" role="region" aria-label="{caption}"><table{stack}>'
            f"<caption>{caption}</caption><thead>{self._group_row()}<tr>{head}</tr></thead>"
            f"<tbody>{''.join(body)}</tbody></table></div>{notes}"
        )

    def _group_row(self) -> str:
        """The row of headings over several columns; empty when no column has one."""
        if not any(c.group for c in self.columns):
            return ""
        spans = self._group_spans(range(len(self.columns)))
        cells = "".join(
            f'<th scope="colgroup" colspan="{len(span)}"><bdi>{escape_html(group, 80)}</bdi></th>'
            if group
            else "<td></td>" * len(span)
            for group, span in spans
        )
        return f'<tr class="groups">{cells}</tr>'

    def _group_spans(self, indices: Iterable[int]) -> list[tuple[str, list[int]]]:
        """Neighbouring columns under one group heading."""
        spans: list[tuple[str, list[int]]] = []
        for i in indices:
            group = plain_text(self.columns[i].group)
            if spans and group and spans[-1][0] == group:
                spans[-1][1].append(i)
            else:
                spans.append((group, [i]))
        return spans

    def markdown(self) -> str:
        """A table of GitHub's Markdown, its caption in bold above and its notes below."""
        head = [f"{c.title} ({unit})" if (unit := c.unit or c.group) else c.title for c in self.columns]
        lines = [head, [":--" if c.is_text else "--:" for c in self.columns]]
        lines += [[cell.text for cell in row] for row in self.rows]
        body = [
            f"| {' | '.join(texts)} |" for texts in ([*map(escape_markdown, line)] for line in lines[:1] + lines[2:])
        ]
        body.insert(1, f"| {' | '.join(lines[1])} |")
        parts = [f"**{escape_markdown(self.caption)}**", "\n".join(body), *map(escape_markdown, self.notes)]
        return "\n\n".join(parts)

    def csv(self) -> str:
        """RFC 4180 text with exact values. Text that a spreadsheet would run as a formula gets a quote."""
        lines: list[list[str | float | None]] = [[name for c in self.columns for name in _csv_fields(c)]]
        for row in self.rows:
            line: list[str | float | None] = []
            for column, cell in zip(self.columns, row, strict=True):
                names = _csv_fields(column)
                numbers = [p for p in (*cell.parts, *cell.below) if isinstance(p, Number)]
                if numbers and not column.is_text:
                    line += [n.value for n in numbers][: len(names)]
                    line += [None] * (len(names) - len(numbers))
                else:
                    line += [cell.text, *[None] * (len(names) - 1)]
            lines.append(line)
        return csv_text(lines)


def csv_text(rows: Iterable[Sequence[str | float | None]]) -> str:
    """RFC 4180 text with exact numbers. Text that a spreadsheet would run as a formula gets a quote."""
    out = io.StringIO()
    writer = csv.writer(out)
    for row in rows:
        writer.writerow([_quote_formula(plain_text(value)) if isinstance(value, str) else value for value in row])
    return out.getvalue()


def _csv_fields(column: Column) -> list[str]:
    lead = f"{column.group} " if column.group else ""
    return [plain_text(lead + name) for name in (column.fields or (column.title,))]


def _quote_formula(text: str) -> str:
    return "'" + text if text[:1] in ("=", "+", "-", "@", "\t", "\r") else text


def _cell_classes(column: Column, tone: str = "") -> str:
    is_change = column.fields == CHANGE_FIELDS
    names = [
        n for n in ("" if column.is_text else "n", "change" if is_change else "", f"t-{tone}" if tone else "") if n
    ]
    return f' class="{" ".join(names)}"' if names else ""


def _cell_label(column: Column) -> str:
    """The name of a value where the headings are not shown."""
    return f' data-label="{escape_html(f"{column.title}, {of}" if (of := column.group or column.unit) else column.title, 80)}"'


def _cell_html(cell: Cell) -> str:
    below, text = _parts_html(cell.below), _parts_html(cell.parts)
    if cell.link:
        text = f'<a href="{escape_html(cell.link)}">{text}</a>'
    return text + (f'<small class="below">{below}</small>' if below else "")


def _parts_html(parts: Sequence[str | Number]) -> str:
    return "".join(
        escape_html(p, 200)
        if isinstance(p, str)
        else escape_html(p.text)
        if p.value is None
        else f'<data value="{p.value!r}">{escape_html(p.text)}</data>'
        for p in parts
    )


# --- cells ------------------------------------------------------------------------------------------------


class HasInterval(HasEnds, Protocol):
    """A difference with its interval."""

    @property
    def difference(self) -> float | None: ...


class HasValue(HasEnds, Protocol):
    """A value with its interval."""

    @property
    def value(self) -> float | None: ...


VALUE_FIELDS = ("value", "low", "high")
"""The numbers of an `interval_cell` in a CSV file."""
CHANGE_FIELDS = ("difference", "low", "high")
"""The numbers of a `difference_cell` in a CSV file."""


def text_cell(value: object, tone: str = "") -> Cell:
    return Cell((plain_text(value, 200) or ABSENT,), tone)


def value_cell(value: float | None, decimals: int = 3) -> Cell:
    return Cell((Number(format_fixed(value, decimals), finite(value)),))


def change_cell(value: float | None, decimals: int = 3, tone: str = "") -> Cell:
    return Cell((Number(format_signed(value, decimals), finite(value)),), tone)


def count_cell(value: float | None, unit: str = "") -> Cell:
    return Cell((Number(format_count(value), finite(value)), *([f" {unit}"] if unit else [])))


def share_cell(value: float | None, decimals: int = 1) -> Cell:
    return Cell((Number(format_percent(value, decimals), finite(value)),))


def difference_cell(entry: HasInterval | None, decimals: int = 3, tone: str = "", unit: str = "document") -> Cell:
    """A difference with its interval below. `unit`: what the interval resamples."""
    if entry is None or finite(entry.difference) is None:
        return Cell(change_cell(None).parts, tone, (Number("", None), Number("", None)))
    return Cell(
        change_cell(entry.difference, decimals).parts, tone, interval_parts(entry, format_signed, decimals, unit)
    )


def interval_cell(
    entry: HasValue | None,
    decimals: int = 3,
    tone: str = "",
    write: Callable[[float | None, int], str] = format_fixed,
    absent: str = ABSENT,
    unit: str = "document",
) -> Cell:
    """A value with its interval below."""
    if entry is None or finite(entry.value) is None:
        return Cell((Number(absent, None),), tone, (Number("", None), Number("", None)))
    number = Number(write(entry.value, decimals), finite(entry.value))
    return Cell((number,), tone, interval_parts(entry, write, decimals, unit))


def interval_parts(
    entry: HasEnds, write: Callable[[float | None, int], str], decimals: int = 3, unit: str = "document"
) -> tuple[str | Number, ...]:
    """The ends of an interval, or that there is none."""
    low, high = finite(entry.low), finite(entry.high)
    if low is None or high is None:
        return (Number(no_interval(unit), None), Number("", None))
    return (Number(write(low, decimals), low), " to ", Number(write(high, decimals), high))

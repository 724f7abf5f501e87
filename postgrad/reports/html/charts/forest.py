"""Forest plot: differences with their intervals, one per row."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from postgrad.foreign_text import plain_text
from postgrad.reports.html.charts.chart import Chart
from postgrad.reports.html.charts.line import LimitLine
from postgrad.reports.html.charts.marks import draw_line, draw_marker, draw_text, empty_figure, make_svg
from postgrad.reports.html.charts.scales import Scale, axis_range, tick_labels, ticks
from postgrad.reports.html.charts.text_fit import fit_text, text_width, visible_labels
from postgrad.reports.html.notation import format_fixed, format_signed

_SHAPES = {"good": 0, "even": 1, "bad": 2, "open": 3}


@dataclass(frozen=True)
class ForestRow:
    """A difference with its 95 % interval, one row of a forest plot. `tone`: good, bad, even or open."""

    name: str
    value: float
    low: float | None = None
    high: float | None = None
    tone: str = "open"
    note: str = ""

    @property
    def interval(self) -> tuple[float, float] | None:
        """The interval, where both ends are finite."""
        if self.low is None or self.high is None or not math.isfinite(self.low) or not math.isfinite(self.high):
            return None
        return self.low, self.high


def forest_plot(
    estimates: Sequence[ForestRow],
    *,
    title: str,
    x_label: str,
    width: float = 560,
    limit: LimitLine | None = None,
    left_word: str = "",
    right_word: str = "",
    decimals: int = 3,
    sign: bool = True,
) -> Chart:
    """Differences with their 95 % intervals around zero, a row each (two lines when narrow); levels where `sign` is off."""
    rows = [e for e in estimates if math.isfinite(e.value)]
    if not rows:
        return empty_figure(width, title, "no differences yet")
    texts = [_estimate_text(row, decimals, sign) for row in rows]
    frame = _make_frame(rows, texts, width, limit is not None)
    ends = [v for row in rows for v in (row.value, row.low, row.high) if v is not None and math.isfinite(v)]
    x_at = Scale(
        *axis_range([*ends, *([limit.value] if limit else [])], zero=True, least=1e-9), frame.left, frame.right
    )
    parts = _draw_axis(x_at, frame, sign)
    if limit:
        parts += _draw_limit(limit, x_at, frame)
    for i, (row, text) in enumerate(zip(rows, texts, strict=True)):
        parts += _draw_row(row, text, x_at, frame, i)
    height = frame.floor + 40 + (16 if left_word or right_word else 0)
    if left_word or right_word:
        parts.append(draw_text(frame.left, frame.floor + 34, f"\u2190 {left_word}"))
        parts.append(draw_text(frame.right, frame.floor + 34, f"{right_word} \u2192", at="end"))
    parts.append(draw_text((frame.left + frame.right) / 2, height - 6, x_label, at="middle"))
    words = ". ".join(f"{plain_text(row.name, 60)} {text}" for row, text in zip(rows[:12], texts, strict=False))
    numbers = [(row.name, row.value, *(row.interval or (None, None))) for row in rows]
    return Chart(
        make_svg(width, height, f"{title}. {x_label}. {words}", parts), ("row", x_label, "low", "high"), numbers
    )


@dataclass(frozen=True)
class _Frame:
    """The plot area in pixels; in a narrow figure the texts of a row stand above its bar."""

    width: float
    left: float
    right: float
    top: float
    row_height: float
    name_width: float
    row_count: int
    is_narrow: bool

    @property
    def floor(self) -> float:
        return self.top + self.row_height * self.row_count + 4

    @property
    def grid_spans(self) -> list[tuple[float, float]]:
        """Where vertical lines are drawn: in a narrow figure none may cross a text."""
        if not self.is_narrow:
            return [(self.top, self.floor)]
        starts = [self.top + i * self.row_height for i in range(self.row_count)]
        return [(start + 22, start + self.row_height - 3) for start in starts]


def _make_frame(rows: Sequence[ForestRow], texts: Sequence[str], width: float, has_limit: bool) -> _Frame:
    is_narrow = width < 480
    value_width = max(text_width(text) for text in texts) + 8
    longest = max(text_width(plain_text(row.name)) * 1.08 for row in rows)
    name_width = min(longest + 12, width * (0.45 if is_narrow else 0.26))
    left, right = (8.0, width - 8.0) if is_narrow else (name_width + 6, width - value_width - 12)
    top = 22.0 if has_limit else 6.0
    return _Frame(width, left, right, top, 46.0 if is_narrow else 32.0, name_width, len(rows), is_narrow)


def _estimate_text(row: ForestRow, decimals: int, sign: bool) -> str:
    write = format_signed if sign else format_fixed
    ends = f"  ({write(row.low, decimals)} to {write(row.high, decimals)})" if row.interval else ""
    return write(row.value, decimals) + ends


def _draw_axis(x_at: Scale, frame: _Frame, sign: bool) -> list[str]:
    values = ticks(x_at.low, x_at.high, max(2, int((frame.right - frame.left) / 64)))
    labels = tick_labels(values, sign=sign)
    visible = visible_labels([x_at(v) for v in values], labels)
    parts = []
    for i, value in enumerate(values):
        style = "zero" if value == 0 else "grid"
        parts += [draw_line(x_at(value), start, x_at(value), end, style) for start, end in frame.grid_spans]
        if i in visible:
            parts.append(draw_text(x_at(value), frame.floor + 16, labels[i], at="middle"))
    return parts


def _draw_limit(limit: LimitLine, x_at: Scale, frame: _Frame) -> list[str]:
    x = x_at(limit.value)
    text = fit_text(plain_text(limit.label), frame.width * 0.6)
    half = text_width(text) / 2
    centre = min(max(x, half), frame.width - half)
    return [
        *(draw_line(x, start, x, end, "level") for start, end in frame.grid_spans),
        draw_text(centre, frame.top - 9, text, at="middle", style="lev", full=limit.label),
    ]


def _draw_row(row: ForestRow, text: str, x_at: Scale, frame: _Frame, index: int) -> list[str]:
    top = frame.top + index * frame.row_height
    y = top + (32 if frame.is_narrow else frame.row_height / 2)
    text_y = top + 15 if frame.is_narrow else y + 4
    tone = row.tone if row.tone in _SHAPES else "open"
    name = plain_text(row.name)
    parts = [
        draw_text(0, text_y, fit_text(name, frame.name_width / 1.08), style="strong name", full=name),
        draw_text(frame.width, text_y, text, at="end", style="strong halo"),
    ]
    if row.interval:
        low, high = map(x_at, row.interval)
        parts.append(draw_line(low, y, high, y, f"bar s-{tone}"))
        parts += [draw_line(end, y - 4, end, y + 4, f"bar s-{tone}") for end in (low, high)]
    style = f"bar s-{tone} hollow" if tone == "open" else f"pt {tone}"
    parts.append(draw_marker(x_at(row.value), y, _SHAPES[tone], style, f"{name}: {text} {row.note}", 4.5))
    return parts

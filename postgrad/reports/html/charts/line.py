"""Line chart: series over x with interval bands, marks and limits, and a label at the end of each line."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from postgrad.foreign_text import plain_text
from postgrad.reports.html.charts.chart import Chart
from postgrad.reports.html.charts.marks import (
    PALETTE_SIZE,
    draw_line,
    draw_marker,
    draw_path,
    draw_text,
    empty_figure,
    make_svg,
)
from postgrad.reports.html.charts.scales import (
    MIN_SPAN,
    Point,
    Scale,
    axis_range,
    log_ticks,
    nice_step,
    tick_labels,
    ticks,
)
from postgrad.reports.html.charts.text_fit import fit_text, spread_positions, text_width, visible_labels
from postgrad.reports.html.charts.thinning import MAX_POINTS, split_at_gaps, thin_points
from postgrad.reports.html.notation import MAX_MAGNITUDE, format_compact, format_fixed, format_signed

ScaleKind = Literal["linear", "log"]
Band = Sequence[tuple[float, float, float]]


@dataclass(frozen=True)
class Series:
    """One line: points (x, y) in order of x; `band` holds (x, low, high). A NaN y is a gap."""

    name: str
    points: Sequence[Point]
    band: Band = ()
    has_markers: bool = False
    is_faint: bool = False
    is_dashed: bool = False
    colour: int | None = None
    has_label: bool = True


@dataclass(frozen=True)
class VerticalMark:
    """A labelled vertical line at x, such as the switch to new data."""

    x: float
    label: str


@dataclass(frozen=True)
class LimitLine:
    """A labelled limit: horizontal in a line chart, vertical in a forest plot."""

    value: float
    label: str


def line_chart(
    series: Sequence[Series],
    *,
    title: str,
    x_label: str,
    y_label: str,
    width: float = 560,
    height: float = 300,
    x_scale: ScaleKind = "linear",
    y_scale: ScaleKind = "linear",
    zero: bool = False,
    least: float = 0.0,
    marks: Sequence[VerticalMark] = (),
    levels: Sequence[LimitLine] = (),
    x_range: tuple[float, float] | None = None,
    x_ticks: Sequence[tuple[float, str]] | None = None,
    empty: str = "no values yet",
) -> Chart:
    """Lines over x, with interval bands, markers and a direct label at each line's end.

    `zero` draws the line y = 0 and keeps it in view; `least` is the smallest height of the y axis in its own
    unit, so that noise does not fill the figure; `x_range` shows a part. On a log x axis, x <= 0 has its own
    place left of the axis. `title` is only the label for assistive technology: the page writes its caption.
    """
    lines = _visible_lines(series, x_range, y_scale)
    if not lines:
        return empty_figure(width, title, empty)
    y_axis = _make_y_axis(lines, levels, height, y_scale, zero, least)
    frame = _make_frame(lines, y_axis, width, height, bool(marks))
    x_axis = _make_x_axis(lines, frame, x_scale, marks, x_range, x_ticks)
    x_at = x_axis.scale
    y_at = Scale(y_axis.low, y_axis.high, frame.floor, frame.top, y_scale == "log")
    parts = [
        draw_text(0, 12, y_label),
        *_draw_grid(y_axis, y_at, frame),
        *_draw_x_ticks(x_axis, frame),
        draw_text((frame.left + frame.right) / 2, frame.height - 6, x_label, at="middle"),
        *_draw_marks(marks, x_at, frame, x_range or (-math.inf, math.inf)),
    ]
    limits, limit_labels = _draw_levels(levels, y_axis, y_at, frame)
    bands, drawn = _draw_lines(lines, x_at, y_at, zero)
    # Bands, then lines, then labels: what is most precise lies on top.
    parts += [*limits, *bands, *drawn, *limit_labels, *_draw_labels(lines, x_at, y_at, frame)]
    svg = make_svg(width, frame.height, _description(title, x_label, y_label, lines, zero), parts)
    return Chart(svg, ("series", x_label, y_label, "low", "high"), [row for line in lines for row in line.rows()])


# --- layout ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Line:
    """The visible part of a series; `index` is its number in the chart."""

    index: int
    series: Series
    points: list[Point]
    band: Band

    @property
    def shape(self) -> int:
        return self.index if self.series.colour is None else self.series.colour

    @property
    def colour(self) -> str:
        return f"c{self.shape % PALETTE_SIZE}"

    def rows(self) -> list[list[str | float | None]]:
        """Name, x, y and the band's ends of each point that is drawn."""
        ends = {x: (low, high) for x, low, high in self.band}
        return [[self.series.name, x, y, *ends.get(x, (None, None))] for x, y in self.points]


@dataclass(frozen=True)
class _YAxis:
    low: float
    high: float
    ticks: list[float]
    labels: list[str]
    has_zero_line: bool


@dataclass(frozen=True)
class _XAxis:
    scale: Scale
    ticks: list[tuple[float, str]]


@dataclass(frozen=True)
class _Frame:
    """The plot area in pixels, inside a picture of `width` x `height`."""

    width: float
    height: float
    left: float
    right: float
    top: float
    floor: float

    @property
    def max_x_ticks(self) -> int:
        return max(2, int((self.right - self.left) / 70))


def _visible_lines(series: Sequence[Series], x_range: tuple[float, float] | None, y_scale: ScaleKind) -> list[_Line]:
    low_x, high_x = x_range or (-math.inf, math.inf)
    lowest = MIN_SPAN if y_scale == "log" else -MAX_MAGNITUDE
    lines = []
    for index, line in enumerate(series):
        inside = [p for p in line.points if low_x <= p[0] <= high_x]
        inside = [(x, y if lowest <= y <= MAX_MAGNITUDE else math.nan) for x, y in inside if abs(x) <= MAX_MAGNITUDE]
        band = [b for b in line.band if low_x <= b[0] <= high_x and all(abs(v) <= MAX_MAGNITUDE for v in b)]
        if any(math.isfinite(y) for _, y in inside):
            lines.append(_Line(index, line, thin_points(inside), band[:: max(1, len(band) // MAX_POINTS)]))
    return lines


def _make_y_axis(
    lines: Sequence[_Line], levels: Sequence[LimitLine], height: float, kind: ScaleKind, zero: bool, least: float
) -> _YAxis:
    ys = [y for line in lines for _, y in line.points if math.isfinite(y)]
    ys += [v for line in lines for b in line.band for v in b[1:] if kind == "linear" or v > 0]
    count = max(3, int(height / 55))
    if kind == "log":
        low, high = min(ys) / 1.1, max(ys) * 1.1
        values = log_ticks(low, high, count)
    else:
        low, high = axis_range([*ys, *(level.value for level in levels)], zero=zero, least=least)
        values = ticks(low, high, count)
    return _YAxis(low, high, values, tick_labels(values, sign=zero), zero)


def _make_frame(lines: Sequence[_Line], y_axis: _YAxis, width: float, height: float, has_marks: bool) -> _Frame:
    """The margins follow from the texts."""
    named = [line for line in lines if line.series.has_label]
    longest = max((text_width(plain_text(line.series.name)) for line in named), default=0)
    right = min(longest + 16, width * 0.32) if named else 12
    top = 24 + (16 if has_marks else 0)
    height = max(height, top + 44 + 15 * len(named))
    left = max((text_width(label) for label in y_axis.labels), default=0) + 10
    return _Frame(width, height, left, width - right, top, height - 40)


def _make_x_axis(
    lines: Sequence[_Line],
    frame: _Frame,
    kind: ScaleKind,
    marks: Sequence[VerticalMark],
    x_range: tuple[float, float] | None,
    x_ticks: Sequence[tuple[float, str]] | None,
) -> _XAxis:
    xs = [x for line in lines for x, _ in line.points]
    positive = [x for x in xs if x > MIN_SPAN]
    is_log = kind == "log" and bool(positive)
    has_zero = is_log and len(positive) < len(xs)
    if is_log:
        start, end = min(positive), max(positive)
        end = end if end > start else start * 10
        left = frame.left + (26 if has_zero else 0)
        scale = Scale(start, end, left, frame.right, True, frame.left + 4 if has_zero else None)
    else:
        start, end = _linear_range(xs, marks, x_range, frame.max_x_ticks if x_ticks is None else None)
        inset = 6 if any(line.series.has_markers for line in lines) else 0
        scale = Scale(start, end, frame.left + inset, frame.right - inset)
    if x_ticks is not None:
        return _XAxis(scale, [(x, plain_text(label)) for x, label in x_ticks if start <= x <= end])
    values = (log_ticks if is_log else ticks)(start, end, frame.max_x_ticks)
    return _XAxis(scale, [*([(0.0, "0")] if has_zero else []), *zip(values, tick_labels(values), strict=True)])


def _linear_range(
    xs: Sequence[float],
    marks: Sequence[VerticalMark],
    x_range: tuple[float, float] | None,
    max_ticks: int | None,
) -> tuple[float, float]:
    low_x, high_x = x_range or (-math.inf, math.inf)
    start, end = x_range if x_range and all(map(math.isfinite, x_range)) else (min(xs), max(xs))
    mark_xs = [mark.x for mark in marks if low_x <= mark.x <= high_x]
    start, end = min([start, *mark_xs]), max([end, *mark_xs])
    if x_range is None and max_ticks is not None and end > start:  # a run of 19.99M tokens ends at a tick of 20M
        step = nice_step(end - start, max_ticks)
        nearest = round(end / step) * step
        end = nearest if 0 < nearest - end < 0.02 * (end - start) else end
        start = 0.0 if 0 < start < 0.02 * (end - start) else start
    if start == end:
        start, end = start - 0.5 * (abs(start) or 1), end + 0.5 * (abs(end) or 1)
    return start, end


# --- drawing --------------------------------------------------------------------------------------------------------------


def _draw_grid(y_axis: _YAxis, y_at: Scale, frame: _Frame) -> list[str]:
    parts = []
    for value, label in zip(y_axis.ticks, y_axis.labels, strict=True):
        style = "zero" if y_axis.has_zero_line and value == 0 else "grid"
        parts.append(draw_line(frame.left, y_at(value), frame.right, y_at(value), style))
        parts.append(draw_text(frame.left - 6, y_at(value) + 4, label, at="end"))
    return [*parts, draw_line(frame.left, frame.floor, frame.right, frame.floor, "axis")]


def _draw_x_ticks(x_axis: _XAxis, frame: _Frame) -> list[str]:
    labels = [label for _, label in x_axis.ticks]
    positions = [x_axis.scale(x) for x, _ in x_axis.ticks]
    # A label at the edge must not leave the picture.
    halves = [text_width(label) / 2 for label in labels]
    centres = [min(max(x, half), frame.width - half) for x, half in zip(positions, halves, strict=True)]
    parts = []
    for i in visible_labels(centres, labels):
        parts.append(draw_line(positions[i], frame.floor, positions[i], frame.floor + 4, "axis"))
        parts.append(draw_text(centres[i], frame.floor + 17, labels[i], at="middle"))
    return parts


def _draw_marks(marks: Sequence[VerticalMark], x_at: Scale, frame: _Frame, x_range: tuple[float, float]) -> list[str]:
    parts = []
    free = -math.inf  # where the next label may begin
    for mark in sorted(marks, key=lambda m: m.x):
        if not x_range[0] <= mark.x <= x_range[1]:
            continue
        x = x_at(mark.x)
        parts.append(draw_line(x, frame.top - 4, x, frame.floor, "mark"))
        text = fit_text(plain_text(mark.label), frame.width * 0.5)
        half = text_width(text) / 2
        centre = min(max(x, half + frame.left), frame.width - half)
        if centre - half > free:
            parts.append(draw_text(centre, frame.top - 8, text, at="middle", full=mark.label))
            free = centre + half + 8
    return parts


def _draw_levels(
    levels: Sequence[LimitLine], y_axis: _YAxis, y_at: Scale, frame: _Frame
) -> tuple[list[str], list[str]]:
    """The limits, and their labels at the right, where the curves are settled."""
    lines, labels = [], []
    for level in levels:
        if y_axis.low <= level.value <= y_axis.high:
            y = y_at(level.value)
            lines.append(draw_line(frame.left, y, frame.right, y, "level"))
            text = fit_text(plain_text(level.label), (frame.right - frame.left) * 0.9)
            labels.append(draw_text(frame.right, y - 5, text, at="end", style="lev halo", full=level.label))
    return lines, labels


def _draw_lines(lines: Sequence[_Line], x_at: Scale, y_at: Scale, zero: bool) -> tuple[list[str], list[str]]:
    """The interval bands, and the lines with their markers."""
    bands, parts = [], []
    for line in lines:
        if len(line.band) > 1:
            edge = [(x_at(x), y_at(high)) for x, _, high in line.band]
            edge += [(x_at(x), y_at(low)) for x, low, _ in reversed(line.band)]
            bands.append(draw_path(edge, f"bd {line.colour}", closed=True))
        elif line.band:
            x, low, high = line.band[0]
            parts.append(draw_line(x_at(x), y_at(low), x_at(x), y_at(high), f"bar s-{line.colour}"))
        is_dashed = line.series.is_dashed or line.shape >= PALETTE_SIZE
        style = f"ln s-{line.colour}{' faint' if line.series.is_faint else ''}{' dash' if is_dashed else ''}"
        for piece in split_at_gaps(line.points):
            placed = [(x_at(x), y_at(y)) for x, y in piece]
            if len(placed) > 1:
                parts.append(draw_path(placed, style))
            is_single = len(placed) == 1 and not line.series.is_faint
            if is_single or (line.series.has_markers and len(line.points) <= 80):
                parts += _draw_markers(line, piece, placed, zero)
    return bands, parts


def _draw_markers(line: _Line, points: Sequence[Point], placed: Sequence[Point], zero: bool) -> list[str]:
    """Markers with a tooltip, none nearer than 7 pixels to the one before."""
    parts = []
    last = (-math.inf, 0.0)
    for (x, y), (px, py) in zip(points, placed, strict=True):
        if math.hypot(px - last[0], py - last[1]) < 7:
            continue
        last = (px, py)
        name = f"{plain_text(line.series.name, 60)}: {_format_value(y, zero)} at {format_compact(x)}"
        parts.append(draw_marker(px, py, line.shape, f"pt {line.colour}", name, 3.2))
    return parts


def _draw_labels(lines: Sequence[_Line], x_at: Scale, y_at: Scale, frame: _Frame) -> list[str]:
    """The name of each line at its end, with a leader where the label had to move."""
    named = [line for line in lines if line.series.has_label]
    ends = [next(p for p in reversed(line.points) if math.isfinite(p[1])) for line in named]
    targets = [y_at(y) for _, y in ends]
    label_x = frame.right + 8
    parts = []
    for line, (x, _), y, label_y in zip(
        named, ends, targets, spread_positions(targets, 15, frame.top + 4, frame.floor - 2), strict=True
    ):
        end_x = x_at(x)
        if abs(label_y - y) > 4 or label_x - end_x > 18:
            parts.append(draw_path([(end_x + 5, y), (label_x - 3, label_y)], "leader"))
        name = plain_text(line.series.name)
        text = fit_text(name, frame.width - frame.right - 9)
        parts.append(draw_text(label_x, label_y + 4, text, style=line.colour, full=name))
    return parts


def _format_value(value: float, sign: bool) -> str:
    decimals = 4 if abs(value) < 10 else 1
    if sign:
        return format_signed(value, decimals)
    return format_fixed(value, decimals) if abs(value) >= 1e-3 else f"{value:.3g}"


def _description(title: str, x_label: str, y_label: str, lines: Sequence[_Line], sign: bool) -> str:
    sentences = [f"{title}. {y_label} against {x_label}."]
    for line in lines[:8]:
        if line.series.is_faint:
            continue
        values = [y for _, y in line.points if math.isfinite(y)]
        ends = f"from {_format_value(values[0], sign)} to {_format_value(values[-1], sign)}"
        sentences.append(f"{plain_text(line.series.name, 60)}: {ends}.")
    return " ".join(sentences)

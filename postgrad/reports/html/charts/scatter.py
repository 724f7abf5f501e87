"""Scatter plot of arms with their intervals and labels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

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
from postgrad.reports.html.charts.scales import Scale, axis_range, tick_labels, ticks
from postgrad.reports.html.charts.text_fit import fit_text, text_width, visible_labels
from postgrad.reports.html.notation import format_signed

_Box = tuple[float, float, float, float]
"""Left, top, right, bottom."""


@dataclass(frozen=True)
class ScatterPoint:
    """One arm: x and y with optional intervals (low, high). A muted one is a grey dot without a label."""

    name: str
    x: float
    y: float
    x_interval: tuple[float, float] | None = None
    y_interval: tuple[float, float] | None = None
    is_muted: bool = False


def scatter(
    points: Sequence[ScatterPoint],
    *,
    title: str,
    x_label: str,
    y_label: str,
    width: float = 560,
    height: float = 340,
    best_corner_text: str = "",
) -> Chart:
    """One labelled point per arm, with crosses for its intervals; a label takes the free side of its point."""
    visible = [(i, p) for i, p in enumerate(points) if math.isfinite(p.x) and math.isfinite(p.y)]
    if not visible:
        return empty_figure(width, title, "no arm has both numbers yet")
    frame = _make_frame([p for _, p in visible], width, height)
    parts = [draw_text(0, 12, y_label), *_draw_axes(frame, x_label)]
    boxes = [_marker_box(p, frame) for _, p in visible]
    if best_corner_text:
        text, box = _draw_corner(best_corner_text, frame)
        parts.append(text)
        boxes.append(box)
    for i, point in sorted(visible, key=lambda pair: not pair[1].is_muted):
        parts += _draw_point(point, i, frame)
        boxes += _interval_boxes(point, frame)
    for i, point in visible:
        if not point.is_muted:
            drawn, box = _draw_label(point, i, frame, boxes)
            parts += drawn
            boxes.append(box)
    words = ". ".join(
        f"{plain_text(p.name, 60)}: {format_signed(p.x)} and {format_signed(p.y)}" for _, p in visible[:12]
    )
    svg = make_svg(width, height, f"{title}. {x_label} and {y_label}. {words}", parts)
    header = ("point", *(f"{label}{end}" for label in (x_label, y_label) for end in ("", ", low", ", high")))
    ends = (None, None)
    return Chart(
        svg, header, [(p.name, p.x, *(p.x_interval or ends), p.y, *(p.y_interval or ends)) for _, p in visible]
    )


@dataclass(frozen=True)
class _Frame:
    """The plot area in pixels with its scales."""

    width: float
    height: float
    left: float
    top: float
    floor: float
    x_at: Scale
    y_at: Scale
    y_ticks: list[float]
    y_labels: list[str]


def _make_frame(points: Sequence[ScatterPoint], width: float, height: float) -> _Frame:
    xs = [v for p in points for v in (p.x, *(p.x_interval or ()))]
    ys = [v for p in points for v in (p.y, *(p.y_interval or ()))]
    is_near_zero = min(ys) < 0.5 * max(ys)  # else the arms would crowd in one corner
    x_range, y_range = axis_range(xs, zero=True, padding=0.12), axis_range(ys, zero=is_near_zero, padding=0.2)
    values = ticks(*y_range, 5)
    labels = tick_labels(values, sign=True)
    left, top, floor = max(map(text_width, labels)) + 10, 26.0, height - 42
    x_at, y_at = Scale(*x_range, left, width - 8), Scale(*y_range, floor, top)
    return _Frame(width, height, left, top, floor, x_at, y_at, values, labels)


def _draw_axes(frame: _Frame, x_label: str) -> list[str]:
    right, parts = frame.width - 8, []
    for value, label in zip(frame.y_ticks, frame.y_labels, strict=True):
        y = frame.y_at(value)
        parts.append(draw_line(frame.left, y, right, y, "zero" if value == 0 else "grid"))
        parts.append(draw_text(frame.left - 6, y + 4, label, at="end"))
    values = ticks(frame.x_at.low, frame.x_at.high, max(2, int((frame.width - frame.left) / 80)))
    labels = tick_labels(values, sign=True)
    for i in visible_labels([frame.x_at(v) for v in values], labels):
        x = frame.x_at(values[i])
        parts.append(draw_line(x, frame.top, x, frame.floor, "zero" if values[i] == 0 else "grid"))
        parts.append(draw_text(x, frame.floor + 17, labels[i], at="middle"))
    return [*parts, draw_text((frame.left + right) / 2, frame.height - 6, x_label, at="middle")]


def _draw_corner(text: str, frame: _Frame) -> tuple[str, _Box]:
    """The label of the best corner, not across the line at 0, and the room it takes."""
    words, zero = f"\u2196 {text}", frame.x_at(0.0)
    left = zero + 6 if frame.left <= zero < frame.left + 12 + text_width(words) else frame.left + 6
    box = (frame.left, frame.top, left + 24 + text_width(words), frame.top + 18)
    return draw_text(left, frame.top + 12, words), box


def _marker_box(point: ScatterPoint, frame: _Frame) -> _Box:
    x, y = frame.x_at(point.x), frame.y_at(point.y)
    return (x - 6, y - 6, x + 6, y + 6)


def _interval_lines(point: ScatterPoint, frame: _Frame) -> list[_Box]:
    """x1, y1, x2, y2 of the intervals of a point."""
    x, y = frame.x_at(point.x), frame.y_at(point.y)
    lines = []
    if point.x_interval:
        low, high = map(frame.x_at, point.x_interval)
        lines.append((low, y, high, y))
    if point.y_interval:
        low, high = map(frame.y_at, point.y_interval)
        lines.append((x, low, x, high))
    return lines


def _interval_boxes(point: ScatterPoint, frame: _Frame) -> list[_Box]:
    return [
        (min(x1, x2) - 2, min(y1, y2) - 2, max(x1, x2) + 2, max(y1, y2) + 2)
        for x1, y1, x2, y2 in _interval_lines(point, frame)
    ]


def _draw_point(point: ScatterPoint, index: int, frame: _Frame) -> list[str]:
    colour = "open" if point.is_muted else f"c{index % PALETTE_SIZE}"
    tip = f"{plain_text(point.name, 60)}: {format_signed(point.x, 4)}, {format_signed(point.y, 4)}"
    x, y = frame.x_at(point.x), frame.y_at(point.y)
    shape, size = (0, 4) if point.is_muted else (index, 5)
    return [
        *(draw_line(*line, f"bar s-{colour}") for line in _interval_lines(point, frame)),
        draw_marker(x, y, shape, f"pt {colour}", tip, size),
    ]


def _draw_label(point: ScatterPoint, index: int, frame: _Frame, taken_boxes: Sequence[_Box]) -> tuple[list[str], _Box]:
    """The name of a point beside it, with a leader where it had to move away, and the room it takes."""
    name = plain_text(point.name)
    text = fit_text(name, frame.width * 0.45)
    x, y = frame.x_at(point.x), frame.y_at(point.y)
    bounds = (frame.left, frame.top, frame.width, frame.floor)
    box = _free_box(x, y, text_width(text) * 1.08, taken_boxes, bounds)
    near = min(max(x, box[0]), box[2]), min(max(y, box[1]), box[3])
    leader = [draw_path([(x, y), near], "leader")] if math.dist(near, (x, y)) > 12 else []
    return [*leader, draw_text(box[0], box[3] - 4, text, style=f"c{index % PALETTE_SIZE} halo", full=name)], box


def _free_box(x: float, y: float, wide: float, taken_boxes: Sequence[_Box], bounds: _Box) -> _Box:
    """The first box beside the point that touches no other; further out when all near ones are taken."""
    tall = 15.0
    for away in (9.0, 18.0, 30.0, 44.0, 60.0):
        for dx, dy in (
            (away, -tall / 2), (-away - wide, -tall / 2), (-wide / 2, -away - tall), (-wide / 2, away),
            (away, -away - tall / 2), (away, away - tall / 2), (-away - wide, -away),
            (-away - wide, away - tall),
        ):  # fmt: skip
            box = (x + dx, y + dy, x + dx + wide, y + dy + tall)
            in_picture = box[0] >= bounds[0] and box[1] >= bounds[1] and box[2] <= bounds[2] and box[3] <= bounds[3]
            if in_picture and not any(
                box[0] < t[2] and t[0] < box[2] and box[1] < t[3] and t[1] < box[3] for t in taken_boxes
            ):
                return box
    left = min(max(x + 9, bounds[0]), bounds[2] - wide)
    return (left, y - tall / 2, left + wide, y + tall / 2)

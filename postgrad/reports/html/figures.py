"""How is a series of numbers drawn as a figure that needs nothing but the page it stands in?

Every function returns one inline `<svg>` (or, for the heat table, a `<table>`) as text. Colours are classes
(`c0`..`c7`, `good`, `bad`, ...) that `STYLE` fills from CSS variables, so a figure follows light, dark and
print without being drawn again. Figures have no ids and no style attributes: a page may hold the same one at
two widths, and a strict Content-Security-Policy lets them pass. Sizes are in CSS pixels; x grows right and
y grows down, as in SVG.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from postgrad.reports.html.notation import (
    MAX_MAGNITUDE,
    MINUS,
    as_number,
    escape_html,
    format_compact,
    format_fixed,
    format_signed,
    plain_text,
    truncate,
)

PALETTE_SIZE = 8  # series colours c0..c7; then they start again with the next marker and a dash
FONT_SIZE = 12.0
_MIN_SPAN = 1e-280  # below this a quotient may overflow
MAX_POINTS = 400  # per line: about two for every pixel of a narrow plot

# Hues after Okabe & Ito (2008), told apart under the three common colour vision deficiencies, each darkened
# (or lightened for the dark page) until text in it has a contrast of at least 4.5 on the page's ground.
STYLE = (
    """
:root{--ground:#fff;--c0:#0a66b0;--c1:#b84a00;--c2:#00795a;--c3:#a1477f;--c4:#7a6200;--c5:#1b7f9c;--c6:#6b52b5;
--c7:#5c5c5c;--ink:#1b1f24;--soft:#59636e;--line:#d8dee4;--grid:#eceff2;--good:#00795a;--bad:#b53a00;
--even:#0a66b0;--open:#68727d}
@media (prefers-color-scheme:dark){:root{--ground:#15191e;--c0:#6cb2f2;--c1:#f59b61;--c2:#4cc9a4;--c3:#e597c7;
--c4:#d8bd52;--c5:#7fcfe6;--c6:#b5a3f5;--c7:#b8bec5;--ink:#e8ebee;--soft:#a0a9b3;--line:#39414a;--grid:#252b32;
--good:#4cc9a4;--bad:#f7925a;--even:#6cb2f2;--open:#a0a9b3}}
svg.fig{display:block;width:100%;height:auto;font-size:12px;font-family:inherit;overflow:visible}
.fig text{fill:var(--soft);font-variant-numeric:tabular-nums}
.fig .grid{stroke:var(--grid);stroke-width:1}.fig .axis{stroke:var(--line);stroke-width:1}
.fig .zero{stroke:var(--soft);stroke-width:1}.fig .mark{stroke:var(--soft);stroke-dasharray:3 3}
.fig .level{stroke:var(--bad);stroke-dasharray:5 4}.fig text.lev{fill:var(--bad)}
.fig .leader{stroke:var(--line);fill:none}
.fig .halo{paint-order:stroke;stroke:var(--ground);stroke-width:4px;stroke-linejoin:round}
.fig .strong{fill:var(--ink)}.fig .name{font-weight:600}
.fig .ln{fill:none;stroke-width:2;stroke-linejoin:round;stroke-linecap:round}
.fig .faint{stroke-width:1;opacity:.35}.fig .dash{stroke-dasharray:6 4}
.fig .bd{stroke:none;opacity:.16}.fig .pt{stroke:var(--ground);stroke-width:1}
.fig .bar{stroke-width:2;fill:none}.fig .plan{fill:none;stroke-width:1.5;stroke-dasharray:3 2}
.fig .seg{stroke:var(--ground);stroke-width:1}
"""
    + "".join(
        f".fig .{c}{{fill:var(--{c})}}.fig .s-{c}{{stroke:var(--{c})}}"
        for c in [*(f"c{i}" for i in range(PALETTE_SIZE)), "good", "bad", "even", "open"]
    )
    + """
.fig text.c0,.fig text.c1,.fig text.c2,.fig text.c3,.fig text.c4,.fig text.c5,.fig text.c6,.fig text.c7
{font-weight:600}
.fig .hollow{fill:var(--ground)}
table.heat td.h{text-align:center;min-width:4.6em;color:var(--ink)}
table.heat td.own{outline:2px solid var(--ink);outline-offset:-3px}
"""
    + "".join(f"table.heat td.h{i}{{background:color-mix(in srgb,var(--c1) {i * 7}%,var(--ground))}}" for i in range(9))
)

Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """One line: points (x, y) in order of x; `band` holds (x, low, high). A NaN y is a gap."""

    name: str
    points: Sequence[Point]
    band: Sequence[tuple[float, float, float]] = ()
    has_markers: bool = False
    is_faint: bool = False
    is_dashed: bool = False
    colour: int | None = None
    has_label: bool = True


@dataclass(frozen=True)
class VerticalMark:
    """A vertical line at x with a word above it, such as the switch to new data."""

    x: float
    label: str


@dataclass(frozen=True)
class LimitLine:
    """A horizontal (line chart) or vertical (forest plot) limit with a word beside it."""

    value: float
    label: str


@dataclass(frozen=True)
class ForestRow:
    """A difference with its 95 % interval, one row of a forest plot. `tone`: good, bad, even or open."""

    name: str
    value: float
    low: float | None = None
    high: float | None = None
    tone: str = "open"
    note: str = ""


@dataclass(frozen=True)
class ScatterPoint:
    """One arm in a scatter: x and y with optional intervals (low, high). A quiet one is a grey dot without a label."""

    name: str
    x: float
    y: float
    x_interval: tuple[float, float] | None = None
    y_interval: tuple[float, float] | None = None
    is_muted: bool = False


# --- scales and ticks -------------------------------------------------------------------------------------


def nice_step(span: float, max_pieces: int) -> float:
    """The smallest of 1, 2, 2.5, 5 times a power of ten that cuts `span` into at most `most` pieces."""
    if not span > _MIN_SPAN:
        return 1.0
    rough = span / max(max_pieces, 1)
    power = 10.0 ** math.floor(math.log10(rough))
    for factor in (1.0, 2.0, 2.5, 5.0, 10.0):
        if factor * power >= rough * (1 - 1e-9):
            return factor * power
    return 10.0 * power


def ticks(low: float, high: float, max_ticks: int = 6) -> list[float]:
    """Round values inside [low, high], at most `most` + 1 of them; zero is exactly 0.0."""
    step = nice_step(high - low, max_ticks)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [0.0 if i == 0 else i * step for i in range(first, min(last, first + 2 * max_ticks + 2) + 1)]


def log_ticks(low: float, high: float, max_ticks: int = 6) -> list[float]:
    """Values 1, 2, 5 times powers of ten inside [low, high] (both > 0), thinned to powers when many."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    for factors in ((1, 2, 5), (1, 3), (1,)):
        found = [f * 10.0**p for p in range(first, last + 1) for f in factors]
        found = [v for v in found if low * (1 - 1e-9) <= v <= high * (1 + 1e-9)]
        if len(found) <= max_ticks:
            break
    stride = max(1, math.ceil(len(found) / max(max_ticks, 1)))
    return found[::stride] or [low]


def tick_labels(values: Sequence[float], sign: bool = False) -> list[str]:
    """One way of writing for the whole axis: as many decimals as the step needs, thousands as k, M, B."""
    largest = max((abs(v) for v in values), default=0.0)
    step = min((abs(b - a) for a, b in itertools.pairwise(values) if a != b), default=largest or 1.0)
    if largest >= 1e15 or (largest and (largest < 1e-3 or step < 1e-5)):
        texts = [f"{v:.1e}" if v else "0" for v in values]
        return [t.replace("e-0", "e-").replace("e+", "e").replace("-", MINUS) for t in texts]
    if largest >= 10_000:
        for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
            decimals = _needed_decimals(step / size)
            if largest >= size and decimals <= 2:
                return [format_fixed(v / size, decimals) + letter if v else "0" for v in values]
    return [(format_signed if sign else format_fixed)(v, _needed_decimals(step)) for v in values]


def _needed_decimals(step: float) -> int:
    """The fewest decimals that write a step without rounding it, at most 6."""
    decimals = 0
    while decimals < 6 and abs(round(step, decimals) - step) > step * 1e-3:
        decimals += 1
    return decimals


@dataclass(frozen=True)
class _Scale:
    low: float
    high: float
    start: float
    end: float
    log: bool = False
    zero_at: float | None = None  # pixel of x <= 0 on a log axis, left of a gap

    def __call__(self, value: float) -> float:
        if self.log:
            if value <= 0:
                return self.start if self.zero_at is None else self.zero_at
            part = (math.log(value) - math.log(self.low)) / ((math.log(self.high) - math.log(self.low)) or 1.0)
        else:
            part = (value - self.low) / ((self.high - self.low) or 1.0)
        return self.start + part * (self.end - self.start)


def _axis_range(values: Iterable[float], *, zero: bool = False, least: float = 0.0, padding: float = 0.06) -> Point:
    """The range of an axis: the finite values, with some room, never of width zero."""
    finite = [v for v in values if math.isfinite(v)]
    if zero or not finite:
        finite.append(0.0)
    low, high = min(finite), max(finite)
    missing = max(least, abs(high) * 1e-6) - (high - low)
    if high - low < max(least, abs(high) * 1e-6):
        low, high = low - missing / 2, high + missing / 2
    if high - low < _MIN_SPAN:
        low, high = (low - 1, high + 1) if abs(low) < _MIN_SPAN else (low - abs(low) * 0.1, high + abs(high) * 0.1)
    pad = (high - low) * padding
    return low - pad, high + pad


def text_width(text: str, size: float = FONT_SIZE) -> float:
    """A careful guess at the width in pixels: without a browser there are no font metrics."""
    wide = sum(1.0 if ord(c) > 0x2E7F else 0.36 if c in " .,:;'|!il()[]" else 0.6 for c in text)
    return wide * size


def fit_text(text: str, width: float, size: float = FONT_SIZE) -> str:
    """The text, shortened with an ellipsis until it fits `width` pixels."""
    if text_width(text, size) <= width:
        return text
    low, high = 1, len(text)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if text_width(truncate(text, middle), size) <= width else (low, middle - 1)
    return truncate(text, low)


def spread_positions(targets: Sequence[float], distance: float, low: float, high: float) -> list[float]:
    """Positions near the wanted ones, at least `distance` from each other and inside [low, high].

    They keep their order; where there is no room for all, they are spread evenly.
    """
    if not targets:
        return []
    if (len(targets) - 1) * distance > high - low:
        distance = (high - low) / max(len(targets) - 1, 1)
    order = sorted(range(len(targets)), key=lambda i: targets[i])
    placed = [0.0] * len(targets)
    reach = low
    for i in order:
        placed[i] = reach = max(targets[i], reach)
        reach += distance
    reach = high
    for i in reversed(order):
        placed[i] = min(placed[i], reach)
        reach = placed[i] - distance
    return placed


# --- thinning ---------------------------------------------------------------------------------------------


def thin_points(points: Sequence[Point], max_points: int = MAX_POINTS) -> list[Point]:
    """At most about `most` points that keep every bucket's lowest and highest value, so spikes stay visible.

    The first and last point stay; a bucket with a NaN keeps one, so a gap stays a gap.
    """
    if len(points) <= max_points:
        return list(points)
    kept = [points[0]]
    buckets = max(1, (max_points - 2) // 2)
    inner = len(points) - 2
    for bucket in range(buckets):
        part = points[1 + bucket * inner // buckets : 1 + (bucket + 1) * inner // buckets]
        finite = [p for p in part if math.isfinite(p[1])]
        chosen = {min(finite, key=lambda p: p[1]), max(finite, key=lambda p: p[1])} if finite else set()
        if len(finite) < len(part):
            chosen = {*list(chosen)[:1], next(p for p in part if not math.isfinite(p[1]))}
        kept += sorted(chosen, key=lambda p: p[0])
    return [*kept, points[-1]]


def smooth_points(points: Sequence[Point], span: float, weights: Sequence[float] | None = None) -> list[Point]:
    """Exponential moving average with the start's bias removed; `span` in points, NaN values left out.

    With `weights` (trained tokens of each step) it is the average over tokens, not over steps.
    """
    keep = 1 - 2 / (max(span, 1.0) + 1)
    total = mass = 0.0
    result = []
    for i, (x, y) in enumerate(points):
        if math.isfinite(y):
            weight = 1.0 if weights is None else weights[i]
            total, mass = keep * total + weight * y, keep * mass + weight
        if mass > 0:
            result.append((x, total / mass))
    return result


# --- pieces -----------------------------------------------------------------------------------------------


def _format_coordinate(value: float) -> str:
    text = f"{value:.1f}"
    return text[:-2] if text.endswith(".0") else text


def _text(x: float, y: float, content: str, *, at: str = "start", style: str = "", full: str = "") -> str:
    """Text at a point; `full` is what the pointer shows where the content had to be shortened."""
    title = f"<title>{escape_html(full)}</title>" if full and full != content else ""
    anchor = "" if at == "start" else f' text-anchor="{at}"'
    shape = f' class="{style}"' if style else ""
    return f'<text x="{_format_coordinate(x)}" y="{_format_coordinate(y)}"{anchor}{shape}>{title}{escape_html(content)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, style: str) -> str:
    return f'<line x1="{_format_coordinate(x1)}" y1="{_format_coordinate(y1)}" x2="{_format_coordinate(x2)}" y2="{_format_coordinate(y2)}" class="{style}"/>'


def _rect(x: float, y: float, width: float, height: float, style: str, title: str = "") -> str:
    inside = f"<title>{escape_html(title)}</title>" if title else ""
    return (
        f'<rect x="{_format_coordinate(x)}" y="{_format_coordinate(y)}" width="{_format_coordinate(max(width, 0))}" height="{_format_coordinate(height)}"'
        f' class="{style}">{inside}</rect>'
    )


def _path(points: Iterable[Point], style: str, closed: bool = False) -> str:
    drawn = "L".join(f"{_format_coordinate(x)} {_format_coordinate(y)}" for x, y in points)
    return f'<path d="M{drawn}{"Z" if closed else ""}" class="{style}"/>'


def _marker(x: float, y: float, shape: int, style: str, title: str = "", size: float = 4.0) -> str:
    inside = f"<title>{escape_html(title)}</title>" if title else ""
    kind = shape % 4
    if kind == 0:
        return f'<circle cx="{_format_coordinate(x)}" cy="{_format_coordinate(y)}" r="{_format_coordinate(size)}" class="{style}">{inside}</circle>'
    s = size * 1.15
    corners = {
        1: [(-1, -1), (1, -1), (1, 1), (-1, 1)],
        2: [(0, -1.25), (1.15, 0.85), (-1.15, 0.85)],
        3: [(0, -1.4), (1.4, 0), (0, 1.4), (-1.4, 0)],
    }[kind]
    s = s * 0.85 if kind == 1 else s
    drawn = "L".join(f"{_format_coordinate(x + dx * s)} {_format_coordinate(y + dy * s)}" for dx, dy in corners)
    return f'<path d="M{drawn}Z" class="{style}">{inside}</path>'


def _svg(width: float, height: float, label: str, parts: Iterable[str]) -> str:
    """A picture for assistive technology is one thing with one label; the numbers stand in tables."""
    return (
        f'<svg class="fig" viewBox="0 0 {_format_coordinate(width)} {_format_coordinate(height)}" role="img"'
        f' aria-label="{escape_html(label, 1200)}">' + "".join(parts) + "</svg>"
    )


def _empty_figure(width: float, label: str, reason: str) -> str:
    body = [_rect(0.5, 0.5, width - 1, 71, "axis hollow"), _text(width / 2, 40, reason, at="middle")]
    return _svg(width, 72, f"{label}: {reason}", body)


def _split_at_gaps(points: Sequence[Point]) -> list[list[Point]]:
    """The line without its gaps."""
    pieces: list[list[Point]] = [[]]
    for point in points:
        if math.isfinite(point[0]) and math.isfinite(point[1]):
            pieces[-1].append(point)
        elif pieces[-1]:
            pieces.append([])
    return [piece for piece in pieces if piece]


def _thin_labels(positions: Sequence[float], labels: Sequence[str], room: float = 8.0) -> list[int]:
    """Indices of the tick labels to write so that none touches the next (centred, left to right)."""
    if not labels:
        return []
    for stride in range(1, len(labels) + 1):
        chosen = list(range(0, len(labels), stride))
        ends = [(positions[i] - text_width(labels[i]) / 2, positions[i] + text_width(labels[i]) / 2) for i in chosen]
        if all(a[1] + room <= b[0] for a, b in itertools.pairwise(ends)):
            return chosen
    return [0]


# --- line chart -------------------------------------------------------------------------------------------


def line_chart(
    series: Sequence[Series],
    *,
    title: str,
    x_label: str,
    y_label: str,
    width: float = 560,
    height: float = 300,
    x_scale: Literal["linear", "log"] = "linear",
    y_scale: Literal["linear", "log"] = "linear",
    zero: bool = False,
    least: float = 0.0,
    marks: Sequence[VerticalMark] = (),
    levels: Sequence[LimitLine] = (),
    x_range: tuple[float, float] | None = None,
    x_ticks: Sequence[tuple[float, str]] | None = None,
    empty: str = "no values yet",
) -> str:
    """Lines over x, with interval bands, markers and a direct label at each line's end.

    `zero` draws the line y = 0 and keeps it in view; `least` is the smallest height of the y axis in its own
    unit, so that noise does not fill the figure; `x_range` shows a part. On a log x axis, x <= 0 has its own
    place left of the axis. `title` is only the label for assistive technology: the page writes its caption.
    """
    low_x, high_x = x_range or (-math.inf, math.inf)
    shown: list[tuple[int, Series, list[Point], list[tuple[float, float, float]]]] = []
    for i, line in enumerate(series):
        inside = [p for p in line.points if low_x <= p[0] <= high_x]
        least_y = _MIN_SPAN if y_scale == "log" else -MAX_MAGNITUDE
        inside = [(x, y if least_y <= y <= MAX_MAGNITUDE else math.nan) for x, y in inside if abs(x) <= MAX_MAGNITUDE]
        band = [b for b in line.band if low_x <= b[0] <= high_x and all(abs(v) <= MAX_MAGNITUDE for v in b)]
        if any(math.isfinite(y) for _, y in inside):
            shown.append((i, line, thin_points(inside), band[:: max(1, len(band) // MAX_POINTS)]))
    if not shown:
        return _empty_figure(width, title, empty)

    # the ranges
    xs = [x for _, _, points, _ in shown for x, _ in points]
    ys = [y for _, _, points, _ in shown for _, y in points if math.isfinite(y)]
    ys += [v for _, _, _, band in shown for b in band for v in b[1:] if y_scale == "linear" or v > 0]
    ys += [level.value for level in levels if y_scale == "linear"]
    positive = [x for x in xs if x > _MIN_SPAN]
    log_x = x_scale == "log" and bool(positive)
    if y_scale == "log":
        bottom, top = min(ys) / 1.1, max(ys) * 1.1
    else:
        bottom, top = _axis_range(ys, zero=zero, least=least)

    # the margins follow from the texts
    y_count = max(3, int(height / 55))
    y_values = log_ticks(bottom, top, y_count) if y_scale == "log" else ticks(bottom, top, y_count)
    y_texts = tick_labels(y_values, sign=zero)
    left = max((text_width(t) for t in y_texts), default=0) + 10
    named = [entry for entry in shown if entry[1].has_label]
    longest = max((text_width(plain_text(line.name)) for _, line, _, _ in named), default=0)
    right = min(longest + 16, width * 0.32) if named else 12
    above = 24 + (16 if marks else 0)
    height = max(height, above + 44 + 15 * len(named))
    floor, plot_right = height - 40, width - right

    if log_x:
        start, end = min(positive), max(positive)
        end = end if end > start else start * 10
        has_zero = len(positive) < len(xs)
        x_scale_at = _Scale(
            start, end, left + (26 if has_zero else 0), plot_right, True, left + 4 if has_zero else None
        )
    else:
        start, end = x_range if x_range and all(map(math.isfinite, x_range)) else (min(xs), max(xs))
        mark_xs = [m.x for m in marks if low_x <= m.x <= high_x]
        start, end = min([start, *mark_xs]), max([end, *mark_xs])
        if x_range is None and x_ticks is None and end > start:  # a run of 19.99M tokens ends at a tick of 20M
            step = nice_step(end - start, max(2, int((plot_right - left) / 70)))
            nearest = round(end / step) * step
            end = nearest if 0 < nearest - end < 0.02 * (end - start) else end
            start = 0.0 if 0 < start < 0.02 * (end - start) else start
        if start == end:
            start, end = start - 0.5 * (abs(start) or 1), end + 0.5 * (abs(end) or 1)
        inset = 6 if any(line.has_markers for _, line, _, _ in shown) else 0
        x_scale_at = _Scale(start, end, left + inset, plot_right - inset)
    y_at = _Scale(bottom, top, floor, above, y_scale == "log")

    parts: list[str] = [_text(0, 12, y_label)]
    for value, text in zip(y_values, y_texts, strict=True):
        style = "zero" if zero and value == 0 else "grid"
        parts.append(_line(left, y_at(value), plot_right, y_at(value), style))
        parts.append(_text(left - 6, y_at(value) + 4, text, at="end"))
    parts.append(_line(left, floor, plot_right, floor, "axis"))

    # x ticks
    if x_ticks is not None:
        tick_pairs = [(x, plain_text(t)) for x, t in x_ticks if start <= x <= end]
    else:
        count = max(2, int((plot_right - left) / 70))
        values = log_ticks(start, end, count) if log_x else ticks(start, end, count)
        tick_pairs = list(zip(values, tick_labels(values), strict=True))
        if log_x and len(positive) < len(xs):
            tick_pairs.insert(0, (0.0, "0"))
    places = [x_scale_at(x) for x, _ in tick_pairs]
    # a label at the edge must not leave the picture
    half = [text_width(t) / 2 for _, t in tick_pairs]
    places_text = [min(max(p, h), width - h) for p, h in zip(places, half, strict=True)]
    chosen = _thin_labels(places_text, [t for _, t in tick_pairs])
    for i, (place, (_, text)) in enumerate(zip(places, tick_pairs, strict=True)):
        if i in chosen:
            parts.append(_line(place, floor, place, floor + 4, "axis"))
            parts.append(_text(places_text[i], floor + 17, text, at="middle"))
    parts.append(_text((left + plot_right) / 2, height - 6, x_label, at="middle"))

    # marks and limits
    free = -math.inf
    for mark in sorted(marks, key=lambda m: m.x):
        if not low_x <= mark.x <= high_x:
            continue
        place = x_scale_at(mark.x)
        parts.append(_line(place, above - 4, place, floor, "mark"))
        text = fit_text(plain_text(mark.label), width * 0.5)
        at = min(max(place, text_width(text) / 2 + left), width - text_width(text) / 2)
        if at - text_width(text) / 2 > free:
            parts.append(_text(at, above - 8, text, at="middle", full=mark.label))
            free = at + text_width(text) / 2 + 8
    words_on_top: list[str] = []  # a limit is named where the run is settled, at the right
    for level in levels:
        if bottom <= level.value <= top:
            parts.append(_line(left, y_at(level.value), plot_right, y_at(level.value), "level"))
            text = fit_text(plain_text(level.label), (plot_right - left) * 0.9)
            at_right = _text(plot_right, y_at(level.value) - 5, text, at="end", style="lev halo", full=level.label)
            words_on_top.append(at_right)

    # bands, then lines, then points: what is said most precisely lies on top
    lines: list[str] = []
    for i, line, points, band in shown:
        colour = f"c{(i if line.colour is None else line.colour) % PALETTE_SIZE}"
        shape = i if line.colour is None else line.colour
        if len(band) > 1:
            edge = [(x_scale_at(x), y_at(high)) for x, _, high in band]
            edge += [(x_scale_at(x), y_at(low)) for x, low, _ in reversed(band)]
            parts.append(_path(edge, f"bd {colour}", closed=True))
        elif band:
            x, low, high = band[0]
            lines.append(_line(x_scale_at(x), y_at(low), x_scale_at(x), y_at(high), f"bar s-{colour}"))
        style = f"ln s-{colour}{' faint' if line.is_faint else ''}{' dash' if line.is_dashed or shape >= PALETTE_SIZE else ''}"
        for piece in _split_at_gaps(points):
            placed = [(x_scale_at(x), y_at(y)) for x, y in piece]
            if len(placed) > 1:
                lines.append(_path(placed, style))
            alone = len(placed) == 1
            if (line.has_markers and len(points) <= 80) or (alone and not line.is_faint):
                last = (-math.inf, 0.0)
                for (x, y), (px, py) in zip(piece, placed, strict=True):
                    if math.hypot(px - last[0], py - last[1]) < 7:
                        continue
                    last = (px, py)
                    name = f"{plain_text(line.name, 60)}: {_format_value(y, zero)} at {format_compact(x)}"
                    lines.append(_marker(px, py, shape, f"pt {colour}", name, 3.2))
    parts += lines + words_on_top

    # direct labels
    ends = [next(p for p in reversed(points) if math.isfinite(p[1])) for _, _, points, _ in named]
    wanted = [y_at(y) for _, y in ends]
    for (i, line, _, _), (x, _), y, place in zip(
        named, ends, wanted, spread_positions(wanted, 15, above + 4, floor - 2), strict=True
    ):
        colour = f"c{(i if line.colour is None else line.colour) % PALETTE_SIZE}"
        end_x, label_x = x_scale_at(x), plot_right + 8
        if abs(place - y) > 4 or label_x - end_x > 18:
            parts.append(_path([(end_x + 5, y), (label_x - 3, place)], "leader"))
        name = plain_text(line.name)
        parts.append(_text(label_x, place + 4, fit_text(name, right - 9), style=colour, full=name))
    return _svg(width, height, _description(title, x_label, y_label, shown, zero), parts)


def _format_value(value: float, sign: bool) -> str:
    decimals = 4 if abs(value) < 10 else 1
    return (
        format_signed(value, decimals)
        if sign
        else (format_fixed(value, decimals) if abs(value) >= 1e-3 else f"{value:.3g}")
    )


def _description(title: str, x_label: str, y_label: str, lines: Sequence[tuple], sign: bool) -> str:
    words = [f"{title}. {y_label} against {x_label}."]
    for _, line, points, _ in lines[:8]:
        if line.is_faint:
            continue
        finite = [p for p in points if math.isfinite(p[1])]
        first, last = finite[0], finite[-1]
        words.append(
            f"{plain_text(line.name, 60)}: from {_format_value(first[1], sign)} to {_format_value(last[1], sign)}."
        )
    return " ".join(words)


# --- forest plot ------------------------------------------------------------------------------------------


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
) -> str:
    """Differences with their 95 % intervals around zero, a row each (two lines when narrow); levels where `sign` is off."""
    known = [e for e in estimates if math.isfinite(e.value)]
    if not known:
        return _empty_figure(width, title, "no differences yet")
    narrow = width < 480
    written = format_signed if sign else format_fixed
    texts = [
        written(e.value, decimals)
        + (f"  ({written(e.low, decimals)} to {written(e.high, decimals)})" if _has_interval(e) else "")
        for e in known
    ]
    value_width = max(text_width(t) for t in texts) + 8
    name_width = min(max(text_width(plain_text(e.name)) * 1.08 for e in known) + 12, width * (0.45 if narrow else 0.26))
    left, plot_right = (8.0, width - 8.0) if narrow else (name_width + 6, width - value_width - 12)
    row = 46.0 if narrow else 32.0
    above = 22.0 if limit else 6.0
    floor = above + row * len(known) + 4
    height = floor + 40 + (16 if left_word or right_word else 0)
    edges = [v for e in known for v in (e.value, e.low, e.high) if v is not None and math.isfinite(v)]
    if limit:
        edges.append(limit.value)
    at = _Scale(*_axis_range(edges, zero=True, least=1e-9), left, plot_right)

    # on a narrow figure the words stand above the bars, and no line may cross them
    rows_of_grid = [(above, floor)]
    if narrow:
        rows_of_grid = [(above + i * row + 22, above + i * row + row - 3) for i in range(len(known))]
    values = ticks(at.low, at.high, max(2, int((plot_right - left) / 64)))
    labels = tick_labels(values, sign=sign)
    chosen = _thin_labels([at(v) for v in values], labels)
    parts = []
    for i, value in enumerate(values):
        for start, end in rows_of_grid:
            parts.append(_line(at(value), start, at(value), end, "zero" if value == 0 else "grid"))
        if i in chosen:
            parts.append(_text(at(value), floor + 16, labels[i], at="middle"))
    if limit:
        place = at(limit.value)
        parts += [_line(place, start, place, end, "level") for start, end in rows_of_grid]
        text = fit_text(plain_text(limit.label), width * 0.6)
        middle = min(max(place, text_width(text) / 2), width - text_width(text) / 2)
        parts.append(_text(middle, above - 9, text, at="middle", style="lev", full=limit.label))
    for i, (estimate, text) in enumerate(zip(known, texts, strict=True)):
        top = above + i * row
        y = top + (32 if narrow else row / 2)
        tone = estimate.tone if estimate.tone in ("good", "bad", "even", "open") else "open"
        name = plain_text(estimate.name)
        parts.append(
            _text(
                0,
                top + 15 if narrow else y + 4,
                fit_text(name, name_width / 1.08),
                style="strong name",
                full=name,
            )
        )
        parts.append(_text(width, top + 15 if narrow else y + 4, text, at="end", style="strong halo"))
        if _has_interval(estimate):
            low, high = at(estimate.low or 0.0), at(estimate.high or 0.0)
            parts.append(_line(low, y, high, y, f"bar s-{tone}"))
            for end in (low, high):
                parts.append(_line(end, y - 4, end, y + 4, f"bar s-{tone}"))
        shape = {"good": 0, "even": 1, "bad": 2, "open": 3}[tone]
        hollow = f"bar s-{tone} hollow" if tone == "open" else f"pt {tone}"
        parts.append(_marker(at(estimate.value), y, shape, hollow, f"{name}: {text} {estimate.note}", 4.5))
    if left_word or right_word:
        parts.append(_text(left, floor + 34, f"\u2190 {left_word}"))
        parts.append(_text(plot_right, floor + 34, f"{right_word} \u2192", at="end"))
    parts.append(_text((left + plot_right) / 2, height - 6, x_label, at="middle"))
    words = ". ".join(f"{plain_text(e.name, 60)} {t}" for e, t in zip(known[:12], texts, strict=False))
    return _svg(width, height, f"{title}. {x_label}. {words}", parts)


def _has_interval(estimate: ForestRow) -> bool:
    return all(v is not None and math.isfinite(v) for v in (estimate.low, estimate.high))


# --- bars -------------------------------------------------------------------------------------------------


def paired_bars(
    pairs: Sequence[tuple[str, float, float, str]], *, title: str, first: str, second: str, width: float = 560
) -> str:
    """Two bars a row, shares in 0..1: (name, first, second, note); the first an outline, the second full."""
    known = [(plain_text(n), as_number(a) or 0.0, as_number(b), plain_text(t)) for n, a, b, t in pairs]
    if not known:
        return _empty_figure(width, title, "no sources recorded")
    top, row = 24.0, 52.0
    height = top + row * len(known) + 4
    largest = max(max(a, b or 0.0) for _, a, b, _ in known) or 1.0
    at = _Scale(0.0, largest, 0.0, width - 2)
    parts = [
        _rect(1, 5, 22, 8, "plan s-c7"), _text(30, 13, first),
        _rect(48 + text_width(first), 5, 22, 8, "c7"), _text(77 + text_width(first), 13, second),
    ]  # fmt: skip
    words = []
    for i, (name, planned, achieved, note) in enumerate(known):
        y, colour = top + i * row, f"c{i % PALETTE_SIZE}"
        parts.append(_text(0, y + 15, fit_text(name, width * 0.4), style="strong name", full=name))
        parts.append(_text(width, y + 15, fit_text(note, width * 0.58), at="end", full=note))
        parts.append(_rect(1, y + 22, at(planned) - 1, 9, f"plan s-{colour}", f"{first}: {planned:.2%}"))
        if achieved is not None:
            parts.append(_rect(0, y + 34, at(achieved), 9, colour, f"{second}: {achieved:.2%}"))
        words.append(f"{name}: {first} {planned:.1%}" + (f", {second} {achieved:.1%}" if achieved is not None else ""))
    return _svg(width, height, f"{title}. {'. '.join(words[:12])}", parts)


def stacked_bars(
    bars: Sequence[tuple[str, Sequence[float]]], part_names: Sequence[str], *, title: str, width: float = 560
) -> str:
    """One bar a row, cut into parts that fill it; a part says its share where it has room."""
    known = [(plain_text(n), [max(as_number(v) or 0.0, 0.0) for v in values]) for n, values in bars]
    known = [(name, values) for name, values in known if sum(values) > 0]
    if not known:
        return _empty_figure(width, title, "nothing counted yet")
    parts, x, y = [], 0.0, 5.0
    used = [i for i in range(len(part_names)) if any(values[i] for _, values in known if i < len(values))]
    for i in used:  # the legend runs over as many lines as it needs
        step = 16 + text_width(part_names[i]) + 16
        if x and x + step > width:
            x, y = 0.0, y + 18
        parts += [_rect(x, y, 10, 10, f"c{i % PALETTE_SIZE}"), _text(x + 15, y + 9, part_names[i])]
        x += step
    top, words = y + 16, []
    for j, (name, values) in enumerate(known):
        line, total, at = top + j * 46, sum(values), 0.0
        parts.append(_text(0, line + 16, fit_text(name, width * 0.6), style="strong name", full=name))
        parts.append(_text(width, line + 16, f"{format_compact(total)} tokens", at="end"))
        for i, value in enumerate(values):
            piece = value / total * width
            share = f"{value / total:.1%}"
            if value:
                tip = f"{part_names[i]}: {round(value):,} ({share})"
                parts.append(_rect(at, line + 22, max(piece, 1.0), 16, f"seg c{i % PALETTE_SIZE}", tip))
            at += piece
        words.append(f"{name}: " + ", ".join(f"{part_names[i]} {v / total:.1%}" for i, v in enumerate(values) if v))
    return _svg(width, top + 46 * len(known), f"{title}. {'. '.join(words[:12])}", parts)


# --- scatter ----------------------------------------------------------------------------------------------


def scatter(
    points: Sequence[ScatterPoint], *, title: str, x_label: str, y_label: str, width: float = 560, height: float = 340,
    best_corner_text: str = "",
) -> str:  # fmt: skip
    """One labelled point an arm, with crosses for its intervals; a label takes the free side of its point."""
    known = [(i, s) for i, s in enumerate(points) if math.isfinite(s.x) and math.isfinite(s.y)]
    if not known:
        return _empty_figure(width, title, "no arm has both numbers yet")
    x_all = [v for _, s in known for v in (s.x, *(s.x_interval or ()))]
    y_all = [v for _, s in known for v in (s.y, *(s.y_interval or ()))]
    near_zero = min(y_all) < 0.5 * max(y_all)  # else the arms would crowd in one corner
    x_range, y_range = _axis_range(x_all, zero=True, padding=0.12), _axis_range(y_all, zero=near_zero, padding=0.2)
    y_values = ticks(*y_range, 5)
    y_texts = tick_labels(y_values, sign=True)
    left, above, floor = max(map(text_width, y_texts)) + 10, 26.0, height - 42
    x_at, y_at = _Scale(*x_range, left, width - 8), _Scale(*y_range, floor, above)
    parts = [_text(0, 12, y_label)]
    for value, text in zip(y_values, y_texts, strict=True):
        parts.append(_line(left, y_at(value), width - 8, y_at(value), "zero" if value == 0 else "grid"))
        parts.append(_text(left - 6, y_at(value) + 4, text, at="end"))
    x_values = ticks(*x_range, max(2, int((width - left) / 80)))
    x_texts = tick_labels(x_values, sign=True)
    for i in _thin_labels([x_at(v) for v in x_values], x_texts):
        place = x_at(x_values[i])
        parts.append(_line(place, above, place, floor, "zero" if x_values[i] == 0 else "grid"))
        parts.append(_text(place, floor + 17, x_texts[i], at="middle"))
    parts.append(_text((left + width - 8) / 2, height - 6, x_label, at="middle"))
    taken = [(x_at(s.x) - 6, y_at(s.y) - 6, x_at(s.x) + 6, y_at(s.y) + 6) for _, s in known]
    if best_corner_text:
        words, zero = f"\u2196 {best_corner_text}", x_at(0.0)
        begin = zero + 6 if left <= zero < left + 12 + text_width(words) else left + 6  # not across the line at 0
        parts.append(_text(begin, above + 12, words))
        taken.append((left, above, begin + 24 + text_width(words), above + 18))
    for i, spot in sorted(known, key=lambda each: not each[1].is_muted):
        x, y, colour = x_at(spot.x), y_at(spot.y), "open" if spot.is_muted else f"c{i % PALETTE_SIZE}"
        for bar in (spot.x_interval and (*map(x_at, spot.x_interval), y, y),
                    spot.y_interval and (x, x, *map(y_at, spot.y_interval))):  # fmt: skip
            if bar:
                taken.append((min(bar[:2]) - 2, min(bar[2:]) - 2, max(bar[:2]) + 2, max(bar[2:]) + 2))
        if spot.x_interval:
            parts.append(_line(x_at(spot.x_interval[0]), y, x_at(spot.x_interval[1]), y, f"bar s-{colour}"))
        if spot.y_interval:
            parts.append(_line(x, y_at(spot.y_interval[0]), x, y_at(spot.y_interval[1]), f"bar s-{colour}"))
        tip = f"{plain_text(spot.name, 60)}: {format_signed(spot.x, 4)}, {format_signed(spot.y, 4)}"
        parts.append(_marker(x, y, 0, "pt open", tip, 4) if spot.is_muted else _marker(x, y, i, f"pt {colour}", tip, 5))
    for i, spot in known:
        if spot.is_muted:
            continue
        name = plain_text(spot.name)
        text = fit_text(name, width * 0.45)
        box = _free_box(x_at(spot.x), y_at(spot.y), text_width(text) * 1.08, taken, (left, above, width, floor))
        taken.append(box)
        x, y = x_at(spot.x), y_at(spot.y)
        near = min(max(x, box[0]), box[2]), min(max(y, box[1]), box[3])
        if math.dist(near, (x, y)) > 12:
            parts.append(_path([(x, y), near], "leader"))
        parts.append(_text(box[0], box[3] - 4, text, style=f"c{i % PALETTE_SIZE} halo", full=name))
    words = ". ".join(f"{plain_text(s.name, 60)}: {format_signed(s.x)} and {format_signed(s.y)}" for _, s in known[:12])
    return _svg(width, height, f"{title}. {x_label} and {y_label}. {words}", parts)


_Box = tuple[float, float, float, float]


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


# --- heat table -------------------------------------------------------------------------------------------


def heat_table(
    row_names: Sequence[str], column_names: Sequence[str], values: Sequence[Sequence[float | None]], *,
    caption: str, corner: str, outlined_rows: Sequence[int | None] = (), format_cell: Callable[[object], str] = format_fixed,
) -> str:  # fmt: skip
    """A table whose ground darkens with the rise above the lowest value so far in its column.

    `own[column]` is the row in which that column's set was learnt: its cell is outlined. Numbers stay text,
    so the table reads without colour.
    """
    rise: dict[tuple[int, int], float] = {}
    for j in range(len(column_names)):
        best = math.inf
        for i, row in enumerate(values):
            value = as_number(row[j]) if j < len(row) else None
            if value is not None:
                best = min(best, value)
                rise[i, j] = value - best
    reach = max(rise.values(), default=0.0)
    head = "".join(f'<th scope="col"><bdi>{escape_html(n, 60)}</bdi></th>' for n in column_names)
    body = []
    for i, name in enumerate(row_names):
        line = []
        for j in range(len(column_names)):
            value = as_number(values[i][j]) if i < len(values) and j < len(values[i]) else None
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

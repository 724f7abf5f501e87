"""Charts show what the numbers are, and stay readable when the numbers are odd."""

import math
import random
import re
from itertools import combinations, pairwise
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from postgrad.reports.html import charts
from postgrad.reports.html.charts import ForestRow, LimitLine, ScatterPoint, Series, VerticalMark
from postgrad.reports.html.charts.marks import PALETTE_SIZE
from postgrad.reports.html.charts.scales import log_ticks, nice_step, tick_labels, ticks
from postgrad.reports.html.charts.text_fit import spread_positions, text_width
from postgrad.reports.html.charts.thinning import MAX_POINTS, thin_points

FINITE = st.floats(-1e9, 1e9, allow_nan=False)


def parsed(svg: str) -> ElementTree.Element:
    """Well-formed as XML, and labelled."""
    root = ElementTree.fromstring(svg)
    assert root.tag == "svg"
    assert root.get("role") == "img"
    assert root.get("aria-label")
    return root


def inside(svg: str, slack: float = 2.0) -> None:
    """No text leaves the picture (by the widths the figure itself reckons with), and no number is nan."""
    root = parsed(svg)
    _, _, width, height = map(float, root.get("viewBox", "").split())
    assert "nan" not in re.sub(r"<title>.*?</title>|aria-label=\"[^\"]*\"|>[^<]*<", "", svg)
    for text in root.iter("text"):
        content = "".join(t for t in text.itertext() if t)
        title = text.find("title")
        if title is not None:
            content = content.removeprefix(title.text or "")
        wide = text_width(content)
        start = float(text.get("x", 0)) - {"middle": wide / 2, "end": wide}.get(text.get("text-anchor", ""), 0)
        assert start >= -slack, (content, start)
        assert start + wide <= width + slack, (content, start + wide, width)
        assert 0 <= float(text.get("y", 0)) <= height + slack, content


def boxes(svg: str, style: str) -> list[tuple[float, float, float, float]]:
    found = []
    for text in parsed(svg).iter("text"):
        if style in (text.get("class") or "").split():
            title = text.find("title")
            content = "".join(text.itertext()).removeprefix((title.text or "") if title is not None else "")
            x, y, wide = float(text.get("x", 0)), float(text.get("y", 0)), text_width(content)
            x -= {"middle": wide / 2, "end": wide}.get(text.get("text-anchor", ""), 0)
            found.append((x, y - 11, x + wide, y + 2))
    return found


@given(FINITE, FINITE, st.integers(2, 10))
def test_ticks_are_round_inside_and_few(a: float, b: float, most: int) -> None:
    low, high = min(a, b), max(a, b)
    if high - low < 1e-6 * max(abs(low), abs(high), 1e-3):
        return
    values = ticks(low, high, most)
    assert len(values) <= most + 1
    assert all(low - 1e-6 * (high - low) <= v <= high + 1e-6 * (high - low) for v in values)
    step = nice_step(high - low, most)
    assert round(step / 10 ** math.floor(math.log10(step) + 1e-9), 6) in (1, 2, 2.5, 5, 10)
    assert len(set(tick_labels(values))) == len(values) or max(map(abs, values)) > 1e3 * step


def test_tick_labels_share_their_decimals() -> None:
    assert tick_labels([0.0, 0.05, 0.1]) == ["0.00", "0.05", "0.10"]
    assert tick_labels([-0.01, 0.0, 0.01], sign=True) == ["\u22120.01", "0.00", "+0.01"]
    assert tick_labels([0.0, 5e6, 1e7]) == ["0", "5M", "10M"]
    assert tick_labels([0.0, 5e-6, 1e-5]) == ["0", "5.0e\u22126", "1.0e\u22125"]


def test_log_ticks_are_powers() -> None:
    assert log_ticks(1, 1000, 4) == [1, 10, 100, 1000]
    assert log_ticks(1, 10, 6) == [1, 2, 5, 10]
    assert len(log_ticks(1e-9, 1e9, 6)) <= 6


@given(st.lists(st.floats(0, 300), max_size=30), st.floats(1, 30))
def test_apart_keeps_order_room_and_distance(wanted: list[float], distance: float) -> None:
    placed = spread_positions(wanted, distance, 0, 300)
    assert len(placed) == len(wanted)
    assert all(-1e-6 <= p <= 300 + 1e-6 for p in placed)
    fits = (len(wanted) - 1) * distance <= 300
    needed = distance if fits else 300 / max(len(wanted) - 1, 1)
    assert all(b - a >= needed - 1e-6 for a, b in pairwise(sorted(placed)))


def test_apart_moves_nothing_that_is_apart() -> None:
    assert spread_positions([10.0, 50.0, 90.0], 15, 0, 100) == [10.0, 50.0, 90.0]


def test_thinned_keeps_spikes_ends_and_gaps() -> None:
    dice = random.Random(1)
    points = [(float(i), dice.random()) for i in range(100_000)]
    points[63_211] = (63_211.0, 99.0)
    points[20_000] = (20_000.0, math.nan)
    kept = thin_points(points)
    assert len(kept) <= MAX_POINTS + 2
    assert kept[0] == points[0]
    assert kept[-1] == points[-1]
    assert (63_211.0, 99.0) in kept
    assert any(math.isnan(y) for _, y in kept)
    assert [x for x, _ in kept] == sorted(x for x, _ in kept)


def test_smoothed_is_the_token_weighted_mean() -> None:
    constant = charts.smooth_points([(float(i), 3.0) for i in range(50)], 10)
    assert all(y == pytest.approx(3.0) for _, y in constant)
    two = charts.smooth_points([(0.0, 1.0), (1.0, 4.0)], 1e9, [1.0, 2.0])
    assert two[-1][1] == pytest.approx(3.0, rel=1e-6)  # (1 x 1 + 2 x 4) / 3
    assert charts.smooth_points([(0.0, math.nan), (1.0, 2.0)], 5) == [(1.0, 2.0)]


def lines(n: int, points: int = 20) -> list[Series]:
    dice = random.Random(n)
    result = []
    for k in range(n):
        values = [(i * 1e6, dice.gauss(0, 0.001) + 0.001 * k) for i in range(points)]
        band = [(x, y - 0.002, y + 0.002) for x, y in values]
        result.append(Series(f"held-out set number {k}", values, band, has_markers=True))
    return result


@pytest.mark.parametrize("width", [358, 560])
@pytest.mark.parametrize("count", [1, 2, 5, 12])
def test_direct_labels_do_not_touch(width: int, count: int) -> None:
    svg = charts.line_chart(lines(count), title="t", x_label="tokens", y_label="nats", width=width, zero=True).svg
    inside(svg)
    found = [b for i in range(PALETTE_SIZE) for b in boxes(svg, f"c{i}")]
    assert len(found) == count
    for a, b in combinations(sorted(found, key=lambda box: box[1]), 2):
        assert a[3] <= b[1] + 0.5


ODD = {
    "none": [],
    "no points": [Series("a", [])],
    "one point": [Series("a", [(5.0, 1.0)], [(5.0, 0.5, 1.5)])],
    "equal": [Series("a", [(0.0, 2.0), (1.0, 2.0), (2.0, 2.0)])],
    "all zero": [Series("a", [(0.0, 0.0), (1.0, 0.0)])],
    "same x": [Series("a", [(3.0, 1.0), (3.0, 2.0)])],
    "only nan": [Series("a", [(0.0, math.nan), (1.0, math.nan)])],
    "gap": [Series("a", [(0.0, 1.0), (1.0, math.nan), (2.0, 3.0)])],
    "infinite": [Series("a", [(0.0, math.inf), (1.0, 1.0), (2.0, 1.5)])],
    "huge": [Series("a", [(0.0, -1e300), (1e300, 1e300)])],
    "tiny": [Series("a", [(0.0, 1e-300), (1.0, 2e-300)])],
    "long": [Series("x" * 500, [(0.0, 1.0), (1.0, 2.0)])],
    "wide": [Series("\u6f22" * 60, [(0.0, 1.0), (1.0, 2.0)])],
}


@pytest.mark.parametrize("width", [358, 560])
@pytest.mark.parametrize("scale", ["linear", "log"])
@pytest.mark.parametrize("name", ODD)
def test_odd_series_still_give_a_figure(name: str, scale: str, width: int) -> None:
    for zero in (False, True):
        svg = charts.line_chart(
            ODD[name],
            title=name,
            x_label="x",
            y_label="y",
            x_scale=scale,
            y_scale=scale,
            zero=zero,
            width=width,
        ).svg  # fmt: skip
        inside(svg)
        assert "inf" not in re.findall(r'd="([^"]*)"', svg)


@settings(max_examples=60)
@given(
    st.lists(st.lists(st.tuples(FINITE, st.floats(allow_nan=True)), max_size=6), max_size=4),
    st.booleans(),
    st.sampled_from(["linear", "log"]),
)
def test_any_numbers_give_a_figure(groups: list, zero: bool, scale: str) -> None:
    series = [Series(f"s{i}", sorted(g, key=lambda p: p[0])) for i, g in enumerate(groups)]
    inside(charts.line_chart(series, title="t", x_label="x", y_label="y", zero=zero, x_scale=scale).svg)


def test_a_gap_splits_the_line_and_marks_stand_in_place() -> None:
    svg = charts.line_chart(
        ODD["gap"],
        title="t",
        x_label="x",
        y_label="y",
        marks=[VerticalMark(0.0, "switch")],
        levels=[LimitLine(2.0, "gate")],
    ).svg
    assert 'class="ln' not in svg  # two single points, no line across the gap
    assert svg.count("<circle") == 2
    assert ">switch<" in svg
    assert ">gate<" in svg


def test_x_range_shows_a_part_only() -> None:
    series = [Series("a", [(float(i), float(i)) for i in range(101)], has_markers=True)]
    svg = charts.line_chart(series, title="t", x_label="x", y_label="y", x_range=(0, 2), width=560).svg
    assert svg.count("<circle") == 3


def test_points_lie_where_the_scale_says() -> None:
    svg = charts.line_chart([Series("a", [(0, 0.0), (1, 1.0), (2, 4.0)], has_markers=True, has_label=False)],
                             title="t", x_label="x", y_label="y").svg  # fmt: skip
    y = [float(v) for v in re.findall(r'<circle cx="[^"]+" cy="([^"]+)"', svg)]
    x = [float(v) for v in re.findall(r'<circle cx="([^"]+)"', svg)]
    assert x[1] - x[0] == pytest.approx(x[2] - x[1], abs=0.2)
    assert (y[0] - y[2]) == pytest.approx(4 * (y[0] - y[1]), abs=0.6)


def test_log_x_gives_zero_a_place_of_its_own() -> None:
    series = [Series("a", [(0, 1.0), (1, 2.0), (10, 3.0), (100, 4.0)], has_markers=True, has_label=False)]
    svg = charts.line_chart(series, title="t", x_label="x", y_label="y", x_scale="log").svg
    x = [float(v) for v in re.findall(r'<circle cx="([^"]+)"', svg)]
    assert x[0] < x[1]
    assert x[2] - x[1] == pytest.approx(x[3] - x[2], abs=0.2)


@pytest.mark.parametrize("width", [358, 560])
def test_forest_rows_say_their_numbers(width: int) -> None:
    rows = [
        ForestRow("general", 0.0104, 0.004, 0.017, "even"),
        ForestRow("a very long name of a held-out set " * 3, -0.33, -0.35, -0.31, "good"),
        ForestRow("no interval", 0.2),
        ForestRow("not a number", math.nan),
    ]
    svg = charts.forest_plot(rows, title="t", x_label="nats", width=width, limit=LimitLine(0.02, "gate"),
                              left_word="better", right_word="worse").svg  # fmt: skip
    inside(svg)
    assert "+0.010  (+0.004 to +0.017)" in svg
    assert "\u22120.330" in svg
    assert "not a number" not in svg
    parsed(charts.forest_plot([], title="t", x_label="x").svg)
    inside(charts.forest_plot([ForestRow("zero", 0.0, 0.0, 0.0)], title="t", x_label="x", width=width).svg)


def test_forest_interval_crosses_zero_only_if_it_does() -> None:
    svg = charts.forest_plot(
        [ForestRow("a", 0.01, -0.01, 0.03), ForestRow("b", 0.02, 0.01, 0.03)], title="t", x_label="x"
    ).svg
    zero = float(re.findall(r'<line x1="([^"]+)"[^>]*class="zero"', svg)[0])
    bars = re.findall(r'<line x1="(\S+)" y1="(\S+)" x2="(\S+)" y2="(\S+)" class="bar', svg)
    spans = [(float(x1), float(x2)) for x1, y1, x2, y2 in bars if y1 == y2]
    assert spans[0][0] < zero < spans[0][1]
    assert zero < spans[1][0]


@pytest.mark.parametrize("width", [358, 560])
def test_bars_are_as_long_as_their_shares(width: int) -> None:
    svg = charts.paired_bars([("papers", 0.9, 0.45, "note"), ("replay", 0.1, math.nan, "")], title="t",
                              first="planned", second="achieved", width=width).svg  # fmt: skip
    inside(svg)
    wide = {name: float(w) for w, name in re.findall(r'width="([^"]+)" height="9" class="([^"]+)"', svg)}
    assert wide["c0"] == pytest.approx(wide["plan s-c0"] / 2, abs=1.0)
    assert "c1" not in wide
    stacked = charts.stacked_bars([("a", [3, 1, 0]), ("none", [0, 0, 0])], ("x", "y", "z"), title="t", width=width).svg
    inside(stacked)
    parts = [float(w) for w in re.findall(r'width="([^"]+)" height="16"', stacked)]
    assert parts == pytest.approx([width * 0.75, width * 0.25], abs=0.1)
    parsed(charts.paired_bars([], title="t", first="a", second="b").svg)
    parsed(charts.stacked_bars([], ("x",), title="t").svg)


@pytest.mark.parametrize("width", [358, 560])
def test_scatter_labels_are_apart(width: int) -> None:
    dice = random.Random(3)
    spots = [ScatterPoint(f"arm {i}", dice.random() * 0.1, dice.random(), None, (0.1, 0.2)) for i in range(8)]
    svg = charts.scatter(spots, title="t", x_label="x", y_label="y", width=width, best_corner_text="better").svg
    inside(svg)
    found = [b for i in range(PALETTE_SIZE) for b in boxes(svg, f"c{i}")]
    assert len(found) == 8
    for a, b in combinations(found, 2):
        assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] + 3 or b[3] <= a[1] + 3
    parsed(charts.scatter([ScatterPoint("a", math.nan, 1.0)], title="t", x_label="x", y_label="y").svg)
    inside(charts.scatter([ScatterPoint("a", 0.0, 0.0)] * 3, title="t", x_label="x", y_label="y", width=width).svg)


def test_heat_shades_the_rise_above_the_best_so_far() -> None:
    html = charts.heat_table(["s1", "s2", "s3"], ["a", "b"], [[2.0, 3.0], [2.4, 1.0], [2.2, None]],
                              caption="c", corner="after", outlined_rows=[0, 1])  # fmt: skip
    ElementTree.fromstring(html)
    shades = re.findall(r'<td class="h h(\d)( own)?"><data value="([^"]+)">', html)
    assert shades == [
        ("0", " own", "2.0"),
        ("0", "", "3.0"),
        ("8", "", "2.4"),
        ("0", " own", "1.0"),
        ("4", "", "2.2"),
    ]
    assert "\u2013" in html


def test_colours_have_contrast_in_both_schemes() -> None:
    """At least 4.5 : 1 of every text colour on its ground (WCAG 2.2, 1.4.3)."""

    def luminance(colour: str) -> float:
        full = colour if len(colour) == 6 else "".join(c * 2 for c in colour)
        parts = [int(full[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    light, dark = charts.STYLE.split("@media", 1)
    for block in (light, dark):
        colours = dict(re.findall(r"--(\w+):#([0-9a-f]{3,6})", block))
        ground = luminance(colours["ground"])
        for name, colour in colours.items():
            if name not in ("ground", "line", "grid"):
                bright, dim = max(ground, luminance(colour)), min(ground, luminance(colour))
                assert (bright + 0.05) / (dim + 0.05) >= 4.5, name

"""Bar charts of shares."""

from __future__ import annotations

from collections.abc import Sequence

from postgrad.foreign_text import plain_text
from postgrad.reports.html.charts.chart import Chart
from postgrad.reports.html.charts.marks import PALETTE_SIZE, draw_rect, draw_text, empty_figure, make_svg
from postgrad.reports.html.charts.scales import Scale
from postgrad.reports.html.charts.text_fit import fit_text, text_width
from postgrad.reports.html.notation import finite, format_compact


def paired_bars(
    pairs: Sequence[tuple[str, float, float, str]], *, title: str, first: str, second: str, width: float = 560
) -> Chart:
    """Two bars a row, shares in 0..1: (name, first, second, note); the first an outline, the second full."""
    known = [(plain_text(n), finite(a) or 0.0, finite(b), plain_text(t)) for n, a, b, t in pairs]
    if not known:
        return empty_figure(width, title, "no sources recorded")
    top, row = 24.0, 52.0
    height = top + row * len(known) + 4
    largest = max(max(a, b or 0.0) for _, a, b, _ in known) or 1.0
    at = Scale(0.0, largest, 0.0, width - 2)
    parts = [
        draw_rect(1, 5, 22, 8, "plan s-c7"), draw_text(30, 13, first),
        draw_rect(48 + text_width(first), 5, 22, 8, "c7"), draw_text(77 + text_width(first), 13, second),
    ]  # fmt: skip
    words = []
    for i, (name, planned, achieved, note) in enumerate(known):
        y, colour = top + i * row, f"c{i % PALETTE_SIZE}"
        parts.append(draw_text(0, y + 15, fit_text(name, width * 0.4), style="strong name", full=name))
        parts.append(draw_text(width, y + 15, fit_text(note, width * 0.58), at="end", full=note))
        parts.append(draw_rect(1, y + 22, at(planned) - 1, 9, f"plan s-{colour}", f"{first}: {planned:.2%}"))
        if achieved is not None:
            parts.append(draw_rect(0, y + 34, at(achieved), 9, colour, f"{second}: {achieved:.2%}"))
        words.append(f"{name}: {first} {planned:.1%}" + (f", {second} {achieved:.1%}" if achieved is not None else ""))
    svg = make_svg(width, height, f"{title}. {'. '.join(words[:12])}", parts)
    return Chart(svg, ("row", first, second), [(name, planned, achieved) for name, planned, achieved, _ in known])


def stacked_bars(
    bars: Sequence[tuple[str, Sequence[float]]], part_names: Sequence[str], *, title: str, width: float = 560
) -> Chart:
    """One bar a row, cut into parts that fill it; a part says its share where it has room."""
    known = [(plain_text(n), [max(finite(v) or 0.0, 0.0) for v in values]) for n, values in bars]
    known = [(name, values) for name, values in known if sum(values) > 0]
    if not known:
        return empty_figure(width, title, "nothing counted yet")
    parts, x, y = [], 0.0, 5.0
    used = [i for i in range(len(part_names)) if any(values[i] for _, values in known if i < len(values))]
    for i in used:  # the legend runs over as many lines as it needs
        step = 16 + text_width(part_names[i]) + 16
        if x and x + step > width:
            x, y = 0.0, y + 18
        parts += [draw_rect(x, y, 10, 10, f"c{i % PALETTE_SIZE}"), draw_text(x + 15, y + 9, part_names[i])]
        x += step
    top, words = y + 16, []
    for j, (name, values) in enumerate(known):
        line, total, at = top + j * 46, sum(values), 0.0
        parts.append(draw_text(0, line + 16, fit_text(name, width * 0.6), style="strong name", full=name))
        parts.append(draw_text(width, line + 16, f"{format_compact(total)} tokens", at="end"))
        for i, value in enumerate(values):
            piece = value / total * width
            share = f"{value / total:.1%}"
            if value:
                tip = f"{part_names[i]}: {round(value):,} ({share})"
                parts.append(draw_rect(at, line + 22, max(piece, 1.0), 16, f"seg c{i % PALETTE_SIZE}", tip))
            at += piece
        words.append(f"{name}: " + ", ".join(f"{part_names[i]} {v / total:.1%}" for i, v in enumerate(values) if v))
    svg = make_svg(width, top + 46 * len(known), f"{title}. {'. '.join(words[:12])}", parts)
    return Chart(svg, ("row", *part_names), [(name, *values) for name, values in known])

"""SVG elements of the charts: text, lines, markers, and the frame around them.

Colours are classes (`c0`..`c7`, `good`, `bad`, ...) that the style sheet fills. Elements have no ids and no style attributes: a
page may hold one chart at two widths, and a strict Content-Security-Policy lets them pass. Sizes are in CSS pixels.
"""

from __future__ import annotations

from collections.abc import Iterable

from postgrad.reports.html.charts.chart import Chart
from postgrad.reports.html.charts.scales import Point
from postgrad.reports.html.notation import escape_html

PALETTE_SIZE = 8  # series colours c0..c7; then they start again with the next marker and a dash


def _px(value: float) -> str:
    text = f"{value:.1f}"
    return text[:-2] if text.endswith(".0") else text


def draw_text(x: float, y: float, content: str, *, at: str = "start", style: str = "", full: str = "") -> str:
    """Text at a point; `full` is what the pointer shows where the content had to be shortened."""
    title = f"<title>{escape_html(full)}</title>" if full and full != content else ""
    anchor = "" if at == "start" else f' text-anchor="{at}"'
    shape = f' class="{style}"' if style else ""
    return f'<text x="{_px(x)}" y="{_px(y)}"{anchor}{shape}>{title}{escape_html(content)}</text>'


def draw_line(x1: float, y1: float, x2: float, y2: float, style: str) -> str:
    return f'<line x1="{_px(x1)}" y1="{_px(y1)}" x2="{_px(x2)}" y2="{_px(y2)}" class="{style}"/>'


def draw_rect(x: float, y: float, width: float, height: float, style: str, title: str = "") -> str:
    inside = f"<title>{escape_html(title)}</title>" if title else ""
    return (
        f'<rect x="{_px(x)}" y="{_px(y)}" width="{_px(max(width, 0))}" height="{_px(height)}"'
        f' class="{style}">{inside}</rect>'
    )


def draw_path(points: Iterable[Point], style: str, closed: bool = False) -> str:
    drawn = "L".join(f"{_px(x)} {_px(y)}" for x, y in points)
    return f'<path d="M{drawn}{"Z" if closed else ""}" class="{style}"/>'


def draw_marker(x: float, y: float, shape: int, style: str, title: str = "", size: float = 4.0) -> str:
    inside = f"<title>{escape_html(title)}</title>" if title else ""
    kind = shape % 4
    if kind == 0:
        return f'<circle cx="{_px(x)}" cy="{_px(y)}" r="{_px(size)}" class="{style}">{inside}</circle>'
    s = size * 1.15
    corners = {
        1: [(-1, -1), (1, -1), (1, 1), (-1, 1)],
        2: [(0, -1.25), (1.15, 0.85), (-1.15, 0.85)],
        3: [(0, -1.4), (1.4, 0), (0, 1.4), (-1.4, 0)],
    }[kind]
    s = s * 0.85 if kind == 1 else s
    drawn = "L".join(f"{_px(x + dx * s)} {_px(y + dy * s)}" for dx, dy in corners)
    return f'<path d="M{drawn}Z" class="{style}">{inside}</path>'


def make_svg(width: float, height: float, label: str, parts: Iterable[str]) -> str:
    """A picture for assistive technology is one thing with one label; the numbers stand in tables."""
    return (
        f'<svg class="fig" viewBox="0 0 {_px(width)} {_px(height)}" role="img"'
        f' aria-label="{escape_html(label, 1200)}">' + "".join(parts) + "</svg>"
    )


def empty_figure(width: float, label: str, reason: str) -> Chart:
    body = [draw_rect(0.5, 0.5, width - 1, 71, "axis hollow"), draw_text(width / 2, 40, reason, at="middle")]
    return Chart(make_svg(width, 72, f"{label}: {reason}", body))

"""Widths of texts without font metrics, and labels that do not overlap."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from postgrad.foreign_text import truncate

FONT_SIZE = 12.0


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


def visible_labels(positions: Sequence[float], labels: Sequence[str], room: float = 8.0) -> list[int]:
    """Indices of the tick labels to write so that none touches the next (centred, left to right)."""
    if not labels:
        return []
    for stride in range(1, len(labels) + 1):
        chosen = list(range(0, len(labels), stride))
        ends = [(positions[i] - text_width(labels[i]) / 2, positions[i] + text_width(labels[i]) / 2) for i in chosen]
        if all(a[1] + room <= b[0] for a, b in itertools.pairwise(ends)):
            return chosen
    return [0]

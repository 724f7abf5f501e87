"""Thinning and smoothing of long series, and their gaps."""

from __future__ import annotations

import math
from collections.abc import Sequence

from postgrad.reports.html.charts.scales import Point

MAX_POINTS = 400  # per line: about two for every pixel of a narrow plot


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


def split_at_gaps(points: Sequence[Point]) -> list[list[Point]]:
    """The line without its gaps."""
    pieces: list[list[Point]] = [[]]
    for point in points:
        if math.isfinite(point[0]) and math.isfinite(point[1]):
            pieces[-1].append(point)
        elif pieces[-1]:
            pieces.append([])
    return [piece for piece in pieces if piece]

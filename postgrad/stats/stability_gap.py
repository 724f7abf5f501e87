"""The stability gap: a loss on old text that rises after a switch of data and falls again by itself.

It occurs even with replay (De Lange et al. 2023, arXiv 2205.13452; for language models Guo et al. 2024, arXiv 2406.14833). A
measurement within the gap overstates the forgetting that remains.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

EARLY_FRACTION = 0.25
"""The first part of a stage, in which the loss must peak for its fall to be a recovery from the switch."""
MIN_RECOVERY = 0.1
"""The share of the rise that must be recovered."""


class EvaluationPoint(NamedTuple):
    """The rise of a loss since the start of a stage, with its interval, at the position `x` of the stage."""

    x: float
    change: float
    low: float
    high: float


@dataclass(frozen=True)
class StabilityGap:
    """A loss that rose to `peak` at `peak_x` and fell to `recovery` at `recovery_x`."""

    peak_x: float
    peak: float
    recovery_x: float
    recovery: float

    @property
    def recovered_share(self) -> float:
        """The share of the rise that was recovered."""
        return (self.peak - self.recovery) / self.peak


def stability_gap(evaluations: Sequence[EvaluationPoint]) -> StabilityGap | None:
    """The gap in the ordered evaluations of a stage, or None.

    The loss must peak in the first quarter of the stage, significantly above the start, and fall significantly later: the two
    intervals do not overlap.
    """
    known = [point for point in evaluations if all(map(math.isfinite, point))]
    if len(known) < 3:
        return None
    first, last = known[0].x, known[-1].x
    peak = max(known, key=lambda point: point.change)
    later_points = [point for point in known if point.x > peak.x]
    if not later_points or peak.low <= 0 or peak.x - first > EARLY_FRACTION * (last - first):
        return None
    later = min(later_points, key=lambda point: point.change)
    gap = StabilityGap(peak.x, peak.change, later.x, later.change)
    return gap if later.high < peak.low and gap.recovered_share >= MIN_RECOVERY else None

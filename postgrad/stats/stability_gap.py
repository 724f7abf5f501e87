"""Did old text get worse just after a switch, and better again by itself? The stability gap of a curve.

At a switch the loss on old text rises first and then falls, even where old text is replayed all the time (De Lange et al. 2023,
arXiv 2205.13452; of language models Guo et al. 2024, arXiv 2406.14833). What is measured inside of it is worse than what stays.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

EARLY_FRACTION = 0.25
"""The part of a stage in which a loss must stand highest for its fall to be a recovery from the switch."""
MIN_RECOVERY = 0.1
"""The share of the rise that must come back."""


class EvaluationPoint(NamedTuple):
    """The rise of a loss since the start of a stage, with its interval, at a place `x` of the stage."""

    x: float
    change: float
    low: float
    high: float


@dataclass(frozen=True)
class StabilityGap:
    """A loss that rose to `peak` at `at` and came back to `later` at `until`."""

    peak_x: float
    peak: float
    recovery_x: float
    recovery: float

    @property
    def recovered_share(self) -> float:
        """The share of the rise that came back."""
        return (self.peak - self.recovery) / self.peak


def stability_gap(evaluations: Sequence[EvaluationPoint]) -> StabilityGap | None:
    """The gap in the looks of a stage, in their order; None where there is none.

    The loss must stand highest in the first quarter of the stage, certainly above the start, and later certainly below that:
    the two intervals do not touch.
    """
    known = [look for look in evaluations if all(map(math.isfinite, look))]
    if len(known) < 3:
        return None
    first, last = known[0].x, known[-1].x
    peak = max(known, key=lambda look: look.change)
    behind = [look for look in known if look.x > peak.x]
    if not behind or peak.low <= 0 or peak.x - first > EARLY_FRACTION * (last - first):
        return None
    later = min(behind, key=lambda look: look.change)
    found = StabilityGap(peak.x, peak.change, later.x, later.change)
    return found if later.high < peak.low and found.recovered_share >= MIN_RECOVERY else None

"""Did old text get worse just after a switch, and better again by itself? The stability gap of a curve.

At a switch the loss on old text rises first and then falls, even where old text is replayed all the time (De Lange et al. 2023,
arXiv 2205.13452; of language models Guo et al. 2024, arXiv 2406.14833). What is measured inside of it is worse than what stays.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

EARLY = 0.25
"""The part of a stage in which a loss must stand highest for its fall to be a recovery from the switch."""
LEAST = 0.1
"""The share of the rise that must come back."""


class Look(NamedTuple):
    """The rise of a loss since the start of a stage, with its interval, at a place `x` of the stage."""

    x: float
    change: float
    low: float
    high: float


@dataclass(frozen=True)
class Gap:
    """A loss that rose to `peak` at `at` and came back to `later` at `until`."""

    at: float
    peak: float
    until: float
    later: float

    @property
    def back(self) -> float:
        """The share of the rise that came back."""
        return (self.peak - self.later) / self.peak


def stability_gap(looks: Sequence[Look]) -> Gap | None:
    """The gap in the looks of a stage, in their order; None where there is none.

    The loss must stand highest in the first quarter of the stage, certainly above the start, and later certainly below that:
    the two intervals do not touch.
    """
    known = [look for look in looks if all(map(math.isfinite, look))]
    if len(known) < 3:
        return None
    first, last = known[0].x, known[-1].x
    peak = max(known, key=lambda look: look.change)
    behind = [look for look in known if look.x > peak.x]
    if not behind or peak.low <= 0 or peak.x - first > EARLY * (last - first):
        return None
    later = min(behind, key=lambda look: look.change)
    found = Gap(peak.x, peak.change, later.x, later.change)
    return found if later.high < peak.low and found.back >= LEAST else None

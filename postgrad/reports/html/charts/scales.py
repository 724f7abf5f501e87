"""Scales and ticks of an axis."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from postgrad.reports.html.notation import MINUS, format_fixed, format_signed

Point = tuple[float, float]
MIN_SPAN = 1e-280  # below this a quotient may overflow


def nice_step(span: float, max_pieces: int) -> float:
    """The smallest of 1, 2, 2.5, 5 times a power of ten that cuts `span` into at most `most` pieces."""
    if not span > MIN_SPAN:
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
class Scale:
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


def axis_range(values: Iterable[float], *, zero: bool = False, least: float = 0.0, padding: float = 0.06) -> Point:
    """The range of an axis: the finite values, with some room, never of width zero."""
    finite = [v for v in values if math.isfinite(v)]
    if zero or not finite:
        finite.append(0.0)
    low, high = min(finite), max(finite)
    missing = max(least, abs(high) * 1e-6) - (high - low)
    if high - low < max(least, abs(high) * 1e-6):
        low, high = low - missing / 2, high + missing / 2
    if high - low < MIN_SPAN:
        low, high = (low - 1, high + 1) if abs(low) < MIN_SPAN else (low - abs(low) * 0.1, high + abs(high) * 0.1)
    pad = (high - low) * padding
    return low - pad, high + pad

"""The bootstrap: 95 % percentile intervals of statistics of resampled units, with one number of draws and one seed rule.

Legend: S draws, N units, K values of a unit.

Units (documents, windows, items, passages) are drawn whole, N of N with replacement. The draws are a function of the seed and N
alone. So statistics of the same units and seed share their draws: a difference, a ratio or a mean of such samples is *paired*.
Independent samples (the tasks of a mean, the two texts of a shift) take different seeds, by convention their numbers in the
list 0, 1, ..., and are thereby *unpaired*.

A single unit has no spread, so it has no interval: its draws are NaN, and so is what is computed from them.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from scipy.sparse import csr_array

DRAWS = 2000
"""Draws of every interval. With 2,000 the Monte Carlo error of an end is about 3 % of half the interval's width (normal
statistic); with 200 it is 10 %, as an end rests on the five outermost draws."""
_ENTRIES_AT_ONCE = 20_000_000

Ends = tuple[float, float] | tuple[None, None]
"""The lower and the upper end of an interval; None for a single unit, which has none."""


def percentile_interval(samples_S: np.ndarray) -> Ends:
    """The middle 95 % of samples; no interval where they are NaN."""
    low, high = np.quantile(samples_S, [0.025, 0.975])
    return (None, None) if np.isnan(low) else (float(low), float(high))


def undefined_draws() -> np.ndarray:
    """The draws of a single unit, of shape (S,)."""
    return np.full(DRAWS, np.nan)


def ratio_interval(numerator_N: np.ndarray, denominator_N: np.ndarray, seed: int = 0) -> Ends:
    """The interval of `sum(numerator) / sum(denominator)`; none with a single unit."""
    return percentile_interval(resample_ratio(numerator_N, denominator_N, seed))


def resample_ratio(numerator_N: np.ndarray, denominator_N: np.ndarray, seed: int = 0) -> np.ndarray:
    """`sum(numerator) / sum(denominator)` of each draw, of shape (S,), such as nats per token over documents."""
    if len(numerator_N) < 2:
        return undefined_draws()
    return np.concatenate(
        [numerator_N[i].sum(1) / denominator_N[i].sum(1) for i in _draw_units(len(numerator_N), seed)]
    )


def resample_sums(values_NK: np.ndarray | csr_array, seed: int = 0) -> np.ndarray:
    """The sum over the units of each draw, of shape (S, K); NaN with a single unit."""
    units = int(values_NK.shape[0])  # pyrefly: ignore[unsupported-operation]
    if units < 2:
        return np.full((DRAWS, int(values_NK.shape[1])), np.nan)  # pyrefly: ignore[unsupported-operation]
    return np.concatenate([counts_SN @ values_NK for counts_SN in resample_counts(units, seed)])


def resample_counts(units: int, seed: int = 0, size: int | None = None) -> Iterator[np.ndarray]:
    """How often each draw has each unit, of shape (some draws, N) and float64; all parts together have S draws.

    `size`: units in a draw. Default: as many as there are.
    """
    for drawn_SN in _draw_units(units, seed, size):
        yield np.stack([np.bincount(row_N, minlength=units) for row_N in drawn_SN]).astype(np.float64)


def _draw_units(units: int, seed: int, size: int | None = None) -> Iterator[np.ndarray]:
    """The units of the draws, of shape (some draws, N); how they are parted changes nothing."""
    rng = np.random.default_rng(seed)
    rows = max(1, min(DRAWS, _ENTRIES_AT_ONCE // units))
    for begin in range(0, DRAWS, rows):
        yield rng.integers(0, units, (min(rows, DRAWS - begin), size or units))

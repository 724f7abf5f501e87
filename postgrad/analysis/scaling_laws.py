"""Published scaling laws of mixtures and forgetting, and the optima that follow from their fits.

CMR      the largest share of new text at which the loss on old text stays within a bound (Gu et al. 2024, arXiv 2407.17467)
D-CPT    losses by model size, tokens and mixture (Que et al. 2024, arXiv 2406.01375)
Bethune  forgetting by tokens of new text, model size and injected old text (Bethune et al. 2025, arXiv 2502.06042)

`loss_curve_law` has the law of a loss along a learning-rate schedule. Each is fitted with `law_fitting.fit_law`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from postgrad.analysis.law_fitting import Estimate, Fit, Law, Parameter
from postgrad.errors import DataError

# --- critical mixture ratio -----------------------------------------------------------------------------


def _power(x: np.ndarray, a: float, s: float, b: float) -> np.ndarray:
    return a * np.maximum(x, 1e-12) ** s + b


_POWER = (
    Parameter("a", (-2.0, -0.5, -0.05, 0.05, 0.5, 2.0)),
    Parameter("s", (-1.0, -0.4, -0.1, 0.1, 0.4, 1.0), -4.0, 4.0),
    Parameter("b", (-1.0, 0.0, 1.0, 2.0, 4.0)),
)

MIXTURE_LAW = Law(
    "CMR: loss by mixture",
    _POWER,
    ("ratio",),
    lambda ratio, **p: _power(ratio, **p),
    "Gu et al. 2024, arXiv 2407.17467: L(R) = a R^s + b",
)
"""The loss on a text by the share R of new text, at one size and budget."""

CRITICAL_RATIO_LAW = Law(
    "CMR: critical ratio by tokens",
    _POWER,
    ("tokens",),
    lambda tokens, **p: _power(tokens, **p),
    "Gu et al. 2024, arXiv 2407.17467: R(T) = a T^s + b, T in units of 0.2B tokens",
)
"""The largest admissible share of new text by the budget."""

CMR_UNIT = 2e8
"""The unit of T in the published parameters of `CRITICAL_RATIO_LAW`."""


def critical_ratio(old_text_fit: Fit, bound: float) -> Estimate:
    """The largest share of new text at which the loss on old text is at most `bound` nats per token.

    `old_text_fit`: a fit of `MIXTURE_LAW` to losses on old text. Raises `DataError` when no share meets the bound.
    """

    def find(values: Mapping[str, float]) -> float:
        return _largest_ratio(lambda ratio_N: old_text_fit.law({"ratio": ratio_N}, values), bound)

    return _solve_ratio(old_text_fit, find, bound)


# --- D-CPT ----------------------------------------------------------------------------------------------


def _dcpt(
    size: np.ndarray, tokens: np.ndarray, ratio: np.ndarray,
    E: float, A: float, a: float, B: float, eta: float, b: float, C: float, eps: float, g: float,
) -> np.ndarray:  # fmt: skip
    return E + A / size**a + B * ratio**eta / tokens**b + C / (ratio + eps) ** g


DCPT = Law(
    "D-CPT",
    (
        Parameter("E", (0.5, 1.0, 2.0), 0.0),
        Parameter("A", (0.1, 1.0), 0.0),
        Parameter("a", (0.1, 0.4), 0.0, 3.0),
        Parameter("B", (0.1, 1.0), 0.0),
        Parameter("eta", (0.3, 1.0), 0.0, 5.0),
        Parameter("b", (0.1, 0.4), 0.0, 3.0),
        Parameter("C", (0.01, 0.1), 0.0),
        Parameter("eps", (0.01, 0.1), 1e-6, 2.0),
        Parameter("g", (0.3, 1.0), 0.0, 5.0),
    ),
    ("size", "tokens", "ratio"),
    _dcpt,
    "Que et al. 2024, arXiv 2406.01375: L = E + A/N^a + B r^eta/D^b + C/(r + eps)^g",
)
"""The loss on a corpus by weights (billions), tokens (billions) and the share `ratio` of that corpus in the mixture."""


def _dcpt_ratio(ratio: np.ndarray, E: float, B: float, eta: float, C: float, eps: float, g: float) -> np.ndarray:
    return E + B * ratio**eta + C / (ratio + eps) ** g


DCPT_RATIO = Law(
    "D-CPT at one size and budget",
    (
        Parameter("E", (0.5, 1.5, 2.5), 0.0),
        Parameter("B", (0.01, 0.3), 0.0),
        Parameter("eta", (0.5, 1.0), 0.0, 5.0),
        Parameter("C", (0.01, 0.1, 0.5), 0.0),
        Parameter("eps", (0.01, 0.1), 1e-6, 2.0),
        Parameter("g", (0.3, 1.0), 0.0, 5.0),
    ),
    ("ratio",),
    _dcpt_ratio,
    "Que et al. 2024, arXiv 2406.01375, with N and D fixed: L = E' + B' r^eta + C/(r + eps)^g",
)
"""`DCPT` for points of the same weights and tokens, whose terms are part of E and B."""


def best_mixture(old_text_fit: Fit, bound: float) -> Estimate:
    """The share of new text that learns most while the loss on old text is at most `bound` nats per token.

    `old_text_fit`: a fit of `DCPT_RATIO` to losses on old text by *its* share. The loss on new text falls with the share of new
    text, so the optimum is the largest admissible one (D-CPT, section 4.3). Raises `DataError` when there is none.
    """

    def find(values: Mapping[str, float]) -> float:
        return _largest_ratio(lambda ratio_N: old_text_fit.law({"ratio": 1.0 - ratio_N}, values), bound)

    return _solve_ratio(old_text_fit, find, bound)


# --- forgetting with injected old text --------------------------------------------------------------------


def _bethune(
    new_tokens: np.ndarray, size: np.ndarray, share: np.ndarray, L0: float, A: float, b: float, B: float, a: float
) -> np.ndarray:
    return L0 + A * new_tokens**b / ((1.0 + B * share) * size) ** a


BETHUNE = Law(
    "Bethune: forgetting with injected old text",
    (
        Parameter("L0", (1.0, 2.0, 3.0), 0.0),
        Parameter("A", (0.01, 0.1, 1.0), 0.0),
        Parameter("b", (0.1, 0.3, 0.6), 0.0, 3.0),
        Parameter("B", (10.0, 100.0, 1000.0), 0.0, 1e6),
        Parameter("a", (0.2, 0.5, 1.0), 0.0, 5.0),
    ),
    ("new_tokens", "size", "share"),
    _bethune,
    "Bethune et al. 2025, arXiv 2502.06042: L = L0 + A D^b / ((1 + B p) N)^a",
)
"""The loss on old text by tokens D of new text (millions), weights N (millions) and the share p of old text injected."""


def injected_share(law_fit: Fit, *, new_tokens: float, size: float, rise: float) -> Estimate:
    """The smallest share of old text with which its loss rises by at most `rise` nats per token; 0 when none is needed.

    `(1 + B p) N = (A D^b / rise)^(1/a)`, solved for p. Raises `DataError` for a rise that is no positive number, or that no
    share keeps to.
    """
    if not rise > 0:
        raise DataError(f"a rise of {rise:g} nats", where=BETHUNE.name, expected="a number above zero")

    def find(p: Mapping[str, float]) -> float:
        with np.errstate(all="ignore"):
            needed = (p["A"] * new_tokens ** p["b"] / rise) ** (1.0 / max(p["a"], 1e-9)) / size
            return float(max(0.0, (needed - 1.0) / max(p["B"], 1e-12)))

    if find(law_fit.values) > 1:
        raise DataError(
            f"no share of old text keeps the rise of its loss within {rise:g} nats per token",
            where=BETHUNE.name,
            expected="a larger rise, fewer tokens of new text, or a larger model",
        )
    return law_fit.solve(lambda p: min(find(p), 1.0))  # a draw above 1 counts as 1


# --- where a curve crosses a bound ------------------------------------------------------------------------


def _largest_ratio(loss_at: Callable[[np.ndarray], np.ndarray], bound: float) -> float:
    """The largest share in [0, 1] at which a loss is within the bound; NaN when there is none."""
    low, high = 0.0, 1.0
    for _ in range(3):  # a grid, then a finer one between two points of it
        ratio_N = np.linspace(low, high, 1001)
        within = np.flatnonzero(loss_at(ratio_N) <= bound)
        if not len(within):
            return float("nan")
        if within[-1] == len(ratio_N) - 1:
            return float(ratio_N[-1])
        low, high = ratio_N[within[-1]], ratio_N[within[-1] + 1]
    return float(low)


def _solve_ratio(old_text_fit: Fit, find: Callable[[Mapping[str, float]], float], bound: float) -> Estimate:
    if np.isnan(find(old_text_fit.values)):
        losses_N = old_text_fit.law({"ratio": np.linspace(0.0, 1.0, 1001)}, old_text_fit.values)
        raise DataError(
            f"no share keeps the loss within {bound:.4f} nats per token",
            where=old_text_fit.law.name,
            expected=f"a bound of {losses_N.min():.4f} or more, which is the lowest that the fit allows",
        )
    # A draw in which no share meets the bound counts as 0: dropping it would narrow the interval.
    return old_text_fit.solve(lambda values: float(np.nan_to_num(find(values))))

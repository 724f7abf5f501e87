"""The loss along a learning-rate schedule in continued training: the annealing law and its shift term.

Legend: T steps.

The annealing law predicts a loss from two areas of the schedule (Tissue et al. 2024, arXiv 2408.11029; for continued training
Wang et al. 2025, arXiv 2505.07796): the forward area S1, the sum of the rates, and the annealing area S2, the momentum sum of
their decreases. A change of distribution adds a term that saturates with S1.
"""

from __future__ import annotations

import numpy as np

from postgrad.analysis.law_fitting import Law, Parameter

MOMENTUM = 0.999
"""lambda of the annealing area, as published."""


def forward_area(rates_T: np.ndarray) -> np.ndarray:
    """S1 after each step: the sum of the learning rates so far, of shape (T,)."""
    return np.cumsum(np.asarray(rates_T, float))


def annealing_area(rates_T: np.ndarray, momentum: float = MOMENTUM, before: float | None = None) -> np.ndarray:
    """S2 after each step, of shape (T,): `sum_{i<=t} sum_{k<=i} (eta_{k-1} - eta_k) momentum^(i-k)`.

    `before` is eta_0, the rate before the first step. Default: that of the first step. A rising rate, as in a
    warm-up, counts negatively.
    """
    rates = np.asarray(rates_T, float)
    falls_T = -np.diff(rates, prepend=rates[0] if before is None else before)
    out, held, area = np.empty(len(rates)), 0.0, 0.0
    for step, fall in enumerate(falls_T):
        held = momentum * held + fall
        area += held
        out[step] = area
    return out


def _cpt_loss(
    forward: np.ndarray, annealing: np.ndarray, forward_before: np.ndarray, annealing_before: np.ndarray,
    L0: float, A: float, a: float, C1: float, C2: float, B: float, E: float, b: float,
) -> np.ndarray:  # fmt: skip
    return (
        L0
        + A * np.maximum(forward_before + forward, 1e-12) ** -a
        - C1 * annealing_before
        - C2 * annealing
        + B * (1.0 - (1.0 + E * forward) ** -b)
    )


CPT_LAW = Law(
    "dynamics of continued pre-training",
    (
        Parameter("L0", (1.0, 2.0), 0.0),
        Parameter("A", (0.1, 1.0), 0.0),
        Parameter("a", (0.2, 0.5), 0.0, 3.0),
        Parameter("C1", (0.1,), 0.0),
        Parameter("C2", (0.1,), 0.0),
        Parameter("B", (-0.5, 0.5)),
        Parameter("E", (1.0, 30.0), 0.0),
        Parameter("b", (0.5,), 0.0, 5.0),
    ),
    ("forward", "annealing", "forward_before", "annealing_before"),
    _cpt_loss,
    "Wang et al. 2025, arXiv 2505.07796: L = L0 + A (S1_pt + S1_cpt)^-a - C1 S2_pt - C2 S2_cpt + B (1 - (1 + E S1_cpt)^-b)",
)
"""The loss on a text by the areas of the schedule of pre-training (`before`) and of its continuation."""


def _shift_loss(
    forward: np.ndarray, annealing: np.ndarray, base: np.ndarray, C: float, B: float, E: float, b: float
) -> np.ndarray:
    return base - C * annealing + B * (1.0 - (1.0 + E * forward) ** -b)


SHIFT_LAW = Law(
    "shift term of continued pre-training",
    (
        Parameter("C", (0.0, 0.1, 1.0), 0.0),
        Parameter("B", (-2.0, -0.3, 0.3, 2.0)),
        Parameter("E", (1.0, 10.0, 100.0, 1000.0), 0.0),
        Parameter("b", (0.2, 0.5, 1.0), 0.0, 5.0),
    ),
    ("forward", "annealing", "base"),
    _shift_loss,
    "Wang et al. 2025, arXiv 2505.07796, continued from one model: L = base - C S2 + B (1 - (1 + E S1)^-b)",
)
"""The same continued from one known model, whose loss is `base`: two short pilots at different rates fit it."""

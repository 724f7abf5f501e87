"""Steps at which a run evaluates and saves checkpoints."""

from __future__ import annotations

from postgrad.config.quantities import length_in_steps

_EARLY_EVALUATIONS = (0.0025, 0.005, 0.01, 0.015, 0.02)
"""Shares of the stage with an evaluation of their own: a dip of the loss is expected in the first 2 % (stability gap)."""


def evaluation_steps(every: str, steps: int, tokens: int) -> set[int]:
    """Steps after which the held-out sets are scored: evenly spaced, the last, and several in the first 2 %."""
    return {*(max(1, round(share * steps)) for share in _EARLY_EVALUATIONS), *checkpoint_steps(every, steps, tokens)}


def checkpoint_steps(every: str, steps: int, tokens: int) -> set[int]:
    """Steps after which a checkpoint is saved: evenly spaced, and the last."""
    stride = max(1, round(length_in_steps(every, steps, tokens)))
    return {*range(stride, steps + 1, stride), steps}

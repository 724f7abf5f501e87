"""Loss-adaptive learning rate: a factor on the scheduled rate that follows the loss (FINCH).

The schedule itself is a pure function of the step. The factor depends on the losses so far, through two numbers that a
checkpoint stores.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

_EPS = 1e-8
"""Keeps the square root positive."""


class LRScale(Protocol):
    """Maps the loss of a step, in nats per trained token, to a factor on the scheduled learning rate."""

    def __call__(self, loss: float) -> float: ...

    def state(self) -> dict[str, float]:
        """State for a checkpoint."""
        ...

    def load(self, state: Mapping[str, float]) -> None:
        """Restore a `state`."""
        ...


class ConstantLRScale:
    """The scheduled learning rate at every step."""

    def __call__(self, loss: float) -> float:
        return 1.0

    def state(self) -> dict[str, float]:
        return {}

    def load(self, state: Mapping[str, float]) -> None: ...


@dataclass
class LossAdaptiveLRScale:
    """A lower learning rate while the loss is high (FINCH).

    Prashant et al. 2026 (arXiv 2605.20005): a step forgets at most about C rate sqrt(loss), so that

        rate_i = min(max_rate, k / sqrt(mean_i + eps))      mean_i = smoothing * mean_{i-1} + (1 - smoothing) * loss_i

    keeps the bound constant. Here `max_rate` is the scheduled rate, and k follows from `start`, the share of it at the first
    step: the factor is min(1, start sqrt(mean_1 / mean_i)). The paper's smoothing is 0.9.
    """

    start: float
    smoothing: float = 0.9
    first_loss: float | None = None
    mean_loss: float | None = None

    def __call__(self, loss: float) -> float:
        if self.first_loss is None or self.mean_loss is None:
            self.first_loss = self.mean_loss = loss
        else:
            self.mean_loss = self.smoothing * self.mean_loss + (1 - self.smoothing) * loss
        return min(1.0, self.start * math.sqrt((self.first_loss + _EPS) / (self.mean_loss + _EPS)))

    def state(self) -> dict[str, float]:
        return (
            {}
            if self.first_loss is None or self.mean_loss is None
            else {"first": self.first_loss, "mean": self.mean_loss}
        )

    def load(self, state: Mapping[str, float]) -> None:
        self.first_loss, self.mean_loss = state.get("first"), state.get("mean")

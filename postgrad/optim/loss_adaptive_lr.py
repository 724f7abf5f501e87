"""How much of the schedule's rate does a step take, given its loss?

The schedule itself is a pure function of the step. What stands here multiplies it by a factor that follows from the step's
loss and from two numbers that a checkpoint holds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

_EPS = 1e-8
"""Keeps the root above zero where a loss is."""


class LRScale(Protocol):
    """Calling it with the loss of a step, in nats per trained token, gives the factor of the step's rate."""

    def __call__(self, loss: float) -> float: ...

    def state(self) -> dict[str, float]:
        """What a checkpoint must hold of it."""
        ...

    def load(self, state: Mapping[str, float]) -> None:
        """Take back what `state` gave."""
        ...


class ConstantLRScale:
    """All of the rate, at every step."""

    def __call__(self, loss: float) -> float:
        return 1.0

    def state(self) -> dict[str, float]:
        return {}

    def load(self, state: Mapping[str, float]) -> None: ...


@dataclass
class LossAdaptiveLRScale:
    """Less of the rate where the loss is high (FINCH).

    Prashant et al. 2026 (arXiv 2605.20005): what a step forgets is at most about C rate sqrt(loss), so that

        rate_i = min(most, k / sqrt(mean_i + eps))      mean_i = smoothing * mean_{i-1} + (1 - smoothing) * loss_i

    keeps the bound the same at every step. `most` is the schedule's rate here, and k follows from `start`, the share of it
    that the first step takes: the factor is min(1, start sqrt(mean_1 / mean_i)). The paper's smoothing is 0.9.
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

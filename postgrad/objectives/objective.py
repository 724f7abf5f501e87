"""What is a token worth? An objective maps a model's output on a batch to a *sum* over its tokens.

Sums, never means: the step divides once, by the count of trained tokens of the whole global batch.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from postgrad.data.batch import Batch
from postgrad.models.model import Output


class Objective(Protocol):
    """`name` is the objective's name in the metrics; calling it gives the summed loss and the sum of each row."""

    @property
    def name(self) -> str: ...

    def __call__(self, output: Output, batch: Batch) -> tuple[Tensor, Tensor]:
        """The summed loss (a scalar with a gradient) and each row's part of it (shape (B,), no gradient)."""
        ...

"""Predicting tokens: the cross-entropy of each label given what the model has read.

Which token is a label is the row's business: the next one, a masked one, a word of a corrupted span, a word of an answer.
Legend: N labels of a batch.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from postgrad.data.loading.batch import Batch
from postgrad.objectives.linear_cross_entropy import CrossEntropy
from postgrad.objectives.objective import HeadObjective


@dataclass(frozen=True)
class TokenLoss(HeadObjective):
    """`-sum log p(label | what was read)` in nats; labels of -100 count nothing."""

    name: str = "next-token"
    weight: float = 1.0
    needs_positions = False

    def logit_loss(self, batch: Batch, positions_N: Tensor | None) -> CrossEntropy:
        """Cross-entropy with the labels."""
        labels = batch.labels.flatten()
        return CrossEntropy(labels, has_ignored=True) if positions_N is None else CrossEntropy(labels[positions_N])

    def loss_weight(self, step: int) -> float:
        """The same at every step."""
        return self.weight

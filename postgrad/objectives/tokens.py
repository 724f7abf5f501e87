"""Predicting tokens: the cross-entropy of each label given what the model has read.

Which token is a label is the row's business: the next one, a masked one, a word of a corrupted span, a word of an answer.
Legend: B batch, T time, N = B T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from postgrad.data.batch import Batch
from postgrad.models.model import Output
from postgrad.objectives.linear_cross_entropy import linear_cross_entropy_by_token


@dataclass(frozen=True)
class Tokens:
    """`-sum log p(label | what was read)` in nats; labels of -100 count nothing."""

    name: str = "next-token"
    weight: float = 1.0

    def __call__(self, output: Output, batch: Batch) -> tuple[Tensor, Tensor]:
        """Summed loss and each row's part of it."""
        head = output.head
        assert head is not None, "tokens are predicted by a language model, which has a head"
        loss, losses_N = linear_cross_entropy_by_token(
            output.hidden.flatten(0, 1),
            head.weight_VD,
            batch.labels.flatten(),
            bias_V=head.bias_V,
            logit_scale=head.scale,
            softcap=head.softcap,
        )
        return self.weight * loss, losses_N.view(batch.labels.shape).sum(1)

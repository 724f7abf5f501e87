"""Next-token prediction: the cross-entropy of each label given what stands before it.

Legend: B batch, T time, N = B T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from postgrad.data.batch import Batch
from postgrad.models.pretrained import Output
from postgrad.objectives.linear_cross_entropy import linear_cross_entropy_by_token


@dataclass(frozen=True)
class NextToken:
    """`-sum log p(label | earlier tokens of the document)` in nats; labels of -100 count nothing."""

    weight: float = 1.0
    name: str = "next-token"

    def __call__(self, output: Output, batch: Batch) -> tuple[Tensor, Tensor]:
        """Summed loss and each row's part of it."""
        head = output.head
        loss, losses_N = linear_cross_entropy_by_token(
            output.hidden_BTD.flatten(0, 1),
            head.weight_VD,
            batch.labels.flatten(),
            bias_V=head.bias_V,
            logit_scale=head.scale,
            softcap=head.softcap,
        )
        return self.weight * loss, losses_N.view(batch.labels.shape).sum(1)

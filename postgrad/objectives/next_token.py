"""Next-token loss: the cross-entropy of each label under the language model's head.

The layout of a row decides which tokens are labels: the next one, a masked one, a token of a corrupted span or of an answer.

Legend: N labels of a batch, V vocabulary, R rows of one block.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from postgrad.data.layouts.rows import IGNORED
from postgrad.data.loading.batch import Batch
from postgrad.objectives.chunked_head_loss import log_sum_exp_R
from postgrad.objectives.objective import HeadObjective


@dataclass(frozen=True)
class TokenLoss(HeadObjective):
    """`-sum log p(label | context)` in nats; labels of -100 are ignored."""

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


class CrossEntropy:
    """`log sum exp(logits) - logit of the label`; the gradient is softmax - onehot."""

    coefficient = 1.0

    def __init__(self, labels_N: Tensor, *, has_ignored: bool = False) -> None:
        """`has_ignored`: some labels may be -100; the rule then zeroes gradient rows, so it must be the only one."""
        self.labels_N, self.has_ignored = labels_N, has_ignored

    def begin_chunk(self, tokens: slice) -> None:
        pass

    def compute_block(
        self, logits_RV: Tensor, probs_RV: Tensor, tokens: slice, gradient_RV: Tensor | None, weight: float
    ) -> Tensor:
        labels_R = self.labels_N[tokens]
        is_label_R = labels_R != IGNORED
        label_R1 = labels_R.where(is_label_R, 0)[:, None]
        losses_R = (log_sum_exp_R(logits_RV, probs_RV) - logits_RV.gather(1, label_R1)[:, 0]).where(is_label_R, 0.0)
        if gradient_RV is not None:
            # The buffer already has the softmax: subtract the one-hot label.
            gradient_RV.scatter_add_(1, label_R1, torch.full_like(label_R1, -weight, dtype=gradient_RV.dtype))
            if self.has_ignored:
                gradient_RV.masked_fill_(~is_label_R[:, None], 0.0)
        return losses_R

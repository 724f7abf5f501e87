"""Next-token loss: the cross-entropy of each label under the language model's head.

The layout of a row decides which tokens are labels: the next one, a masked one, a token of a corrupted span or of an answer.

Legend: N labels of a batch, V vocabulary, R rows of one block.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from postgrad.data.loading.batch import Batch
from postgrad.objectives.chunked_head_loss import log_sum_exp_R
from postgrad.objectives.objective import HeadObjective
from postgrad.objectives.token_weights import TokenWeights


@dataclass(frozen=True)
class TokenLoss(HeadObjective):
    """`-sum w log p(label | context)` in nats, w = 1 without `token_weights`; labels of -100 are ignored."""

    name: str = "next-token"
    weight: float = 1.0
    token_weights: TokenWeights | None = None

    def logit_loss(self, batch: Batch, positions_N: Tensor) -> CrossEntropy:
        """Cross-entropy with the labels."""
        return CrossEntropy(batch.labels.flatten()[positions_N], token_weights=self.token_weights)

    def loss_weight(self, step: int) -> float:
        """The same at every step."""
        return self.weight


class CrossEntropy:
    """`log sum exp(logits) - logit of the label`, times the token's weight; the gradient is the weight x (softmax - onehot)."""

    def __init__(self, labels_N: Tensor, token_weights: TokenWeights | None = None) -> None:
        self.labels_N, self.token_weights = labels_N, token_weights
        # Without token weights, the softmax enters the gradient as it is.
        self.coefficient = 1.0 if token_weights is None else 0.0

    def begin_chunk(self, tokens: slice) -> None:
        pass

    def compute_block(
        self, logits_RV: Tensor, probs_RV: Tensor, tokens: slice, gradient_RV: Tensor | None, weight: float
    ) -> Tensor:
        label_R1 = self.labels_N[tokens][:, None]
        losses_R = log_sum_exp_R(logits_RV, probs_RV) - logits_RV.gather(1, label_R1)[:, 0]
        onehot_R1 = torch.full_like(label_R1, -weight, dtype=logits_RV.dtype)
        if self.token_weights is not None:
            weights_R = self.token_weights(logits_RV, losses_R)
            losses_R = weights_R * losses_R
            onehot_R1 *= weights_R[:, None]
            if gradient_RV is not None:
                gradient_RV.addcmul_(probs_RV, weights_R[:, None], value=weight)
        if gradient_RV is not None:
            # The buffer already has the softmax: subtract the one-hot label.
            gradient_RV.scatter_add_(1, label_R1, onehot_R1)
        return losses_R

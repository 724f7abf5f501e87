"""The balancing loss of a mixture of experts, which spreads the tokens over the experts.

It is no loss of a token and not in nats: it has its own place in the step and in the metrics, and is part of no perplexity. Its
value is that of transformers for the tokens of one micro-batch of one rank, weighted by the trained tokens of each, so it does
depend on how a global batch is divided.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from postgrad.data.layouts.rows import IGNORED
from postgrad.data.loading.batch import Batch
from postgrad.models.experts import balancing_loss
from postgrad.models.model import Output


@dataclass(frozen=True)
class BalancingLoss:
    """`coefficient * balancing loss * trained tokens` of a micro-batch: a sum, as objectives are."""

    coefficient: float
    top_k: int

    def __call__(self, output: Output, batch: Batch) -> Tensor:
        """The summed loss over the tokens that the routers see, without padding."""
        loss = balancing_loss(output.router_logits, self.top_k, real_tokens(batch))
        return self.coefficient * batch.label_count * loss


def real_tokens(batch: Batch) -> Tensor:
    """Which positions (B, T) are text: those of the attention mask, or those up to the last label of a row."""
    mask_BT = batch.inputs.get("attention_mask")
    if mask_BT is not None and mask_BT.shape == batch.labels.shape:
        return mask_BT.bool()
    return (batch.labels != IGNORED).flip(1).cummax(1).values.flip(1)

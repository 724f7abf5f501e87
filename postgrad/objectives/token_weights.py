"""Token weights: factors of the next-token loss of single tokens, computed from the model's own predictions.

A token's loss becomes `-w log p(label)`, with a weight w through which no gradient flows:

    entropy       w = (H_k / ln k)^a     H_k: entropy of the k likeliest tokens, renormalised
                  EAFT (Diao et al. 2026, arXiv 2601.02151): little is learnt where the model is confident, so a label
                  that contradicts a confident prediction does not overwrite it. k = 20, a = 1 there.
    probability   w = p(label)^a         DFT (Wu et al. 2025, arXiv 2508.05629), a = 1: unlikely labels count less

Legend: R rows of one block, V vocabulary, K the likeliest tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


class TokenWeights(Protocol):
    """Weights (R,) of tokens in [0, 1], from their logits (R, V) and the losses (R,) of their labels in nats."""

    def __call__(self, logits_RV: Tensor, losses_R: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class EntropyWeights:
    """The normalised entropy of the `top_k` likeliest tokens, to the power `exponent`."""

    top_k: int = 20
    exponent: float = 1.0

    def __call__(self, logits_RV: Tensor, losses_R: Tensor) -> Tensor:
        k = min(self.top_k, logits_RV.shape[-1])
        log_probs_RK = logits_RV.topk(k, dim=-1, sorted=False).values.log_softmax(-1)
        entropy_R = -(log_probs_RK.exp() * log_probs_RK).sum(-1)
        return (entropy_R / math.log(k)).clamp(0.0, 1.0) ** self.exponent  # rounding may leave [0, 1]


@dataclass(frozen=True)
class ProbabilityWeights:
    """The probability of the label, to the power `exponent`."""

    exponent: float = 1.0

    def __call__(self, logits_RV: Tensor, losses_R: Tensor) -> Tensor:
        return (-self.exponent * losses_R).exp()

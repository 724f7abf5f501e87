"""Laws of token weights: the weighted loss and its gradient are those of the definition, with weights that are constants."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from postgrad.models.model import OutputHead
from postgrad.objectives.chunked_head_loss import WeightedLoss, linear_loss
from postgrad.objectives.next_token import CrossEntropy
from postgrad.objectives.token_weights import EntropyWeights, ProbabilityWeights, TokenWeights

N, D, V = 29, 8, 37


def entropy_by_definition(log_probs_NV: Tensor, labels_N: Tensor, k: int, exponent: float) -> Tensor:
    top = log_probs_NV.exp().sort(dim=-1, descending=True).values[:, :k]
    top = top / top.sum(-1, keepdim=True)
    return (-(top * top.log()).sum(-1) / math.log(k)) ** exponent


def probability_by_definition(log_probs_NV: Tensor, labels_N: Tensor, exponent: float) -> Tensor:
    return log_probs_NV.exp().gather(1, labels_N.clamp(min=0)[:, None])[:, 0] ** exponent


CASES: dict[str, tuple[TokenWeights, Any]] = {
    "entropy": (EntropyWeights(), lambda z, y: entropy_by_definition(z, y, 20, 1.0)),
    "entropy of all, squared": (EntropyWeights(V, 2.0), lambda z, y: entropy_by_definition(z, y, V, 2.0)),
    "more than the vocabulary": (EntropyWeights(10 * V), lambda z, y: entropy_by_definition(z, y, V, 1.0)),
    "probability": (ProbabilityWeights(), lambda z, y: probability_by_definition(z, y, 1.0)),
    "root of the probability": (ProbabilityWeights(0.5), lambda z, y: probability_by_definition(z, y, 0.5)),
    "exponent 0": (EntropyWeights(20, 0.0), lambda z, y: torch.ones_like(z[:, 0])),
}


def make_case() -> tuple[Tensor, OutputHead, Tensor]:
    draw = torch.Generator().manual_seed(5)
    hidden = torch.randn(N, D, generator=draw, dtype=torch.float64).requires_grad_()
    weight = torch.randn(V, D, generator=draw, dtype=torch.float64).requires_grad_()
    bias = torch.randn(V, generator=draw, dtype=torch.float64).requires_grad_()
    return hidden, OutputHead(weight, bias, 0.7, 3.0), torch.randint(V, (N,), generator=draw)


@pytest.mark.parametrize(
    ("kind", "mutant"),
    [(kind, None) for kind in CASES]
    + [(kind, m) for kind in CASES if kind != "exponent 0" for m in ("gradient through the weights", "weights of 1")],
)
def test_the_weighted_loss_and_its_gradient_are_those_of_the_definition(kind: str, mutant: str | None) -> None:
    (weights, definition), (hidden, head, labels_N) = CASES[kind], make_case()
    rule = CrossEntropy(labels_N, None if mutant == "weights of 1" else weights)
    loss, losses_1N = linear_loss(hidden, head, [WeightedLoss(rule, 1.3)], chunk=4)
    log_probs_NV = head.logits(hidden).log_softmax(-1)
    w_N = definition(log_probs_NV, labels_N)
    w_N = w_N if mutant == "gradient through the weights" else w_N.detach()
    exact_N = w_N * torch.nn.functional.nll_loss(log_probs_NV, labels_N, reduction="none")
    inputs = [hidden, head.weight_VD, head.bias_V]
    ours, theirs = torch.autograd.grad(loss, inputs), torch.autograd.grad(1.3 * exact_N.sum(), inputs)
    is_equal = torch.allclose(losses_1N[0], exact_N.detach(), rtol=1e-9, atol=1e-12) and all(
        torch.allclose(a, b, rtol=1e-9, atol=1e-12) for a, b in zip(ours, theirs, strict=True)
    )
    assert is_equal == (mutant is None)


def test_a_confident_prediction_that_is_contradicted_teaches_little() -> None:
    """EAFT's reason: there the entropy is low and the loss high; where the model is unsure, all of the loss remains."""
    confident, unsure = torch.full((V,), -9.0), torch.zeros(V)
    confident[0] = 9.0
    losses_2 = torch.tensor([18.0, math.log(V)])
    sure, open_ = EntropyWeights()(torch.stack([confident, unsure]), losses_2).tolist()
    assert sure < 1e-5 and open_ == pytest.approx(1.0)

"""How is the cross-entropy of a language model's head computed without ever holding all its logits?

In chunks, as `linear_loss` says: softmax - onehot is the gradient of a token's logits, known as soon as they are.

Shapes: N tokens, D hidden width, V vocabulary, R rows of one block.
"""

from __future__ import annotations

import torch
from torch import Tensor

from postgrad.models.model import OutputHead
from postgrad.objectives.linear_loss import WeightedLoss, linear_loss, log_sum_exp_R

IGNORED = -100
"""The label of a token that is read but not trained on (the convention of torch and transformers)."""


def linear_cross_entropy(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    labels_N: Tensor,
    *,
    bias_V: Tensor | None = None,
    chunk: int | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """Cross-entropy of ``logits = hidden @ weight.T + bias``, summed over the tokens whose label is not -100.

    The products run in the dtype of `hidden_ND` (under autocast, in autocast's), softmax and all sums in
    fp32. The gradient of the weight is added up in fp32 and returned in the weight's own dtype: an fp32 weight
    beside bf16 hidden states gets a gradient that was never rounded as a whole. Differentiable once, in hidden
    states, weight and bias; one backward pass per call.

    Args:
        hidden_ND: what the head reads, (tokens, width); bf16, fp16, fp32 or fp64.
        weight_VD: the head, (vocabulary, width), any floating dtype.
        labels_N: the token to be predicted at each position, already shifted; -100 is left out.
        bias_V: the head's bias, where it has one.
        chunk: tokens whose logits exist at one time; None: 64 MiB of logits, at least 512 tokens.
        logit_scale: logits are multiplied by it (Cohere; Granite divides: give 1 / logits_scaling).
        softcap: then ``softcap * tanh(logits / softcap)`` (Gemma 2).

    Returns:
        The summed loss in nats, a scalar, fp32 (fp64 for fp64 hidden states).

    Raises:
        ValueError: shapes that do not belong together, or a chunk below 1.
        RuntimeError: a second backward pass through the same call.
    """
    loss, _ = linear_cross_entropy_by_token(
        hidden_ND,
        weight_VD,
        labels_N,
        bias_V=bias_V,
        chunk=chunk,
        logit_scale=logit_scale,
        softcap=softcap,
    )
    return loss


@torch.compiler.disable
def linear_cross_entropy_by_token(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    labels_N: Tensor,
    *,
    bias_V: Tensor | None = None,
    chunk: int | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The summed loss, and each token's part of it.

    Arguments and errors are those of `linear_cross_entropy`, the first value is what it returns. The second,
    of shape (N,), has no gradient and is 0 where the label is -100.
    """
    if hidden_ND.dim() != 2 or weight_VD.dim() != 2 or labels_N.shape != hidden_ND.shape[:1]:
        raise ValueError(
            f"linear_cross_entropy: hidden {tuple(hidden_ND.shape)}, weight {tuple(weight_VD.shape)}, labels "
            f"{tuple(labels_N.shape)}; expected (N, D), (V, D) and (N,): flatten batch and time first"
        )
    if chunk is not None and chunk < 1:
        raise ValueError(f"linear_cross_entropy: chunk is {chunk}; expected at least 1 token, or None")
    head = OutputHead(weight_VD, bias_V, logit_scale, softcap)
    if hidden_ND.device.type != "cpu":
        loss, losses_1N = linear_loss(hidden_ND, head, [WeightedLoss(CrossEntropy(labels_N, has_ignored=True))], chunk)
        return loss, losses_1N[0]
    # Tokens without a label need no logits at all. On other devices asking how many there are would stop the
    # queue.
    trained = (labels_N != IGNORED).nonzero().flatten()
    rule = CrossEntropy(labels_N.index_select(0, trained))
    loss, losses_1N = linear_loss(hidden_ND.index_select(0, trained), head, [WeightedLoss(rule)], chunk)
    return loss, losses_1N.new_zeros(len(labels_N)).index_copy(0, trained, losses_1N[0])


class CrossEntropy:
    """`log sum exp(logits) - logit of the label`; the gradient is softmax - onehot."""

    coefficient = 1.0

    def __init__(self, labels_N: Tensor, *, has_ignored: bool = False) -> None:
        """`some`: there are tokens without a label among them; this is then the only rule."""
        self.labels_N, self.has_ignored = labels_N, has_ignored

    def begin_chunk(self, tokens: slice) -> None:
        pass

    def compute_block(
        self, logits_RV: Tensor, probs_RV: Tensor, tokens: slice, gradient_RV: Tensor | None, weight: float
    ) -> Tensor:
        labels_R = self.labels_N[tokens]
        trained_R = labels_R != IGNORED
        label_R1 = labels_R.where(trained_R, 0)[:, None]
        losses_R = (log_sum_exp_R(logits_RV, probs_RV) - logits_RV.gather(1, label_R1)[:, 0]).where(trained_R, 0.0)
        if gradient_RV is not None:
            gradient_RV.scatter_add_(1, label_R1, torch.full_like(label_R1, -weight, dtype=gradient_RV.dtype))
            if self.has_ignored:
                gradient_RV.masked_fill_(~trained_R[:, None], 0.0)
        return losses_R

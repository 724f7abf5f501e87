"""Losses of a language model's head, computed in chunks, so that all logits never exist at once.

The logits of a batch are by far its largest tensor: tokens x vocabulary, once more in fp32, and once more as a gradient. But
for cross-entropy and divergences from another model, the gradient with respect to the logits is known as soon as the logits
are. So the forward pass goes through the tokens in chunks, turns each chunk's logits into their gradient in place,
multiplies that into the gradients of hidden states and weight, and discards it. The backward pass only scales the result.

Shapes: N tokens, D hidden width, V vocabulary, C tokens of one chunk, R rows of one block.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from postgrad.models.model import OutputHead

_CHUNK_BYTES = 64 * 2**20
# Smaller chunks save little memory, and each chunk costs a pass over the fp32 gradient of the weight.
_SMALLEST_CHUNK = 512
# Softmax in fp32 runs block by block: on a CPU small enough for its cache (4 MiB; measured as fast as a compiled kernel),
# elsewhere large enough to fill the device.
_BLOCK_ELEMENTS = {"cpu": 2**20, "other": 2**24}


class LogitLoss(Protocol):
    """A loss as a function of tokens' logits and their softmax, with its gradient.

    `coefficient` times the softmax is part of the gradient with respect to the logits; `compute_block` adds the rest.
    """

    coefficient: float

    def begin_chunk(self, tokens: slice) -> None:
        """Prepare for a chunk of tokens; its blocks follow in order."""

    def compute_block(
        self, logits_RV: Tensor, probs_RV: Tensor, tokens: slice, gradient_RV: Tensor | None, weight: float
    ) -> Tensor:
        """The unweighted losses (R,) of a block; adds the rest of the weighted gradient to `gradient_RV`.

        Must not change logits and probabilities. The gradient already contains the softmax times all weights and
        coefficients, and may be the same tensor as `probs_RV`, so probabilities must be read before it is written.
        """
        ...


class WeightedLoss(NamedTuple):
    """A loss and its weight."""

    logit_loss: LogitLoss
    weight: float = 1.0


def exact_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of softmax and sums."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def compute_products(hidden_CD: Tensor, head: OutputHead, out_CV: Tensor) -> None:
    """`h W^T` of a head, in the dtype of the hidden states."""
    torch.mm(hidden_CD, head.weight_VD.to(hidden_CD.dtype).t(), out=out_CV)


def compute_logits(products_RV: Tensor, head: OutputHead, out_RV: Tensor) -> None:
    """A head's logits from rows of its products, in the dtype of `out_RV`."""
    out_RV.copy_(products_RV)
    if head.bias_V is not None:
        out_RV += head.bias_V.to(out_RV.dtype)
    if head.scale != 1.0:
        out_RV *= head.scale
    if head.softcap is not None:
        out_RV.div_(head.softcap).tanh_().mul_(head.softcap)


def log_sum_exp_R(logits_RV: Tensor, probs_RV: Tensor) -> Tensor:
    """`log sum exp` from logits and softmax: `max z - log max p`, finite because the largest p is at least 1 / V."""
    return logits_RV.amax(-1) - probs_RV.amax(-1).log()


@torch.compiler.disable
def linear_loss(
    hidden_ND: Tensor, head: OutputHead, weighted_losses: Sequence[WeightedLoss], chunk: int | None = None
) -> tuple[Tensor, Tensor]:
    """The weighted sum of losses of a head's logits, and each token's unweighted part of each, (losses, N), without gradient.

    All losses share the logits, which are computed once, as is their gradient. The products run in the dtype of `hidden_ND`
    (under autocast, in autocast's), losses and sums in fp32 (fp64 for fp64). The gradient of the weight is accumulated in
    fp32 and returned in the weight's dtype. Differentiable once, in hidden states, weight and bias; one backward pass per
    call. `chunk`: tokens whose logits exist at one time (default: 64 MiB of logits, at least 512 tokens).
    """
    device = hidden_ND.device.type
    if torch.is_autocast_enabled(device) and hidden_ND.dtype != torch.float64:
        hidden_ND = hidden_ND.to(torch.get_autocast_dtype(device))
    if chunk is None:
        chunk = max(_SMALLEST_CHUNK, _CHUNK_BYTES // (head.weight_VD.shape[0] * hidden_ND.element_size()))
    return _LinearLoss.apply(  # type: ignore[no-any-return]
        hidden_ND,
        head.weight_VD,
        head.bias_V,
        weighted_losses,
        chunk,
        head.scale,
        head.softcap,
        torch.is_grad_enabled(),
    )


class _LinearLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        weighted_losses: Sequence[WeightedLoss],
        chunk: int,
        scale: float,
        softcap: float | None,
        with_gradients: bool,
    ) -> tuple[Tensor, Tensor]:
        wants_hidden, wants_weight, wants_bias = (with_gradients and w for w in ctx.needs_input_grad[:3])
        wants_any = wants_hidden or wants_weight or wants_bias
        exact = exact_dtype(hidden_ND.dtype)
        d_hidden_ND = torch.empty_like(hidden_ND) if wants_hidden else None
        d_weight_VD = torch.zeros_like(weight_VD, dtype=exact) if wants_weight else None
        d_bias_V = torch.zeros_like(bias_V, dtype=exact) if bias_V is not None and wants_bias else None

        count = len(hidden_ND)
        losses_JN = hidden_ND.new_empty(len(weighted_losses), count, dtype=exact)
        head = OutputHead(weight_VD.to(hidden_ND.dtype), bias_V, scale, softcap)
        logits = hidden_ND.new_empty(min(chunk, count), len(weight_VD))
        blocks = _BlockBuffers(logits, head, weighted_losses)
        for start in range(0, count, chunk):
            tokens = slice(start, min(start + chunk, count))
            hidden_CD, logits_CV = hidden_ND[tokens], logits[: tokens.stop - tokens.start]
            compute_products(hidden_CD, head, logits_CV)
            for rule, _ in weighted_losses:
                rule.begin_chunk(tokens)
            blocks.compute_losses(logits_CV, tokens, losses_JN, d_bias_V, keep_gradient=wants_any)
            gradient_CV = logits_CV  # overwritten in place by the line above
            if d_hidden_ND is not None:
                torch.mm(gradient_CV, head.weight_VD, out=d_hidden_ND[tokens])
            if d_weight_VD is not None:
                d_weight_VD += gradient_CV.t() @ hidden_CD
        ctx.gradients = [d_hidden_ND, d_weight_VD, d_bias_V]
        ctx.dtypes = [hidden_ND.dtype, weight_VD.dtype, None if bias_V is None else bias_V.dtype]
        ctx.mark_non_differentiable(losses_JN)
        ctx.set_materialize_grads(False)
        sums_J = losses_JN.sum(1)
        return sum(
            (weight * sums_J[j] for j, (_, weight) in enumerate(weighted_losses)), sums_J.new_zeros(())
        ), losses_JN

    @staticmethod
    @once_differentiable
    def backward(  # type: ignore[override]  # once_differentiable hides the parameters
        ctx: Any, *grad_outputs: Any
    ) -> tuple[Tensor | None, ...]:
        d_loss: Tensor | None = grad_outputs[0]
        if d_loss is None:
            return (None,) * 8
        if ctx.gradients is None:
            raise RuntimeError(
                "linear_loss: backward ran a second time, but its gradients were freed; call the loss again (retain_graph "
                "has no effect here)"
            )
        # In place: the weight's gradient is the largest tensor here, and a second one would double the peak.
        d_hidden_ND, d_weight_VD, d_bias_V = (
            None if gradient is None else gradient.mul_(d_loss).to(dtype)
            for gradient, dtype in zip(ctx.gradients, ctx.dtypes, strict=True)
        )
        ctx.gradients = None
        return d_hidden_ND, d_weight_VD, d_bias_V, None, None, None, None, None


class _BlockBuffers:
    """Turns a chunk of products into the gradient of their losses, block by block, in preallocated buffers."""

    def __init__(self, products_CV: Tensor, head: OutputHead, weighted_losses: Sequence[WeightedLoss]) -> None:
        tokens, vocabulary = products_CV.shape
        elements = _BLOCK_ELEMENTS.get(products_CV.device.type, _BLOCK_ELEMENTS["other"])
        self.rows = max(1, min(tokens, max(elements // vocabulary, torch.get_num_threads())))
        self.exact_RV = products_CV.new_empty(self.rows, vocabulary, dtype=exact_dtype(products_CV.dtype))
        self.probs_RV = torch.empty_like(self.exact_RV)
        self.head, self.weighted_losses = head, weighted_losses
        self.softmax_coefficient = sum(rule.coefficient * weight for rule, weight in weighted_losses)
        # A single loss of weight 1 can turn the softmax into its gradient in place.
        in_place = len(weighted_losses) == 1 and self.softmax_coefficient == 1.0
        self.gradient_RV = self.probs_RV if in_place else torch.empty_like(self.exact_RV)

    def compute_losses(
        self,
        products_CV: Tensor,
        tokens: slice,
        losses_JN: Tensor,
        d_bias_V: Tensor | None,
        *,
        keep_gradient: bool,
    ) -> None:
        """Fill the tokens' losses; with `keep_gradient`, also turn the products into their gradient, and add to `d_bias_V`."""
        for start in range(0, len(products_CV), self.rows):
            block_RV = products_CV[start : start + self.rows]
            block_tokens = slice(tokens.start + start, tokens.start + start + len(block_RV))
            exact_RV, probs_RV = self.exact_RV[: len(block_RV)], self.probs_RV[: len(block_RV)]
            gradient_RV = self.gradient_RV[: len(block_RV)]
            compute_logits(block_RV, self.head, exact_RV)
            torch.softmax(exact_RV, -1, out=probs_RV)
            if keep_gradient and self.gradient_RV is not self.probs_RV:
                torch.mul(probs_RV, self.softmax_coefficient, out=gradient_RV)
            target_RV = gradient_RV if keep_gradient else None
            for j, (rule, weight) in enumerate(self.weighted_losses):
                losses_JN[j, block_tokens] = rule.compute_block(exact_RV, probs_RV, block_tokens, target_RV, weight)
            if not keep_gradient:
                continue
            # The chain rule back through the head: d softcap tanh(z / softcap) = 1 - (logit / softcap)^2, then the scale.
            if self.head.softcap is not None:
                gradient_RV *= exact_RV.div_(self.head.softcap).square_().neg_().add_(1.0)
            if self.head.scale != 1.0:
                gradient_RV *= self.head.scale
            if d_bias_V is not None:
                d_bias_V += gradient_RV.sum(0)
            block_RV.copy_(gradient_RV)

"""How is the loss of a language model's head computed without ever holding all its logits?

The logits of a batch are its largest tensor by far: tokens x vocabulary, and once more in fp32, and once
more as a gradient. But the gradient of the summed cross-entropy with respect to the logits is softmax - onehot,
known as soon as the logits are. So the forward pass goes through the tokens in chunks, turns each chunk's
logits into their gradient in place, multiplies that into the gradients of hidden states and weight, and
forgets it. The backward pass only scales what is there.

Shapes: N tokens, D hidden width, V vocabulary, C tokens of one chunk, R rows of one softmax block.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORED = -100
"""The label of a token that is read but not trained on (the convention of torch and transformers)."""

_CHUNK_BYTES = 64 * 2**20
# A smaller chunk would save little more, and each one costs a pass over the fp32 gradient of the weight.
_SMALLEST_CHUNK = 512
# Softmax in fp32 goes block by block: on a processor small enough to stay in its cache (4 MiB; as fast as a
# compiled kernel, measured), elsewhere large enough to fill the device.
_BLOCK_ELEMENTS = {"cpu": 2**20, "other": 2**24}


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
    device = hidden_ND.device.type
    if torch.is_autocast_enabled(device) and hidden_ND.dtype != torch.float64:
        hidden_ND = hidden_ND.to(torch.get_autocast_dtype(device))
    if chunk is None:
        chunk = max(_SMALLEST_CHUNK, _CHUNK_BYTES // (weight_VD.shape[0] * hidden_ND.element_size()))
    rest = (weight_VD, bias_V, chunk, logit_scale, softcap, torch.is_grad_enabled())
    if device != "cpu":
        return _LinearCrossEntropy.apply(hidden_ND, labels_N, *rest)
    # Tokens without a label need no logits at all. On other devices asking how many there are would stop the
    # queue.
    trained = (labels_N != IGNORED).nonzero().flatten()
    if len(trained) == len(labels_N):
        return _LinearCrossEntropy.apply(hidden_ND, labels_N, *rest)
    loss, trained_losses = _LinearCrossEntropy.apply(
        hidden_ND.index_select(0, trained), labels_N.index_select(0, trained), *rest
    )
    return loss, trained_losses.new_zeros(len(labels_N)).index_copy(0, trained, trained_losses)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        labels_N: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        chunk: int,
        logit_scale: float,
        softcap: float | None,
        with_gradients: bool,
    ) -> tuple[Tensor, Tensor]:
        wants_hidden, _, wants_weight, wants_bias = (with_gradients and w for w in ctx.needs_input_grad[:4])
        wants_any = wants_hidden or wants_weight or wants_bias
        exact = _exact(hidden_ND.dtype)
        d_hidden_ND = torch.empty_like(hidden_ND) if wants_hidden else None
        d_weight_VD = torch.zeros_like(weight_VD, dtype=exact) if wants_weight else None
        d_bias_V = torch.zeros_like(bias_V, dtype=exact) if bias_V is not None and wants_bias else None

        count = len(hidden_ND)
        losses_N = hidden_ND.new_empty(count, dtype=exact)
        head_VD = weight_VD.to(hidden_ND.dtype)
        logits = hidden_ND.new_empty(min(chunk, count), len(head_VD))
        softmax = _Softmax(logits, bias_V, logit_scale, softcap)
        for start in range(0, count, chunk):
            here = slice(start, min(start + chunk, count))
            hidden_CD, logits_CV = hidden_ND[here], logits[: here.stop - here.start]
            torch.mm(hidden_CD, head_VD.t(), out=logits_CV)
            softmax.losses(logits_CV, labels_N[here], losses_N[here], d_bias_V, keep_gradient=wants_any)
            gradient_CV = logits_CV  # overwritten in place by the line above
            if d_hidden_ND is not None:
                torch.mm(gradient_CV, head_VD, out=d_hidden_ND[here])
            if d_weight_VD is not None:
                d_weight_VD += gradient_CV.t() @ hidden_CD
        ctx.gradients = [d_hidden_ND, d_weight_VD, d_bias_V]
        ctx.dtypes = [hidden_ND.dtype, weight_VD.dtype, None if bias_V is None else bias_V.dtype]
        ctx.mark_non_differentiable(losses_N)
        ctx.set_materialize_grads(False)
        return losses_N.sum(), losses_N

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
                "linear_cross_entropy: backward ran a second time, but its gradients were handed out and are "
                "gone; call linear_cross_entropy again (retain_graph does not reach in here)"
            )
        # In place: the weight's gradient is the largest tensor here, and a second one would double the peak.
        d_hidden_ND, d_weight_VD, d_bias_V = (
            None if gradient is None else gradient.mul_(d_loss).to(dtype)
            for gradient, dtype in zip(ctx.gradients, ctx.dtypes, strict=True)
        )
        ctx.gradients = None
        return d_hidden_ND, None, d_weight_VD, d_bias_V, None, None, None, None


class _Softmax:
    """Turns a chunk of logits into their gradient, block by block in fp32, in buffers that are made once."""

    def __init__(self, logits_CV: Tensor, bias_V: Tensor | None, logit_scale: float, softcap: float | None) -> None:
        tokens, vocabulary = logits_CV.shape
        elements = _BLOCK_ELEMENTS.get(logits_CV.device.type, _BLOCK_ELEMENTS["other"])
        self.rows = max(1, min(tokens, max(elements // vocabulary, torch.get_num_threads())))
        self.exact_RV = logits_CV.new_empty(self.rows, vocabulary, dtype=_exact(logits_CV.dtype))
        self.shares_RV = torch.empty_like(self.exact_RV)
        self.bias_V = None if bias_V is None else bias_V.to(self.exact_RV.dtype)
        self.logit_scale, self.softcap = logit_scale, softcap

    def losses(
        self,
        logits_CV: Tensor,
        labels_C: Tensor,
        losses_C: Tensor,
        d_bias_V: Tensor | None,
        *,
        keep_gradient: bool,
    ) -> None:
        """Fill `losses_C`; with `keep_gradient`, also turn `logits_CV` into its gradient, and add to `d_bias_V`."""
        for start in range(0, len(logits_CV), self.rows):
            here = slice(start, start + self.rows)
            block_RV, labels_R = logits_CV[here], labels_C[here]
            exact_RV, shares_RV = self.exact_RV[: len(block_RV)], self.shares_RV[: len(block_RV)]
            exact_RV.copy_(block_RV)
            if self.bias_V is not None:
                exact_RV += self.bias_V
            if self.logit_scale != 1.0:
                exact_RV *= self.logit_scale
            if self.softcap is not None:
                exact_RV.div_(self.softcap).tanh_().mul_(self.softcap)
            torch.softmax(exact_RV, -1, out=shares_RV)
            # log Σ exp from the largest share: it is at least 1 / V, so its logarithm is exact and finite.
            log_sum_R = exact_RV.amax(-1) - shares_RV.amax(-1).log()
            trained_R = labels_R != IGNORED
            label_R1 = labels_R.where(trained_R, 0)[:, None]
            losses_C[here] = (log_sum_R - exact_RV.gather(1, label_R1)[:, 0]).where(trained_R, 0.0)
            if not keep_gradient:
                continue
            shares_RV.scatter_add_(1, label_R1, torch.full_like(label_R1, -1, dtype=shares_RV.dtype))
            if logits_CV.device.type != "cpu":  # there they were left out before
                shares_RV.masked_fill_(~trained_R[:, None], 0.0)
            if self.softcap is not None:
                shares_RV *= exact_RV.div_(self.softcap).square_().neg_().add_(1.0)
            if self.logit_scale != 1.0:
                shares_RV *= self.logit_scale
            if d_bias_V is not None:
                d_bias_V += shares_RV.sum(0)
            block_RV.copy_(shares_RV)


def _exact(dtype: torch.dtype) -> torch.dtype:
    """The dtype of softmax and sums."""
    return torch.float64 if dtype == torch.float64 else torch.float32

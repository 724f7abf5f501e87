"""How far is a head's distribution from a teacher's, token by token, without ever holding all logits of either?

With p the teacher's distribution over the vocabulary and q the student's, both softmax(logits / T):

    forward   T^2 sum p log(p / q)      gradient in the student's logits   T (q - p)
    reverse   T^2 sum q log(q / p)                                         T q (log(q / p) - sum q log(q / p))

(Hinton et al. 2015, arXiv 1503.02531, section 2: T^2 keeps the gradient's size as T changes.) A teacher that said only
a part of p, once, before the training, is told by a few ids of each token with weights w:

    sampled   ids drawn from p, w unbiased for p:  T^2 (log sum exp(z) - sum w z - H(p))        T (q - w)
              (Anshumann et al. 2025, arXiv 2503.16870, section 4)
    top-k     w = p on the k likeliest ids K, and the rest of p as one bucket:
              T^2 (sum_K p log(p / q) + p' log(p' / q')),  p' = 1 - sum_K p, q' = 1 - sum_K q
              T (q - p) on K,  T q (1 - p' / q') elsewhere: the rest has the right mass, and keeps its own shape

where z are the student's logits / T. Shapes: N tokens, D hidden width, V vocabulary, C tokens of one chunk, R rows of one
block, E ids told of all tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from postgrad.data.batch import Few
from postgrad.models.model import Head
from postgrad.objectives.linear_loss import linear_loss, log_sum_R, logits_of, products

Direction = Literal["forward", "reverse"]


def linear_divergence(
    hidden_ND: Tensor,
    head: Head,
    teacher_ND: Tensor,
    teacher_head: Head,
    *,
    direction: Direction = "forward",
    temperature: float = 1.0,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The summed divergence from a teacher of whom everything is known, and each token's part of it.

    `teacher_ND` has the teacher's own width, and its head the student's vocabulary. Differentiable in the student alone.
    Raises `ValueError` for shapes that do not belong together.
    """
    if len(hidden_ND) != len(teacher_ND) or len(head.weight_VD) != len(teacher_head.weight_VD):
        raise ValueError(
            f"linear_divergence: {len(hidden_ND)} tokens of {len(head.weight_VD)} ids beside a teacher's {len(teacher_ND)} "
            f"of {len(teacher_head.weight_VD)}; expected as many of both"
        )
    return linear_loss(hidden_ND, head, _Whole(teacher_ND, teacher_head, direction, temperature), chunk)


def linear_told(
    hidden_ND: Tensor, head: Head, told: Few, *, temperature: float = 1.0, chunk: int | None = None
) -> tuple[Tensor, Tensor]:
    """The summed forward divergence from a teacher who said a few ids of each token, and each token's part of it.

    What was told holds for this temperature. Raises `ValueError` for shapes that do not belong together.
    """
    if len(hidden_ND) != len(told.ends_N):
        raise ValueError(
            f"linear_told: {len(hidden_ND)} tokens and a word on {len(told.ends_N)}; expected as many of both"
        )
    return linear_loss(hidden_ND, head, _Told(told, temperature), chunk)


Divergence = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Losses (R,) of the logits of student and teacher, both (R, V). The third fills with the gradient; the second is used up."""


def _forward(student_RV: Tensor, teacher_RV: Tensor, gradient_RV: Tensor) -> Tensor:
    # sum p log(p / q) = sum p (teacher - student) - (log sum exp teacher - log sum exp student)
    torch.softmax(student_RV, -1, out=gradient_RV)
    shares_RV = teacher_RV.softmax(-1)
    apart_R = log_sum_R(teacher_RV, shares_RV) - log_sum_R(student_RV, gradient_RV)
    losses_R = teacher_RV.sub_(student_RV).mul_(shares_RV).sum(-1) - apart_R
    gradient_RV -= shares_RV
    return losses_R


def _reverse(student_RV: Tensor, teacher_RV: Tensor, gradient_RV: Tensor) -> Tensor:
    torch.softmax(student_RV, -1, out=gradient_RV)
    log_sum_teacher_R = teacher_RV.logsumexp(-1)
    apart_RV = teacher_RV.sub_(student_RV).neg_()
    mean_R = (apart_RV * gradient_RV).sum(-1)
    losses_R = mean_R - (log_sum_R(student_RV, gradient_RV) - log_sum_teacher_R)
    gradient_RV *= apart_RV.sub_(mean_R[:, None])
    return losses_R


_DIVERGENCES: dict[Direction, Divergence] = {"forward": _forward, "reverse": _reverse}


class _Whole:
    """The divergence from a teacher's hidden states and head."""

    def __init__(self, hidden_ND: Tensor, head: Head, direction: Direction, temperature: float) -> None:
        self.hidden_ND, self.temperature = hidden_ND.detach(), temperature
        bias_V = None if head.bias_V is None else head.bias_V.detach()
        self.head = Head(head.weight_VD.detach().to(hidden_ND.dtype), bias_V, head.scale, head.softcap)
        self.divergence = _DIVERGENCES[direction]
        self.products_CV = self.teacher_RV = hidden_ND.new_empty(0)
        self.first = 0

    def begin(self, tokens: slice) -> None:
        hidden_CD = self.hidden_ND[tokens]
        if len(self.products_CV) < len(hidden_CD):  # the first chunk is the largest
            self.products_CV = hidden_CD.new_empty(len(hidden_CD), len(self.head.weight_VD))
        products(hidden_CD, self.head, self.products_CV[: len(hidden_CD)])
        self.first = tokens.start

    def block(self, logits_RV: Tensor, gradient_RV: Tensor, tokens: slice, *, keep_gradient: bool) -> Tensor:
        if len(self.teacher_RV) < len(logits_RV):
            self.teacher_RV = torch.empty_like(logits_RV)
        teacher_RV, t = self.teacher_RV[: len(logits_RV)], self.temperature
        logits_of(self.products_CV[tokens.start - self.first : tokens.stop - self.first], self.head, teacher_RV)
        if t == 1.0:
            return self.divergence(logits_RV, teacher_RV, gradient_RV)
        return _softened(self.divergence(logits_RV / t, teacher_RV.div_(t), gradient_RV), gradient_RV, t)


class _Told:
    """The divergence from the few ids that a teacher named."""

    def __init__(self, told: Few, temperature: float) -> None:
        self.told, self.temperature = told, temperature
        self.begins_N = np.concatenate(([0], told.ends_N))
        counts_N = torch.from_numpy(np.diff(self.begins_N)).to(told.ids_E.device)
        self.token_E = torch.repeat_interleave(counts_N, output_size=len(told.ids_E))

    def begin(self, tokens: slice) -> None:
        pass

    def block(self, logits_RV: Tensor, gradient_RV: Tensor, tokens: slice, *, keep_gradient: bool) -> Tensor:
        told, t = self.told, self.temperature
        here = slice(int(self.begins_N[tokens.start]), int(self.begins_N[tokens.stop]))
        row_E, ids_E = self.token_E[here] - tokens.start, told.ids_E[here]
        weights_E = told.weights_E[here].to(logits_RV.dtype)
        logits_RV = logits_RV if t == 1.0 else logits_RV / t
        torch.softmax(logits_RV, -1, out=gradient_RV)
        losses_R = logits_RV.new_zeros(len(logits_RV))
        if told.rest_N is None:
            assert told.entropy_N is not None
            losses_R += log_sum_R(logits_RV, gradient_RV) - told.entropy_N[tokens].to(logits_RV.dtype)
            losses_R.index_add_(0, row_E, weights_E * logits_RV[row_E, ids_E], alpha=-1)
            gradient_RV.index_put_((row_E, ids_E), -weights_E, accumulate=True)
        else:
            log_q_E = logits_RV[row_E, ids_E] - log_sum_R(logits_RV, gradient_RV)[row_E]
            rest_R = told.rest_N[tokens].to(logits_RV.dtype).clamp(min=0)  # 1 - sum p may round below it
            q_E = gradient_RV[row_E, ids_E]
            losses_R.index_add_(0, row_E, torch.special.xlogy(weights_E, weights_E) - weights_E * log_q_E)
            gradient_RV[row_E, ids_E] = 0.0
            rest_q_R = gradient_RV.sum(-1).clamp(min=torch.finfo(logits_RV.dtype).tiny)
            losses_R += torch.special.xlogy(rest_R, rest_R) - rest_R * rest_q_R.log()
            gradient_RV *= (1 - rest_R / rest_q_R)[:, None]
            gradient_RV[row_E, ids_E] = q_E - weights_E
        return losses_R if t == 1.0 else _softened(losses_R, gradient_RV, t)


def _softened(losses_R: Tensor, gradient_RV: Tensor, temperature: float) -> Tensor:
    """T^2 times the losses of logits / T; the gradient becomes that in the logits."""
    gradient_RV *= temperature
    return temperature**2 * losses_R

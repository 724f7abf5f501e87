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

from typing import Literal

import numpy as np
import torch
from torch import Tensor

from postgrad.data.loading.batch import TeacherTargets
from postgrad.models.model import OutputHead
from postgrad.objectives.linear_loss import WeightedLoss, compute_logits, compute_products, linear_loss, log_sum_exp_R

Direction = Literal["forward", "reverse"]


def linear_divergence(
    hidden_ND: Tensor,
    head: OutputHead,
    teacher_ND: Tensor,
    teacher_head: OutputHead,
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
    rule = Divergence(teacher_ND, teacher_head, direction, temperature)
    loss, losses_1N = linear_loss(hidden_ND, head, [WeightedLoss(rule)], chunk)
    return loss, losses_1N[0]


def linear_sparse_divergence(
    hidden_ND: Tensor, head: OutputHead, teacher: TeacherTargets, *, temperature: float = 1.0, chunk: int | None = None
) -> tuple[Tensor, Tensor]:
    """The summed forward divergence from a teacher who said a few ids of each token, and each token's part of it.

    What was told holds for this temperature. Raises `ValueError` for shapes that do not belong together.
    """
    if len(hidden_ND) != len(teacher.ends_N):
        raise ValueError(
            f"linear_told: {len(hidden_ND)} tokens and a word on {len(teacher.ends_N)}; expected as many of both"
        )
    loss, losses_1N = linear_loss(hidden_ND, head, [WeightedLoss(SparseDivergence(teacher, temperature))], chunk)
    return loss, losses_1N[0]


class Divergence:
    """The divergence from a teacher's hidden states and head. `has_N`: where there is a teacher; None: everywhere."""

    def __init__(
        self,
        hidden_ND: Tensor,
        head: OutputHead,
        direction: Direction = "forward",
        temperature: float = 1.0,
        teacher_mask_N: Tensor | None = None,
    ) -> None:
        self.hidden_ND, self.direction, self.temperature, self.teacher_mask_N = (
            hidden_ND.detach(),
            direction,
            temperature,
            teacher_mask_N,
        )
        bias_V = None if head.bias_V is None else head.bias_V.detach()
        self.head = OutputHead(head.weight_VD.detach().to(hidden_ND.dtype), bias_V, head.scale, head.softcap)
        self.is_plain = direction == "forward" and temperature == 1.0 and teacher_mask_N is None
        self.coefficient = 1.0 if self.is_plain else 0.0
        self.products_CV = self.teacher_RV = hidden_ND.new_empty(0)
        self.chunk_start = 0

    def begin_chunk(self, tokens: slice) -> None:
        hidden_CD = self.hidden_ND[tokens]
        if len(self.products_CV) < len(hidden_CD):  # the first chunk is the largest
            self.products_CV = hidden_CD.new_empty(len(hidden_CD), len(self.head.weight_VD))
        compute_products(hidden_CD, self.head, self.products_CV[: len(hidden_CD)])
        self.chunk_start = tokens.start

    def compute_block(
        self, logits_RV: Tensor, probs_RV: Tensor, tokens: slice, gradient_RV: Tensor | None, weight: float
    ) -> Tensor:
        if len(self.teacher_RV) < len(logits_RV):
            self.teacher_RV = torch.empty_like(logits_RV)
        teacher_RV, t = self.teacher_RV[: len(logits_RV)], self.temperature
        compute_logits(
            self.products_CV[tokens.start - self.chunk_start : tokens.stop - self.chunk_start], self.head, teacher_RV
        )
        if t != 1.0:
            teacher_RV /= t
            logits_RV = logits_RV / t
            probs_RV = logits_RV.softmax(-1)
        if self.is_plain:
            losses_R, said_RV = _forward_divergence(logits_RV, probs_RV, teacher_RV)
            if gradient_RV is not None:
                gradient_RV.sub_(said_RV, alpha=weight)
            return losses_R
        losses_R, own_RV = _DIVERGENCES[self.direction](logits_RV, probs_RV, teacher_RV)
        if self.direction == "forward":
            own_RV = probs_RV - own_RV
        losses_R = t * t * losses_R
        if self.teacher_mask_N is not None:
            has_R = self.teacher_mask_N[tokens]
            losses_R, own_RV = losses_R.where(has_R, 0.0), own_RV.masked_fill_(~has_R[:, None], 0.0)
        if gradient_RV is not None:
            gradient_RV.add_(own_RV, alpha=weight * t)
        return losses_R


def _forward_divergence(student_RV: Tensor, probs_RV: Tensor, teacher_RV: Tensor) -> tuple[Tensor, Tensor]:
    """`sum p log(p / q)`, and p; the teacher's logits are used up."""
    # sum p (teacher - student) - (log sum exp teacher - log sum exp student)
    said_RV = teacher_RV.softmax(-1)
    apart_R = log_sum_exp_R(teacher_RV, said_RV) - log_sum_exp_R(student_RV, probs_RV)
    return teacher_RV.sub_(student_RV).mul_(said_RV).sum(-1) - apart_R, said_RV


def _reverse_divergence(student_RV: Tensor, probs_RV: Tensor, teacher_RV: Tensor) -> tuple[Tensor, Tensor]:
    """`sum q log(q / p)`, and its gradient; the teacher's logits are used up."""
    log_sum_teacher_R = teacher_RV.logsumexp(-1)
    apart_RV = teacher_RV.sub_(student_RV).neg_()
    mean_R = (apart_RV * probs_RV).sum(-1)
    losses_R = mean_R - (log_sum_exp_R(student_RV, probs_RV) - log_sum_teacher_R)
    return losses_R, apart_RV.sub_(mean_R[:, None]).mul_(probs_RV)


_DIVERGENCES = {"forward": _forward_divergence, "reverse": _reverse_divergence}


class SparseDivergence:
    """The divergence from the few ids that a teacher named; where it named none there is no loss."""

    def __init__(self, teacher: TeacherTargets, temperature: float = 1.0) -> None:
        self.teacher, self.temperature = teacher, temperature
        self.begins_N = np.concatenate(([0], teacher.ends_N))
        counts_N = torch.from_numpy(np.diff(self.begins_N)).to(teacher.ids_E.device)
        self.token_E = torch.repeat_interleave(counts_N, output_size=len(teacher.ids_E))
        self.teacher_mask_N = None if bool((np.diff(self.begins_N) > 0).all()) else counts_N > 0
        self.is_plain = temperature == 1.0 and self.teacher_mask_N is None
        self.coefficient = 1.0 if self.is_plain else 0.0

    def begin_chunk(self, tokens: slice) -> None:
        pass

    def compute_block(
        self, logits_RV: Tensor, probs_RV: Tensor, tokens: slice, gradient_RV: Tensor | None, weight: float
    ) -> Tensor:
        t = self.temperature
        if self.is_plain:
            return self._compute_plain_block(logits_RV, probs_RV, tokens, gradient_RV, weight)
        if t != 1.0:
            logits_RV = logits_RV / t
            probs_RV = logits_RV.softmax(-1)
        own_RV = probs_RV.clone()
        losses_R = t * t * self._compute_plain_block(logits_RV, probs_RV, tokens, own_RV, 1.0)
        if self.teacher_mask_N is not None:
            said_R = self.teacher_mask_N[tokens]
            losses_R, own_RV = losses_R.where(said_R, 0.0), own_RV.masked_fill_(~said_R[:, None], 0.0)
        if gradient_RV is not None:
            gradient_RV.add_(own_RV, alpha=weight * t)
        return losses_R

    def _compute_plain_block(
        self, logits_RV: Tensor, probs_RV: Tensor, tokens: slice, gradient_RV: Tensor | None, weight: float
    ) -> Tensor:
        """At temperature 1; the gradient holds the softmax times the weight."""
        told = self.teacher
        here = slice(int(self.begins_N[tokens.start]), int(self.begins_N[tokens.stop]))
        at_E = self.token_E[here] - tokens.start, told.ids_E[here]
        weights_E = told.weights_E[here].to(logits_RV.dtype)
        log_sum = log_sum_exp_R(logits_RV, probs_RV)
        losses_R = torch.zeros_like(log_sum)
        if told.rest_mass_N is None:
            assert told.entropy_N is not None
            losses_R.index_add_(0, at_E[0], weights_E * logits_RV[at_E], alpha=-1)
            losses_R += log_sum - told.entropy_N[tokens].to(logits_RV.dtype)
            if gradient_RV is not None:
                gradient_RV.index_put_(at_E, weights_E * -weight, accumulate=True)
            return losses_R
        rest_R = told.rest_mass_N[tokens].to(logits_RV.dtype).clamp(min=0)  # 1 - sum p may round below it
        q_E = probs_RV[at_E]
        losses_R.index_add_(
            0, at_E[0], torch.special.xlogy(weights_E, weights_E) - weights_E * (logits_RV[at_E] - log_sum[at_E[0]])
        )
        rest_RV = probs_RV.index_put(at_E, q_E.new_zeros(()))
        rest_q_R = rest_RV.sum(-1).clamp(min=torch.finfo(logits_RV.dtype).tiny)
        losses_R += torch.special.xlogy(rest_R, rest_R) - rest_R * rest_q_R.log()
        if gradient_RV is not None:
            gradient_RV.sub_(rest_RV.mul_((rest_R / rest_q_R)[:, None]), alpha=weight)
            gradient_RV.index_put_(at_E, weights_E * -weight, accumulate=True)
        return losses_R

"""Divergences from a teacher at a language model's head, computed in chunks, so that neither model's logits exist as a whole.

With p the teacher's distribution over the vocabulary and q the student's, both softmax(logits / T):

    forward   T^2 sum p log(p / q)      gradient in the student's logits   T (q - p)
    reverse   T^2 sum q log(q / p)                                         T q (log(q / p) - sum q log(q / p))

(Hinton et al. 2015, arXiv 1503.02531, section 2: T^2 keeps the gradient's size as T changes.) Without the labels (TMKL, Xu et
al. 2026, arXiv 2605.29498), each token's label is removed from both distributions and the rest renormalised: the divergence
then holds the other tokens' order and leaves the label to the cross-entropy. A cached teacher is a sparse
distribution, a few ids of each token with weights w:

    sampled   ids drawn from p, w unbiased for p:  T^2 (log sum exp(z) - sum w z - H(p))        T (q - w)
              (Anshumann et al. 2025, arXiv 2503.16870, section 4)
    top-k     w = p on the k likeliest ids K, and the rest of p as one bucket:
              T^2 (sum_K p log(p / q) + p' log(p' / q')),  p' = 1 - sum_K p, q' = 1 - sum_K q
              T (q - p) on K,  T q (1 - p' / q') elsewhere: the tail gets the right mass, and keeps its own shape

where z are the student's logits / T. Shapes: N tokens, D hidden width, V vocabulary, C tokens of one chunk, R rows of one
block, E ids of all tokens' sparse distributions.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor

from postgrad.data.loading.batch import TeacherTargets
from postgrad.models.model import OutputHead
from postgrad.objectives.chunked_head_loss import compute_logits, compute_products, log_sum_exp_R

Direction = Literal["forward", "reverse"]


class Divergence:
    """The divergence from a teacher's hidden states and head; 0 where `teacher_mask_N` is False (None: True everywhere)."""

    def __init__(
        self,
        hidden_ND: Tensor,
        head: OutputHead,
        direction: Direction = "forward",
        temperature: float = 1.0,
        teacher_mask_N: Tensor | None = None,
        excluded_N: Tensor | None = None,
    ) -> None:
        """`excluded_N`: a token of the vocabulary for each position, removed from both distributions."""
        self.excluded_N = excluded_N
        self.hidden_ND, self.direction, self.temperature = hidden_ND.detach(), direction, temperature
        self.teacher_mask_N = teacher_mask_N
        bias_V = None if head.bias_V is None else head.bias_V.detach()
        self.head = OutputHead(head.weight_VD.detach().to(hidden_ND.dtype), bias_V, head.scale, head.softcap)
        # Then the student's softmax enters the gradient as it is: `linear_loss` adds it, with this coefficient.
        is_shared = teacher_mask_N is None and excluded_N is None
        self.is_plain = direction == "forward" and temperature == 1.0 and is_shared
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
        if t != 1.0 or self.excluded_N is not None:
            teacher_RV /= t
            logits_RV = logits_RV / t
            if self.excluded_N is not None:  # a finite logit without probability: its differences are 0, not NaN
                excluded_R1 = self.excluded_N[tokens, None]
                lowest = torch.finfo(logits_RV.dtype).min / 4
                logits_RV.scatter_(1, excluded_R1, lowest)
                teacher_RV.scatter_(1, excluded_R1, lowest)
            probs_RV = logits_RV.softmax(-1)
        if self.is_plain:
            losses_R, teacher_probs_RV = _forward_divergence(logits_RV, probs_RV, teacher_RV)
            if gradient_RV is not None:
                gradient_RV.sub_(teacher_probs_RV, alpha=weight)
            return losses_R
        losses_R, own_RV = _DIVERGENCES[self.direction](logits_RV, probs_RV, teacher_RV)
        if self.direction == "forward":
            own_RV = probs_RV - own_RV
        return _add_masked(t, t * t * losses_R, own_RV, self.teacher_mask_N, tokens, gradient_RV, weight)


def _add_masked(
    temperature: float,
    losses_R: Tensor,
    own_RV: Tensor,
    mask_N: Tensor | None,
    tokens: slice,
    gradient_RV: Tensor | None,
    weight: float,
) -> Tensor:
    """Zero losses and gradients outside of the mask, and add a divergence's gradient (for logits / T) to the block's."""
    if mask_N is not None:
        mask_R = mask_N[tokens]
        losses_R, own_RV = losses_R.where(mask_R, 0.0), own_RV.masked_fill_(~mask_R[:, None], 0.0)
    if gradient_RV is not None:
        # T^2 from the loss, 1 / T from the logits.
        gradient_RV.add_(own_RV, alpha=weight * temperature)
    return losses_R


def _forward_divergence(student_RV: Tensor, probs_RV: Tensor, teacher_RV: Tensor) -> tuple[Tensor, Tensor]:
    """`sum p log(p / q)`, and p; overwrites the teacher's logits."""
    # sum p (teacher - student) - (log sum exp teacher - log sum exp student)
    teacher_probs_RV = teacher_RV.softmax(-1)
    log_sum_ratio_R = log_sum_exp_R(teacher_RV, teacher_probs_RV) - log_sum_exp_R(student_RV, probs_RV)
    return teacher_RV.sub_(student_RV).mul_(teacher_probs_RV).sum(-1) - log_sum_ratio_R, teacher_probs_RV


def _reverse_divergence(student_RV: Tensor, probs_RV: Tensor, teacher_RV: Tensor) -> tuple[Tensor, Tensor]:
    """`sum q log(q / p)`, and its gradient; overwrites the teacher's logits."""
    log_sum_teacher_R = teacher_RV.logsumexp(-1)
    difference_RV = teacher_RV.sub_(student_RV).neg_()
    mean_R = (difference_RV * probs_RV).sum(-1)
    losses_R = mean_R - (log_sum_exp_R(student_RV, probs_RV) - log_sum_teacher_R)
    return losses_R, difference_RV.sub_(mean_R[:, None]).mul_(probs_RV)


_DIVERGENCES = {"forward": _forward_divergence, "reverse": _reverse_divergence}


class SparseDivergence:
    """The forward divergence from a teacher's sparse distributions; 0 for a token without one."""

    def __init__(self, teacher: TeacherTargets, temperature: float = 1.0) -> None:
        self.teacher, self.temperature = teacher, temperature
        self.starts_N = np.concatenate(([0], teacher.ends_N))
        counts_N = torch.from_numpy(np.diff(self.starts_N)).to(teacher.ids_E.device)
        self.token_E = torch.repeat_interleave(counts_N, output_size=len(teacher.ids_E))
        self.teacher_mask_N = None if bool((np.diff(self.starts_N) > 0).all()) else counts_N > 0
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
        return _add_masked(t, losses_R, own_RV, self.teacher_mask_N, tokens, gradient_RV, weight)

    def _compute_plain_block(
        self, logits_RV: Tensor, probs_RV: Tensor, tokens: slice, gradient_RV: Tensor | None, weight: float
    ) -> Tensor:
        """At temperature 1, with a gradient buffer that contains the softmax times the weight."""
        teacher = self.teacher
        entries = slice(int(self.starts_N[tokens.start]), int(self.starts_N[tokens.stop]))
        row_E, ids_E = self.token_E[entries] - tokens.start, teacher.ids_E[entries]
        weights_E = teacher.weights_E[entries].to(logits_RV.dtype)
        log_sum_R = log_sum_exp_R(logits_RV, probs_RV)
        losses_R = torch.zeros_like(log_sum_R)
        if teacher.rest_mass_N is None:  # sampled: log sum exp(z) - sum w z - H(p)
            assert teacher.entropy_N is not None
            losses_R.index_add_(0, row_E, weights_E * logits_RV[row_E, ids_E], alpha=-1)
            losses_R += log_sum_R - teacher.entropy_N[tokens].to(logits_RV.dtype)
        else:  # top-k: sum_K p log(p / q) + p' log(p' / q')
            rest_p_R = teacher.rest_mass_N[tokens].to(logits_RV.dtype).clamp(min=0)  # 1 - sum p may round below 0
            log_q_E = logits_RV[row_E, ids_E] - log_sum_R[row_E]
            losses_R.index_add_(0, row_E, torch.special.xlogy(weights_E, weights_E) - weights_E * log_q_E)
            rest_RV = probs_RV.index_put((row_E, ids_E), probs_RV.new_zeros(()))  # q outside of K
            rest_q_R = rest_RV.sum(-1).clamp(min=torch.finfo(logits_RV.dtype).tiny)
            losses_R += torch.special.xlogy(rest_p_R, rest_p_R) - rest_p_R * rest_q_R.log()
            if gradient_RV is not None:
                gradient_RV.sub_(rest_RV.mul_((rest_p_R / rest_q_R)[:, None]), alpha=weight)
        if gradient_RV is not None:
            gradient_RV.index_put_((row_E, ids_E), weights_E * -weight, accumulate=True)
        return losses_R

"""Distillation: the divergence of the model's predictions from a teacher's (another model, or its own start).

On new text this is learning without forgetting (Li & Hoiem 2016, arXiv 1606.09282), on replayed text knowledge distillation
(Hinton et al. 2015, arXiv 1503.02531). It is computed where a row has labels; their values matter only where they are left
out of the distributions.

Legend: B batch, T time, N labels, C classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from postgrad.data.layouts.rows import IGNORED
from postgrad.data.loading.batch import Batch
from postgrad.data.problem_type import ProblemType
from postgrad.models.model import Output
from postgrad.objectives.kl_divergence import Direction, Divergence, SparseDivergence
from postgrad.objectives.objective import HeadObjective
from postgrad.objectives.teacher import Teacher, TeacherOutput

LossWeight = Callable[[int], float]
"""The factor of a loss by step (from 1)."""


@dataclass(frozen=True)
class DistillationLoss(HeadObjective):
    """`T^2 KL(teacher || student)` (forward) or `T^2 KL(student || teacher)` (reverse) over the vocabulary, in nats."""

    teacher: Teacher
    weight: LossWeight
    direction: Direction = "forward"
    temperature: float = 1.0
    name: str = "distill"
    exclude_labels: bool = False

    def logit_loss(self, batch: Batch, positions_N: Tensor) -> Divergence:
        """The divergence from the teacher's output; 0 for a label without a teacher position."""
        prediction = self.teacher(batch)
        head = prediction.output.head
        assert head is not None, "a language model has a head"
        hidden_ND, mask_N = _teacher_hidden(prediction, positions_N, batch)
        excluded_N = batch.labels.flatten()[positions_N] if self.exclude_labels else None
        return Divergence(hidden_ND, head, self.direction, self.temperature, mask_N, excluded_N)

    def loss_weight(self, step: int) -> float:
        """The scheduled factor at a step (from 1)."""
        return self.weight(step)


def _teacher_hidden(teacher_output: TeacherOutput, positions_N: Tensor, batch: Batch) -> tuple[Tensor, Tensor | None]:
    """The teacher's hidden states at these labels, (N, D) or (N, C), and a mask of those that exist; None: all."""
    hidden_BSD = teacher_output.output.hidden
    hidden_ND = hidden_BSD.flatten(0, 1)
    if teacher_output.positions_BT is None:
        return hidden_ND if len(hidden_ND) == len(positions_N) else hidden_ND[positions_N], None
    teacher_N = teacher_output.positions_BT.flatten()[positions_N]
    mask_N = teacher_N >= 0
    row_N = positions_N // batch.labels.shape[1]
    return hidden_ND[row_N * hidden_BSD.shape[1] + teacher_N.clamp(min=0)], None if bool(mask_N.all()) else mask_N


@dataclass(frozen=True)
class CachedDistillationLoss(HeadObjective):
    """The forward divergence from a teacher's cached predictions for the same rows.

    With sampled ids it is an unbiased estimate. A label without a cached prediction contributes 0.
    """

    weight: LossWeight
    temperature: float = 1.0
    name: str = "distill"

    def logit_loss(self, batch: Batch, positions_N: Tensor) -> SparseDivergence:
        """The divergence from the cached predictions."""
        return SparseDivergence(batch.teacher_targets[self.name], self.temperature)

    def loss_weight(self, step: int) -> float:
        """The scheduled factor at a step (from 1)."""
        return self.weight(step)


@dataclass(frozen=True)
class TaskDistillationLoss:
    """Distillation of a task layer's logits.

    `class` and `tags`: the divergence of the class probabilities; `multi`: the mean over classes of each class's binary
    divergence; `number`: the squared difference of the two numbers, without direction and temperature.
    """

    problem_type: ProblemType
    teacher: Teacher
    weight: LossWeight
    direction: Direction = "forward"
    temperature: float = 1.0
    name: str = "distill"

    def __call__(self, output: Output, batch: Batch) -> tuple[Tensor, Tensor]:
        """The summed divergence and each row's part of it."""
        prediction = self.teacher(batch)
        student, teacher = output.logits().float(), prediction.output.logits().float()
        if self.problem_type == ProblemType.TAGS:
            positions_N = (batch.labels != IGNORED).flatten().nonzero().flatten()
            teacher_NC, mask_N = _teacher_hidden(prediction, positions_N, batch)
            losses_N = self._logit_divergence(student.flatten(0, 1)[positions_N], teacher_NC.float())
            losses_N = losses_N if mask_N is None else losses_N * mask_N
            losses_B = student.new_zeros(len(student)).index_add(0, positions_N // batch.labels.shape[1], losses_N)
        elif self.problem_type == ProblemType.NUMBER:
            losses_B = (student[:, 0] - teacher[:, 0]).square()
        elif self.problem_type == ProblemType.MULTI_LABEL:
            binary = [
                torch.stack([functional.logsigmoid(z), functional.logsigmoid(-z)], -1)
                for z in self._apply_temperature(student, teacher)
            ]
            losses_B = self._divergence(*binary).mean(-1)
        else:
            losses_B = self._logit_divergence(student, teacher)
        # Padding rows: a number has no label value that means "ignored".
        losses_B = losses_B * torch.from_numpy(batch.label_count_B > 0).to(losses_B.device)
        return self.weight(batch.step) * losses_B.sum(), losses_B.detach()

    def _apply_temperature(self, *logits: Tensor) -> tuple[Tensor, ...]:
        return tuple(z / self.temperature for z in logits)

    def _logit_divergence(self, student_NC: Tensor, teacher_NC: Tensor) -> Tensor:
        return self._divergence(*(z.log_softmax(-1) for z in self._apply_temperature(student_NC, teacher_NC)))

    def _divergence(self, log_q: Tensor, log_p: Tensor) -> Tensor:
        """From the student's and the teacher's log-probabilities (..., C), summed over the last axis."""
        if self.direction == "reverse":
            log_p, log_q = log_q, log_p
        return self.temperature**2 * (log_p.exp() * (log_p - log_q)).sum(-1)

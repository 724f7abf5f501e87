"""Answering as a teacher does: the divergence of the model's answers from those of another, or from its own of before.

On new text this is learning without forgetting (Li & Hoiem 2016, arXiv 1606.09282), on replayed text knowledge distillation on
what was known (Hinton et al. 2015, arXiv 1503.02531). It is taken where a row has labels; which labels is of no matter.

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
from postgrad.objectives.linear_divergence import Direction, Divergence, SparseDivergence
from postgrad.objectives.objective import HeadObjective
from postgrad.objectives.teacher import Teacher, TeacherOutput

LossWeight = Callable[[int], float]
"""The factor of a loss at each step, counted from 1."""


@dataclass(frozen=True)
class DistillationLoss(HeadObjective):
    """`T^2 KL(teacher || student)` (forward), or the other way round, over the vocabulary where a row has labels, in nats."""

    teacher: Teacher
    weight: LossWeight
    direction: Direction = "forward"
    temperature: float = 1.0
    name: str = "distill"

    def logit_loss(self, batch: Batch, positions_N: Tensor | None) -> Divergence:
        """The divergence from what the teacher answers; a label that it has no place for counts nothing."""
        answer = self.teacher(batch)
        head = answer.output.head
        assert head is not None and positions_N is not None, "a language model has a head"
        hidden_ND, has_N = _teacher_hidden(answer, positions_N, batch)
        return Divergence(hidden_ND, head, self.direction, self.temperature, has_N)

    def loss_weight(self, step: int) -> float:
        """As the stage has it."""
        return self.weight(step)


def _teacher_hidden(teacher_output: TeacherOutput, positions_N: Tensor, batch: Batch) -> tuple[Tensor, Tensor | None]:
    """What a teacher answers at these labels, (N, D) or (N, C), and where it does; None: everywhere."""
    said_BSD = teacher_output.output.hidden
    said_ND = said_BSD.flatten(0, 1)
    if teacher_output.positions_BT is None:
        return said_ND if len(said_ND) == len(positions_N) else said_ND[positions_N], None
    theirs_N = teacher_output.positions_BT.flatten()[positions_N]
    has_N = theirs_N >= 0
    row_N = positions_N // batch.labels.shape[1]
    return said_ND[row_N * said_BSD.shape[1] + theirs_N.clamp(min=0)], None if bool(has_N.all()) else has_N


@dataclass(frozen=True)
class CachedDistillationLoss(HeadObjective):
    """The forward divergence from what a teacher said of the same rows before the training.

    Of drawn ids it is an estimate without bias. A label of which nothing was said counts nothing.
    """

    weight: LossWeight
    temperature: float = 1.0
    name: str = "distill"

    def logit_loss(self, batch: Batch, positions_N: Tensor | None) -> SparseDivergence:
        """What was said, label by label."""
        return SparseDivergence(batch.teacher_targets[self.name], self.temperature)

    def loss_weight(self, step: int) -> float:
        """As the stage has it."""
        return self.weight(step)


@dataclass(frozen=True)
class TaskDistillationLoss:
    """The same for a task layer's logits.

    `class` and `tags`: the divergence of the classes' probabilities; `multi`: the mean over classes of that of each class's
    own two; `number`: the squared distance of the two numbers, which knows neither direction nor temperature.
    """

    problem_type: ProblemType
    teacher: Teacher
    weight: LossWeight
    direction: Direction = "forward"
    temperature: float = 1.0
    name: str = "distill"

    def __call__(self, output: Output, batch: Batch) -> tuple[Tensor, Tensor]:
        """Summed divergence and each row's part of it."""
        answer = self.teacher(batch)
        mine, theirs = output.logits().float(), answer.output.logits().float()
        if self.problem_type == ProblemType.TAGS:
            place_N = (batch.labels != IGNORED).flatten().nonzero().flatten()
            theirs_NC, has_N = _teacher_hidden(answer, place_N, batch)
            losses_N = self._logit_divergence(mine.flatten(0, 1)[place_N], theirs_NC.float())
            losses_N = losses_N if has_N is None else losses_N * has_N
            losses_B = mine.new_zeros(len(mine)).index_add(0, place_N // batch.labels.shape[1], losses_N)
        elif self.problem_type == ProblemType.NUMBER:
            losses_B = (mine[:, 0] - theirs[:, 0]).square()
        elif self.problem_type == ProblemType.MULTI_LABEL:
            both = [
                torch.stack([functional.logsigmoid(z), functional.logsigmoid(-z)], -1)
                for z in self._apply_temperature(mine, theirs)
            ]
            losses_B = self._divergence(*both).mean(-1)
        else:
            losses_B = self._logit_divergence(mine, theirs)
        # A row of which nothing counts may still have a label that is a number.
        losses_B = losses_B * torch.from_numpy(batch.label_count_B > 0).to(losses_B.device)
        return self.weight(batch.step) * losses_B.sum(), losses_B.detach()

    def _apply_temperature(self, *logits: Tensor) -> tuple[Tensor, ...]:
        return tuple(z / self.temperature for z in logits)

    def _logit_divergence(self, mine_NC: Tensor, theirs_NC: Tensor) -> Tensor:
        mine_NC, theirs_NC = (z.log_softmax(-1) for z in self._apply_temperature(mine_NC, theirs_NC))
        return self._divergence(mine_NC, theirs_NC)

    def _divergence(self, log_q: Tensor, log_p: Tensor) -> Tensor:
        """Of log-probabilities (..., C), summed over the last axis."""
        if self.direction == "reverse":
            log_p, log_q = log_q, log_p
        return self.temperature**2 * (log_p.exp() * (log_p - log_q)).sum(-1)

"""Answering as a teacher does: the divergence of the model's answers from those of another, or from its own of before.

On new text this is learning without forgetting (Li & Hoiem 2016, arXiv 1606.09282), on replayed text knowledge distillation on
what was known (Hinton et al. 2015, arXiv 1503.02531). It is taken where a row has labels; which labels is of no matter.

Legend: B batch, T time, N labels, C classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from postgrad.data.batch import Batch, Few
from postgrad.data.rows import IGNORED
from postgrad.models.model import Output
from postgrad.objectives.decisions import Problem
from postgrad.objectives.linear_divergence import Direction, linear_divergence, linear_told
from postgrad.objectives.teacher import Teacher

Weight = Callable[[int], float]
"""The factor of a loss at each step, counted from 1."""


def _labelled_N(batch: Batch) -> Tensor:
    """Where the labels are, counted through all rows."""
    return (batch.labels != IGNORED).flatten().nonzero().flatten()


def _rows_B(losses_N: Tensor, place_N: Tensor, batch: Batch) -> Tensor:
    """Each row's part of the labels' losses."""
    row_N = place_N // (batch.labels.numel() // len(batch.labels))
    return losses_N.new_zeros(len(batch.labels)).index_add(0, row_N, losses_N.detach())


def _pairs(batch: Batch, place_BT: Tensor | None, length: int) -> tuple[Tensor, Tensor]:
    """Where student and teacher answer, counted through all rows; labels that the teacher has no place for are left out."""
    student_N = _labelled_N(batch)
    if place_BT is None:
        return student_N, student_N
    place_N = place_BT.flatten()[student_N]
    has = place_N >= 0
    student_N, place_N = student_N[has], place_N[has]
    return student_N, student_N // batch.labels.shape[1] * length + place_N


@dataclass(frozen=True)
class Distill:
    """`T^2 KL(teacher || student)` (forward), or the other way round, over the vocabulary where a row has labels, in nats."""

    teacher: Teacher
    weight: Weight
    direction: Direction = "forward"
    temperature: float = 1.0
    name: str = "distill"

    def __call__(self, output: Output, batch: Batch) -> tuple[Tensor, Tensor]:
        """Summed divergence and each row's part of it."""
        answer = self.teacher(batch)
        assert output.head is not None and answer.output.head is not None, "language models have heads"
        student_N, teacher_N = _pairs(batch, answer.place_BT, answer.output.hidden.shape[1])
        loss, losses_N = linear_divergence(
            output.hidden.flatten(0, 1)[student_N],
            output.head,
            answer.output.hidden.flatten(0, 1)[teacher_N],
            answer.output.head,
            direction=self.direction,
            temperature=self.temperature,
        )
        return self.weight(batch.step) * loss, _rows_B(losses_N, student_N, batch)


@dataclass(frozen=True)
class DistillTold:
    """The forward divergence from what a teacher said of the same rows before the training."""

    weight: Weight
    temperature: float = 1.0
    name: str = "distill"

    def __call__(self, output: Output, batch: Batch) -> tuple[Tensor, Tensor]:
        """Summed divergence (of drawn ids: an estimate of it without bias) and each row's part of it."""
        assert output.head is not None, "a language model has a head"
        place_N, told = _said(_labelled_N(batch), batch.told[self.name])
        hidden_ND = output.hidden.flatten(0, 1)[place_N]
        loss, losses_N = linear_told(hidden_ND, output.head, told, temperature=self.temperature)
        return self.weight(batch.step) * loss, _rows_B(losses_N, place_N, batch)


def _said(place_N: Tensor, told: Few) -> tuple[Tensor, Few]:
    """The labels of which something was said: a teacher has no place for the first word behind a prompt that it lacks."""
    some_N = np.diff(told.ends_N, prepend=0) > 0
    if some_N.all():
        return place_N, told
    kept = torch.from_numpy(some_N).to(place_N.device)
    rest_N, entropy_N = (None if t is None else t[kept] for t in (told.rest_N, told.entropy_N))
    return place_N[kept], told._replace(ends_N=told.ends_N[some_N], rest_N=rest_N, entropy_N=entropy_N)


@dataclass(frozen=True)
class DistillDecisions:
    """The same for a task layer's logits.

    `class` and `tags`: the divergence of the classes' probabilities; `multi`: the mean over classes of that of each class's
    own two; `number`: the squared distance of the two numbers, which knows neither direction nor temperature.
    """

    problem: Problem
    teacher: Teacher
    weight: Weight
    direction: Direction = "forward"
    temperature: float = 1.0
    name: str = "distill"

    def __call__(self, output: Output, batch: Batch) -> tuple[Tensor, Tensor]:
        """Summed divergence and each row's part of it."""
        answer = self.teacher(batch)
        mine, theirs = output.logits().float(), answer.output.logits().float()
        if self.problem == "tags":
            mine_N, theirs_N = _pairs(batch, answer.place_BT, theirs.shape[1])
            losses_N = self._apart(mine.flatten(0, 1)[mine_N], theirs.flatten(0, 1)[theirs_N])
            losses_B = mine.new_zeros(len(mine)).index_add(0, mine_N // batch.labels.shape[1], losses_N)
        elif self.problem == "number":
            losses_B = (mine[:, 0] - theirs[:, 0]).square()
        elif self.problem == "multi":
            both = [
                torch.stack([functional.logsigmoid(z), functional.logsigmoid(-z)], -1)
                for z in self._cooled(mine, theirs)
            ]
            losses_B = self._divergence(*both).mean(-1)
        else:
            losses_B = self._apart(mine, theirs)
        # A row of which nothing counts may still have a label that is a number.
        losses_B = losses_B * torch.from_numpy(batch.counted_B > 0).to(losses_B.device)
        return self.weight(batch.step) * losses_B.sum(), losses_B.detach()

    def _cooled(self, *logits: Tensor) -> tuple[Tensor, ...]:
        return tuple(z / self.temperature for z in logits)

    def _apart(self, mine_NC: Tensor, theirs_NC: Tensor) -> Tensor:
        mine_NC, theirs_NC = (z.log_softmax(-1) for z in self._cooled(mine_NC, theirs_NC))
        return self._divergence(mine_NC, theirs_NC)

    def _divergence(self, log_q: Tensor, log_p: Tensor) -> Tensor:
        """Of log-probabilities (..., C), summed over the last axis."""
        if self.direction == "reverse":
            log_p, log_q = log_q, log_p
        return self.temperature**2 * (log_p.exp() * (log_p - log_q)).sum(-1)

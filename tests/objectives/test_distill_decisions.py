"""Distillation of a task layer: each divergence by hand, in both directions, and what it is not."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from postgrad.data.layouts.rows import IGNORED, Row
from postgrad.data.loading.batch import collate
from postgrad.data.problem_type import ProblemType
from postgrad.models.model import Output
from postgrad.objectives.distillation import TaskDistillationLoss
from postgrad.objectives.teacher import TeacherOutput

MINE, THEIRS = [1.0, -0.5], [0.2, 0.7]


def kl(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def soft(z: list[float], t: float) -> list[float]:
    parts = [math.exp(v / t) for v in z]
    return [part / sum(parts) for part in parts]


def by_hand(problem: ProblemType, direction: str, t: float) -> float:
    first, second = (THEIRS, MINE) if direction == "forward" else (MINE, THEIRS)
    if problem == "number":
        return (MINE[0] - THEIRS[0]) ** 2
    if problem == "class":
        return t**2 * kl(soft(first, t), soft(second, t))
    both = [kl(soft([a, 0.0], t), soft([b, 0.0], t)) for a, b in zip(first, second, strict=True)]
    return t**2 * sum(both) / len(both)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("problem", ["class", "multi", "number"])
def test_each_divergence_is_that_of_its_definition(problem: ProblemType, direction: str, temperature: float) -> None:
    batch = collate([Row({"input_ids": np.array([1])}, np.array(0.0, np.float32), 1)], [0])
    said = TeacherOutput(Output(torch.tensor([THEIRS]), None))
    loss_of = TaskDistillationLoss(problem, lambda batch: said, lambda step: 0.5, direction, temperature)  # type: ignore[arg-type]
    loss, losses_B = loss_of(Output(torch.tensor([MINE]), None), batch)
    wanted = by_hand(problem, direction, temperature)
    assert losses_B.tolist() == pytest.approx([wanted], rel=1e-5) and float(loss) == pytest.approx(0.5 * wanted)
    if problem != "number":  # the other direction would be caught
        assert wanted != pytest.approx(
            by_hand(problem, "reverse" if direction == "forward" else "forward", temperature), rel=1e-3
        )


def test_tags_are_taught_where_there_is_a_label_and_the_teacher_has_a_place_for_it() -> None:
    """Two rows of three places; the teacher reads two places of each, and has none for the last label of the first."""
    labels = [[IGNORED, 1, 0], [1, IGNORED, IGNORED]]
    rows = [Row({"input_ids": np.arange(3)}, np.array(row), sum(label != IGNORED for label in row)) for row in labels]
    mine = [[[9.0, 0.0], [1.0, -0.5], [0.3, 0.1]], [[-2.0, 0.5], [0.0, 9.0], [9.0, 9.0]]]
    theirs = [[[0.2, 0.7], [7.0, 0.0]], [[0.0, 7.0], [1.5, -1.0]]]
    said = TeacherOutput(Output(torch.tensor(theirs), None), torch.tensor([[1, 0, -1], [1, 0, 0]]))
    loss_of = TaskDistillationLoss(ProblemType.TAGS, lambda batch: said, lambda step: 1.0, "forward", 2.0)
    loss, losses_B = loss_of(Output(torch.tensor(mine), None), collate(rows, [0, 0]))
    wanted = [
        4 * kl(soft(theirs[0][0], 2.0), soft(mine[0][1], 2.0)),
        4 * kl(soft(theirs[1][1], 2.0), soft(mine[1][0], 2.0)),
    ]
    assert losses_B.tolist() == pytest.approx(wanted, rel=1e-5) and float(loss) == pytest.approx(sum(wanted), rel=1e-5)

"""Decisions: each loss by hand, and rows that are there only to keep ranks together weigh nothing."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from postgrad.data.layouts.rows import Row, ignore_labels
from postgrad.data.loading.batch import collate
from postgrad.data.problem_type import ProblemType
from postgrad.models.model import Output
from postgrad.objectives.classification_loss import ClassificationLoss

LOGITS = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
CASES: dict[ProblemType, tuple[torch.Tensor, list[np.ndarray], list[float]]] = {
    "class": (
        LOGITS,
        [np.array(0, np.int64), np.array(0, np.int64)],
        [math.log(1 + math.exp(-2)), math.log(1 + math.exp(1))],
    ),
    "multi": (
        LOGITS,
        [np.array([1, 0], np.float32), np.array([0, 0], np.float32)],
        [
            (math.log(1 + math.exp(-2)) + math.log(2)) / 2,
            (math.log(2) + math.log(1 + math.exp(1))) / 2,
        ],
    ),
    "number": (
        LOGITS[:, :1],
        [np.array(0.5, np.float32), np.array(-3.0, np.float32)],
        [1.5**2, 3.0**2],
    ),
    "tags": (
        torch.stack([LOGITS, LOGITS.flip(1)]),
        [np.array([0, -100], np.int64), np.array([1, 0], np.int64)],
        [math.log(1 + math.exp(-2)), math.log(1 + math.exp(-2)) + math.log(1 + math.exp(-1))],
    ),
}


@pytest.mark.parametrize("problem", CASES)
def test_losses_by_hand_and_silent_rows(problem: ProblemType) -> None:
    logits, labels, expected = CASES[problem]
    rows = [Row({"input_ids": np.arange(2)}, label, 1) for label in labels]
    logits = logits.clone().requires_grad_()
    loss, by_row = ClassificationLoss(problem)(Output(logits, None), collate(rows, [0, 0]))
    assert by_row.tolist() == pytest.approx(expected, rel=1e-6)
    assert loss.item() == pytest.approx(sum(expected), rel=1e-6)
    batch = collate([rows[0], ignore_labels(rows[1])], [0, 0])
    loss, by_row = ClassificationLoss(problem, weight=2.0)(Output(logits, None), batch)
    assert by_row.tolist() == pytest.approx([expected[0], 0.0], rel=1e-6)
    assert loss.item() == pytest.approx(2 * expected[0], rel=1e-6) and batch.label_count == 1
    loss.backward()
    assert logits.grad is not None and logits.grad[0].any() and not logits.grad[1].any()

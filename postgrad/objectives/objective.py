"""Objectives: from a model's output on a batch to a *sum* of losses over its tokens.

Sums, never means: the step divides once, by the number of trained tokens of the whole global batch. A token then has the same
weight in every micro-batch and on every rank (gradients are summed over ranks; FSDP's averaging divisor is set to 1).
Objectives of a language model's head on the same rows share the logits, which are computed once.

Legend: B batch, T time, N labels of a batch, J objectives.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from postgrad.data.loading.batch import Batch
from postgrad.models.model import Output
from postgrad.objectives.chunked_head_loss import LogitLoss, WeightedLoss, linear_loss


class Objective(Protocol):
    """`name` is the objective's name in the metrics; a call returns the summed loss and the sum of each row."""

    @property
    def name(self) -> str: ...

    def __call__(self, output: Output, batch: Batch) -> tuple[Tensor, Tensor]:
        """The summed loss (a scalar with a gradient) and each row's part of it (shape (B,), no gradient)."""
        ...


class HeadObjective(ABC):
    """An objective on the logits at labels, given as a `LogitLoss`."""

    @abstractmethod
    def logit_loss(self, batch: Batch, positions_N: Tensor) -> LogitLoss:
        """The loss at these positions of the flattened rows."""

    @abstractmethod
    def loss_weight(self, step: int) -> float:
        """The factor of the loss at a step (from 1)."""

    def __call__(self, output: Output, batch: Batch) -> tuple[Tensor, Tensor]:
        """The summed loss and each row's part of it."""
        loss, _, rows_JB = _compute_head_losses([self], output, batch)
        return loss, rows_JB[0]


class CombinedLoss(NamedTuple):
    """The summed loss of all objectives, each one's sum (J,), and each row's part (B,); only the first has a gradient."""

    loss: Tensor
    sums_J: Tensor
    rows_B: Tensor


def combine_losses(objectives: Sequence[Objective], output: Output, batch: Batch) -> CombinedLoss:
    """Evaluate all objectives on a batch; those of the head in one pass over its logits."""
    head_objectives = [o for o in objectives if isinstance(o, HeadObjective)]
    losses, rows_B, sums = [], [], {}
    if head_objectives:
        loss, sums_J, rows_JB = _compute_head_losses(head_objectives, output, batch)
        losses.append(loss)
        rows_B += list(rows_JB)
        sums |= {id(o): s for o, s in zip(head_objectives, sums_J, strict=True)}
    for objective in objectives:
        if not isinstance(objective, HeadObjective):
            loss, own_B = objective(output, batch)
            losses.append(loss)
            rows_B.append(own_B)
            sums[id(objective)] = loss.detach()
    sums_J = torch.stack([sums[id(o)].double() for o in objectives])
    return CombinedLoss(torch.stack(losses).sum(), sums_J, torch.stack(rows_B).sum(0).double())


def _compute_head_losses(
    objectives: Sequence[HeadObjective], output: Output, batch: Batch
) -> tuple[Tensor, Tensor, Tensor]:
    """The weighted loss, each objective's sum, and each row's part of each (without weights), of shape (J, B)."""
    assert output.head is not None, "token losses need a language model's head"
    hidden_ND, shape = output.hidden.flatten(0, 1), batch.labels.shape
    # Tokens without a label need no logits.
    batch = batch if batch.label_positions is not None else batch.find_label_positions()
    positions_N = batch.label_positions
    assert positions_N is not None
    hidden_ND = hidden_ND if len(positions_N) == len(hidden_ND) else hidden_ND.index_select(0, positions_N)
    rules = [WeightedLoss(o.logit_loss(batch, positions_N), o.loss_weight(batch.step)) for o in objectives]
    loss, losses_JN = linear_loss(hidden_ND, output.head, rules)
    weights_J = losses_JN.new_tensor([weight for _, weight in rules])
    rows_JB = losses_JN.new_zeros(len(rules), shape[0]).index_add(1, positions_N // shape[1], losses_JN)
    return loss, losses_JN.sum(1) * weights_J, rows_JB

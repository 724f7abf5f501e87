"""Online teachers: a second model's output on the rows that a model is trained on.

A teacher is a frozen model, or the model in training with its tuning disabled. It reads the same rows, without the virtual
tokens of a soft prompt in training, for which the base has no vectors.

Legend: B batch, T time, S positions that the teacher reads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from postgrad.data.loading.batch import Batch
from postgrad.models.model import Model, Output
from postgrad.models.sublayers import eval_mode


class TeacherOutput(NamedTuple):
    """A teacher's output on a batch; `positions_BT` is its position for each label, -1 where it has none.

    None: the teacher's positions are the student's.
    """

    output: Output
    positions_BT: Tensor | None = None


class Teacher(Protocol):
    """Predicts the student's labels, without gradients."""

    def __call__(self, batch: Batch) -> TeacherOutput: ...


@dataclass(frozen=True)
class OnlineTeacher:
    """A model that runs at every step.

    `teacher_context`: in it the model computes as the teacher (the tuning's `disable`, for the model in training).
    `vocabulary_size`: ids from there on are virtual tokens that the teacher does not have; None: there are none.
    """

    model: Model
    teacher_context: Callable[[], AbstractContextManager[None]] = nullcontext
    vocabulary_size: int | None = None

    @torch.no_grad()
    def __call__(self, batch: Batch) -> TeacherOutput:
        """Its output in eval mode, so that it is deterministic."""
        inputs, positions_BT = (
            (batch.inputs, None) if self.vocabulary_size is None else drop_virtual_tokens(batch, self.vocabulary_size)
        )
        with eval_mode(self.model), self.teacher_context():
            output = self.model(**inputs)
        return TeacherOutput(output, positions_BT)


def drop_virtual_tokens(batch: Batch, vocabulary_size: int) -> tuple[Mapping[str, Tensor], Tensor | None]:
    """Inputs without ids from `vocabulary_size` on, and the new position of each label.

    Virtual ids are removed and the rest moves up; in packed rows, position ids are recounted in each document. If the
    position of a label is removed (the last vector of a prompt predicts the first word), the one before it in the same
    document predicts it; a label without one gets -1. Labels of a decoder of its own do not move: None.
    """
    ids_BT = batch.inputs["input_ids"]
    real_BT = ids_BT < vocabulary_size
    before_BT = real_BT.cumsum(1) - real_BT.long()  # real ids before each position: its new index
    positions_BT = batch.inputs.get("position_ids")
    starts_BT = torch.zeros_like(before_BT)
    if positions_BT is not None:
        starts_BT = torch.where(positions_BT == 0, before_BT, 0).cummax(1).values
    order_BS = (~real_BT).long().argsort(dim=1, stable=True)[:, : int(real_BT.sum(1).max())]
    real_BS = real_BT.gather(1, order_BS)
    inputs = dict(batch.inputs)
    for name, tensor in batch.inputs.items():
        if tensor.shape == ids_BT.shape and not name.startswith("decoder_"):
            inputs[name] = tensor.gather(1, order_BS).where(real_BS, 0)
    if positions_BT is not None:
        padding_BS = (~real_BS).cumsum(1) - 1  # padding is a document of its own
        inputs["position_ids"] = (before_BT - starts_BT).gather(1, order_BS).where(real_BS, padding_BS)
    if "decoder_input_ids" in inputs or batch.labels.shape != ids_BT.shape:
        return inputs, None
    last_BT = before_BT + real_BT.long() - 1
    return inputs, last_BT.where(last_BT >= starts_BT, -1)

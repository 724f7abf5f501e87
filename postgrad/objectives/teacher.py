"""What does another model say of the rows that a model is trained on?

A teacher is a frozen model, or the model in training with its tuning switched off. It reads the same rows, but for the places
of vectors that it does not have: a soft prompt that is being trained is left out of what its base reads.

Legend: B batch, T time, S places that the teacher reads.
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
    """What a teacher says of a batch, and where: `place_BT` is its place for each label, -1 where it has none.

    None: it reads what the student reads, place by place.
    """

    output: Output
    positions_BT: Tensor | None = None


class Teacher(Protocol):
    """Says what it expects where the student is to answer; nothing of it has a gradient."""

    def __call__(self, batch: Batch) -> TeacherOutput: ...


@dataclass(frozen=True)
class OnlineTeacher:
    """A model that is asked at every step.

    `alone`: inside, the model answers as the teacher (the tuning's `off`, when it is the model in training). `known`: ids from
    there on stand for vectors that the teacher does not have; None when there are none.
    """

    model: Model
    teacher_context: Callable[[], AbstractContextManager[None]] = nullcontext
    vocabulary_size: int | None = None

    @torch.no_grad()
    def __call__(self, batch: Batch) -> TeacherOutput:
        """Its output in eval mode: a teacher says the same whenever it is asked."""
        inputs, place_BT = (
            (batch.inputs, None) if self.vocabulary_size is None else drop_virtual_tokens(batch, self.vocabulary_size)
        )
        with eval_mode(self.model), self.teacher_context():
            output = self.model(**inputs)
        return TeacherOutput(output, place_BT)


def drop_virtual_tokens(batch: Batch, vocabulary_size: int) -> tuple[Mapping[str, Tensor], Tensor | None]:
    """What a model reads that knows the ids below `known` alone, and its place for each label.

    The other ids are taken out and the rest moves up; in packed rows positions are counted anew in each piece. Where a
    label's own place is taken out (the last vector of a prompt says the first word), the place before it in the same piece
    answers; a label with nothing before it in its piece has no place. Labels that a decoder of its own answers stay.
    """
    ids_BT = batch.inputs["input_ids"]
    real_BT = ids_BT < vocabulary_size
    before_BT = real_BT.cumsum(1) - real_BT.long()
    positions_BT = batch.inputs.get("position_ids")
    starts_BT = torch.zeros_like(before_BT)
    if positions_BT is not None:
        starts_BT = torch.where(positions_BT == 0, before_BT, 0).cummax(1).values
    order_BS = (~real_BT).long().argsort(dim=1, stable=True)[:, : int(real_BT.sum(1).max())]
    kept_BS = real_BT.gather(1, order_BS)
    inputs = dict(batch.inputs)
    for name, tensor in batch.inputs.items():
        if tensor.shape == ids_BT.shape and not name.startswith("decoder_"):
            inputs[name] = tensor.gather(1, order_BS).where(kept_BS, 0)
    if positions_BT is not None:
        behind_BS = (~kept_BS).cumsum(1) - 1  # what fills a row up is a piece of its own
        inputs["position_ids"] = (before_BT - starts_BT).gather(1, order_BS).where(kept_BS, behind_BS)
    if "decoder_input_ids" in inputs or batch.labels.shape != ids_BT.shape:
        return inputs, None
    last_BT = before_BT + real_BT.long() - 1
    return inputs, last_BT.where(last_BT >= starts_BT, -1)

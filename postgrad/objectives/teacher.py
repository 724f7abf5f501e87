"""Online teachers: a second model's output on the rows that a model is trained on.

A teacher is a frozen model, or the model in training with its tuning disabled. It reads the same rows, without the virtual
tokens of a soft prompt in training, for which the base has no vectors.

Legend: B batch, T time, S positions that the teacher reads, N documents, P positions of a document, D model width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from postgrad.data.loading.batch import Batch
from postgrad.data.loading.unpacked_rows import group_by_length
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
    `vocabulary_size`: ids from there on are virtual tokens that the teacher does not have; None: there are none. `packed`:
    whether the documents of a row may go through the model together. `is_sharded`: every call is one forward pass.
    """

    model: Model
    teacher_context: Callable[[], AbstractContextManager[None]] = nullcontext
    vocabulary_size: int | None = None
    packed: bool = True
    is_sharded: bool = False

    @torch.no_grad()
    def __call__(self, batch: Batch) -> TeacherOutput:
        """Its output in eval mode, so that it is deterministic."""
        inputs, positions_BT = (
            (batch.inputs, None) if self.vocabulary_size is None else drop_virtual_tokens(batch, self.vocabulary_size)
        )
        with eval_mode(self.model), self.teacher_context():
            is_split = not self.packed and "position_ids" in inputs
            output = self._read_documents(inputs) if is_split else self.model(**inputs)
        return TeacherOutput(output, positions_BT)

    def _read_documents(self, inputs: Mapping[str, Tensor]) -> Output:
        """The output for packed rows whose documents go through the model in rows of their own."""
        position_BT = inputs["position_ids"]
        rows, length = position_BT.shape
        document_BT = (position_BT == 0).flatten().cumsum(0).view(rows, length) - 1
        size_N = document_BT.flatten().bincount()
        ids_NP = position_BT.new_zeros(len(size_N), length)
        ids_NP[document_BT, position_BT] = inputs["input_ids"]
        sizes = size_N.tolist()
        groups = [list(range(len(sizes)))] if self.is_sharded else group_by_length(sizes, length, rows * length)
        hidden_BTD: Tensor | None = None
        for group in groups:
            number_N = torch.full_like(size_N, -1)
            number_N[group] = torch.arange(len(group), device=size_N.device)
            output = self.model(input_ids=ids_NP[group, : max(sizes[i] for i in group)])
            if hidden_BTD is None:
                hidden_BTD = output.hidden.new_zeros(rows, length, output.hidden.shape[-1])
            is_read_BT = number_N[document_BT] >= 0
            hidden_BTD[is_read_BT] = output.hidden[number_N[document_BT[is_read_BT]], position_BT[is_read_BT]]
        assert hidden_BTD is not None, "a batch has rows"
        return Output(hidden_BTD, self.model.head())


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

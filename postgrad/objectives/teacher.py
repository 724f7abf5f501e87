"""Online teachers: a second model's output on the rows that a model is trained on.

A teacher is a frozen model, or the model in training with its tuning disabled. It reads the same rows, without the virtual
tokens of a soft prompt in training, for which the base has no vectors. It may read more than the model: contexts (the beginning
of a document, a fact) that precede the text of each document, as in context distillation (DiSC, Padmanabhan et al. 2026,
arXiv 2602.16093; SDFT, Shenfeld et al. 2026, arXiv 2601.19897). Its predictions are those of the same labels.

Legend: B batch, T time, S positions that the teacher reads, N documents, P positions of a document, D model width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from postgrad.data.layouts.rows import IGNORED, RowContext
from postgrad.data.loading.batch import Batch
from postgrad.data.loading.unpacked_rows import group_by_length
from postgrad.models.model import Model, Output
from postgrad.models.sublayers import eval_mode

_MULTIPLE = 16
"""Rows with contexts are padded to a multiple of this, for fewer distinct shapes."""


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
    `reads_contexts`: it reads the contexts of the rows too.
    """

    model: Model
    teacher_context: Callable[[], AbstractContextManager[None]] = nullcontext
    vocabulary_size: int | None = None
    packed: bool = True
    is_sharded: bool = False
    reads_contexts: bool = False

    @torch.no_grad()
    def __call__(self, batch: Batch) -> TeacherOutput:
        """Its output in eval mode, so that it is deterministic."""
        index_BT: Tensor | None = None
        if self.reads_contexts and batch.contexts:
            batch, index_BT = insert_contexts(batch)
        inputs: Mapping[str, Any] = batch.model_inputs
        positions_BT: Tensor | None = None
        if self.vocabulary_size is not None:
            inputs, positions_BT = drop_virtual_tokens(batch, self.vocabulary_size)
        with eval_mode(self.model), self.teacher_context():
            is_split = not self.packed and "position_ids" in inputs
            output = self._read_documents(inputs) if is_split else self.model(**inputs)
        if index_BT is not None:
            positions_BT = index_BT if positions_BT is None else positions_BT.gather(1, index_BT)
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


def insert_contexts(batch: Batch) -> tuple[Batch, Tensor]:
    """The batch with the contexts in its rows, without labels, and the new position of each label (B, T).

    The position ids of a document go on after its context; what fills the rows is a document of its own.
    """
    length = batch.labels.shape[1]
    longest = max(sum(len(each.ids) for each in contexts) for contexts in batch.contexts)
    size = -(-(length + longest) // _MULTIPLE) * _MULTIPLE
    rows = [_insert_into_row(contexts, length, size) for contexts in batch.contexts]
    device = batch.labels.device
    source_BS, added_BS, shift_BS, index_BT = (
        torch.from_numpy(np.stack(arrays)).to(device) for arrays in zip(*rows, strict=True)
    )
    is_own_BS = source_BS >= 0
    inputs = {name: t.gather(1, source_BS.clamp(min=0)).where(is_own_BS, 0) for name, t in batch.inputs.items()}
    inputs["input_ids"] += added_BS
    if "position_ids" in inputs:
        inputs["position_ids"] += shift_BS
    unlabelled = torch.full_like(source_BS, IGNORED)
    return replace(batch, inputs=inputs, labels=unlabelled, document_lengths=None), index_BT


def _insert_into_row(contexts: Sequence[RowContext], length: int, size: int) -> tuple[np.ndarray, ...]:
    """Of each new position: its old one (-1: none), the id of a context, and what is added to its position id.

    The last array is the new position of each label (T,).
    """
    source_S, added_S, shift_S = np.full(size, -1), np.zeros(size, np.int64), np.zeros(size, np.int64)
    inserted_T, before_label_T, shift_T = np.zeros((3, length), np.int64)
    end = 0
    for context in contexts:
        count = len(context.ids)
        begin = context.position + end
        added_S[begin : begin + count] = context.ids
        shift_S[begin : begin + count] = context.position - context.begin + np.arange(count)
        inserted_T[context.position :] += count
        before_label_T[context.first_label :] += count
        shift_T[context.position : context.stop] = count
        end += count
    new_T = np.arange(length) + inserted_T
    source_S[new_T] = np.arange(length)
    shift_S[new_T] = shift_T
    shift_S[length + end :] = np.arange(size - length - end)
    return source_S, added_S, shift_S, np.arange(length) + before_label_T


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

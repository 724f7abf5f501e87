"""Micro-batches: rows as tensors, with label counts on the host.

Legend: B batch, T time, N labels of a batch, E predicted ids of all labels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from postgrad.data.layouts.rows import IGNORED, Row, RowContext
from postgrad.data.loading.teacher_cache import SparseDistribution

_MULTIPLE = 8
"""Rows of unequal lengths are padded to a multiple of this, for fewer distinct shapes."""


class TeacherTargets(NamedTuple):
    """Cached predictions for N labels: `ids_E` with their weights; label i's end at `ends_N[i]` (on the host).

    `rest_mass_N`: probability of all other ids (None for samples). `entropy_N`: entropy of the teacher's distribution (None
    for top-k, whose weights give it).
    """

    ids_E: Tensor
    weights_E: Tensor
    ends_N: np.ndarray
    rest_mass_N: Tensor | None
    entropy_N: Tensor | None

    def to(self, device: torch.device) -> TeacherTargets:
        """The targets with their tensors on `device`."""
        moved: dict[str, Any] = {
            name: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
            for name, value in self._asdict().items()
        }
        return TeacherTargets(**moved)


@dataclass(frozen=True)
class Batch:
    """A micro-batch: model inputs by argument name, and labels.

    `source_B` and `label_count_B` stay on the host, so that counting never waits for a device.
    """

    inputs: dict[str, Tensor]
    labels: Tensor
    source_B: np.ndarray
    label_count_B: np.ndarray
    objectives: tuple[int, ...] = (0,)
    """Indices of the stage's objectives that apply to these rows."""
    position_B: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    """Position of each row in the mixture."""
    step: int = 0
    """Training step, counted from 1."""
    teacher_targets: Mapping[str, TeacherTargets] = field(default_factory=dict)
    """Cached teacher predictions, by name of the objective."""
    padding: int | None = None
    """Of unpacked rows: positions that fill them to a common length."""
    document_lengths: tuple[int, ...] | None = None
    """Of packed rows: the positions of each document, on the host, so that a model does not wait for a device to read them."""
    label_positions: Tensor | None = None
    """Positions with a label, counted through the rows: found on the host, where looking for them waits for no device."""
    contexts: tuple[tuple[RowContext, ...], ...] = ()
    """Of each row, what only a teacher reads; empty where no row has any."""

    @property
    def label_count(self) -> int:
        """Trained tokens of this micro-batch."""
        return int(self.label_count_B.sum())

    @property
    def model_inputs(self) -> dict[str, Any]:
        """The arguments of a model."""
        lengths = {} if self.document_lengths is None else {"document_lengths": self.document_lengths}
        return {**self.inputs, **lengths}

    def find_label_positions(self) -> Batch:
        """The micro-batch with `label_positions`."""
        return replace(self, label_positions=(self.labels != IGNORED).flatten().nonzero().flatten())

    def to(self, device: torch.device) -> Batch:
        """The micro-batch with its tensors on `device`."""
        if self.labels.device == device:
            return self
        positions = self.find_label_positions().label_positions
        assert positions is not None
        return replace(
            self,
            label_positions=positions.to(device, non_blocking=True),
            inputs={name: tensor.to(device, non_blocking=True) for name, tensor in self.inputs.items()},
            labels=self.labels.to(device, non_blocking=True),
            teacher_targets={name: targets.to(device) for name, targets in self.teacher_targets.items()},
        )


def collate_teacher_targets(
    distributions: Sequence[SparseDistribution], *, has_rest_mass: bool = False
) -> TeacherTargets:
    """Concatenate the predictions for the rows of a batch; `has_rest_mass`: from top-k, not from samples."""
    if not distributions:
        empty = torch.empty(0)
        return TeacherTargets(torch.empty(0, dtype=torch.int64), empty, np.empty(0, np.int64), None, empty)
    ids_E, weights_E, counts_N, last_N = (np.concatenate(arrays) for arrays in zip(*distributions, strict=True))
    rest_or_entropy_N = torch.from_numpy(last_N)
    return TeacherTargets(
        torch.from_numpy(ids_E),
        torch.from_numpy(weights_E),
        np.cumsum(counts_N),
        rest_or_entropy_N if has_rest_mass else None,
        None if has_rest_mass else rest_or_entropy_N,
    )


def collate(
    rows: Sequence[Row],
    sources: Sequence[int],
    objectives: tuple[int, ...] = (0,),
    pad_token_id: int = 0,
    *,
    length: int | None = None,
) -> Batch:
    """Stack rows of one layout, padding shorter ones on the right: to `length`, or to that of the longest.

    Labels are padded with `IGNORED`, ids with `pad_token_id` (some models locate the end of a text by it), others with 0.
    """
    padding = {"input_ids": pad_token_id}
    inputs = {
        name: _stack_padded([row.inputs[name] for row in rows], padding.get(name, 0), length) for name in rows[0].inputs
    }
    return Batch(
        {name: torch.from_numpy(array) for name, array in inputs.items()},
        torch.from_numpy(_stack_padded([row.labels for row in rows], IGNORED, length)),
        np.asarray(sources, np.int64),
        np.array([row.label_count for row in rows], np.int64),
        objectives,
        contexts=tuple(row.contexts for row in rows) if any(row.contexts for row in rows) else (),
        document_lengths=_document_lengths(inputs["position_ids"]) if "position_ids" in inputs else None,
    )


def _document_lengths(position_BT: np.ndarray) -> tuple[int, ...]:
    """The positions of each document, which begins where position ids restart."""
    return tuple(np.diff(np.flatnonzero(position_BT == 0), append=position_BT.size).tolist())


def _stack_padded(arrays: Sequence[np.ndarray], padding: int, length: int | None) -> np.ndarray:
    if length is None and len({array.shape[:1] for array in arrays}) == 1:
        return np.stack(arrays)
    length = length or -(-max(len(array) for array in arrays) // _MULTIPLE) * _MULTIPLE
    out = np.full((len(arrays), length, *arrays[0].shape[1:]), padding, arrays[0].dtype)
    for row, array in zip(out, arrays, strict=True):
        row[: len(array)] = array
    return out

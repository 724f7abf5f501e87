"""What does the model see at once? Rows as tensors, with the count of trained tokens known on the host.

Legend: B batch, T time, N labels of a batch, E ids told of all of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from postgrad.data.layouts.rows import IGNORED, Row
from postgrad.data.loading.teacher_cache import SparseDistribution

_MULTIPLE = 8
"""Rows of unequal lengths are padded to a multiple of this, so that few shapes occur."""


class TeacherTargets(NamedTuple):
    """What a teacher said of N labels: `ids_E` with their weights, those of label i up to `ends_N[i]` (on the host).

    `rest_N`: the mass of all other ids; None when the ids were drawn. `entropy_N`: of the teacher's distribution; None when
    the weights tell it.
    """

    ids_E: Tensor
    weights_E: Tensor
    ends_N: np.ndarray
    rest_mass_N: Tensor | None
    entropy_N: Tensor | None

    def to(self, device: torch.device) -> TeacherTargets:
        """The same with its tensors on `device`."""
        moved = [t if t is None else t.to(device, non_blocking=True) for t in (self.rest_mass_N, self.entropy_N)]
        ids_E, weights_E = (t.to(device, non_blocking=True) for t in (self.ids_E, self.weights_E))
        return TeacherTargets(ids_E, weights_E, self.ends_N, *moved)


@dataclass(frozen=True)
class Batch:
    """A micro-batch: what the model is called with, by name, and the labels.

    `counted_B` and `source_B` stay on the host, so that counting never waits for a device.
    """

    inputs: dict[str, Tensor]
    labels: Tensor
    source_B: np.ndarray
    label_count_B: np.ndarray
    objectives: tuple[int, ...] = (0,)
    """Which of the stage's objectives weigh these rows."""
    position_B: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    """Where in the mixture each row stands."""
    step: int = 0
    """The step they belong to, counted from 1."""
    teacher_targets: Mapping[str, TeacherTargets] = field(default_factory=dict)
    """What was said of the labels before the training, by the name of the objective that wants it."""

    @property
    def label_count(self) -> int:
        """Trained tokens of this micro-batch."""
        return int(self.label_count_B.sum())

    def to(self, device: torch.device) -> Batch:
        """The same micro-batch with its tensors on `device`."""
        if self.labels.device == device:
            return self
        return replace(
            self,
            inputs={name: tensor.to(device, non_blocking=True) for name, tensor in self.inputs.items()},
            labels=self.labels.to(device, non_blocking=True),
            teacher_targets={name: few.to(device) for name, few in self.teacher_targets.items()},
        )


def collate_teacher_targets(
    distributions: Sequence[SparseDistribution], *, has_rest_mass: bool = False
) -> TeacherTargets:
    """The words on the rows of a batch as one; `rest`: what is said of each label is the mass of all other ids."""
    if not distributions:
        nothing = torch.empty(0)
        return TeacherTargets(torch.empty(0, dtype=torch.int64), nothing, np.empty(0, np.int64), None, nothing)
    ids_E, weights_E, counts_N, said_N = (np.concatenate(arrays) for arrays in zip(*distributions, strict=True))
    said = torch.from_numpy(said_N)
    ends_N = np.cumsum(counts_N)
    return TeacherTargets(
        torch.from_numpy(ids_E),
        torch.from_numpy(weights_E),
        ends_N,
        said if has_rest_mass else None,
        None if has_rest_mass else said,
    )


def collate(
    rows: Sequence[Row], sources: Sequence[int], objectives: tuple[int, ...] = (0,), pad_token_id: int = 0
) -> Batch:
    """Stack rows of one layout; shorter ones are padded on the right.

    Labels are padded with what counts nothing, ids with `pad` (some models find the end of a text by it), the rest with 0.
    """
    padding = {"input_ids": pad_token_id}
    return Batch(
        {
            name: torch.from_numpy(_stack_padded([row.inputs[name] for row in rows], padding.get(name, 0)))
            for name in rows[0].inputs
        },
        torch.from_numpy(_stack_padded([row.labels for row in rows], IGNORED)),
        np.asarray(sources, np.int64),
        np.array([row.label_count for row in rows], np.int64),
        objectives,
    )


def _stack_padded(arrays: Sequence[np.ndarray], padding: int) -> np.ndarray:
    lengths = {array.shape[:1] for array in arrays}
    if len(lengths) == 1:
        return np.stack(arrays)
    longest = -(-max(len(array) for array in arrays) // _MULTIPLE) * _MULTIPLE
    out = np.full((len(arrays), longest, *arrays[0].shape[1:]), padding, arrays[0].dtype)
    for row, array in zip(out, arrays, strict=True):
        row[: len(array)] = array
    return out

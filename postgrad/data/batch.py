"""What does the model see at once? Rows as tensors, with the count of trained tokens known on the host.

Legend: B batch, T time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from postgrad.data.rows import IGNORED, Row

_MULTIPLE = 8
"""Rows of unequal lengths are padded to a multiple of this, so that few shapes occur."""


@dataclass(frozen=True)
class Batch:
    """A micro-batch: what the model is called with, by name, and the labels.

    `counted_B` and `source_B` stay on the host, so that counting never waits for a device.
    """

    inputs: dict[str, Tensor]
    labels: Tensor
    source_B: np.ndarray
    counted_B: np.ndarray
    objectives: tuple[int, ...] = (0,)
    """Which of the stage's objectives weigh these rows."""

    @property
    def counted(self) -> int:
        """Trained tokens of this micro-batch."""
        return int(self.counted_B.sum())

    def to(self, device: torch.device) -> Batch:
        """The same micro-batch with its tensors on `device`."""
        if self.labels.device == device:
            return self
        return Batch(
            {name: tensor.to(device, non_blocking=True) for name, tensor in self.inputs.items()},
            self.labels.to(device, non_blocking=True),
            self.source_B,
            self.counted_B,
            self.objectives,
        )


def collate(rows: Sequence[Row], sources: Sequence[int], objectives: tuple[int, ...] = (0,), pad: int = 0) -> Batch:
    """Stack rows of one layout; shorter ones are padded on the right.

    Labels are padded with what counts nothing, ids with `pad` (some models find the end of a text by it), the rest with 0.
    """
    padding = {"input_ids": pad}
    return Batch(
        {
            name: torch.from_numpy(_stacked([row.inputs[name] for row in rows], padding.get(name, 0)))
            for name in rows[0].inputs
        },
        torch.from_numpy(_stacked([row.labels for row in rows], IGNORED)),
        np.asarray(sources, np.int64),
        np.array([row.counted for row in rows], np.int64),
        objectives,
    )


def _stacked(arrays: Sequence[np.ndarray], padding: int) -> np.ndarray:
    lengths = {array.shape[:1] for array in arrays}
    if len(lengths) == 1:
        return np.stack(arrays)
    longest = -(-max(len(array) for array in arrays) // _MULTIPLE) * _MULTIPLE
    out = np.full((len(arrays), longest, *arrays[0].shape[1:]), padding, arrays[0].dtype)
    for row, array in zip(out, arrays, strict=True):
        row[: len(array)] = array
    return out

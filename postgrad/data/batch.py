"""What does the model see at once? Rows as tensors, with the count of trained tokens known on the host.

Legend: B batch, T time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from postgrad.data.pack import IGNORED, Row


@dataclass(frozen=True)
class Batch:
    """A micro-batch. `counted_B` and `source_B` stay on the host, so that counting never waits for a device."""

    ids_BT: Tensor
    labels_BT: Tensor
    positions_BT: Tensor
    source_B: np.ndarray
    counted_B: np.ndarray

    @property
    def counted(self) -> int:
        """Trained tokens of this micro-batch."""
        return int(self.counted_B.sum())

    def to(self, device: torch.device) -> Batch:
        """The same micro-batch with its tensors on `device`."""
        if self.ids_BT.device == device:
            return self
        return Batch(
            self.ids_BT.to(device, non_blocking=True),
            self.labels_BT.to(device, non_blocking=True),
            self.positions_BT.to(device, non_blocking=True),
            self.source_B,
            self.counted_B,
        )


def collate(rows: Sequence[Row], sources: Sequence[int]) -> Batch:
    """Stack rows of one length."""
    labels = np.stack([row.labels_T for row in rows])
    return Batch(
        torch.from_numpy(np.stack([row.ids_T for row in rows])),
        torch.from_numpy(labels),
        torch.from_numpy(np.stack([row.positions_T for row in rows])),
        np.asarray(sources, np.int64),
        (labels != IGNORED).sum(axis=1),
    )

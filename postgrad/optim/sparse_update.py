"""Update masks: the weight entries that an optimizer step changes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor

from postgrad.data.loading.batch import Batch
from postgrad.distributed.shards import local_shard, sum_over_shards

OptimizerStates = Mapping[Tensor, Mapping[str, Any]]
"""The optimizer's state of each master: of AdamW its moments, under `exp_avg` and `exp_avg_sq`."""


class UpdateMask(Protocol):
    """Selects at every step which entries of the masters change."""

    def observe(self, batch: Batch) -> AbstractContextManager[None]:
        """Context of the forward pass of a micro-batch."""
        ...

    def before_update(self) -> None:
        """Called once all gradients are complete, before any weight changes."""
        ...

    def after_update(self, states: OptimizerStates) -> int | None:
        """Called after the optimizer's dense update. Returns the number of entries that stay changed; None for all."""
        ...

    def discard(self) -> None:
        """Forget what was observed since the last update: this step has none."""
        ...


class FullMask:
    """Dense updates."""

    def observe(self, batch: Batch) -> AbstractContextManager[None]:
        return nullcontext()

    def before_update(self) -> None: ...

    def after_update(self, states: OptimizerStates) -> int | None:
        return None

    def discard(self) -> None: ...


class SparseMask(ABC):
    """Sparse updates: entries outside the mask keep their value to the bit, without weight decay.

    The optimizer updates everything, with dense moments, and the other entries are then restored from a copy. So a share of
    100 % equals the dense update to the bit, and the fused kernel stays in use. The copy exists only during an update.
    """

    def __init__(self, sparse_masters: Sequence[Tensor], masters: Sequence[Tensor]) -> None:
        """`sparse_masters`: those of `masters` with a mask; the others are updated densely."""
        self.sparse_masters = list(sparse_masters)
        sparse_ids = set(map(id, self.sparse_masters))
        self.dense_masters = [master for master in masters if id(master) not in sparse_ids]
        self._snapshots: list[tuple[Tensor, Tensor]] = []

    @property
    @abstractmethod
    def num_updated(self) -> int:
        """Entries that an update changes when all masters have a gradient."""

    @abstractmethod
    def masks(self, masters: Sequence[Tensor], states: OptimizerStates) -> list[Tensor]:
        """Masks of this rank's rows of `masters`, some of the sparse ones; any shape that broadcasts to the rows."""

    def observe(self, batch: Batch) -> AbstractContextManager[None]:
        return nullcontext()

    def discard(self) -> None:
        self._snapshots = []

    def before_update(self) -> None:
        self._snapshots = [(m, local_shard(m.detach()).clone()) for m in self.sparse_masters if m.grad is not None]

    @torch.no_grad()
    def after_update(self, states: OptimizerStates) -> int:
        num_updated = sum(master.numel() for master in self.dense_masters if master.grad is not None)
        masks = self.masks([master for master, _ in self._snapshots], states)
        for (master, start), mask in zip(self._snapshots, masks, strict=True):
            shard = local_shard(master.detach())
            torch.where(mask, shard, start, out=shard)
        if masks:
            count = torch.stack([mask.count_nonzero() for mask in masks]).sum()
            num_updated += int(sum_over_shards(count, self._snapshots[0][0]))
        self._snapshots = []
        return num_updated

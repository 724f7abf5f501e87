"""Which numbers does an update move? All that have a gradient, unless fewer are asked for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor

from postgrad.data.loading.batch import Batch
from postgrad.distributed.shards import local_shard, sum_over_ranks

OptimizerStates = Mapping[Tensor, Mapping[str, Any]]
"""Of each master that an optimizer has moved: its moments, under `exp_avg` and `exp_avg_sq`."""


class UpdateMask(Protocol):
    """Decides at every update which numbers of the masters move."""

    def observe(self, batch: Batch) -> AbstractContextManager[None]:
        """Inside, the model reads a micro-batch of the step."""
        ...

    def before_update(self) -> None:
        """Called when all gradients are in and nothing has moved yet."""
        ...

    def after_update(self, states: OptimizerStates) -> int | None:
        """Called when the optimizer has moved everything. Returns how many numbers are left moved, when it is not all."""
        ...


class FullMask:
    """All numbers move."""

    def observe(self, batch: Batch) -> AbstractContextManager[None]:
        return nullcontext()

    def before_update(self) -> None: ...

    def after_update(self, states: OptimizerStates) -> int | None:
        return None


class SparseMask(ABC):
    """Some numbers of some masters move, and the others stay what they are, to the bit: nothing decays there either.

    The optimizer moves everything, with all of its moments, and what is to stay is put back. So a share of 100 % is the plain
    update to the bit, and the fused kernel is the same. It takes a copy of the chosen masters for as long as an update lasts.
    """

    def __init__(self, sparse_masters: Sequence[Tensor], masters: Sequence[Tensor]) -> None:
        """`chosen`: the masters of which fewer move; all other `masters` move whole."""
        self.sparse_masters = list(sparse_masters)
        known = set(map(id, self.sparse_masters))
        self.dense_masters = [master for master in masters if id(master) not in known]
        self._snapshots: list[tuple[Tensor, Tensor]] = []

    @property
    @abstractmethod
    def num_updated(self) -> int:
        """How many numbers an update moves when all masters have a gradient."""

    @abstractmethod
    def masks(self, masters: Sequence[Tensor], states: OptimizerStates) -> list[Tensor]:
        """Which numbers of this rank's rows of some of the chosen masters move; of any shape that spreads over the rows."""

    def observe(self, batch: Batch) -> AbstractContextManager[None]:
        return nullcontext()

    def before_update(self) -> None:
        self._snapshots = [(m, local_shard(m.detach()).clone()) for m in self.sparse_masters if m.grad is not None]

    @torch.no_grad()
    def after_update(self, states: OptimizerStates) -> int:
        moved = sum(other.numel() for other in self.dense_masters if other.grad is not None)
        masks = self.masks([master for master, _ in self._snapshots], states)
        for (master, start), mask in zip(self._snapshots, masks, strict=True):
            here = local_shard(master.detach())
            torch.where(mask, here, start, out=here)
        if masks:
            moved += int(
                sum_over_ranks(torch.stack([mask.count_nonzero() for mask in masks]).sum(), self._snapshots[0][0])
            )
        self._snapshots = []
        return moved

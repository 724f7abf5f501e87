"""Which numbers does an update move? All that have a gradient, unless fewer are asked for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor

from postgrad.data.loading.batch import Batch
from postgrad.distributed.shards import over_ranks, own

States = Mapping[Tensor, Mapping[str, Any]]
"""Of each master that an optimizer has moved: its moments, under `exp_avg` and `exp_avg_sq`."""


class Moving(Protocol):
    """Decides at every update which numbers of the masters move."""

    def watching(self, batch: Batch) -> AbstractContextManager[None]:
        """Inside, the model reads a micro-batch of the step."""
        ...

    def before(self) -> None:
        """Called when all gradients are in and nothing has moved yet."""
        ...

    def after(self, states: States) -> int | None:
        """Called when the optimizer has moved everything. Returns how many numbers are left moved, when it is not all."""
        ...


class Everything:
    """All numbers move."""

    def watching(self, batch: Batch) -> AbstractContextManager[None]:
        return nullcontext()

    def before(self) -> None: ...

    def after(self, states: States) -> int | None:
        return None


class Fewer(ABC):
    """Some numbers of some masters move, and the others stay what they are, to the bit: nothing decays there either.

    The optimizer moves everything, with all of its moments, and what is to stay is put back. So a share of 100 % is the plain
    update to the bit, and the fused kernel is the same. It takes a copy of the chosen masters for as long as an update lasts.
    """

    def __init__(self, chosen: Sequence[Tensor], masters: Sequence[Tensor]) -> None:
        """`chosen`: the masters of which fewer move; all other `masters` move whole."""
        self.chosen = list(chosen)
        known = set(map(id, self.chosen))
        self.others = [master for master in masters if id(master) not in known]
        self._kept: list[tuple[Tensor, Tensor]] = []

    @property
    @abstractmethod
    def count(self) -> int:
        """How many numbers an update moves when all masters have a gradient."""

    @abstractmethod
    def masks(self, masters: Sequence[Tensor], states: States) -> list[Tensor]:
        """Which numbers of this rank's rows of some of the chosen masters move; of any shape that spreads over the rows."""

    def watching(self, batch: Batch) -> AbstractContextManager[None]:
        return nullcontext()

    def before(self) -> None:
        self._kept = [(m, own(m.detach()).clone()) for m in self.chosen if m.grad is not None]

    @torch.no_grad()
    def after(self, states: States) -> int:
        moved = sum(other.numel() for other in self.others if other.grad is not None)
        masks = self.masks([master for master, _ in self._kept], states)
        for (master, start), mask in zip(self._kept, masks, strict=True):
            here = own(master.detach())
            torch.where(mask, here, start, out=here)
        if masks:
            moved += int(over_ranks(torch.stack([mask.count_nonzero() for mask in masks]).sum(), self._kept[0][0]))
        self._kept = []
        return moved

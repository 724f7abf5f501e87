"""The interface of penalties: functions of the weights alone, whose gradient is added once per step.

The gradient is computed in closed form, without a graph or backward pass, once for all micro-batches. A penalty holds the
fp32 masters, the tensors that the optimizer updates, whatever dtype the model computes in.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

from torch import Tensor


class Penalty(Protocol):
    """A term of the loss that depends on the weights alone; `name` is its name in the metrics."""

    @property
    def name(self) -> str: ...

    def __call__(self) -> Tensor:
        """Add the gradient to the masters' `.grad`, creating it where there is none.

        Called after the gradients of all micro-batches are complete and divided, before clipping. Returns the penalty's value,
        a detached scalar that is equal on all ranks.
        """
        ...


@runtime_checkable
class StagePenalty(Penalty, Protocol):
    """A penalty that a stage names: it has a strength, which may be found before the training, and an entry in the record."""

    strength: float
    metadata: Mapping[str, object]

    def pull_norm(self) -> Tensor:
        """The 2-norm of its gradient at strength 1, over all ranks; no gradient is changed."""
        ...


@runtime_checkable
class DecoupledPenalty(Protocol):
    """A penalty that acts within the optimizer's step, as weight decay does."""

    def decay(self, rate: float) -> None:
        """Decay the masters at this learning rate; called before the optimizer's own update."""
        ...

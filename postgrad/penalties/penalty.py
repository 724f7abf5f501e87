"""What pulls the weights back? A penalty looks at weights alone, not at data: it adds its gradient once per step.

Its gradient is written out, so it needs no graph and no backward pass, whatever the number of micro-batches. It is handed
the fp32 masters that it needs when it is made: the tensors an optimizer moves, whatever the model computes in.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Penalty(Protocol):
    """`name` is the penalty's name in the metrics; calling it pulls."""

    @property
    def name(self) -> str: ...

    def __call__(self) -> Tensor:
        """Add the gradient to the masters' `.grad` (where there is none yet, it becomes it).

        Called after the last micro-batch's gradients are in and divided, and before clipping. Returns the penalty's value: a
        scalar, detached, the same on every rank.
        """
        ...


class DecoupledPenalty(Protocol):
    """What pulls in the optimizer's step itself, as weight decay does."""

    def decay(self, rate: float) -> None:
        """Move the masters at this learning rate; called before the optimizer's own update."""
        ...

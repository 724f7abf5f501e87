"""Updates inside the backward pass: a weight is updated when its gradient is complete, and the gradient is dropped.

So the gradient of the whole model never exists at once (LOMO, Lv et al. 2023, arXiv 2306.09782). The update of each weight is
the optimizer's own. What needs the whole gradient before an update (clipping, penalties, masks) or several backward passes
cannot be combined with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from postgrad.distributed.shards import local_shard, sum_over_shards
from postgrad.optim.optimizer import Optimizer, Weight


class ReleasedGradients:
    """What is left of the gradients of a backward pass."""

    def __init__(self) -> None:
        self._norms: list[tuple[Tensor, Tensor]] = []

    def add(self, weight: Weight) -> None:
        """Take the norm of a weight's gradient, without waiting for the device."""
        gradient = weight.master.grad
        assert gradient is not None
        norm = torch.linalg.vector_norm(local_shard(gradient), dtype=torch.float32)
        self._norms.append((norm, weight.master))

    def norm(self) -> Tensor:
        """The 2-norm of the whole gradient, over all shards; a scalar on the device. Collective."""
        squares = [norm.square() for norm, _ in self._norms]
        return sum_over_shards(torch.stack(squares).sum(), self._norms[0][1]).sqrt()


@contextmanager
def release_gradients(optimizer: Optimizer, rate: float) -> Iterator[ReleasedGradients]:
    """Inside, a backward pass updates each weight at this learning rate as soon as its gradient is complete."""
    released = ReleasedGradients()

    def make_hook(weight: Weight) -> Callable[[Tensor], None]:
        def update(_: Tensor) -> None:
            optimizer.weights.take_gradient(weight)
            released.add(weight)
            optimizer.step_weight(weight, rate)

        return update

    with ExitStack() as hooks:
        for weight in optimizer.weights.entries:
            if weight.parameter.requires_grad:  # gradual unfreezing
                hooks.callback(weight.parameter.register_post_accumulate_grad_hook(make_hook(weight)).remove)
        yield released

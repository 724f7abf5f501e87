"""How are weights held near those of a reference? By a quadratic pull, the same for all or by how much each one matters.

    strength / 2 * sum_i importance_i (w_i - reference_i)^2

    importance 1                  L2-SP (Li, Grandvalet & Davoine 2018, arXiv 1802.01483)
    diagonal Fisher information   EWC (Kirkpatrick et al. 2017, arXiv 1612.00796, equation 3)
    |d ||f||^2 / d w_i|           MAS (Aljundi et al. 2018, arXiv 1711.09601)

It is added to a loss that is a mean over trained tokens, so a strength is per trained token. With the Fisher information per
token of the old text, the Laplace approximation of the joint loss of both texts has strength = old tokens / new tokens.

The gradient, strength * importance_i (w_i - reference_i), is written out. Weights that move as they are get it directly. Where
a tuning moves a weight by tensors of its own (B A), the pull acts on the change of the weight, and the chain rule takes it to
those tensors.

`AnchoredDecay` is the same pull as a part of the optimizer's step instead of the loss, as weight decay is in AdamW (Loshchilov
& Hutter 2019, arXiv 1711.05101): Adam's moments do not see it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from postgrad.distributed.shards import full_tensor, local_gradient, local_shard, local_shard_like, sum_over_ranks

_GROUP = {"cpu": 1 << 18, "other": 1 << 25}
"""Numbers that are worked on together: on a CPU what stays in its cache through all passes, elsewhere what fills a device."""


class DifferentiableDelta(Protocol):
    """How a weight of the base is changed by other tensors, as functions of their values; shapes are the weight's."""

    def delta(self, values: Sequence[Tensor]) -> Tensor:
        """What is added to the weight."""
        ...

    def backward(self, values: Sequence[Tensor], gradient: Tensor) -> list[Tensor]:
        """The gradient of each tensor, when `gradient` is that of the weight."""
        ...

    def squared_norm(self, values: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """`sum delta^2`, and the gradient of half of it for each tensor."""
        ...


@dataclass(frozen=True)
class AnchoredWeight:
    """A weight that moves as it is, and what it is held to: reference and importance have this rank's rows of the master.

    `compute`: what the model computes with; while a tuning holds it fast (`requires_grad`), it is not pulled. `rate_factor`:
    what the learning rate is multiplied by for it.
    """

    master: Tensor
    reference: Tensor
    importance: Tensor | None = None
    parameter: Tensor | None = None
    rate_factor: float = 1.0

    @property
    def is_trainable(self) -> bool:
        """Whether it moves in this step."""
        return self.parameter is None or self.parameter.requires_grad


@dataclass(frozen=True)
class AnchoredDelta:
    """A weight that other tensors change, and their masters.

    `importance` and `offset` are split over ranks as the weight is; `offset` is how far the weight is from the reference
    without any change (None: it is the reference).
    """

    weight_delta: DifferentiableDelta
    masters: Sequence[Tensor]
    importance: Tensor | None = None
    offset: Tensor | None = None


class _WeightSlice(NamedTuple):
    """Some numbers of a held weight: `begin` and `end` in its own rows laid flat; None: all of it, as it lies."""

    weight: AnchoredWeight
    span: tuple[int, int] | None

    def select(self, tensor: Tensor) -> Tensor:
        part = local_shard(tensor)
        return part if self.span is None else part.view(-1)[self.span[0] : self.span[1]]


class Anchor:
    """Pulls weights towards their reference, by their gradients."""

    def __init__(
        self,
        weights: Sequence[AnchoredWeight],
        deltas: Sequence[AnchoredDelta] = (),
        *,
        strength: float,
        divisor: float = 1.0,
        name: str = "anchor",
    ) -> None:
        """`strength`: per trained token. `over`: what importance is divided by."""
        self.name, self.strength, self.divisor = name, strength, divisor
        self.weights, self.deltas = list(weights), list(deltas)
        self.metadata: Mapping[str, object] = {}
        self._groups = _group_slices(self.weights)

    @torch.no_grad()
    def __call__(self) -> Tensor:
        """`strength / 2 * sum importance (w - reference)^2`; adds `strength * importance (w - reference)` to each `.grad`."""
        squares: list[Tensor] = []
        for group in self._groups:
            drift, pull = _pull(group)
            squares += _dot_products(drift, pull)
            moving = [i for i, stretch in enumerate(group) if stretch.weight.is_trainable]
            if moving:
                gradients = [group[i].select(local_gradient(group[i].weight.master)) for i in moving]
                torch._foreach_add_(gradients, [pull[i] for i in moving], alpha=self.strength / self.divisor)
        total = _total_square(squares, self.weights)
        for changed in self.deltas:
            square, gradients = _delta_gradients(changed)
            total = total + square
            for master, gradient in zip(changed.masters, gradients, strict=True):
                local_gradient(master).add_(local_shard_like(gradient, master), alpha=self.strength / self.divisor)
        return (0.5 * self.strength / self.divisor * total).float()


class AnchoredDecay:
    """Moves weights towards their reference in the optimizer's step: `w -= rate * strength * importance (w - reference)`.

    A pull never goes beyond the reference: what would be more than the whole way is the whole way.
    """

    def __init__(
        self, weights: Sequence[AnchoredWeight], *, strength: float, divisor: float = 1.0, name: str = "anchor"
    ) -> None:
        """`strength`: as in weight decay, times the rate. `over`: what importance is divided by."""
        self.name, self.strength, self.divisor = name, strength, divisor
        self.weights = list(weights)
        self.metadata: Mapping[str, object] = {}
        self._groups = _group_slices(self.weights)

    @torch.no_grad()
    def __call__(self) -> Tensor:
        """`strength / 2 * sum importance (w - reference)^2`, for the metrics; no gradient is added."""
        squares = [square for group in self._groups for square in _dot_products(*_pull(group))]
        return (0.5 * self.strength / self.divisor * _total_square(squares, self.weights)).float()

    @torch.no_grad()
    def decay(self, rate: float) -> None:
        """Move the masters at this learning rate; called before the optimizer's own update, on the same weights."""
        for group in self._groups:
            moving = [stretch for stretch in group if stretch.weight.is_trainable]
            for factor, alike in groupby(moving, lambda stretch: stretch.weight.rate_factor):
                part, step = list(alike), rate * factor * self.strength / self.divisor
                weights = [stretch.select(stretch.weight.master) for stretch in part]
                drift = _drift(part, weights)
                if part[0].weight.importance is None:
                    torch._foreach_add_(weights, drift, alpha=-min(step, 1.0))
                    continue
                shares = torch._foreach_mul(_importance(part), step)
                torch._foreach_clamp_max_(shares, 1.0)
                torch._foreach_mul_(drift, shares)
                torch._foreach_sub_(weights, drift)


@torch.no_grad()
def pull_norm(penalty: Anchor | AnchoredDecay) -> Tensor:
    """The 2-norm of the penalty's gradient at a strength of 1, over all ranks; nothing is added to any gradient."""
    squares = [square for group in penalty._groups for square in _dot_products(*2 * [_pull(group)[1]])]
    total = _total_square(squares, penalty.weights)
    for changed in penalty.deltas if isinstance(penalty, Anchor) else ():
        total = total + sum(gradient.double().square().sum() for gradient in _delta_gradients(changed)[1])
    return total.sqrt() / penalty.divisor


def _group_slices(weights: Sequence[AnchoredWeight]) -> list[list[_WeightSlice]]:
    """The weights, cut into stretches that are worked on together; each group has an importance or has none."""
    groups: list[list[_WeightSlice]] = []
    for weighted in (False, True):
        room = 0
        for one in weights:
            master = local_shard(one.master)
            if (one.importance is not None) != weighted or not master.numel():
                continue
            size = _GROUP.get(master.device.type, _GROUP["other"])
            parts = [local_shard(t) for t in (one.master, one.reference, one.importance) if t is not None]
            flat = all(t.is_contiguous() for t in parts)
            spans = range(0, master.numel(), size) if flat else [None]
            for begin in spans:
                end = master.numel() if begin is None else min(begin + size, master.numel())
                if room < end - (begin or 0):
                    groups.append([])
                    room = size
                groups[-1].append(_WeightSlice(one, None if begin is None else (begin, end)))
                room -= end - (begin or 0)
    return groups


def _drift(group: Sequence[_WeightSlice], weights: list[Tensor]) -> list[Tensor]:
    """How far the weights are from their reference."""
    references = [s.select(s.weight.reference).to(w.device) for s, w in zip(group, weights, strict=True)]
    return list(torch._foreach_sub(weights, references))


def _importance(group: Sequence[_WeightSlice]) -> list[Tensor]:
    found = [s.select(s.weight.importance) for s in group if s.weight.importance is not None]
    return [t.to(local_shard(s.weight.master).device, torch.float32) for s, t in zip(group, found, strict=True)]


def _pull(group: Sequence[_WeightSlice]) -> tuple[list[Tensor], list[Tensor]]:
    """The drift of a group, and the same times the importance: the gradient at a strength of 1."""
    drift = _drift(group, [s.select(s.weight.master) for s in group])
    if group[0].weight.importance is None:
        return drift, drift
    return drift, list(torch._foreach_mul(drift, _importance(group)))


def _dot_products(first: list[Tensor], second: list[Tensor]) -> list[Tensor]:
    """The sum of the products of each pair, none of which is negative."""
    if first[0].device.type == "cpu":  # in one pass
        return [torch.dot(a.reshape(-1), b.reshape(-1)) for a, b in zip(first, second, strict=True)]
    return list(torch._foreach_norm(torch._foreach_mul(first, second), 1))


def _total_square(squares: list[Tensor], weights: Sequence[AnchoredWeight]) -> Tensor:
    """One sum in double precision, over all ranks."""
    if not weights:
        return torch.zeros((), dtype=torch.float64)
    device = local_shard(weights[0].master).device
    total = torch.stack([s.double() for s in squares]).sum() if squares else torch.zeros((), dtype=torch.float64)
    return sum_over_ranks(total.to(device), weights[0].master)


def _delta_gradients(anchored: AnchoredDelta) -> tuple[Tensor, list[Tensor]]:
    """`sum importance delta^2` of one changed weight, and the gradient of half of it for each tensor that changes it."""
    values = [full_tensor(master.detach()) for master in anchored.masters]
    if anchored.importance is None and anchored.offset is None:
        square, gradients = anchored.weight_delta.squared_norm(values)
        return square.double(), gradients
    delta = anchored.weight_delta.delta(values)
    if anchored.offset is not None:
        delta = delta + full_tensor(anchored.offset)
    pull = delta if anchored.importance is None else delta * full_tensor(anchored.importance).float()
    return (delta * pull).double().sum(), anchored.weight_delta.backward(values, pull)

"""Quadratic penalties on the distance from reference weights (L2-SP, EWC, MAS), with an importance per weight entry.

    strength / 2 * sum_i importance_i (w_i - reference_i)^2

    importance 1                  L2-SP (Li, Grandvalet & Davoine 2018, arXiv 1802.01483)
    diagonal Fisher information   EWC (Kirkpatrick et al. 2017, arXiv 1612.00796, equation 3)
    |d ||f||^2 / d w_i|           MAS (Aljundi et al. 2018, arXiv 1711.09601)

The loss is a mean over trained tokens, so the strength is per trained token. With the Fisher information per token of the old
text, the Laplace approximation of the joint loss of both texts has strength = old tokens / new tokens.

The gradient, strength * importance_i (w_i - reference_i), is computed in closed form. Trained weights get it directly. Where a
tuning changes a weight by tensors of its own (B A), the chain rule takes the gradient of the weight's delta to those tensors.

`AnchoredDecay` applies the same pull within the optimizer's step, decoupled from the loss, as AdamW's weight decay (Loshchilov
& Hutter 2019, arXiv 1711.05101): Adam's moments do not see it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from postgrad.distributed.shards import full_tensor, local_gradient, local_shard, local_shard_like, sum_over_shards

_GROUP = {"cpu": 1 << 18, "other": 1 << 25}
"""Entries processed together: on a CPU few enough for its cache through all passes, elsewhere enough to fill a device."""


class DifferentiableDelta(Protocol):
    """The delta of a base weight as a function of a tuning's tensors; deltas have the weight's shape."""

    def delta(self, values: Sequence[Tensor]) -> Tensor:
        """The delta added to the weight."""
        ...

    def backward(self, values: Sequence[Tensor], gradient: Tensor) -> list[Tensor]:
        """The gradient of each tensor, given that of the weight."""
        ...

    def squared_norm(self, values: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """`sum delta^2`, and the gradient of half of it for each tensor."""
        ...


@dataclass(frozen=True)
class AnchoredWeight:
    """A trained weight with its reference and importance, both of this rank's rows of the master.

    `parameter`: the model's tensor; while a tuning freezes it (`requires_grad`), there is no pull. `rate_factor`: the weight's
    factor on the learning rate.
    """

    master: Tensor
    reference: Tensor
    importance: Tensor | None = None
    parameter: Tensor | None = None
    rate_factor: float = 1.0

    @property
    def is_trainable(self) -> bool:
        """Whether this step trains the weight."""
        return self.parameter is None or self.parameter.requires_grad


@dataclass(frozen=True)
class AnchoredDelta:
    """A weight that a tuning's tensors change, and their masters.

    `importance` and `offset` are sharded as the weight is. `offset`: the base weight minus the reference (None: equal).
    """

    weight_delta: DifferentiableDelta
    masters: Sequence[Tensor]
    importance: Tensor | None = None
    offset: Tensor | None = None


class _WeightSlice(NamedTuple):
    """A slice of an anchored weight: `begin` and `end` in its flattened local rows; None: all of it."""

    weight: AnchoredWeight
    span: tuple[int, int] | None

    def select(self, tensor: Tensor) -> Tensor:
        shard = local_shard(tensor)
        return shard if self.span is None else shard.view(-1)[self.span[0] : self.span[1]]


class Anchor:
    """A penalty that adds its gradient to those of the losses."""

    def __init__(
        self,
        weights: Sequence[AnchoredWeight],
        deltas: Sequence[AnchoredDelta] = (),
        *,
        strength: float,
        divisor: float = 1.0,
        name: str = "anchor",
    ) -> None:
        """`strength`: per trained token. `divisor`: of the importance."""
        self.name, self.strength, self.divisor = name, strength, divisor
        self.weights, self.deltas = list(weights), list(deltas)
        self.metadata: Mapping[str, object] = {}
        self._groups = _group_slices(self.weights)

    @torch.no_grad()
    def pull_norm(self) -> Tensor:
        """The 2-norm of the gradient at strength 1, over all ranks; no gradient is changed."""
        total = _weight_gradient_square(self._groups, self.weights)
        for anchored in self.deltas:
            total = total + sum(gradient.double().square().sum() for gradient in _delta_gradients(anchored)[1])
        return total.sqrt() / self.divisor

    @torch.no_grad()
    def __call__(self) -> Tensor:
        """`strength / 2 * sum importance (w - reference)^2`; adds `strength * importance (w - reference)` to each `.grad`."""
        squares: list[Tensor] = []
        for group in self._groups:
            drift, pull = _pull(group)
            squares += _dot_products(drift, pull)
            trained = [i for i, s in enumerate(group) if s.weight.is_trainable]
            if trained:
                gradients = [group[i].select(local_gradient(group[i].weight.master)) for i in trained]
                torch._foreach_add_(gradients, [pull[i] for i in trained], alpha=self.strength / self.divisor)
        total = _total_square(squares, self.weights)
        for anchored in self.deltas:
            square, gradients = _delta_gradients(anchored)
            total = total + square
            for master, gradient in zip(anchored.masters, gradients, strict=True):
                local_gradient(master).add_(local_shard_like(gradient, master), alpha=self.strength / self.divisor)
        return (0.5 * self.strength / self.divisor * total).float()


class AnchoredDecay:
    """Decoupled decay towards the reference: `w -= rate * strength * importance (w - reference)`.

    The factor is limited to 1, so a weight never overshoots its reference.
    """

    def __init__(
        self, weights: Sequence[AnchoredWeight], *, strength: float, divisor: float = 1.0, name: str = "anchor"
    ) -> None:
        """`strength`: as in weight decay, times the learning rate. `divisor`: of the importance."""
        self.name, self.strength, self.divisor = name, strength, divisor
        self.weights = list(weights)
        self.metadata: Mapping[str, object] = {}
        self._groups = _group_slices(self.weights)

    @torch.no_grad()
    def pull_norm(self) -> Tensor:
        """The 2-norm of `importance (w - reference)`, over all ranks."""
        return _weight_gradient_square(self._groups, self.weights).sqrt() / self.divisor

    @torch.no_grad()
    def __call__(self) -> Tensor:
        """`strength / 2 * sum importance (w - reference)^2`, for the metrics; no gradient is added."""
        squares = [square for group in self._groups for square in _dot_products(*_pull(group))]
        return (0.5 * self.strength / self.divisor * _total_square(squares, self.weights)).float()

    @torch.no_grad()
    def decay(self, rate: float) -> None:
        """Decay the masters at this learning rate; called before the optimizer's own update."""
        for group in self._groups:
            trained = [s for s in group if s.weight.is_trainable]
            for factor, same_rate in groupby(trained, lambda s: s.weight.rate_factor):
                slices, step = list(same_rate), rate * factor * self.strength / self.divisor
                weights = [s.select(s.weight.master) for s in slices]
                drift = _drift(slices, weights)
                if slices[0].weight.importance is None:
                    torch._foreach_add_(weights, drift, alpha=-min(step, 1.0))
                    continue
                shares = torch._foreach_mul(_importance(slices), step)
                torch._foreach_clamp_max_(shares, 1.0)
                torch._foreach_mul_(drift, shares)
                torch._foreach_sub_(weights, drift)


@torch.no_grad()
def _weight_gradient_square(groups: Sequence[list[_WeightSlice]], weights: Sequence[AnchoredWeight]) -> Tensor:
    """The squared 2-norm of the gradient of the weights at strength 1, over all ranks."""
    return _total_square([square for group in groups for square in _dot_products(*2 * [_pull(group)[1]])], weights)


def _group_slices(weights: Sequence[AnchoredWeight]) -> list[list[_WeightSlice]]:
    """Group slices of the weights for `torch._foreach` calls: large weights are cut, small ones share a group.

    Weights with and without importance are in different groups. A weight whose tensors are not contiguous stays whole, since it
    cannot be flattened without a copy.
    """
    groups: list[list[_WeightSlice]] = []
    for has_importance in (False, True):
        room = 0  # entries that the last group still takes
        for weight in weights:
            master = local_shard(weight.master)
            if (weight.importance is not None) != has_importance or not master.numel():
                continue
            size = _GROUP.get(master.device.type, _GROUP["other"])
            tensors = [local_shard(t) for t in (weight.master, weight.reference, weight.importance) if t is not None]
            is_flat = all(t.is_contiguous() for t in tensors)
            for begin in range(0, master.numel(), size) if is_flat else [None]:
                end = master.numel() if begin is None else min(begin + size, master.numel())
                if room < end - (begin or 0):
                    groups.append([])
                    room = size
                groups[-1].append(_WeightSlice(weight, None if begin is None else (begin, end)))
                room -= end - (begin or 0)
    return groups


def _drift(group: Sequence[_WeightSlice], weights: list[Tensor]) -> list[Tensor]:
    """The weights minus their references."""
    references = [s.select(s.weight.reference).to(w.device) for s, w in zip(group, weights, strict=True)]
    return list(torch._foreach_sub(weights, references))


def _importance(group: Sequence[_WeightSlice]) -> list[Tensor]:
    stored = [s.select(s.weight.importance) for s in group if s.weight.importance is not None]
    return [t.to(local_shard(s.weight.master).device, torch.float32) for s, t in zip(group, stored, strict=True)]


def _pull(group: Sequence[_WeightSlice]) -> tuple[list[Tensor], list[Tensor]]:
    """The drift of a group, and drift * importance: the gradient at strength 1."""
    drift = _drift(group, [s.select(s.weight.master) for s in group])
    if group[0].weight.importance is None:
        return drift, drift
    return drift, list(torch._foreach_mul(drift, _importance(group)))


def _dot_products(first: list[Tensor], second: list[Tensor]) -> list[Tensor]:
    """The dot product of each pair; no product of two entries is negative."""
    if first[0].device.type == "cpu":  # one pass
        return [torch.dot(a.reshape(-1), b.reshape(-1)) for a, b in zip(first, second, strict=True)]
    return list(torch._foreach_norm(torch._foreach_mul(first, second), 1))


def _total_square(squares: list[Tensor], weights: Sequence[AnchoredWeight]) -> Tensor:
    """The sum over all weights and ranks, in double precision. Collective."""
    if not weights:
        return torch.zeros((), dtype=torch.float64)
    device = local_shard(weights[0].master).device
    total = torch.stack([s.double() for s in squares]).sum() if squares else torch.zeros((), dtype=torch.float64)
    return sum_over_shards(total.to(device), weights[0].master)


def _delta_gradients(anchored: AnchoredDelta) -> tuple[Tensor, list[Tensor]]:
    """`sum importance delta^2` of one weight, and the gradient of half of it for each tensor of the tuning. Collective."""
    values = [full_tensor(master.detach()) for master in anchored.masters]
    if anchored.importance is None and anchored.offset is None:
        square, gradients = anchored.weight_delta.squared_norm(values)
        return square.double(), gradients
    delta = anchored.weight_delta.delta(values)
    if anchored.offset is not None:
        delta = delta + full_tensor(anchored.offset)
    pull = delta if anchored.importance is None else delta * full_tensor(anchored.importance).float()
    return (delta * pull).double().sum(), anchored.weight_delta.backward(values, pull)

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

from postgrad.distributed.shards import over_ranks, own, own_gradient, own_part, whole

_GROUP = {"cpu": 1 << 18, "other": 1 << 25}
"""Numbers that are worked on together: on a CPU what stays in its cache through all passes, elsewhere what fills a device."""


class Change(Protocol):
    """How a weight of the base is changed by other tensors, as functions of their values; shapes are the weight's."""

    def delta(self, values: Sequence[Tensor]) -> Tensor:
        """What is added to the weight."""
        ...

    def chain(self, values: Sequence[Tensor], gradient: Tensor) -> list[Tensor]:
        """The gradient of each tensor, when `gradient` is that of the weight."""
        ...

    def square(self, values: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """`sum delta^2`, and the gradient of half of it for each tensor."""
        ...


@dataclass(frozen=True)
class Held:
    """A weight that moves as it is, and what it is held to: reference and importance have this rank's rows of the master.

    `compute`: what the model computes with; while a tuning holds it fast (`requires_grad`), it is not pulled. `rate_factor`:
    what the learning rate is multiplied by for it.
    """

    master: Tensor
    reference: Tensor
    importance: Tensor | None = None
    compute: Tensor | None = None
    rate_factor: float = 1.0

    @property
    def moves(self) -> bool:
        """Whether it moves in this step."""
        return self.compute is None or self.compute.requires_grad


@dataclass(frozen=True)
class Changed:
    """A weight that other tensors change, and their masters.

    `importance` and `offset` are split over ranks as the weight is; `offset` is how far the weight is from the reference
    without any change (None: it is the reference).
    """

    change: Change
    masters: Sequence[Tensor]
    importance: Tensor | None = None
    offset: Tensor | None = None


class _Stretch(NamedTuple):
    """Some numbers of a held weight: `begin` and `end` in its own rows laid flat; None: all of it, as it lies."""

    held: Held
    span: tuple[int, int] | None

    def of(self, tensor: Tensor) -> Tensor:
        part = own(tensor)
        return part if self.span is None else part.view(-1)[self.span[0] : self.span[1]]


class Anchor:
    """Pulls weights towards their reference, by their gradients."""

    def __init__(
        self,
        held: Sequence[Held],
        changed: Sequence[Changed] = (),
        *,
        strength: float,
        over: float = 1.0,
        name: str = "anchor",
    ) -> None:
        """`strength`: per trained token. `over`: what importance is divided by."""
        self.name, self.strength, self.over = name, strength, over
        self.held, self.changed = list(held), list(changed)
        self.about: Mapping[str, object] = {}
        self._groups = _groups(self.held)

    @torch.no_grad()
    def __call__(self) -> Tensor:
        """`strength / 2 * sum importance (w - reference)^2`; adds `strength * importance (w - reference)` to each `.grad`."""
        squares: list[Tensor] = []
        for group in self._groups:
            drift, pull = _pull(group)
            squares += _products(drift, pull)
            moving = [i for i, stretch in enumerate(group) if stretch.held.moves]
            if moving:
                gradients = [group[i].of(own_gradient(group[i].held.master)) for i in moving]
                torch._foreach_add_(gradients, [pull[i] for i in moving], alpha=self.strength / self.over)
        total = _summed(squares, self.held)
        for changed in self.changed:
            square, gradients = _through(changed)
            total = total + square
            for master, gradient in zip(changed.masters, gradients, strict=True):
                own_gradient(master).add_(own_part(gradient, master), alpha=self.strength / self.over)
        return (0.5 * self.strength / self.over * total).float()


class AnchoredDecay:
    """Moves weights towards their reference in the optimizer's step: `w -= rate * strength * importance (w - reference)`.

    A pull never goes beyond the reference: what would be more than the whole way is the whole way.
    """

    def __init__(self, held: Sequence[Held], *, strength: float, over: float = 1.0, name: str = "anchor") -> None:
        """`strength`: as in weight decay, times the rate. `over`: what importance is divided by."""
        self.name, self.strength, self.over = name, strength, over
        self.held = list(held)
        self.about: Mapping[str, object] = {}
        self._groups = _groups(self.held)

    @torch.no_grad()
    def __call__(self) -> Tensor:
        """`strength / 2 * sum importance (w - reference)^2`, for the metrics; no gradient is added."""
        squares = [square for group in self._groups for square in _products(*_pull(group))]
        return (0.5 * self.strength / self.over * _summed(squares, self.held)).float()

    @torch.no_grad()
    def decay(self, rate: float) -> None:
        """Move the masters at this learning rate; called before the optimizer's own update, on the same weights."""
        for group in self._groups:
            moving = [stretch for stretch in group if stretch.held.moves]
            for factor, alike in groupby(moving, lambda stretch: stretch.held.rate_factor):
                part, step = list(alike), rate * factor * self.strength / self.over
                weights = [stretch.of(stretch.held.master) for stretch in part]
                drift = _drift(part, weights)
                if part[0].held.importance is None:
                    torch._foreach_add_(weights, drift, alpha=-min(step, 1.0))
                    continue
                shares = torch._foreach_mul(_importance(part), step)
                torch._foreach_clamp_max_(shares, 1.0)
                torch._foreach_mul_(drift, shares)
                torch._foreach_sub_(weights, drift)


@torch.no_grad()
def pull_norm(penalty: Anchor | AnchoredDecay) -> Tensor:
    """The 2-norm of the penalty's gradient at a strength of 1, over all ranks; nothing is added to any gradient."""
    squares = [square for group in penalty._groups for square in _products(*2 * [_pull(group)[1]])]
    total = _summed(squares, penalty.held)
    for changed in penalty.changed if isinstance(penalty, Anchor) else ():
        total = total + sum(gradient.double().square().sum() for gradient in _through(changed)[1])
    return total.sqrt() / penalty.over


def _groups(held: Sequence[Held]) -> list[list[_Stretch]]:
    """The weights, cut into stretches that are worked on together; each group has an importance or has none."""
    groups: list[list[_Stretch]] = []
    for weighted in (False, True):
        room = 0
        for one in held:
            master = own(one.master)
            if (one.importance is not None) != weighted or not master.numel():
                continue
            size = _GROUP.get(master.device.type, _GROUP["other"])
            parts = [own(t) for t in (one.master, one.reference, one.importance) if t is not None]
            flat = all(t.is_contiguous() for t in parts)
            spans = range(0, master.numel(), size) if flat else [None]
            for begin in spans:
                end = master.numel() if begin is None else min(begin + size, master.numel())
                if room < end - (begin or 0):
                    groups.append([])
                    room = size
                groups[-1].append(_Stretch(one, None if begin is None else (begin, end)))
                room -= end - (begin or 0)
    return groups


def _drift(group: Sequence[_Stretch], weights: list[Tensor]) -> list[Tensor]:
    """How far the weights are from their reference."""
    references = [s.of(s.held.reference).to(w.device) for s, w in zip(group, weights, strict=True)]
    return list(torch._foreach_sub(weights, references))


def _importance(group: Sequence[_Stretch]) -> list[Tensor]:
    found = [s.of(s.held.importance) for s in group if s.held.importance is not None]
    return [t.to(own(s.held.master).device, torch.float32) for s, t in zip(group, found, strict=True)]


def _pull(group: Sequence[_Stretch]) -> tuple[list[Tensor], list[Tensor]]:
    """The drift of a group, and the same times the importance: the gradient at a strength of 1."""
    drift = _drift(group, [s.of(s.held.master) for s in group])
    if group[0].held.importance is None:
        return drift, drift
    return drift, list(torch._foreach_mul(drift, _importance(group)))


def _products(first: list[Tensor], second: list[Tensor]) -> list[Tensor]:
    """The sum of the products of each pair, none of which is negative."""
    if first[0].device.type == "cpu":  # in one pass
        return [torch.dot(a.reshape(-1), b.reshape(-1)) for a, b in zip(first, second, strict=True)]
    return list(torch._foreach_norm(torch._foreach_mul(first, second), 1))


def _summed(squares: list[Tensor], held: Sequence[Held]) -> Tensor:
    """One sum in double precision, over all ranks."""
    if not held:
        return torch.zeros((), dtype=torch.float64)
    device = own(held[0].master).device
    total = torch.stack([s.double() for s in squares]).sum() if squares else torch.zeros((), dtype=torch.float64)
    return over_ranks(total.to(device), held[0].master)


def _through(changed: Changed) -> tuple[Tensor, list[Tensor]]:
    """`sum importance delta^2` of one changed weight, and the gradient of half of it for each tensor that changes it."""
    values = [whole(master.detach()) for master in changed.masters]
    if changed.importance is None and changed.offset is None:
        square, gradients = changed.change.square(values)
        return square.double(), gradients
    delta = changed.change.delta(values)
    if changed.offset is not None:
        delta = delta + whole(changed.offset)
    pull = delta if changed.importance is None else delta * whole(changed.importance).float()
    return (delta * pull).double().sum(), changed.change.chain(values, pull)

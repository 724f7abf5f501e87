"""What lies between two models of one shape? Their weights, interpolated: all of them, or those of some blocks alone.

`start + w (end - start)` (WiSE-FT, Wortsman et al. 2022, arXiv 2109.01903): at w = 0 the start, at w = 1 the end, in between
some of what was learnt against some of what was forgotten. Of a low-rank adapter it is the adapter scaled by w. The mean of
several checkpoints of a constant phase is the other half of it: an anneal without steps (Hägele et al. 2024, arXiv 2405.18392).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from postgrad.errors import ModelError
from postgrad.models.layers import get_layer_stacks


def copy_weights(model: nn.Module) -> dict[str, Tensor]:
    """A copy of all parameters by name, tied ones once."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def refuse_other_shapes(
    start: Mapping[str, Tensor],
    end: Mapping[str, Tensor],
    names: tuple[str, str],
    blocks: Sequence[Sequence[str]] = (),
) -> list[str]:
    """The weights that only the end has (a new task layer). Raises `ModelError` when the two are models of other shapes.

    `blocks`: the names of the weights of each of the end's blocks. Where the start lacks one of them, blocks were put in
    between, and those of one number are no longer the same.
    """
    new = sorted(end.keys() - start.keys())
    gone = sorted(start.keys() - end.keys())
    other = [name for name in start.keys() & end.keys() if start[name].shape != end[name].shape]
    if other or (gone and len(gone) == len(start)):
        name = other[0] if other else gone[0]
        shapes = [tuple(each[name].shape) if name in each else "missing" for each in (start, end)]
        raise ModelError(
            f"{name} is {shapes[0]} in {names[0]} and {shapes[1]} in {names[1]}",
            where="blend",
            expected="two models of one architecture and vocabulary",
        )
    lacking = next((name for block in blocks for name in block if name not in start), None)
    if lacking:
        raise ModelError(
            f"{names[1]} has {lacking}, and {names[0]} has not: blocks of one number are not the same in both",
            where="blend",
            expected="two models with the same blocks",
        )
    return new


@torch.no_grad()
def interpolate_weights(
    model: nn.Module, start: Mapping[str, Tensor], end: Mapping[str, Tensor], weight: Mapping[str, float] | float
) -> None:
    """Set the parameters of `model` to `start + w (end - start)`, in float32; `weight` by name, or one for all.

    What the start does not have stays the end's.
    """
    for name, parameter in model.named_parameters():
        if name not in start:
            parameter.copy_(end[name])
            continue
        w = weight if isinstance(weight, float | int) else weight[name]
        # Exact at both ends: start + 1 (end - start) is not the end in floating point.
        whole = (
            end[name] if w == 1 else start[name] if w == 0 else torch.lerp(start[name].float(), end[name].float(), w)
        )
        parameter.copy_(whole)


@contextmanager
def preserve_weights(model: nn.Module) -> Iterator[None]:
    """Inside, weights may be changed; afterwards they are what they were."""
    before = copy_weights(model)
    try:
        yield
    finally:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(before[name])


def average_weights(states: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of several models' weights, summed in float64."""
    return {
        name: torch.stack([state[name].double() for state in states]).mean(0).to(states[0][name].dtype)
        for name in states[0]
    }


def block_parameter_names(model: PreTrainedModel) -> list[list[str]]:
    """The names of the parameters of each block, in order; an encoder-decoder has its encoder's first."""
    names = {id(p): name for name, p in model.named_parameters()}
    return [
        [names[id(p)] for p in block.parameters() if id(p) in names]
        for stack in get_layer_stacks(model)
        for block in stack
    ]

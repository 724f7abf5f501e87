"""Weight interpolation and averaging of models of one shape, for all weights or block by block.

`start + w (end - start)` (WiSE-FT, Wortsman et al. 2022, arXiv 2109.01903) trades what was learnt (w = 1) against what was
forgotten (w = 0). For a low-rank adapter it is the adapter scaled by w. The mean of several checkpoints of a constant-rate
phase is an anneal without steps (Hägele et al. 2024, arXiv 2405.18392).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

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
    """The weights that only the end has (a new task layer). Raises `ModelError` for models of different shapes.

    `blocks`: the weight names of each of the end's blocks. Where the start lacks one of them, blocks were inserted, and blocks
    of one number do not correspond.
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
            f"{names[1]} has {lacking} and {names[0]} has not: their blocks do not correspond",
            where="blend",
            expected="two models with the same blocks",
        )
    return new


@torch.no_grad()
def interpolate_weights(
    model: nn.Module, start: Mapping[str, Tensor], end: Mapping[str, Tensor], weight: Mapping[str, float] | float
) -> None:
    """Set the parameters of `model` to `start + w (end - start)`, in float32; `weight` by name, or one for all.

    Weights that the start lacks are those of the end.
    """
    for name, parameter in model.named_parameters():
        if name not in start:
            parameter.copy_(end[name])
            continue
        w = weight if isinstance(weight, float | int) else weight[name]
        # Exact at both ends: start + 1 (end - start) is not the end in floating point.
        value = (
            end[name] if w == 1 else start[name] if w == 0 else torch.lerp(start[name].float(), end[name].float(), w)
        )
        parameter.copy_(value)


def average_weights(states: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of several models' weights, summed in float64."""
    return {
        name: torch.stack([state[name].double() for state in states]).mean(0).to(states[0][name].dtype)
        for name in states[0]
    }


def block_parameter_names(model: PreTrainedModel) -> list[list[str]]:
    """The parameter names of each block, in order; an encoder comes before its decoder."""
    names = {id(p): name for name, p in model.named_parameters()}
    return [
        [names[id(p)] for p in block.parameters() if id(p) in names]
        for stack in get_layer_stacks(model)
        for block in stack
    ]

"""Weight interpolation and averaging of models of one shape, for all weights or block by block.

`start + w (end - start)` (WiSE-FT, Wortsman et al. 2022, arXiv 2109.01903) trades what was learnt (w = 1) against what was
forgotten (w = 0). For a low-rank adapter it is the adapter scaled by w. A weighted mean of the checkpoints of a constant-rate
phase is an anneal without steps (`optim.decay_weights`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from postgrad.errors import ModelError
from postgrad.models.layers import get_layer_stacks
from postgrad.models.merge_weights import slerp


def copy_weights(model: nn.Module) -> dict[str, Tensor]:
    """A copy of all parameters by name, tied ones once."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def refuse_other_shapes(
    start: Mapping[str, Tensor],
    end: Mapping[str, Tensor],
    names: tuple[str, str],
    blocks: Sequence[Sequence[str]] = (),
    *,
    has_task_layer: bool = False,
) -> list[str]:
    """The weights of a new task layer, which only the end has. Raises `ModelError` for models of different shapes.

    The error names both models and the first weight that differs. `blocks`: the weight names of each of the end's blocks; those
    of inserted blocks are missing in the start. `has_task_layer`: the end has a task layer that the start may lack.
    """
    inserted = next((name for block in blocks for name in block if name not in start), None)
    if inserted:
        raise ModelError(
            f"{names[1]} has {inserted} and {names[0]} has not: their blocks do not correspond",
            where="blend",
            expected="two models with the same blocks",
        )
    new = [name for name in end if name not in start]
    gone = [name for name in start if name not in end]
    other = [name for name in end if name in start and start[name].shape != end[name].shape]
    if not has_task_layer or len(gone) == len(start):
        other += new + gone
    if other:
        first, second = (tuple(each[other[0]].shape) if other[0] in each else "missing" for each in (start, end))
        raise ModelError(
            f"{other[0]} is {first} in {names[0]} and {second} in {names[1]}",
            where="blend",
            expected="two models of one architecture and vocabulary",
            hint="a head that only one of them has is tied in the other; a vocabulary that grew has more rows",
        )
    return sorted(new)


@torch.no_grad()
def interpolate_weights(
    model: nn.Module,
    start: Mapping[str, Tensor],
    end: Mapping[str, Tensor],
    weight: Mapping[str, float] | float,
    *,
    on_sphere: bool = False,
) -> None:
    """Set the parameters of `model` to `start + w (end - start)`, in float32; `weight` by name, or one for all.

    `on_sphere`: along the great circle between them instead. Weights that the start lacks are those of the end.
    """
    for name, parameter in model.named_parameters():
        if name not in start:
            parameter.copy_(end[name])
            continue
        w = weight if isinstance(weight, float | int) else weight[name]
        # Exact at both ends: start + 1 (end - start) is not the end in floating point.
        if w in (0, 1):
            parameter.copy_(end[name] if w else start[name])
        elif on_sphere:
            parameter.copy_(slerp(start[name].double(), end[name].double(), w))
        else:
            parameter.copy_(torch.lerp(start[name].float(), end[name].float(), w))


def average_weights(states: Iterable[Mapping[str, Tensor]], weights: Sequence[float]) -> dict[str, Tensor]:
    """The sum of several models' weights times `weights`, in float64; the states are read one after another."""
    total: dict[str, Tensor] = {}
    dtypes: dict[str, torch.dtype] = {}
    remaining = list(weights)
    for state in states:
        weight = remaining.pop(0)
        for name, tensor in state.items():
            total[name] = total[name].add_(tensor, alpha=weight) if name in total else tensor.double() * weight
            dtypes[name] = tensor.dtype
        del state, tensor  # before the next one is read
    return {name: tensor.to(dtypes[name]) for name, tensor in total.items()}


def block_parameter_names(model: PreTrainedModel) -> list[list[str]]:
    """The parameter names of each block, in order; an encoder comes before its decoder."""
    names = {id(p): name for name, p in model.named_parameters()}
    return [
        [names[id(p)] for p in block.parameters() if id(p) in names]
        for stack in get_layer_stacks(model)
        for block in stack
    ]

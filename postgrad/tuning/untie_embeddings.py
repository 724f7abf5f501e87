"""Untying an output embedding that is the input embedding under a second name.

To train one of the two alone, the weight is copied, and transformers' records of ties are updated, so that it ties the two
again neither when the model is resized nor when it is saved or loaded.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from postgrad.errors import TuningError
from postgrad.models.sublayers import eval_mode, make_probe_inputs
from postgrad.models.tied_weights import remove_ties


class UntieResult(NamedTuple):
    """Notes for the plan, and parameters that the forward pass no longer reads."""

    notes: list[str]
    unused_parameters: set[str]


def tied_to(model: PreTrainedModel, name: str) -> str | None:
    """The first name of the weight that `name` is a second name of; None for a first name."""
    first_names = {id(p): n for n, p in model.named_parameters()}
    first = first_names[id(model.get_parameter(name))]
    return None if first == name else first


def untie_output(model: PreTrainedModel) -> UntieResult:
    """Give a language model an output embedding of its own; does nothing if it has one.

    Raises `TuningError` if there is no output embedding, or the model's output would change.
    """
    layer = model.get_output_embeddings()
    if layer is None:
        raise TuningError(
            f"{type(model).__name__} has no output embedding to untie", where="tuning.untie", hint="remove `untie`"
        )
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    prefix = next(name for name, module in model.named_modules() if module is layer)
    shared = {local: p for local, p in layer.named_parameters(recurse=False) if len(names[id(p)]) > 1}
    if not shared:
        return UntieResult([], set())
    expected = _compute_logits(model)
    for local, parameter in shared.items():
        setattr(layer, local, nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad))
    config_note = remove_ties(model, {f"{prefix}.{local}" for local in shared})
    if not torch.equal(_compute_logits(model), expected):
        raise TuningError(
            f"the output of {type(model).__name__} changes when its output embedding is untied",
            where="tuning.untie",
            hint="train other weights: blocks, norm, lora or full",
        )
    others = {local: next(n for n in names[id(p)] if n != f"{prefix}.{local}") for local, p in shared.items()}
    notes = [
        f"{prefix}.{local} was {others[local]}, and is a weight of its own now ({p.numel():,} numbers more)"
        for local, p in shared.items()
    ]
    body = {id(m) for m in model.base_model.modules()}
    unused = {name for name in others.values() if id(model.get_submodule(name.rpartition(".")[0])) not in body}
    return UntieResult([*notes, config_note], unused)


def _compute_logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad(), eval_mode(model):
        logits = model(**make_probe_inputs(model)).logits
    assert isinstance(logits, Tensor)
    return logits

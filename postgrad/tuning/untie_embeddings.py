"""How does a tied output embedding become a weight of its own?

The output embedding of many language models is the input embedding under a second name. To move one alone, it is copied,
and transformers is told, so that it ties the two again neither when the model is resized nor when it is saved or loaded.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from postgrad.errors import TuningError
from postgrad.models.sublayers import eval_mode, make_probe_inputs


class UntieResult(NamedTuple):
    """What untying did: sentences for the reader, and parameters that nothing reads any more."""

    notes: list[str]
    unused_parameters: set[str]


def tied_to(model: PreTrainedModel, name: str) -> str | None:
    """The first name of the weight that `name` is a second name of; None when it stands for itself."""
    first = {id(p): n for n, p in model.named_parameters()}
    mine = first[id(model.get_parameter(name))]
    return None if mine == name else mine


def untie_output(model: PreTrainedModel) -> UntieResult:
    """Make a language model's output embedding its own; nothing happens where it is already.

    Raises `TuningError` when there is no output embedding, or the model would answer differently.
    """
    layer = model.get_output_embeddings()
    if layer is None:
        raise TuningError(
            f"{type(model).__name__} has no output embedding that could be untied",
            where="tuning.untie",
            hint="leave untie out",
        )
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    prefix = next(name for name, module in model.named_modules() if module is layer)
    shared = {leaf: p for leaf, p in layer.named_parameters(recurse=False) if len(names[id(p)]) > 1}
    if not shared:
        return UntieResult([], set())
    before = _compute_logits(model)
    for leaf, parameter in shared.items():
        setattr(layer, leaf, nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad))
    said = _update_tied_keys(model, {f"{prefix}.{leaf}" for leaf in shared})
    if not torch.equal(_compute_logits(model), before):
        raise TuningError(
            f"{type(model).__name__} answers differently once its output embedding is not tied",
            where="tuning.untie",
            hint="let something else move: blocks, norm, lora or full",
        )
    others = {leaf: next(n for n in names[id(p)] if n != f"{prefix}.{leaf}") for leaf, p in shared.items()}
    notes = [
        f"{prefix}.{leaf} was {others[leaf]}, and is a weight of its own now ({p.numel():,} numbers more)"
        for leaf, p in shared.items()
    ]
    read = {id(m) for m in model.base_model.modules()}
    idle = {name for name in others.values() if id(model.get_submodule(name.rpartition(".")[0])) not in read}
    return UntieResult([*notes, said], idle)


def _update_tied_keys(model: PreTrainedModel, untied: set[str]) -> str:
    """Let transformers know that the weights named in `own` are tied no more; what its configuration says now."""
    for ties in ("all_tied_weights_keys", "_tied_weights_keys"):
        known = getattr(model, ties, None) or {}
        setattr(model, ties, {k: v for k, v in known.items() if k not in untied and v not in untied})
    if model.all_tied_weights_keys:
        # The key also ties other weights, such as the two input embeddings of T5 and BART. With both weights in a folder,
        # transformers ties them only where they are equal.
        return "the configuration still says tie_word_embeddings: true, and the saved folder holds both weights"
    model.config.tie_word_embeddings = False
    return "the configuration says tie_word_embeddings: false now"


def _compute_logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad(), eval_mode(model):
        answer = model(**make_probe_inputs(model)).logits
    assert isinstance(answer, Tensor)
    return answer

"""Where does a parameter stand in a model: in which block, how far below the top, in the embeddings or the task layer?

Nothing here knows an architecture by name: what lies before or behind the blocks is told by the order of calls in one
small forward pass.

A stack is a list of blocks. An encoder-decoder has two, and each is counted on its own: both stand on the embeddings of
raw tokens, and the encoder's top block is read by every block of the decoder, the last one too, so it is as near to the
loss as the decoder's top block is. To count the decoder on top of the encoder would be to call the decoder's first block,
which sees raw tokens, more abstract than the encoder's last.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from postgrad.models.pretrained import get_layer_stacks
from postgrad.models.sublayers import eval_mode, make_probe_inputs

ParameterLocation = tuple[nn.Module, str]
"""A parameter by the module that holds it and its name there: sharding puts other tensors in the same places."""


def locate_parameter(model: nn.Module, name: str) -> ParameterLocation:
    """Where a parameter is held."""
    path, _, leaf = name.rpartition(".")
    return model.get_submodule(path), leaf


def get_parameter(location: ParameterLocation) -> nn.Parameter:
    """The parameter that a place holds now."""
    module, leaf = location
    return module.get_parameter(leaf)


def named_stacks(model: PreTrainedModel) -> dict[str, nn.ModuleList]:
    """The stacks of blocks by name, an encoder before its decoder."""
    names = {id(module): name for name, module in model.named_modules()}
    return {names[id(stack)]: stack for stack in get_layer_stacks(model)}


def block_distances(model: PreTrainedModel) -> dict[str, int]:
    """Every block by name, with its distance from the top of its stack: 1 for the top block, L for the lowest of L."""
    stacks = named_stacks(model)
    return {f"{name}.{i}": len(stack) - i for name, stack in stacks.items() for i in range(len(stack))}


def parameter_distances(model: PreTrainedModel) -> dict[str, int]:
    """How far each parameter is from the top of its stack of L blocks, by name.

    0 is the task layer with all that stands behind the blocks (final norm, pooler); blocks go from 1 to L; the embeddings
    are L + 1. A tied output layer is the input embedding, and stands with it.
    """
    stacks, blocks, order, behind = (
        named_stacks(model),
        block_distances(model),
        _call_order(model),
        set(head_parameters(model)),
    )

    def of(name: str) -> int:
        block = next((b for b in blocks if name.startswith(f"{b}.")), None)
        if block is not None:
            return blocks[block]
        mine = _nearest_stacks(name, stacks)
        # What is never called counts as an embedding, which is the cautious side.
        called = order.get(name.rpartition(".")[0], -1)
        if name in behind or called > min(order[f"{stack}.0"] for stack in mine):
            return 0
        return 1 + max(len(stacks[stack]) for stack in mine)

    return {name: of(name) for name, _ in model.named_parameters()}


def head_parameters(model: PreTrainedModel) -> list[str]:
    """Names of the parameters that stand on the backbone, second names of tied ones too.

    They are a task's own layers, or what turns a language model's hidden states into logits.
    """
    body, output = model.base_model, model.get_output_embeddings()
    # A language model may be its own backbone (T5): then its output embedding alone stands on it.
    within = {id(m) for m in body.modules()} if body is not model else set()
    stands = {id(m) for m in output.modules()} if body is model and output is not None else set()
    return [
        f"{name}.{leaf}" if name else leaf
        for name, module in model.named_modules()
        if (id(module) in stands if body is model else id(module) not in within)
        for leaf, _ in module.named_parameters(recurse=False)
    ]


def task_layer_parameters(model: PreTrainedModel) -> list[str]:
    """Names of the parameters of a task's own layers; none in a language model, whose output was pretrained with it."""
    return head_parameters(model) if model.get_output_embeddings() is None else []


def _nearest_stacks(name: str, stacks: dict[str, nn.ModuleList]) -> list[str]:
    """The stacks in the smallest part of the model that holds a parameter and has any."""
    part = name
    while part:
        part = part.rpartition(".")[0]
        mine = [stack for stack in stacks if stack.startswith(f"{part}." if part else "")]
        if mine:
            return mine
    return list(stacks)


def _call_order(model: PreTrainedModel) -> dict[str, int]:
    """When each module of the backbone is first called, as a rank."""
    names = {id(module): name for name, module in model.named_modules()}
    order: dict[str, int] = {}

    def note(module: nn.Module, _inputs: object) -> None:
        order.setdefault(names[id(module)], len(order))

    hooks = [module.register_forward_pre_hook(note) for module in model.modules()]
    try:
        with torch.no_grad(), eval_mode(model):
            model.base_model(**make_probe_inputs(model))
    finally:
        for hook in hooks:
            hook.remove()
    return order

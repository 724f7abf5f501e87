"""The location of parameters in a model: blocks, distances from the top, embeddings, and the task layer.

No architecture is known by name: the order of calls in one small forward pass shows what comes before and after the blocks.

A stack is a list of blocks. An encoder-decoder has two, and each is counted on its own: both read the embeddings of raw
tokens, and every block of the decoder, the last one too, reads the encoder's top block, so that one is as near to the loss
as the decoder's top block. Counting the decoder on top of the encoder would place the decoder's first block, which reads raw
tokens, above the encoder's last.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from transformers import PreTrainedModel

from postgrad.models.layers import get_layer_stacks
from postgrad.models.sublayers import eval_mode, make_probe_inputs

ParameterLocation = tuple[nn.Module, str]
"""A parameter as its module and its name there: FSDP replaces the parameter object, not its location."""


def locate_parameter(model: nn.Module, name: str) -> ParameterLocation:
    """The location of a parameter."""
    path, _, local = name.rpartition(".")
    return model.get_submodule(path), local


def get_parameter(location: ParameterLocation) -> nn.Parameter:
    """The current parameter at a location."""
    module, local = location
    return module.get_parameter(local)


class SavedRequiresGrad:
    """The `requires_grad` of every parameter of a model, to be restored."""

    def __init__(self, model: nn.Module) -> None:
        self.flags = [(locate_parameter(model, name), p.requires_grad) for name, p in model.named_parameters()]

    def restore(self) -> None:
        """Set `requires_grad` to the saved values."""
        for location, requires_grad in self.flags:
            get_parameter(location).requires_grad_(requires_grad)


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` in the place of the submodule of this name."""
    path, _, local = name.rpartition(".")
    setattr(model.get_submodule(path), local, module)


def is_inside(name: str, modules: Iterable[str]) -> bool:
    """Whether a parameter or module is in one of these modules."""
    return any(name.startswith(f"{module}.") for module in modules)


def named_stacks(model: PreTrainedModel) -> dict[str, nn.ModuleList]:
    """The stacks of blocks by name, an encoder before its decoder."""
    names = {id(module): name for name, module in model.named_modules()}
    return {names[id(stack)]: stack for stack in get_layer_stacks(model)}


def block_distances(model: PreTrainedModel) -> dict[str, int]:
    """Every block's distance from the top of its stack, by name: 1 for the top block, L for the lowest of L."""
    stacks = named_stacks(model)
    return {f"{name}.{i}": len(stack) - i for name, stack in stacks.items() for i in range(len(stack))}


def parameter_distances(model: PreTrainedModel) -> dict[str, int]:
    """Every parameter's distance from the top of its stack of L blocks, by name.

    0 is the task layer and everything after the blocks (final norm, pooler); blocks go from 1 to L; the embeddings are L + 1.
    A tied output layer counts as the input embedding.
    """
    stacks, blocks = named_stacks(model), block_distances(model)
    order, head = _call_order(model), set(head_parameters(model))

    def distance(name: str) -> int:
        block = next((b for b in blocks if is_inside(name, [b])), None)
        if block is not None:
            return blocks[block]
        nearest = _nearest_stacks(name, stacks)
        # A module that is never called counts as an embedding, the cautious choice: it gets the lowest rate.
        rank = order.get(name.rpartition(".")[0], -1)
        if name in head or rank > min(order[f"{stack}.0"] for stack in nearest):
            return 0
        return 1 + max(len(stacks[stack]) for stack in nearest)

    return {name: distance(name) for name, _ in model.named_parameters()}


def head_parameters(model: PreTrainedModel) -> list[str]:
    """Names of the parameters on top of the backbone, second names of tied ones too.

    They are a task's own layers, or what maps a language model's hidden states to logits.
    """
    body, output = model.base_model, model.get_output_embeddings()
    if body is not model:
        inside = {id(m) for m in body.modules()}
        head = {id(m) for m in model.modules()} - inside
    else:  # a language model that is its own backbone (T5): only its output embedding is on top
        head = set() if output is None else {id(m) for m in output.modules()}
    return [
        f"{name}.{local}" if name else local
        for name, module in model.named_modules()
        if id(module) in head
        for local, _ in module.named_parameters(recurse=False)
    ]


def task_layer_parameters(model: PreTrainedModel) -> list[str]:
    """Names of the parameters of a task's own layers; none in a language model, whose output layer is pretrained."""
    return head_parameters(model) if model.get_output_embeddings() is None else []


def _nearest_stacks(name: str, stacks: dict[str, nn.ModuleList]) -> list[str]:
    """The stacks in the smallest enclosing module of a parameter that has any."""
    module = name
    while module:
        module = module.rpartition(".")[0]
        nearest = [stack for stack in stacks if stack.startswith(f"{module}." if module else "")]
        if nearest:
            return nearest
    return list(stacks)


def _call_order(model: PreTrainedModel) -> dict[str, int]:
    """The rank of each backbone module's first call in a forward pass."""
    names = {id(module): name for name, module in model.named_modules()}
    order: dict[str, int] = {}

    def record(module: nn.Module, _inputs: object) -> None:
        order.setdefault(names[id(module)], len(order))

    hooks = [module.register_forward_pre_hook(record) for module in model.modules()]
    try:
        with torch.no_grad(), eval_mode(model):
            model.base_model(**make_probe_inputs(model))
    finally:
        for hook in hooks:
            hook.remove()
    return order

"""Finds the modules of a block that write to the residual stream, and sets a module's output to zero.

Legend: B batch, T time, D model width.

A block that only adds to its input returns `stream + a + b + ...`, where each term is some module's output. The terms are
read off autograd's graph of one small forward pass, from the block's output back to its input, so module names and the order
of modules (sequential or parallel) do not matter.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from postgrad.models.sublayers import eval_mode, make_probe_inputs

SUM_NODE = "AddBackward"
ZERO_PRESERVING_NODES = tuple(
    f"{operation}Backward"
    for operation in (
        "View",
        "UnsafeView",
        "ReshapeAlias",
        "Alias",
        "Clone",
        "ToCopy",
        "Transpose",
        "Squeeze",
        "Unsqueeze",
        "Mul",
        "Div",
    )
)
"""Autograd's names of operations that map zero to zero."""


class ModuleCall(NamedTuple):
    """A module's call during the forward pass; `module` is its name within the block."""

    module: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def find_writers(model: PreTrainedModel, blocks: Iterable[str]) -> dict[str, list[ModuleCall] | None]:
    """By block, the calls whose outputs it adds to the stream; None for a block that does more than add.

    A norm after the addition, as in BERT, is such a case.
    """
    with ExitStack() as hooks, torch.enable_grad(), eval_mode(model):
        traces = {name: _ResidualTrace(model.get_submodule(name), hooks) for name in blocks}
        model.base_model(**make_probe_inputs(model))
    return {name: trace.writers() for name, trace in traces.items()}


def zero_output(block: nn.Module, call: ModuleCall) -> bool:
    """Set one weight of a module (and its bias) so that the module's output is zero; returns whether there is such a weight.

    The value is 0 for a matrix or a gain, -1 for a gain stored as its difference from one. The weight must still get a
    gradient, otherwise the block could never be trained.
    """
    module = block.get_submodule(call.module).requires_grad_(True)
    for name, weight in module.named_parameters(recurse=False):
        bias = getattr(module, "bias" if name == "weight" else f"{name}_bias", None)
        saved = [(p, p.detach().clone()) for p in (weight, bias) if p is not None]
        for value in (0.0, -1.0):
            with torch.no_grad():
                for p, _ in saved:
                    p.zero_()
                weight.fill_(value)
            if _outputs_zero(module, call, weight):
                return True
        with torch.no_grad():
            for p, values in saved:
                p.copy_(values)
    return False


def _outputs_zero(module: nn.Module, call: ModuleCall, weight: nn.Parameter) -> bool:
    """Whether a module's output is zero, and `weight` gets a gradient."""
    with torch.enable_grad():
        out = module(*call.args, **call.kwargs)
        (gradient,) = torch.autograd.grad(out, weight, torch.ones_like(out), allow_unused=True)
    return not out.any() and gradient is not None and bool(gradient.any())


class _ResidualTrace:
    """The autograd graph of one block: the nodes of its input, of its modules' outputs, and of its output."""

    def __init__(self, block: nn.Module, hooks: ExitStack) -> None:
        self.start_node: Any = None
        self.end_node: Any = None
        self.calls: dict[Any, ModuleCall] = {}
        self.names = {id(module): name for name, module in block.named_modules()}
        handles = [block.register_forward_pre_hook(self._enter_block, with_kwargs=True)]
        for module in block.modules():
            if next(module.parameters(recurse=False), None) is not None:
                handles.append(module.register_forward_hook(self._record_call, with_kwargs=True))
        handles.append(block.register_forward_hook(self._exit_block))
        for handle in handles:
            hooks.callback(handle.remove)

    def writers(self) -> list[ModuleCall] | None:
        """The calls whose outputs the block adds to the stream; None if it does more than add."""
        terms = self._sum_terms(self.end_node)
        if terms is None or terms.count(None) != 1:
            return None
        return [call for call in terms if call is not None]

    def _enter_block(self, _block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        # Detached: only the graph of this block is traced. `clone` gives the stream a node of its own.
        hidden_BTD: Tensor = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        stream_BTD = hidden_BTD.detach().requires_grad_().clone()
        self.start_node = stream_BTD.grad_fn
        if "hidden_states" in kwargs:
            return args, {**kwargs, "hidden_states": stream_BTD}
        return (stream_BTD, *args[1:]), kwargs

    def _record_call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: object) -> None:
        if isinstance(output, Tensor) and output.grad_fn is not None:
            inputs = tuple(_detach(a) for a in args), {key: _detach(a) for key, a in kwargs.items()}
            self.calls.setdefault(output.grad_fn, ModuleCall(self.names[id(module)], *inputs))

    def _exit_block(self, _block: nn.Module, _args: object, output: Any) -> None:
        self.end_node = (output if isinstance(output, Tensor) else output[0]).grad_fn

    def _sum_terms(self, node: Any) -> list[ModuleCall | None] | None:
        """The terms of a node's sum, with None for the stream itself; None if the node is no such sum."""
        if node is self.start_node:
            return [None]
        if node in self.calls:
            return [self.calls[node]]
        operation = node.name()
        if not operation.startswith((SUM_NODE, *ZERO_PRESERVING_NODES)):
            return None
        inputs = [self._sum_terms(parent) for parent, _ in node.next_functions if parent is not None]
        sums = [terms for terms in inputs if terms is not None]
        if operation.startswith(SUM_NODE):
            return [term for terms in sums for term in terms] if len(sums) == len(inputs) else None
        # One traceable factor of a product is enough: the product is zero as soon as that factor is.
        return sums[0] if sums else None


def _detach(value: object) -> object:
    return value.detach() if isinstance(value, Tensor) else value

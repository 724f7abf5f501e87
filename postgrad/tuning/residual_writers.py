"""Which modules of a block write to the residual stream, and how is one silenced?

Legend: B batch, T time, D model width.

A block that only adds to what it is given returns `stream + a + b + ...`, where each term is what some module gave. The
terms are read off autograd's graph of one small forward pass, from the block's output back to its input, so it does not
matter what an architecture calls its modules, nor whether they stand one behind the other or side by side.
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
"""What autograd calls operations that give nothing when they are given nothing."""


class ModuleCall(NamedTuple):
    """A module's call during the small forward pass; `module` is its name within the block."""

    module: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def find_writers(model: PreTrainedModel, blocks: Iterable[str]) -> dict[str, list[ModuleCall] | None]:
    """The calls whose outputs these blocks (by name) add to the stream; None for one that does not just add.

    A norm behind the addition, as in BERT, makes a block one that does not.
    """
    with ExitStack() as hooks, torch.enable_grad(), eval_mode(model):
        passes = {name: _ResidualTrace(model.get_submodule(name), hooks) for name in blocks}
        model.base_model(**make_probe_inputs(model))
    return {name: one.writers() for name, one in passes.items()}


def zero_output(block: nn.Module, call: ModuleCall) -> bool:
    """Set one weight of a module (and the bias beside it) so that its output is zero; whether there is such a weight.

    Zero does so for a matrix or a gain, minus one for a gain that is counted from one. Only a weight that still gets a
    gradient will do: the block has to learn to speak again.
    """
    module = block.get_submodule(call.module).requires_grad_(True)
    for name, weight in module.named_parameters(recurse=False):
        beside = getattr(module, "bias" if name == "weight" else f"{name}_bias", None)
        kept = [(p, p.detach().clone()) for p in (weight, beside) if p is not None]
        for value in (0.0, -1.0):
            with torch.no_grad():
                for p, _ in kept:
                    p.zero_()
                weight.fill_(value)
            if _outputs_zero(module, call, weight):
                return True
        with torch.no_grad():
            for p, before in kept:
                p.copy_(before)
    return False


def _outputs_zero(module: nn.Module, call: ModuleCall, weight: nn.Parameter) -> bool:
    """Whether a module gives zero, and `weight` a gradient."""
    with torch.enable_grad():
        out = module(*call.args, **call.kwargs)
        (slope,) = torch.autograd.grad(out, weight, torch.ones_like(out), allow_unused=True)
    return not out.any() and slope is not None and bool(slope.any())


class _ResidualTrace:
    """One pass through one block: where the stream comes in, what modules make of it, and where it goes out."""

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
        """What the block adds to the stream; None when it does not just add."""
        terms = self._sum_terms(self.end_node)
        if terms is None or terms.count(None) != 1:
            return None
        return [call for call in terms if call is not None]

    def _enter_block(self, _block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        # The graph of one block is wanted, and not of all that came before.
        given: Tensor = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        stream_BTD = given.detach().requires_grad_().clone()
        self.start_node = stream_BTD.grad_fn
        if "hidden_states" in kwargs:
            return args, {**kwargs, "hidden_states": stream_BTD}
        return (stream_BTD, *args[1:]), kwargs

    def _record_call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: object) -> None:
        if isinstance(output, Tensor) and output.grad_fn is not None:
            cut = tuple(_detach(a) for a in args), {key: _detach(a) for key, a in kwargs.items()}
            self.calls.setdefault(output.grad_fn, ModuleCall(self.names[id(module)], *cut))

    def _exit_block(self, _block: nn.Module, _args: object, output: Any) -> None:
        self.end_node = (output if isinstance(output, Tensor) else output[0]).grad_fn

    def _sum_terms(self, node: Any) -> list[ModuleCall | None] | None:
        """The terms of the sum that a node is, None among them for the stream itself; None when it is no such sum."""
        if node is self.start_node:
            return [None]
        if node in self.calls:
            return [self.calls[node]]
        operation = node.name()
        if not operation.startswith((SUM_NODE, *ZERO_PRESERVING_NODES)):
            return None
        inputs = [self._sum_terms(before) for before, _ in node.next_functions if before is not None]
        known = [terms for terms in inputs if terms is not None]
        if operation.startswith(SUM_NODE):
            return [term for terms in known for term in terms] if len(known) == len(inputs) else None
        # A product is nothing as soon as one of its factors is.
        return known[0] if known else None


def _detach(value: object) -> object:
    return value.detach() if isinstance(value, Tensor) else value

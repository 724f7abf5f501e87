"""The sub-layers of a model's blocks, found by tracing the residual stream, whatever an architecture calls them.

Legend: B batch, T time, D model width.

A block adds the outputs of its sub-layers to the residual stream: `stream + attention(...)`, `stream + feed_forward(...)`. One
forward pass over a few tokens is traced operation by operation, so no table of class names is needed:

    stream      the block's input, and every function of it without a product with a matrix
    branch      every tensor after such a product
    residual    an addition of the two, each of shape (B, T, D): here a sub-layer ends, and the sum is stream again

A branch that multiplies activations by one another (or runs a fused attention) is attention; the others are feed-forward.
Dropout, scaling and reshaping leave a branch the output of the module that it came from.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from postgrad.models.layers import get_embedding_weight

ATTENTION, CROSS_ATTENTION, FEED_FORWARD = "attention", "cross_attention", "feed_forward"

PRODUCTS = frozenset({"mm", "addmm", "bmm", "baddbmm", "matmul", "linear", "einsum", "_grouped_mm"})
SUMS = frozenset({"add", "add_"})


class Sublayer(NamedTuple):
    """One branch of a block, by the modules at its two ends.

    `output` is the last module whose output (or its element `index`) is added to the stream, with no weights in between.
    `entry` is the first module of the branch with a product; its first argument is the sub-layer's input. `norm` is the norm
    that alone follows the sum (post-LN).
    """

    name: str
    output: nn.Module
    index: int | None
    entry: nn.Module | None
    norm: nn.Module | None


class Block(NamedTuple):
    """A block of a stack: its name in the model, its width D, and its sub-layers in the order they are added."""

    name: str
    module: nn.Module
    width: int
    sublayers: tuple[Sublayer, ...]


def make_probe_inputs(model: PreTrainedModel) -> dict[str, Tensor]:
    """The arguments of a small forward pass of the model's body: two rows of five ids."""
    ids_BT = (torch.arange(10).reshape(2, 5) % get_embedding_weight(model).shape[0]).to(model.device)
    decoder = {"decoder_input_ids": ids_BT} if model.config.is_encoder_decoder else {}
    return {"input_ids": ids_BT, "attention_mask": torch.ones_like(ids_BT), **decoder}


@contextmanager
def training_mode(model: nn.Module) -> Iterator[None]:
    """Inside, every module is in training mode; afterwards each is in its own mode again."""
    evaluating = [module for module in model.modules() if not module.training]
    model.train()
    try:
        yield
    finally:
        for module in evaluating:
            module.training = False


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Inside, every module is in eval mode; afterwards each is in its own mode again."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a normalisation, by its class name and its lack of matrices."""
    return "norm" in type(module).__name__.lower() and all(p.ndim < 2 for p in module.parameters())


def find_blocks(model: PreTrainedModel) -> list[Block]:
    """The blocks of every stack (encoder before decoder) with their sub-layers; empty when no stack has any.

    A block whose sub-layers were not recognised has none.
    """
    body = model.base_model
    names = {module: name for name, module in model.named_modules()}
    stacks = list(_outermost_lists(body))
    tracer = _OperationTracer()
    with ExitStack() as hooks, eval_mode(model), torch.no_grad():
        for block in (block for stack in stacks for block in stack):
            tracer.trace_block(block, hooks)
        with tracer:
            body(**make_probe_inputs(model))
    seen = {block: one.sublayers() for block, one in tracer.traces.items()}
    return [
        Block(names[block], block, tracer.traces[block].width if block in seen else 0, seen.get(block, ()))
        for stack in stacks
        if any(seen.get(block) for block in stack)
        for block in stack
    ]


def _outermost_lists(module: nn.Module) -> Iterator[nn.ModuleList]:
    """Module lists that are in no other module list."""
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield child
        else:
            yield from _outermost_lists(child)


@dataclass(frozen=True)
class _Branch:
    """The path of a tensor since the stream: the modules that returned it, in order, and the first module with a product."""

    modules: tuple[tuple[nn.Module, int | None], ...] = ()
    is_attention: bool = False
    entry: nn.Module | None = None


class _TracedTensor(NamedTuple):
    """A tensor with the branches that it is a sum of; none: it is stream."""

    tensor: Tensor
    branches: tuple[_Branch, ...]


class _ResidualSum(NamedTuple):
    """A residual addition: its branches and the address of its result."""

    branches: tuple[_Branch, ...]
    address: int


class _BlockTrace:
    """One pass through one block."""

    def __init__(self, hidden_BTD: Tensor, inputs: list[Tensor]) -> None:
        """`inputs`: all tensors that the block gets, including encoder states."""
        self.width, self.numel = hidden_BTD.shape[-1], hidden_BTD.numel()
        # Tensors are kept so that neither an id nor an address is used twice.
        self.traced: dict[int, _TracedTensor] = {id(tensor): _TracedTensor(tensor, ()) for tensor in inputs}
        self.inplace_writes: dict[int, _TracedTensor] = {}
        self.module_stack: list[tuple[nn.Module, Tensor | None]] = []
        self.calls: Counter[nn.Module] = Counter()
        self.sums: list[_ResidualSum] = []
        self.norms: dict[int, nn.Module] = {}
        self.stream_addresses: set[int] = set()

    def enter_module(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        first = args[0] if args and isinstance(args[0], Tensor) else None
        self.module_stack.append((module, first))
        self.calls[module] += 1
        if first is not None and first.numel() == self.numel and is_norm(module):
            self.norms[first.data_ptr()] = module

    def exit_module(self, module: nn.Module, output: object) -> None:
        self.module_stack.pop()
        parts = [(None, output)] if isinstance(output, Tensor) else _elements(output)
        for index, part in parts:
            source = self._lookup(part) if isinstance(part, Tensor) else None
            if source and source.branches:
                modules = source.branches[0].modules if len(source.branches) == 1 else ()
                branch = replace(_merge_branches(source.branches), modules=(*modules, (module, index)))
                self.traced[id(part)] = _TracedTensor(source.tensor, (branch,))

    def record_operation(self, op: Any, arguments: object, result: object) -> None:
        """An operation ran."""
        name = op.overloadpacket.__name__
        tensors = [t for t in tree_leaves(arguments) if isinstance(t, Tensor)]
        known = [found for found in map(self._lookup, tensors) if found]
        if not known or name.endswith("_like") or name.startswith("new_"):
            return
        outputs = [t for t in tree_leaves(result) if isinstance(t, Tensor) and t.is_floating_point()]
        branches = self._branches_after(name, op.namespace == "aten", known, outputs)
        for tensor in outputs:
            self.traced[id(tensor)] = _TracedTensor(tensor, branches)
            if name.endswith("_"):
                self.inplace_writes[_storage_address(tensor)] = self.traced[id(tensor)]

    def _lookup(self, tensor: Tensor) -> _TracedTensor | None:
        """The trace of a tensor, or of the in-place writes into its storage."""
        if id(tensor) in self.traced or _storage_address(tensor) not in self.inplace_writes:
            return self.traced.get(id(tensor))
        return _TracedTensor(tensor, self.inplace_writes[_storage_address(tensor)].branches)

    def _branches_after(
        self, name: str, is_aten: bool, known: list[_TracedTensor], outputs: list[Tensor]
    ) -> tuple[_Branch, ...]:
        through = [branches for _, branches in known if branches]
        # Operations of other libraries (quantised products, fused attention) count as products.
        if name in PRODUCTS or not is_aten or "attention" in name or "conv" in name:
            joined = _merge_branches(tuple(b for branches in through for b in branches))
            fused = "attention" in name or "attn" in name or "conv" in name
            attends = joined.is_attention or fused or (name in PRODUCTS and len(known) > 1)
            return (_Branch((), attends, joined.entry or self._entry_module(known[0][0])),)
        if not through:
            return ()
        if name in SUMS and len(known) == 2:
            if len(through) == 1 and self._is_stream(known[0][0]) and known[0][0].shape == known[1][0].shape:
                (stream,) = (tensor for tensor, branches in known if not branches)
                self.stream_addresses.add(stream.data_ptr())
                self.sums.append(_ResidualSum(through[0], outputs[0].data_ptr()))
                return ()
            return tuple(b for branches in through for b in branches)
        return (
            through[0] if len(through) == 1 else (_merge_branches(tuple(b for branches in through for b in branches)),)
        )

    def _is_stream(self, tensor: Tensor) -> bool:
        return tensor.shape[-1] == self.width and tensor.numel() == self.numel

    def _entry_module(self, operand: Tensor) -> nn.Module | None:
        """The running module, if `operand` is the whole of its first argument."""
        if not self.module_stack:
            return None
        module, first = self.module_stack[-1]
        if (
            first is None
            or first.shape[-1] != self.width
            or first.numel() != self.numel
            or operand.numel() != self.numel
        ):
            return None
        return module if torch.equal(first.reshape(-1), operand.reshape(-1)) else None

    def close(self) -> None:
        """Release all tensors."""
        self.traced.clear()
        self.inplace_writes.clear()
        self.module_stack.clear()

    def sublayers(self) -> tuple[Sublayer, ...]:
        """The branches that were added to the stream and have a module of their own at their end.

        Such a module ran once: one that ran more often belongs to other branches too. A module of several blocks is traced in
        each of them, and never counts as having run once.
        """

        def own(module: nn.Module | None) -> bool:
            return module is not None and self.calls[module] == 1

        out: list[Sublayer] = []
        for added in self.sums:
            norm = None if added.address in self.stream_addresses else self.norms.get(added.address)
            for branch in added.branches:
                ends = [end for end in branch.modules if own(end[0])]
                if ends:
                    name = _sublayer_name(branch.is_attention, [s.name for s in out])
                    out.append(Sublayer(name, *ends[-1], branch.entry if own(branch.entry) else None, norm))
        return tuple(out)


class _OperationTracer(TorchDispatchMode):
    """Traces every operation while a block runs; the last pass of each block counts."""

    def __init__(self) -> None:
        super().__init__()
        self.traces: dict[nn.Module, _BlockTrace] = {}
        self.current_trace: _BlockTrace | None = None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if self.current_trace is not None:
            self.current_trace.record_operation(func, (args, kwargs), result)
        return result

    def trace_block(self, block: nn.Module, hooks: ExitStack) -> None:
        """Trace a block until `hooks` is closed."""

        def begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.is_floating_point()]
            if inputs:
                self.current_trace = self.traces[module] = _BlockTrace(kwargs.get("hidden_states", inputs[0]), inputs)

        def end(*_: object) -> None:
            if self.current_trace is not None:
                self.current_trace.close()
            self.current_trace = None

        def enter(module: nn.Module, args: tuple[Any, ...]) -> None:
            if self.current_trace is not None:
                self.current_trace.enter_module(module, args)

        def leave(module: nn.Module, _args: object, output: object) -> None:
            if self.current_trace is not None:
                self.current_trace.exit_module(module, output)

        handles = [block.register_forward_pre_hook(begin, with_kwargs=True), block.register_forward_hook(end)]
        for module in block.modules():
            if module is not block:
                handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
        for handle in handles:
            hooks.callback(handle.remove)


def _merge_branches(branches: tuple[_Branch, ...]) -> _Branch:
    """One branch made of several by an operation other than addition."""
    entries = [b.entry for b in branches if b.entry is not None]
    return _Branch((), any(b.is_attention for b in branches), entries[0] if entries else None)


def _storage_address(tensor: Tensor) -> int:
    """The address of a tensor's storage."""
    return tensor.untyped_storage().data_ptr()


def _elements(output: object) -> list[tuple[int | None, object]]:
    return list(enumerate(output)) if isinstance(output, tuple | list) else []


def _sublayer_name(is_attention: bool, used_names: list[str]) -> str:
    """A name for one more sub-layer; a block's second attention reads the encoder."""
    names = [ATTENTION, CROSS_ATTENTION] if is_attention else [FEED_FORWARD]
    free = [name for name in names if name not in used_names]
    return free[0] if free else f"{names[-1]}_{1 + sum(name.startswith(names[-1]) for name in used_names)}"

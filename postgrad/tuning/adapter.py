"""Bottleneck adapters in the blocks of a frozen model: D to M, a nonlinearity, M to D, added to the existing output.

Legend: B batch, T time, D model width, M bottleneck width.

Three variants, each as its publication has it (`s` is the residual sum `stream + feed_forward`):

    houlsby    after every sub-layer (attention, cross-attention, feed-forward), before the residual addition and so, in
               post-LN blocks, before the norm; the norms are trained too. Houlsby et al. 2019 (arXiv 1902.00751), fig. 2.
    pfeiffer   after the feed-forward only. In post-LN blocks (BERT) the adapter reads the norm of the sum, and its output is
               added to the sum before that norm: `norm(s + A(norm(s)))`. Pfeiffer et al. 2020 (arXiv 2005.00052, eq. 1),
               the adapter of AdapterFusion (arXiv 2005.00247). Pre-LN blocks have no such norm: there it reads the
               feed-forward's own output, `f + A(f)`.
    parallel   parallel to the feed-forward: it reads the feed-forward's input, and its scaled output is added to that of the
               feed-forward. He et al. 2022 (arXiv 2110.04366), section 3.3 (their M was D / 2).

The up-projection starts at zero, so a model starts as its base, bit for bit.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from postgrad.errors import TuningError
from postgrad.models.sublayers import (
    ATTENTION,
    FEED_FORWARD,
    Block,
    Sublayer,
    eval_mode,
    find_blocks,
    is_norm,
    make_probe_inputs,
)
from postgrad.tuning.extra_trainable import ExtraTrainable
from postgrad.tuning.module_tuning import ModuleTuning, SwitchableModule, disable_modules
from postgrad.tuning.tuning import check_choice, check_ranges

AdapterVariant = Literal["houlsby", "pfeiffer", "parallel"]


class _AdapterDefaults(NamedTuple):
    """The sub-layers a variant requires, and its published settings."""

    required_sublayers: tuple[str, ...]
    activation: str
    scale: float
    train_norms: bool


VARIANTS: Mapping[str, _AdapterDefaults] = {
    "houlsby": _AdapterDefaults((ATTENTION, FEED_FORWARD), "swish", 1.0, train_norms=True),
    "pfeiffer": _AdapterDefaults((FEED_FORWARD,), "relu", 1.0, train_norms=False),
    "parallel": _AdapterDefaults((FEED_FORWARD,), "relu", 4.0, train_norms=False),
}


class Bottleneck(SwitchableModule):
    """One adapter, `A(x) = up(dropout(activation(down(x))))`, and the hooks that insert it.

    Its projections are plain parameters, so searches for the model's linear layers do not match them.
    """

    def __init__(
        self, width: int, size: int, activation: str, dropout: float, scale: float, generator: torch.Generator
    ) -> None:
        """`width` D, `size` M; `generator` draws the down-projection from U(-1/sqrt(D), 1/sqrt(D))."""
        super().__init__()
        bound = width**-0.5
        self.down_weight = nn.Parameter(torch.empty(size, width).uniform_(-bound, bound, generator=generator))
        self.down_bias = nn.Parameter(torch.zeros(size))
        self.up_weight = nn.Parameter(torch.zeros(width, size))
        self.up_bias = nn.Parameter(torch.zeros(width))
        self.activation: nn.Module = ACT2FN[activation]
        self.dropout = nn.Dropout(dropout)
        self.scale = scale
        self.output_index: int | None = None
        self.parallel_input: Tensor | None = None

    def forward(self, hidden: Tensor) -> Tensor:
        """A(x) for hidden states of shape (..., D), in their dtype."""
        dtype = hidden.dtype
        inner = nn.functional.linear(hidden, self.down_weight.to(dtype), self.down_bias.to(dtype))
        inner = self.dropout(self.activation(inner))
        return nn.functional.linear(inner, self.up_weight.to(dtype), self.up_bias.to(dtype))

    def register_hooks(self, sublayer: Sublayer, variant: str) -> list[RemovableHandle]:
        """Insert the adapter at a sub-layer."""
        self.output_index = sublayer.index
        if variant == "parallel":
            assert sublayer.entry is not None
            capture = sublayer.entry.register_forward_pre_hook(self._capture_input)
            return [capture, sublayer.output.register_forward_hook(self._add_parallel)]
        if variant == "pfeiffer" and sublayer.norm is not None:
            return [sublayer.norm.register_forward_pre_hook(self._add_before_norm)]
        return [sublayer.output.register_forward_hook(self._add_after)]

    # Bound methods, so that the hooks of a copied model call its own adapters.

    def _add_after(self, _module: nn.Module, _args: object, output: Any) -> Any:
        return self._add_adapter(output, self._hidden_states(output)) if self.enabled else None

    def _capture_input(self, _module: nn.Module, args: tuple[Any, ...]) -> None:
        self.parallel_input = args[0] if self.enabled else None

    def _add_parallel(self, _module: nn.Module, _args: object, output: Any) -> Any:
        # Released at once: the captured tensor would outlive the step otherwise.
        hidden, self.parallel_input = self.parallel_input, None
        return None if hidden is None else self._add_adapter(output, hidden.reshape(self._hidden_states(output).shape))

    def _add_before_norm(self, norm: nn.Module, args: tuple[Any, ...]) -> Any:
        return (torch.add(args[0], self(norm.forward(args[0])), alpha=self.scale),) if self.enabled else None

    def _hidden_states(self, output: Any) -> Tensor:
        return output if self.output_index is None else output[self.output_index]

    def _add_adapter(self, output: Any, adapter_input: Tensor) -> Any:
        """A module's output with the scaled adapter output added to its hidden states."""
        hidden = torch.add(self._hidden_states(output), self(adapter_input), alpha=self.scale)
        i = self.output_index
        return hidden if i is None else (*output[:i], hidden, *output[i + 1 :])


class Adapter(ModuleTuning):
    """Bottleneck adapters in every block of a frozen model (both stacks of an encoder-decoder)."""

    kind = "adapter"
    exports_alone = True
    unmergeable_reason = (
        "an adapter has a nonlinearity between its two projections, so no plain weights have its effect"
    )

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        variant: AdapterVariant = "houlsby",
        reduction: float = 16,
        size: int | None = None,
        activation: str | None = None,
        scale: float | None = None,
        dropout: float = 0.0,
        train_norms: bool | None = None,
        skip_layers: Collection[int] = (),
        also_train: Collection[str] = (),
        seed: int = 0,
    ) -> None:
        """Freeze the model and add an adapter of width M = `size`, or D / `reduction`, to each of the variant's sub-layers.

        None selects the published value: `activation` swish (houlsby) or relu, `scale` (the factor of the adapter's output)
        4 for parallel and else 1, `train_norms` (train the body's norms) for houlsby only. `dropout` acts on the bottleneck.
        `skip_layers`: layers without adapters, counted from 0, the encoder's before the decoder's (AdapterDrop, Rueckle et
        al. 2021, arXiv 2010.11918). `also_train`: patterns of further parameters to train.

        Norms and what `also_train` matches belong to the base: they are part of `state`, and `disable` and `detach` restore
        their values, except for a task's own layer, which has no pretrained value.

        Raises `TuningError` for options out of range, for a model without the variant's sub-layers, and if no gradient
        reaches an adapter.
        """
        super().__init__(model)
        check_choice(variant, VARIANTS, "variant")
        defaults = VARIANTS[variant]
        self.options = {
            "variant": variant,
            "reduction": reduction,
            "size": size,
            "activation": defaults.activation if activation is None else activation,
            "scale": defaults.scale if scale is None else scale,
            "dropout": dropout,
            "train_norms": defaults.train_norms if train_norms is None else train_norms,
            "skip_layers": sorted(set(skip_layers)),
            "also_train": list(also_train),
            "seed": seed,
        }
        _check_options(self.options)
        with disable_modules(m for m in model.modules() if isinstance(m, Bottleneck)):
            blocks = find_blocks(model)
        selected = _select_blocks(blocks, self.options["skip_layers"], model)
        sublayers = [_select_sublayers(block, variant) for block in selected]
        norms = _norm_parameters(model, blocks, selected) if self.options["train_norms"] else []
        self.extra_trainable = ExtraTrainable(model, [*norms, *also_train])
        self._adapters: dict[str, Bottleneck] = {}
        generator = torch.Generator().manual_seed(seed)
        for block, block_sublayers in zip(selected, sublayers, strict=True):
            self._add_block_adapters(block, block_sublayers, generator)
        self._check_gradients()
        self._add_notes(blocks, selected, norms)

    def _add_block_adapters(self, block: Block, sublayers: list[Sublayer], generator: torch.Generator) -> None:
        o = self.options
        size = o["size"] or max(1, int(block.width / o["reduction"]))
        adapters = nn.ModuleDict()
        for sublayer in sublayers:
            adapter = Bottleneck(block.width, size, o["activation"], o["dropout"], o["scale"], generator)
            adapter.train(block.module.training)
            self._adapters[f"{block.name}.{sublayer.name}"] = adapter
            self._hooks += adapter.register_hooks(sublayer, o["variant"])
            adapters[sublayer.name] = adapter
        self._add_module(block.module, "adapter", adapters.to(next(block.module.parameters()).device))

    def _check_gradients(self) -> None:
        """Detach and raise `TuningError` if the model's last hidden states do not depend on some adapter."""
        with eval_mode(self.model), torch.enable_grad():
            hidden_BTD = self.model.base_model(**make_probe_inputs(self.model))[0]
        reached = _graph_parameters(hidden_BTD.grad_fn)
        for name, adapter in self._adapters.items():
            if id(adapter.up_weight) not in reached:
                self.detach()
                raise TuningError(
                    f"no gradient reaches the adapter at {name}",
                    where="tuning",
                    expected="blocks whose sub-layers contribute to the model's last hidden states",
                )

    def _add_notes(self, blocks: list[Block], adapted_blocks: list[Block], norms: list[str]) -> None:
        sizes = sorted({a.down_weight.shape[0] for a in self._adapters.values()})
        sublayers = dict.fromkeys(name.rpartition(".")[2] for name in self._adapters)
        self.notes.append(
            f"{len(self._adapters)} adapters of width {', '.join(map(str, sizes))} in "
            f"{len(adapted_blocks)} of {len(blocks)} blocks ({', '.join(sublayers)})"
        )
        if norms:
            self.notes.append(f"{len(norms)} norm weights are trained too")

    def tensors(self) -> dict[str, nn.Parameter]:
        """`<block>.<sub-layer>.<weight>` of every adapter, and the trained weights of the base by name."""
        own = {f"{name}.{part}": p for name, a in self._adapters.items() for part, p in a.named_parameters()}
        return own | self.extra_trainable.tensors()


def _check_options(options: Mapping[str, Any]) -> None:
    activation = options["activation"]
    near = difflib.get_close_matches(activation, ACT2FN) or ["swish", "relu", "gelu", "tanh"]
    ranges = {
        "reduction": (options["reduction"] > 0, "more than 0: M is D divided by it"),
        "size": (options["size"] is None or options["size"] >= 1, "1 or more"),
        "dropout": (0 <= options["dropout"] < 1, "a fraction from 0 to below 1"),
        "activation": (activation in ACT2FN, f"an activation of transformers, such as {', '.join(near)}"),
    }
    check_ranges(options, ranges)


def _select_blocks(blocks: list[Block], skip_layers: Iterable[int], model: PreTrainedModel) -> list[Block]:
    """The blocks that get adapters. Raises `TuningError` if there are none, or a skipped one does not exist."""
    if not blocks:
        raise TuningError(
            f"{type(model).__name__} has no stack of blocks",
            where="tuning",
            expected="lists of blocks that add attention and feed-forward to their hidden states; it has "
            f"{', '.join(name for name, _ in model.base_model.named_children())}",
        )
    unknown = [i for i in skip_layers if not 0 <= i < len(blocks)]
    selected = [block for i, block in enumerate(blocks) if i not in skip_layers]
    if unknown or not selected:
        raise TuningError(
            f"there is no layer {unknown[0]}" if unknown else "every layer is skipped",
            where="tuning.skip_layers",
            expected=f"some of the layers 0 to {len(blocks) - 1}",
        )
    return selected


def _select_sublayers(block: Block, variant: str) -> list[Sublayer]:
    """The block's sub-layers that get an adapter. Raises `TuningError` if one that the variant requires is missing."""
    required = VARIANTS[variant].required_sublayers
    missing = [name for name in required if name not in [s.name for s in block.sublayers]]
    selected = [s for s in block.sublayers if ATTENTION in required or s.name.startswith(FEED_FORWARD)]
    no_input = variant == "parallel" and any(s.entry is None for s in selected)
    if missing or no_input:
        problem = f"no {missing[0]} sub-layer" if missing else "unknown input of the feed-forward"
        raise TuningError(
            f"{problem} in {block.name} ({type(block.module).__name__})",
            where="tuning",
            expected=f"a module whose output is added to the block's hidden states; its modules are "
            f"{', '.join(name for name, _ in block.module.named_children())}",
            hint="another variant, or another kind of tuning, such as LoRA",
        )
    return selected


def _norm_parameters(model: PreTrainedModel, blocks: list[Block], adapted_blocks: list[Block]) -> list[str]:
    """Names of the weights of the body's norms, except in blocks without adapters."""
    skipped = {m for block in blocks if block not in adapted_blocks for m in block.module.modules()}
    body = set(model.base_model.modules())
    return [
        f"{name}.{weight}"
        for name, module in model.named_modules()
        if module in body and module not in skipped and is_norm(module)
        for weight, _ in module.named_parameters()
    ]


def _graph_parameters(node: Node | None) -> set[int]:
    """Ids of the parameters that an autograd graph reaches."""
    parameters: set[int] = set()
    visited: set[Node] = set()
    pending = [node] if node is not None else []
    while pending:
        node = pending.pop()
        if node not in visited:
            visited.add(node)
            parameters.add(id(getattr(node, "variable", None)))
            pending += [parent for parent, _ in node.next_functions if parent is not None]
    return parameters

"""What can a block learn beside frozen weights? Bottleneck adapters: D to M, a nonlinearity, M to D, added to what is there.

Legend: B batch, T time, D model width, M bottleneck width.

Three forms, each as its publication has it (`s` is the residual sum `stream + feed_forward`):

    houlsby    behind every sub-layer (attention, cross-attention, feed-forward), before the residual addition and so, in
               post-LN blocks, before the norm; the norms are trained too. Houlsby et al. 2019 (arXiv 1902.00751), fig. 2.
    pfeiffer   behind the feed-forward only. In post-LN blocks (BERT) the adapter reads what the norm makes of the sum, and
               its answer is added to the sum before that norm: `norm(s + A(norm(s)))`. Pfeiffer et al. 2020 (arXiv
               2005.00052, eq. 1), the adapter of AdapterFusion (arXiv 2005.00247). Pre-LN blocks have no such norm: there
               it reads the feed-forward's own output, `f + A(f)`.
    parallel   beside the feed-forward: what the feed-forward reads the adapter reads too, and its answer is scaled and
               added to that of the feed-forward. He et al. 2022 (arXiv 2110.04366), section 3.3 (their M was D / 2).

The up-projection begins at zero, so a model begins as its base, bit for bit.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel, PreTrainedTokenizerBase
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
from postgrad.tuning.parameter_location import task_layer_parameters
from postgrad.tuning.tuning import Tuning, TuningExport, copy_state, freeze, unfreeze

AdapterVariant = Literal["houlsby", "pfeiffer", "parallel"]


class _AdapterDefaults(NamedTuple):
    """What a form needs of a block, and the settings it was published with."""

    required_sublayers: tuple[str, ...]
    activation: str
    scale: float
    train_norms: bool


VARIANTS: Mapping[str, _AdapterDefaults] = {
    "houlsby": _AdapterDefaults((ATTENTION, FEED_FORWARD), "swish", 1.0, train_norms=True),
    "pfeiffer": _AdapterDefaults((FEED_FORWARD,), "relu", 1.0, train_norms=False),
    "parallel": _AdapterDefaults((FEED_FORWARD,), "relu", 4.0, train_norms=False),
}


class Bottleneck(nn.Module):
    """One adapter, `A(x) = up(dropout(activation(down(x))))`, and the hooks that let it speak.

    Its projections are plain parameters: whatever looks for the model's linear layers does not find them.
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
        self.enabled = True
        self.output_index: int | None = None
        self.parallel_input: Tensor | None = None

    def forward(self, hidden: Tensor) -> Tensor:
        """A(x) for hidden states of shape (..., D), in their dtype."""
        dtype = hidden.dtype
        inner = nn.functional.linear(hidden, self.down_weight.to(dtype), self.down_bias.to(dtype))
        inner = self.dropout(self.activation(inner))
        return nn.functional.linear(inner, self.up_weight.to(dtype), self.up_bias.to(dtype))

    def register_hooks(self, sublayer: Sublayer, form: str) -> list[RemovableHandle]:
        """Speak at a sub-layer from now on."""
        self.output_index = sublayer.index
        if form == "parallel":
            assert sublayer.entry is not None
            listening = sublayer.entry.register_forward_pre_hook(self._capture_input)
            return [listening, sublayer.output.register_forward_hook(self._add_parallel)]
        if form == "pfeiffer" and sublayer.norm is not None:
            return [sublayer.norm.register_forward_pre_hook(self._add_before_norm)]
        return [sublayer.output.register_forward_hook(self._add_after)]

    # Bound methods, so that a copied model's hooks are those of its own adapters.

    def _add_after(self, _module: nn.Module, _args: object, output: Any) -> Any:
        return self._add_adapter(output, self._hidden_states(output)) if self.enabled else None

    def _capture_input(self, _module: nn.Module, args: tuple[Any, ...]) -> None:
        self.parallel_input = args[0] if self.enabled else None

    def _add_parallel(self, _module: nn.Module, _args: object, output: Any) -> Any:
        # Let go at once: what was heard would outlive the step otherwise.
        heard, self.parallel_input = self.parallel_input, None
        return None if heard is None else self._add_adapter(output, heard.reshape(self._hidden_states(output).shape))

    def _add_before_norm(self, norm: nn.Module, args: tuple[Any, ...]) -> Any:
        return (torch.add(args[0], self(norm.forward(args[0])), alpha=self.scale),) if self.enabled else None

    def _hidden_states(self, output: Any) -> Tensor:
        """What a module adds to the stream."""
        return output if self.output_index is None else output[self.output_index]

    def _add_adapter(self, output: Any, adapter_input: Tensor) -> Any:
        """A module's output with my answer to `read` added to what it says."""
        said = torch.add(self._hidden_states(output), self(adapter_input), alpha=self.scale)
        return (
            said
            if self.output_index is None
            else (*output[: self.output_index], said, *output[self.output_index + 1 :])
        )


class Adapter(Tuning):
    """Bottleneck adapters in every block of a frozen model (both stacks of an encoder-decoder)."""

    kind = "adapter"

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
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        """Freeze the model and add an adapter of width M = `size`, or D / `reduction`, to each of the form's places.

        What is None is as the form was published: `activation` swish (houlsby) or relu, `scale` (what an adapter's answer
        is multiplied by) 4 for parallel and else 1, `train_norms` (the body's norms move too) for houlsby only.
        `dropout` acts on the bottleneck. `skip_layers`: layers that stay as they are, counted from 0, the encoder's before
        the decoder's (AdapterDrop, Rueckle et al. 2021, arXiv 2010.11918). `also_train`: parameters that move besides.

        Norms and what `also_train` names are the base's own: they are part of `state`, and `off` and `detach` give back what
        they were; but a task's own layer has no base to go back to, and stays what it became.

        Raises `TuningError` for options out of range, and for a model in whose blocks the form's places cannot be found or
        from whose adapters no gradient comes back.
        """
        super().__init__(model)
        published = _get_defaults(variant)
        self.options: dict[str, Any] = {
            "variant": variant,
            "reduction": reduction,
            "size": size,
            "activation": published.activation if activation is None else activation,
            "scale": published.scale if scale is None else scale,
            "dropout": dropout,
            "train_norms": published.train_norms if train_norms is None else train_norms,
            "skip_layers": sorted(set(skip_layers)),
            "also_train": list(also_train),
            "seed": seed,
        }
        _check_options(self.options)
        with _disable_adapters(m for m in model.modules() if isinstance(m, Bottleneck)):
            blocks = find_blocks(model)
        chosen = _select_blocks(blocks, self.options["skip_layers"], model)
        places = [(block, _select_sublayers(block, variant)) for block in chosen]
        norms = _norm_parameters(model, blocks, chosen) if self.options["train_norms"] else []
        self._initial_requires_grad = [
            (_parameter_owner(model, name), p.requires_grad) for name, p in model.named_parameters()
        ]
        self._base_parameters = {name: _parameter_owner(model, name) for name in unfreeze(model, [*norms, *also_train])}
        freeze(model)
        for owner in self._base_parameters.values():
            _get_parameter(owner).requires_grad_(True)
        based = self._base_parameters.keys() - set(task_layer_parameters(model))
        self._initial_values = {
            name: _get_parameter(self._base_parameters[name]).detach().clone() for name in sorted(based)
        }
        self._adapters: dict[str, Bottleneck] = {}
        self._containers: list[tuple[nn.Module, str]] = []
        self._hooks: list[RemovableHandle] = []
        generator = torch.Generator().manual_seed(seed)
        for block, sublayers in places:
            self._add_block_adapters(block, sublayers, generator)
        self._check_gradients()
        self._add_notes(blocks, chosen, norms)

    def _add_block_adapters(self, block: Block, sublayers: list[Sublayer], generator: torch.Generator) -> None:
        """Put adapters into one block."""
        o = self.options
        home = nn.ModuleDict()
        for sublayer in sublayers:
            size = o["size"] or max(1, int(block.width / o["reduction"]))
            adapter = Bottleneck(block.width, size, o["activation"], o["dropout"], o["scale"], generator)
            adapter.train(block.module.training)
            self._adapters[f"{block.name}.{sublayer.name}"] = adapter
            self._hooks += adapter.register_hooks(sublayer, o["form"])
            home[sublayer.name] = adapter
        taken = dict(block.module.named_children())
        name = next(n for n in ("adapter", *(f"adapter_{i}" for i in range(2, len(taken) + 3))) if n not in taken)
        block.module.add_module(name, home.to(next(block.module.parameters()).device))
        self._containers.append((block.module, name))

    def _check_gradients(self) -> None:
        """Raise `TuningError`, and leave, when some adapter has no part in what the model's body gives."""
        with eval_mode(self.model), torch.enable_grad():
            hidden_BTD = self.model.base_model(**make_probe_inputs(self.model))[0]
        reached = _graph_leaves(hidden_BTD.grad_fn)
        for name, adapter in self._adapters.items():
            if id(adapter.up_weight) not in reached:
                self.detach()
                raise TuningError(
                    f"no gradient comes back to the adapter at {name}",
                    where="tuning.adapter",
                    expected="blocks whose sub-layers are on the way to the model's last hidden states",
                )

    def _add_notes(self, blocks: list[Block], adapted_blocks: list[Block], norms: list[str]) -> None:
        """Say what was done."""
        sizes = sorted({a.down_weight.shape[0] for a in self._adapters.values()})
        self.notes.append(
            f"{len(self._adapters)} adapters of width {', '.join(map(str, sizes))} in {len(adapted_blocks)} of {len(blocks)} blocks"
            f" ({', '.join(dict.fromkeys(name.rpartition('.')[2] for name in self._adapters))})"
        )
        if norms:
            self.notes.append(f"{len(norms)} weights of norms move too")

    @contextmanager
    def disable(self) -> Iterator[None]:
        """Inside, the model answers as the base does, bit for bit: adapters are silent, and the body's weights are back."""
        kept = {name: _get_parameter(self._base_parameters[name]).data.clone() for name in self._initial_values}
        self._copy_values(self._initial_values)
        try:
            with _disable_adapters(self._adapters.values()):
                yield
        finally:
            self._copy_values(kept)

    def _copy_values(self, values: Mapping[str, Tensor]) -> None:
        """Give the base's own weights these values; what autograd has kept of them stays valid once they are back."""
        for name, value in values.items():
            weight = _get_parameter(self._base_parameters[name]).data
            weight.copy_(_distribute_like(weight, value))

    def state(self) -> dict[str, Tensor]:
        """`<block>.<sub-layer>.<weight>` of every adapter, and the base's own weights that move, by their names."""
        mine = {f"{name}.{part}": p.detach() for name, a in self._adapters.items() for part, p in a.named_parameters()}
        return mine | {name: _get_parameter(owner).detach() for name, owner in self._base_parameters.items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state` gave. Raises `TuningError` when names or shapes are not mine."""
        copy_state(self.state(), state, self.kind)

    def detach(self) -> None:
        """Take adapters and hooks out; the base's own weights are what they were, and as trainable."""
        for handle in self._hooks:
            handle.remove()
        for block, name in self._containers:
            delattr(block, name)
        self._copy_values(self._initial_values)
        for owner, moves in self._initial_requires_grad:
            _get_parameter(owner).requires_grad_(moves)
        self._hooks, self._containers, self._initial_requires_grad = [], [], []
        self._adapters, self._base_parameters, self._initial_values = {}, {}, {}

    def merge(self, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        """Raises `TuningError`: there are no plain weights of the same effect."""
        raise TuningError(
            "an adapter has a nonlinearity between its two projections, so no plain weights have its effect",
            where="tuning.adapter",
            expected="a tuning that is linear in the weights, such as LoRA, to merge",
            hint="publish the adapters as a folder and attach them where the model is used",
        )

    def export(self) -> TuningExport:
        """All of it: an adapter has nothing that only training needs."""
        return TuningExport({"kind": self.kind, **self.options}, self.state())


def _get_defaults(form: str) -> _AdapterDefaults:
    if form not in VARIANTS:
        raise TuningError(f"there is no variant '{form}'", where="tuning.variant", expected=" or ".join(VARIANTS))
    return VARIANTS[form]


def _check_options(options: Mapping[str, Any]) -> None:
    """Raise `TuningError` for an option that makes no adapter."""
    activation = options["activation"]
    near = difflib.get_close_matches(activation, ACT2FN) or ["swish", "relu", "gelu", "tanh"]
    ranges = {
        "reduction": (options["reduction"] > 0, "more than 0: M is D divided by it"),
        "size": (options["size"] is None or options["size"] >= 1, "1 or more"),
        "dropout": (0 <= options["dropout"] < 1, "a share from 0 to below 1"),
        "activation": (activation in ACT2FN, f"a name that transformers has, such as {', '.join(near)}"),
    }
    for key, (right, expected) in ranges.items():
        if not right:
            raise TuningError(f"{options[key]!r} cannot be used", where=f"tuning.{key}", expected=expected)


def _select_blocks(blocks: list[Block], leave_out: Iterable[int], model: PreTrainedModel) -> list[Block]:
    """The blocks that get adapters. Raises `TuningError` when that is none, or one left out is not there."""
    if not blocks:
        raise TuningError(
            f"no stack of blocks was found in {type(model).__name__}",
            where="tuning.adapter",
            expected="lists of blocks that add attention and feed-forward to their hidden states; it has "
            f"{', '.join(name for name, _ in model.base_model.named_children())}",
        )
    unknown = [i for i in leave_out if not 0 <= i < len(blocks)]
    chosen = [block for i, block in enumerate(blocks) if i not in leave_out]
    if unknown or not chosen:
        raise TuningError(
            f"layer {unknown[0]} is not there" if unknown else "every layer is left out",
            where="tuning.skip_layers",
            expected=f"some of the layers 0 to {len(blocks) - 1}",
        )
    return chosen


def _select_sublayers(block: Block, form: str) -> list[Sublayer]:
    """The block's sub-layers that get an adapter. Raises `TuningError` when one that the form needs is not there."""
    needs = _get_defaults(form).required_sublayers
    missing = [need for need in needs if need not in [s.name for s in block.sublayers]]
    found = [s for s in block.sublayers if ATTENTION in needs or s.name.startswith(FEED_FORWARD)]
    deaf = [s for s in found if s.entry is None] if form == "parallel" else []
    if missing or deaf:
        what = f"no {missing[0]} sub-layer was found" if missing else "what the feed-forward reads could not be told"
        raise TuningError(
            f"{what} in {block.name} ({type(block.module).__name__})",
            where="tuning.adapter",
            expected=f"a module whose output is added to the block's hidden states; its modules are "
            f"{', '.join(name for name, _ in block.module.named_children())}",
            hint="another form, or another kind of tuning, such as LoRA",
        )
    return found


def _norm_parameters(model: PreTrainedModel, blocks: list[Block], adapted_blocks: list[Block]) -> list[str]:
    """Names of the weights of the body's norms, those of blocks without adapters left out."""
    still = {m for block in blocks if block not in adapted_blocks for m in block.module.modules()}
    body = set(model.base_model.modules())
    return [
        f"{name}.{weight}"
        for name, module in model.named_modules()
        if module in body and module not in still and is_norm(module)
        for weight, _ in module.named_parameters()
    ]


def _parameter_owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that holds a parameter: sharding exchanges parameters, so the module is what is remembered."""
    module, _, weight = name.rpartition(".")
    return model.get_submodule(module), weight


def _get_parameter(owner: tuple[nn.Module, str]) -> nn.Parameter:
    weight = getattr(*owner)
    assert isinstance(weight, nn.Parameter)
    return weight


def _distribute_like(weight: Tensor, value: Tensor) -> Tensor:
    """`value` sharded as `weight` is, where FSDP has sharded it since `value` was taken."""
    if not isinstance(weight, DTensor) or isinstance(value, DTensor):
        return value
    return distribute_tensor(value.to(weight.device), weight.device_mesh, weight.placements)


@contextmanager
def _disable_adapters(adapters: Iterable[Bottleneck]) -> Iterator[None]:
    """Inside, these adapters say nothing."""
    speaking = [a for a in adapters if a.enabled]
    for adapter in speaking:
        adapter.enabled = False
    try:
        yield
    finally:
        for adapter in speaking:
            adapter.enabled = True


def _graph_leaves(node: Node | None) -> set[int]:
    """Ids of the parameters that a graph leads to."""
    found: set[int] = set()
    seen: set[Node] = set()
    todo = [node] if node is not None else []
    while todo:
        node = todo.pop()
        if node not in seen:
            seen.add(node)
            found.add(id(getattr(node, "variable", None)))
            todo += [following for following, _ in node.next_functions if following is not None]
    return found

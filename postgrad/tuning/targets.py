"""Target modules: the linear layers that a tuning acts on, by group or by name pattern.

    all-linear    every linear layer of the blocks
    attention     those of attention
    feed-forward  the others
    experts       (LoRA alone) the weights of fused experts, which are tensors of three dimensions and no layers
    auto          the query and value projections, fused or not, as in the LoRA paper (Hu et al. 2021, section 4.2) and in
                  PEFT's defaults

Layers are classified by their position in the model; no architecture is known by name, apart from the usual names of query
and value projections. The groups contain `nn.Linear` and GPT-2's `Conv1D` inside the blocks, and never layers outside of
them (language-model head, task heads, poolers, embeddings), routers of mixtures of experts, or layers whose weights are read
without a call of the layer, on which an adapter would have no effect.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from postgrad.errors import TuningError

_ATTENTION = re.compile(r"att(n|ention)", re.IGNORECASE)
_ROUTER = re.compile(r"(^|_)router(_|$)|^(shared_expert_)?gate$|^gating$")
_ROUTER_CLASS = re.compile(r"router|gating|topk", re.IGNORECASE)
EXPERTS = "experts"
_QUERY_OR_VALUE = re.compile(r"(^|_)(w?q|w?v|kv|query|value)(_|$)|qkv|^(c|q|kv)_attn$|^(in|att)_proj$", re.IGNORECASE)


@dataclass(frozen=True)
class LinearLayer:
    """One linear layer and its position. `is_targetable`: groups may contain it."""

    name: str
    module: nn.Module
    is_targetable: bool
    is_attention: bool
    is_head: bool

    @property
    def local_name(self) -> str:
        """The last part of its name."""
        return self.name.rpartition(".")[2]


_GROUPS: dict[str, Callable[[LinearLayer], bool]] = {
    "all-linear": lambda layer: True,
    "attention": lambda layer: layer.is_attention,
    "feed-forward": lambda layer: not layer.is_attention,
    "auto": lambda layer: layer.is_attention and bool(_QUERY_OR_VALUE.search(layer.local_name)),
}


def resolve_targets(
    model: PreTrainedModel,
    targets: str | Sequence[str],
    exclude: Sequence[str] = (),
    experts: Sequence[str] = (),
) -> list[str]:
    """Names of the linear layers that match `targets` (groups or patterns) but not `exclude`, in the model's order.

    `experts`: names of the weights of fused experts, which the group `experts` and patterns with that word match too.

    A pattern (shell style) matches a layer's full name or the end of it, as in `q_proj`, `*.3.*` or `mlp.down_proj`, or
    modules with everything in them. Only a full name matches a layer outside of the blocks, such as a pooler.

    Raises `TuningError` if a pattern matches nothing, or a head.
    """
    layers = linear_layers(model)
    patterns = [targets] if isinstance(targets, str) else list(targets)
    included, excluded = (
        {name for pattern in chosen for name in _match_names(pattern, layers, model, experts)}
        for chosen in (patterns, exclude)
    )
    names = [name for name in (*(layer.name for layer in layers), *experts) if name in included - excluded]
    if not names:
        raise TuningError(
            f"no linear layer of {type(model).__name__} is targeted",
            where="tuning.targets",
            expected=f"one of {', '.join(_GROUPS)}, or names of layers",
        )
    return names


def linear_layers(model: PreTrainedModel) -> list[LinearLayer]:
    """Every linear layer of a model that is called as a layer, under any adapters around it."""
    body, output = model.base_model, model.get_output_embeddings()
    head = set() if body is model else set(map(id, model.modules())) - set(map(id, body.modules()))
    head |= set() if output is None else {id(output)}
    return [
        LinearLayer(name, module, targetable and id(module) not in head, attention, id(module) in head)
        for name, module, targetable, attention in _walk(model, "", in_block=False, attention=False, plain=True)
        if is_linear(module)
    ]


def block_layers(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The linear layers of the blocks, without adapters around them, by the names of their weights in the plain model."""
    return {f"{layer.name}.weight": base_layer(layer.module) for layer in linear_layers(model) if layer.is_targetable}


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer, itself or under adapters; not one that an architecture computes in another way."""
    kind = type(base_layer(module))
    is_other = kind.__module__.startswith("transformers.models.") and kind.forward is not nn.Linear.forward
    return issubclass(kind, nn.Linear | Conv1D) and not is_other


def is_transposed(module: nn.Module) -> bool:
    """Whether a linear layer stores its weight as (inputs, outputs)."""
    return isinstance(base_layer(module), Conv1D)


def base_layer(module: nn.Module) -> Any:
    """A layer without the adapters around it."""
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def short_names(model: PreTrainedModel, names: Iterable[str]) -> list[str]:
    """The shortest endings (`q_proj`, or `output.dense`) that match exactly these modules; their names if none do.

    `resolve_targets` and PEFT's `target_modules` match endings alike.
    """
    full_names = set(names)
    layers = {layer.name for layer in linear_layers(model)}
    if experts := full_names - layers - {name for name, _ in model.named_modules()}:
        return [*(short_names(model, full_names - experts) if full_names - experts else ()), *sorted(experts)]
    if not full_names <= {layer.name for layer in linear_layers(model) if layer.is_targetable}:
        return sorted(full_names)
    every = [name.split(".") for name, _ in model.named_modules()]
    for parts in (1, 2, 3):
        endings = {tuple(name.split(".")[-parts:]) for name in full_names}
        readable = not any(ending[0].isdigit() for ending in endings)
        if readable and {".".join(name) for name in every if tuple(name[-parts:]) in endings} == full_names:
            return sorted(".".join(ending) for ending in endings)
    return sorted(full_names)


def _walk(
    module: nn.Module, prefix: str, *, in_block: bool, attention: bool, plain: bool
) -> Iterator[tuple[str, nn.Module, bool, bool]]:
    """(name, module, whether groups may contain it, whether it is in attention) of everything below a module."""
    for name, child in module.named_children():
        kind = type(child).__name__
        # `nn.MultiheadAttention` reads its layers' weights in one fused kernel, without calling the layers.
        if isinstance(module, nn.MultiheadAttention) or _is_added(child):
            continue
        flags = {
            "in_block": in_block or isinstance(module, nn.ModuleList),
            "attention": attention or bool(_ATTENTION.search(name) or _ATTENTION.search(kind)),
            "plain": plain
            and not (_ROUTER.search(name) or _ROUTER_CLASS.search(kind))
            # Mamba's kernels read the weights of all their layers but the first.
            and not ("Mamba" in type(module).__name__ and isinstance(child, nn.Linear) and name != "in_proj"),
        }
        yield f"{prefix}{name}", child, flags["in_block"] and flags["plain"], flags["attention"]
        if not isinstance(child, BaseTunerLayer):
            yield from _walk(child, f"{prefix}{name}.", **flags)


def _is_added(module: nn.Module) -> bool:
    """Whether a module was added by another tuning."""
    return type(module).__module__.startswith("postgrad.") and not isinstance(module, BaseTunerLayer)


def _match_names(target: str, layers: Sequence[LinearLayer], model: nn.Module, experts: Sequence[str]) -> Iterable[str]:
    """The names of the layers and of the weights of experts that a group or a pattern matches."""
    if target == EXPERTS:
        inside = [layer.name for layer in layers if layer.is_targetable and f".{EXPERTS}." in layer.name]
        matches = [*inside, *experts]
    else:
        patterns = (f"*.{target}", f"*.{target}.*") if EXPERTS in target else ()
        named = [name for name in experts if any(fnmatchcase(f".{name}", pattern) for pattern in patterns)]
        matches = named or [name for name in experts if name == target]
    return matches or [layer.name for layer in _match_layers(target, layers, model)]


def _match_layers(target: str, layers: Sequence[LinearLayer], model: nn.Module) -> list[LinearLayer]:
    """The layers of a group, or those that a pattern matches."""
    if target in _GROUPS:
        matches = [layer for layer in layers if layer.is_targetable and _GROUPS[target](layer)]
    else:
        patterns = (target, f"*.{target}", f"{target}.*", f"*.{target}.*")
        matches = [
            layer
            for layer in layers
            if layer.name == target or (layer.is_targetable and any(fnmatchcase(layer.name, p) for p in patterns))
        ]
    heads = [layer.name for layer in matches if layer.is_head] or [
        layer.name for layer in layers if layer.is_head and not matches and layer.local_name == target
    ]
    if heads:
        raise TuningError(
            f"{heads[0]} is a head, which cannot carry an adapter",
            where="tuning.targets",
            expected="layers of the model's blocks",
            hint=f"train all of it: also_train: [{heads[0]}]",
        )
    if not matches:
        raise TuningError(
            f"'{target}' matches no linear layer of {type(model).__name__}",
            where="tuning.targets",
            expected=f"{', '.join(_GROUPS)}, or names such as {', '.join(_nearest_names(target, layers))}",
        )
    return matches


def _nearest_names(target: str, layers: Sequence[LinearLayer]) -> list[str]:
    """Up to three names, or endings of names, close to `target`."""
    targetable = [layer for layer in layers if layer.is_targetable]
    known = list(dict.fromkeys([*(layer.local_name for layer in targetable), *(layer.name for layer in targetable)]))
    return difflib.get_close_matches(target.strip("*."), known, n=3, cutoff=0.5) or known[:3]

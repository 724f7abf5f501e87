"""Which linear layers of a model does a tuning act on?

A layer's place in the model tells what it is; nothing here knows an architecture by name, apart from what attention layers
call their query and value projections. The groups hold `nn.Linear` and GPT-2's `Conv1D` inside the blocks, and never what
stands outside of them (language-model head, task heads, poolers, embeddings), the routers of mixtures of experts, or layers
whose weights are used without the layer being called, so that nothing put around it would have an effect.

    all-linear    every linear layer of the blocks
    attention     those of attention
    feed-forward  the others
    auto          the query and value projections, fused or not, as in the LoRA paper (Hu et al. 2021, section 4.2) and in
                  PEFT's defaults
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from postgrad.errors import TuningError

_ATTENTION = re.compile(r"att(n|ention)", re.IGNORECASE)
_ROUTER = re.compile(r"(^|_)router(_|$)|^(shared_expert_)?gate$|^gating$")
_ROUTER_CLASS = re.compile(r"router|gating|topk", re.IGNORECASE)
_QUERY_OR_VALUE = re.compile(r"(^|_)(w?q|w?v|kv|query|value)(_|$)|qkv|^(c|q|kv)_attn$|^(in|att)_proj$", re.IGNORECASE)


@dataclass(frozen=True)
class LinearLayer:
    """One linear layer: where it is and what it does there. `ordinary`: a group may take it."""

    name: str
    module: nn.Module
    is_targetable: bool
    is_attention: bool
    is_head: bool

    @property
    def leaf_name(self) -> str:
        """The last part of its name."""
        return self.name.rpartition(".")[2]


_GROUPS: dict[str, Callable[[LinearLayer], bool]] = {
    "all-linear": lambda layer: True,
    "attention": lambda layer: layer.is_attention,
    "feed-forward": lambda layer: not layer.is_attention,
    "auto": lambda layer: layer.is_attention and bool(_QUERY_OR_VALUE.search(layer.leaf_name)),
}


def resolve_targets(model: PreTrainedModel, targets: str | Sequence[str], exclude: Sequence[str] = ()) -> list[str]:
    """Names of the linear layers that `targets` (groups or patterns) take and `exclude` does not, in the model's order.

    A pattern (shell style) names layers in full or by the end of their name, as in `q_proj`, `*.3.*` or `mlp.down_proj`, or
    modules with all that is in them. Only a name in full can take a layer outside of the blocks, such as a pooler.

    Raises `TuningError` when a pattern matches nothing, or names a head.
    """
    layers = linear_layers(model)
    wanted = [targets] if isinstance(targets, str) else list(targets)
    taken = {layer.name for target in wanted for layer in _match_layers(target, layers, model)}
    left_out = {layer.name for pattern in exclude for layer in _match_layers(pattern, layers, model)}
    names = [layer.name for layer in layers if layer.name in taken - left_out]
    if not names:
        raise TuningError(
            f"no linear layer of {type(model).__name__} is left to act on",
            where="tuning.targets",
            expected=f"one of {', '.join(_GROUPS)}, or names of layers",
        )
    return names


def linear_layers(model: PreTrainedModel) -> list[LinearLayer]:
    """Every linear layer of a model that is called as a layer, whatever tunings are already around it."""
    body, speaks = model.base_model, model.get_output_embeddings()
    behind = set() if body is model else set(map(id, model.modules())) - set(map(id, body.modules()))
    behind |= set() if speaks is None else {id(speaks)}
    return [
        LinearLayer(name, module, ordinary and id(module) not in behind, attention, id(module) in behind)
        for name, module, ordinary, attention in _walk(model, "", inside=False, attention=False, plain=True)
        if is_linear(module)
    ]


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer, itself or under the adapters that were put around it."""
    inner = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    return isinstance(inner, nn.Linear | Conv1D)


def is_transposed(module: nn.Module) -> bool:
    """Whether a linear layer holds its weight as (inputs, outputs)."""
    return isinstance(module.get_base_layer() if isinstance(module, BaseTunerLayer) else module, Conv1D)


def short_names(model: PreTrainedModel, names: Iterable[str]) -> list[str]:
    """The shortest endings (`q_proj`, or `output.dense`) that stand for exactly these modules; their names if none do.

    Endings mean the same to `resolve`, to PEFT's `target_modules` and to those who read them.
    """
    wanted = set(names)
    if not wanted <= {layer.name for layer in linear_layers(model) if layer.is_targetable}:
        return sorted(wanted)
    every = [name.split(".") for name, _ in model.named_modules()]
    for parts in (1, 2, 3):
        endings = {tuple(name.split(".")[-parts:]) for name in wanted}
        readable = not any(ending[0].isdigit() for ending in endings)
        if readable and {".".join(name) for name in every if tuple(name[-parts:]) in endings} == wanted:
            return sorted(".".join(ending) for ending in endings)
    return sorted(wanted)


def _walk(
    module: nn.Module, prefix: str, *, inside: bool, attention: bool, plain: bool
) -> Iterator[tuple[str, nn.Module, bool, bool]]:
    """(name, module, whether a group may take it, whether it is in attention) of everything below a module."""
    for name, child in module.named_children():
        kind = type(child).__name__
        if isinstance(module, nn.MultiheadAttention) or _is_foreign(child):
            continue
        here = {
            "inside": inside or isinstance(module, nn.ModuleList),
            "attention": attention or bool(_ATTENTION.search(name) or _ATTENTION.search(kind)),
            "plain": plain
            and not (_ROUTER.search(name) or _ROUTER_CLASS.search(kind))
            # Mamba's kernels read the weights of all their layers but the first.
            and not ("Mamba" in type(module).__name__ and isinstance(child, nn.Linear) and name != "in_proj"),
        }
        yield f"{prefix}{name}", child, here["inside"] and here["plain"], here["attention"]
        if not isinstance(child, BaseTunerLayer):
            yield from _walk(child, f"{prefix}{name}.", **here)


def _is_foreign(module: nn.Module) -> bool:
    """Whether a module belongs to another tuning rather than to the model."""
    return type(module).__module__.startswith("postgrad.") and not isinstance(module, BaseTunerLayer)


def _match_layers(target: str, layers: Sequence[LinearLayer], model: nn.Module) -> list[LinearLayer]:
    """The layers that a group or a pattern takes."""
    if target in _GROUPS:
        taken = [layer for layer in layers if layer.is_targetable and _GROUPS[target](layer)]
    else:
        patterns = (target, f"*.{target}", f"{target}.*", f"*.{target}.*")
        taken = [
            layer
            for layer in layers
            if layer.name == target or (layer.is_targetable and any(fnmatchcase(layer.name, p) for p in patterns))
        ]
    heads = [layer.name for layer in taken if layer.is_head] or [
        layer.name for layer in layers if layer.is_head and not taken and layer.leaf_name == target
    ]
    if heads:
        raise TuningError(
            f"{heads[0]} is a head, which is trained as a whole or not at all",
            where="tuning.targets",
            expected="layers of the model's blocks",
            hint=f"name it in `also_train`, to train it besides: also_train: [{heads[0]}]",
        )
    if not taken:
        raise TuningError(
            f"'{target}' takes no linear layer of {type(model).__name__}",
            where="tuning.targets",
            expected=f"{', '.join(_GROUPS)}, or names such as {', '.join(_nearest_names(target, layers))}",
        )
    return taken


def _nearest_names(target: str, layers: Sequence[LinearLayer]) -> list[str]:
    """Up to three names, or endings of names, that `target` may have meant."""
    ordinary = [layer for layer in layers if layer.is_targetable]
    known = list(dict.fromkeys([*(layer.leaf_name for layer in ordinary), *(layer.name for layer in ordinary)]))
    return difflib.get_close_matches(target.strip("*."), known, n=3, cutoff=0.5) or known[:3]

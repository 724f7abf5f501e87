"""Merging several low-rank adapters of one base into one.

The target is the weighted sum of their updates, sum of w s B A over the adapters:

    cat     exactly that: the factors concatenated, at the sum of the ranks
    svd     its best approximation of a given rank
    linear  A's and B's are summed separately, so the product has cross terms of one adapter's B and another's A: rough

and methods that reduce interference, on A's and B's (or, with `_svd`, on whole updates): `ties` (Yadav et al. 2023, arXiv
2306.01708: keep the largest, elect a sign), `dare_linear` and `dare_ties` (Yu et al. 2023, arXiv 2311.03099: drop at random,
rescale the rest) and `magnitude_prune`. The arithmetic is PEFT's `add_weighted_adapter`, run on one layer of the right size
at a time. Every adapter is converted to s = alpha / rank first: PEFT gives the sum the configuration of the first adapter,
and would multiply it by the root of the rank if that is rsLoRA.

Legend: R rank, I inputs and O outputs of a layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from postgrad.errors import TuningError, suggest_nearest
from postgrad.tuning.lora import LoraAdapter, scalings
from postgrad.tuning.targets import EXPERTS
from postgrad.tuning.tuning import TuningExport

MergeMethod = Literal[
    "cat",
    "svd",
    "linear",
    "ties",
    "ties_svd",
    "dare_linear",
    "dare_ties",
    "dare_linear_svd",
    "dare_ties_svd",
    "magnitude_prune",
    "magnitude_prune_svd",
]

LoraMatrices = tuple[Tensor, Tensor, float]
"""A (R, I), B (O, R) and s of one adapter at one layer."""


def merge_adapters(
    model: PreTrainedModel,
    parts: Sequence[tuple[LoraAdapter | TuningExport, float]],
    method: MergeMethod = "cat",
    *,
    density: float | None = None,
) -> LoraAdapter:
    """Attach the weighted sum of `parts` to `model` as one adapter.

    `density`: the fraction of values that ties, dare and pruning keep, below one. Methods with svd give the sum the largest
    rank of the parts. Parts attached to `model` are detached. A base weight trained by one part is copied.

    Raises `TuningError` for parts that cannot be summed: dora (its magnitudes are not additive), different ranks where A's
    are summed, or a base weight trained by two of them.
    """
    _check_arguments(parts, method, density)
    exports = [(part.export() if isinstance(part, LoraAdapter) else part, weight) for part, weight in parts]
    extra = _extra_tensors([part for part, _ in exports])
    for part, _ in parts:
        if isinstance(part, LoraAdapter) and part.model is model:
            part.detach()
    matrices = [(_layer_matrices(part), weight) for part, weight in exports]
    summed: dict[str, tuple[Tensor, Tensor]] = {}
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        for name in dict.fromkeys(name for part, _ in matrices for name in part):
            layer_parts = [(part[name], weight) for part, weight in matrices if name in part]
            if _is_pruning(method) and len(layer_parts) == 1:  # PEFT does not prune a single adapter
                (a_RI, b_OR, _), _ = layer_parts[0]
                layer_parts.append(((torch.zeros_like(a_RI), torch.zeros_like(b_OR), 1.0), 1.0))
            _check_ranks(name, [a_RI.shape[0] for (a_RI, _, _), _ in layer_parts], method)
            summed[name] = _merge_layer(layer_parts, method, density)
    ranks = {name: a_RI.shape[0] for name, (a_RI, _) in summed.items()}
    largest = max(ranks.values())
    tuning = LoraAdapter(
        model,
        rank=largest,
        alpha=largest,
        targets=list(summed),
        rank_pattern={name: r for name, r in ranks.items() if r != largest},
        alpha_pattern={name: float(r) for name, r in ranks.items() if r != largest},
        also_train=list(extra),
    )
    state = {f"{name}.lora_{ab}.weight": t for name, pair in summed.items() for ab, t in zip("AB", pair, strict=True)}
    tuning.load(state | extra)
    return tuning


def _check_arguments(
    parts: Sequence[tuple[LoraAdapter | TuningExport, float]], method: str, density: float | None
) -> None:
    if method not in get_args(MergeMethod):
        raise TuningError(
            f"unknown method '{method}' of merging adapters",
            where="--method",
            expected=", ".join(get_args(MergeMethod)),
            hint=suggest_nearest(method, get_args(MergeMethod)),
        )
    prunes = _is_pruning(method)
    if len(parts) < 1 + prunes:
        raise TuningError(
            f"{method} of {len(parts)} adapters",
            where="--method",
            expected="two adapters or more" if prunes else "one adapter or more",
        )
    if prunes != (density is not None) or (density is not None and not 0.0 < density < 1.0):
        raise TuningError(
            f"{method} with a density of {density}",
            where="--density",
            expected="a fraction above 0 and below 1" if prunes else "no density: every value is kept",
        )
    for part, _ in parts:
        names = part.state() if isinstance(part, LoraAdapter) else part.state
        if any(name.endswith(f".lora_A.{EXPERTS}") for name in names):
            raise TuningError(
                "an adapter on the weights of fused experts cannot be summed: its matrices are stacked",
                where="--method",
                hint="merge it into its base, and blend the models",
            )
        variant = part.variant if isinstance(part, LoraAdapter) else part.options.get("variant", "lora")
        if variant == "dora":
            raise TuningError(
                "a dora adapter cannot be summed: its magnitudes rescale the whole weights",
                where="--method",
                hint="merge it into its base, and blend the models",
            )


def _is_pruning(method: str) -> bool:
    return method.startswith(("ties", "dare", "magnitude"))


def _check_ranks(name: str, ranks: Sequence[int], method: MergeMethod) -> None:
    if len(set(ranks)) > 1 and method != "cat" and not method.endswith("svd"):
        raise TuningError(
            f"{name} has adapters of the ranks {', '.join(map(str, ranks))}, but {method} sums their A's",
            where="--method",
            expected="one rank for all",
            hint="use cat, svd, or the method's variant with _svd",
        )


def _extra_tensors(parts: Sequence[TuningExport]) -> dict[str, Tensor]:
    """The base weights that the parts trained."""
    tensors: dict[str, Tensor] = {}
    for part in parts:
        for name, tensor in part.state.items():
            if ".lora_" in name:
                continue
            if name in tensors:
                raise TuningError(
                    f"two of the adapters trained the base weight {name}",
                    where="--method",
                    expected="each base weight from one adapter at most: they are not averaged",
                )
            tensors[name] = tensor.detach().clone()
    return tensors


def _merge_layer(
    parts: Sequence[tuple[LoraMatrices, float]],
    method: MergeMethod,
    density: float | None,
) -> tuple[Tensor, Tensor]:
    """A (R, I) and B (O, R) of the sum at one layer, with s = 1."""
    (a_RI, b_OR, _), _ = parts[0]
    scaffold = nn.ModuleDict({"layer": nn.utils.skip_init(nn.Linear, a_RI.shape[1], b_OR.shape[0], device=a_RI.device)})
    names = [f"part_{i}" for i in range(len(parts))]
    configs = [
        LoraConfig(r=a_RI.shape[0], lora_alpha=s * a_RI.shape[0], target_modules=["layer"])  # type: ignore[bad-argument-type]
        for (a_RI, _, s), _ in parts
    ]
    tuner = LoraModel(scaffold, configs[0], names[0])
    for name, config in list(zip(names, configs, strict=True))[1:]:
        tuner.peft_config[name] = config
        tuner.inject_adapter(scaffold, name)
    layer: Any = scaffold["layer"]
    for name, ((a_RI, b_OR, _), _) in zip(names, parts, strict=True):
        layer.lora_A[name].weight.data.copy_(a_RI)
        layer.lora_B[name].weight.data.copy_(b_OR)
    tuner.add_weighted_adapter(
        names,
        [weight for _, weight in parts],
        "sum",
        combination_type=method,
        svd_full_matrices=False,
        density=density,
    )
    return layer.lora_A["sum"].weight.data, layer.lora_B["sum"].weight.data


def _layer_matrices(part: TuningExport) -> dict[str, LoraMatrices]:
    """A, B and s by layer."""
    return {
        name: (part.state[f"{name}.lora_A.weight"].detach(), part.state[f"{name}.lora_B.weight"].detach(), scaling)
        for name, scaling in scalings(part).items()
    }

"""How do several low-rank adapters of one base become one?

Each part has a weight w. What is to be approached is the weighted sum of their updates, sum of w s B A over the parts:

    cat     exactly that: the parts side by side, at the sum of their ranks
    svd     its best approximation of a given rank
    linear  A's and B's are summed one by one, so the product has terms of one part's B and another's A: quick and rough

and the ways of keeping parts from cancelling one another, on A's and B's (or, with `_svd`, on whole updates): `ties` (Yadav et
al. 2023, arXiv 2306.01708: keep the largest, elect a sign), `dare_linear` and `dare_ties` (Yu et al. 2023, arXiv 2311.03099:
drop at random, scale up the rest) and `magnitude_prune`. The arithmetic is PEFT's `add_weighted_adapter`, run on one layer of
the right size at a time. Every part is brought to s = alpha / rank first: PEFT gives the sum the configuration of the first
part, and would multiply it by the root of the rank where that is rsLoRA.

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


SignMethod = Literal["total", "frequency"]
LoraMatrices = tuple[Tensor, Tensor, float]
"""A (R, I), B (O, R) and s of one adapter at one layer."""


def merge_adapters(
    model: PreTrainedModel,
    parts: Sequence[tuple[LoraAdapter | TuningExport, float]],
    method: MergeMethod = "cat",
    *,
    rank: int | None = None,
    density: float | None = None,
    sign: SignMethod = "total",
    seed: int = 0,
) -> LoraAdapter:
    """Attach to `model` the one adapter that `parts` with their weights make.

    `rank`: of the sum, for the ways with svd (left out: the largest of the parts). `density`: the share of numbers that ties,
    dare and pruning keep, below one. `sign`: whether ties counts sizes or heads. `seed`: of what dare drops. Parts that are
    attached to `model` are taken out. A weight that one part trained besides comes along as it is.

    Raises `TuningError` for parts that cannot be summed: dora (its magnitudes are no summand), different ranks where A's are
    summed one by one, or the same weight trained besides by two of them.
    """
    _check_arguments(parts, method, density)
    taken = [(part.export() if isinstance(part, LoraAdapter) else part, weight) for part, weight in parts]
    besides = _extra_tensors([part for part, _ in taken])
    for part, _ in parts:
        if isinstance(part, LoraAdapter) and part.model is model:
            part.detach()
    matrices = [(_layer_matrices(part), weight) for part, weight in taken]
    summed: dict[str, tuple[Tensor, Tensor]] = {}
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        for name in dict.fromkeys(name for part, _ in matrices for name in part):
            here = [(part[name], weight) for part, weight in matrices if name in part]
            if _is_pruning(method) and len(here) == 1:  # PEFT prunes nothing that stands alone
                (a_RI, b_OR, _), _ = here[0]
                here.append(((torch.zeros_like(a_RI), torch.zeros_like(b_OR), 1.0), 1.0))
            _check_ranks(name, [a_RI.shape[0] for (a_RI, _, _), _ in here], method)
            summed[name] = _merge_layer(here, method, rank, density, sign)
    ranks = {name: a_RI.shape[0] for name, (a_RI, _) in summed.items()}
    largest = max(ranks.values())
    tuning = LoraAdapter(
        model,
        rank=largest,
        alpha=largest,
        targets=list(summed),
        rank_pattern={name: r for name, r in ranks.items() if r != largest},
        alpha_pattern={name: float(r) for name, r in ranks.items() if r != largest},
        also_train=list(besides),
    )
    state = {f"{name}.lora_{ab}.weight": t for name, pair in summed.items() for ab, t in zip("AB", pair, strict=True)}
    tuning.load(state | besides)
    return tuning


def _check_arguments(
    parts: Sequence[tuple[LoraAdapter | TuningExport, float]], method: str, density: float | None
) -> None:
    if method not in get_args(MergeMethod):
        raise TuningError(
            f"there is no way '{method}' to combine adapters",
            where="combine",
            expected=", ".join(get_args(MergeMethod)),
            hint=suggest_nearest(method, get_args(MergeMethod)),
        )
    prunes = _is_pruning(method)
    if len(parts) < 1 + prunes:
        raise TuningError(
            f"{method} of {len(parts)} adapters",
            where="combine",
            expected="two adapters or more, that could get in one another's way" if prunes else "one adapter or more",
        )
    if prunes != (density is not None) or (density is not None and not 0.0 < density < 1.0):
        raise TuningError(
            f"{method} with a density of {density}",
            where="combine",
            expected="a share above 0 and below 1" if prunes else "no density: every number is kept",
        )
    for part, _ in parts:
        form = part.variant if isinstance(part, LoraAdapter) else part.options.get("variant", "lora")
        if form == "dora":
            raise TuningError(
                "a dora adapter is no summand: its magnitudes rescale the whole weights",
                where="combine",
                hint="merge it into its base, and combine the models",
            )


def _is_pruning(method: str) -> bool:
    return method.startswith(("ties", "dare", "magnitude"))


def _check_ranks(name: str, ranks: Sequence[int], method: MergeMethod) -> None:
    if len(set(ranks)) > 1 and method != "cat" and not method.endswith("svd"):
        raise TuningError(
            f"{name} has adapters of the ranks {', '.join(map(str, ranks))}, and {method} sums their A's one by one",
            where="combine",
            expected="one rank for all",
            hint="take cat, svd, or the way's form with _svd",
        )


def _extra_tensors(parts: Sequence[TuningExport]) -> dict[str, Tensor]:
    """What parts trained besides their adapters."""
    found: dict[str, Tensor] = {}
    for part in parts:
        for name, tensor in part.state.items():
            if ".lora_" in name:
                continue
            if name in found:
                raise TuningError(
                    f"two of the adapters trained {name} besides",
                    where="combine",
                    expected="each weight from one adapter at most: they are not averaged",
                )
            found[name] = tensor.detach().clone()
    return found


def _merge_layer(
    parts: Sequence[tuple[LoraMatrices, float]],
    method: MergeMethod,
    rank: int | None,
    density: float | None,
    sign: SignMethod,
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
        svd_rank=rank,
        svd_full_matrices=False,
        density=density,
        majority_sign_method=sign,
    )
    return layer.lora_A["sum"].weight.data, layer.lora_B["sum"].weight.data


def _layer_matrices(part: TuningExport) -> dict[str, LoraMatrices]:
    """A, B and s by layer."""
    return {
        name: (part.state[f"{name}.lora_A.weight"].detach(), part.state[f"{name}.lora_B.weight"].detach(), scaling)
        for name, scaling in scalings(part).items()
    }

"""Merging models that were trained from one start. What a model learnt is its task vector, t = model - start.

    linear       start + sum of w t: task arithmetic (Ilharco et al. 2023, arXiv 2212.04089). For a model continued on new text
                 and a chat model of the same base it is the chat vector (Huang et al. 2024, arXiv 2310.04799), or instruction
                 residual (Jindal et al. 2024, arXiv 2410.10739)
    ties         keep the largest `density` of each t, elect the sign of the sum of w t at every weight, and add the mean of
                 the w t that have it (Yadav et al. 2023, arXiv 2306.01708, algorithm 1, where one scale stands for all w)
    dare_linear  drop the values of each t at random, keep `density` of them, divide those by `density`; then linear (Yu et al.
                 2024, arXiv 2311.03099)
    dare_ties    the same, then the election and the mean of ties
    model_stock  start + r (mean of t), r = K c / (1 + (K - 1) c) of K models, c the mean cosine between their t's (Jang et al.
                 2024, arXiv 2403.19522; of more than two models c is the mean over pairs, as in mergekit)
    slerp        the great circle between two models, at w2 / (w1 + w2)

The arithmetic is that of one tensor at a time, as in mergekit and PEFT, in float64. The code of TIES trims all weights
together instead. Where task vectors disagree (c < 0), model stock stays at the start.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

MergeMethod = Literal["linear", "ties", "dare_linear", "dare_ties", "model_stock", "slerp"]
PRUNING_METHODS = ("ties", "dare_linear", "dare_ties")
"""The methods that keep a fraction of the values."""


@dataclass(frozen=True)
class MergeRecipe:
    """A method of merging, and the weight of each model."""

    method: MergeMethod
    weights: tuple[float, ...]
    density: float = 1.0
    """The fraction of the values of each task vector that ties and dare keep."""
    seed: int = 0
    """Of the values that dare drops."""


@torch.no_grad()
def merge_weights(
    start: Mapping[str, Tensor], models: Sequence[Mapping[str, Tensor]], recipe: MergeRecipe
) -> dict[str, Tensor]:
    """The merged weights by name. One model at weight 1, merged by `linear`, is that model to the bit."""
    return {
        name: _merge_tensor(name, tensor.double(), [model[name].double() for model in models], recipe).to(tensor.dtype)
        for name, tensor in start.items()
    }


def _merge_tensor(name: str, start: Tensor, models: Sequence[Tensor], recipe: MergeRecipe) -> Tensor:
    vectors = [model - start for model in models]
    match recipe.method:
        case "linear":
            # start + 1 (model - start) is not the model in floating point, this is
            scaled = [w * model for w, model in zip(recipe.weights, models, strict=True)]
            return (1 - sum(recipe.weights)) * start + sum(scaled[1:], scaled[0])
        case "ties":
            return start + elect_and_mean([keep_largest(t, recipe.density) for t in vectors], recipe.weights)
        case "dare_linear" | "dare_ties":
            dropped = [
                drop_at_random(t, recipe.density, _generator(recipe.seed, i, name)) for i, t in enumerate(vectors)
            ]
            return start + (weighted_sum if recipe.method == "dare_linear" else elect_and_mean)(dropped, recipe.weights)
        case "model_stock":
            return start + model_stock_ratio(vectors) * torch.stack(vectors).mean(0)
        case "slerp":
            first, second = recipe.weights
            return slerp(models[0], models[1], second / (first + second))


def weighted_sum(vectors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """`sum of w t`."""
    return torch.stack([w * t for w, t in zip(weights, vectors, strict=True)]).sum(0)


def keep_largest(vector: Tensor, density: float) -> Tensor:
    """The `density` of the values that are largest in magnitude, at least one; the others are zero."""
    kept = torch.zeros_like(vector).flatten()
    indices = vector.abs().flatten().topk(max(1, int(density * vector.numel())), sorted=False).indices
    kept[indices] = vector.flatten()[indices]
    return kept.view_as(vector)


def drop_at_random(vector: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """Each value with probability `density`, divided by it, else zero: the mean over draws is the vector."""
    # drawn on the CPU, so that the same values are dropped on every device
    kept = torch.rand(vector.shape, generator=generator, dtype=torch.float64) < density
    return vector * kept.to(vector.device) / density


def elect_and_mean(vectors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """At each weight the mean of the `w t` whose sign is that of their sum."""
    scaled = torch.stack([w * t for w, t in zip(weights, vectors, strict=True)])
    agrees = (scaled.sign() == scaled.sum(0).sign()) & (scaled != 0)
    return (scaled * agrees).sum(0) / agrees.sum(0).clamp(min=1)


def model_stock_ratio(vectors: Sequence[Tensor]) -> float:
    """`K c / (1 + (K - 1) c)`, c the mean cosine between two of K task vectors, at least 0."""
    flat = [t.flatten() for t in vectors]
    pairs = [(a, b) for i, a in enumerate(flat) for b in flat[i + 1 :]]
    cosine = max(0.0, sum(_cosine(a, b) for a, b in pairs) / len(pairs))
    return len(flat) * cosine / (1 + (len(flat) - 1) * cosine)


def slerp(first: Tensor, second: Tensor, share: float) -> Tensor:
    """The point at `share` of the way on the great circle from `first` to `second` (Shoemake 1985); a line where they align."""
    cosine = _cosine(first.flatten(), second.flatten())
    angle = torch.arccos(torch.tensor(cosine, dtype=torch.float64).clamp(-1, 1))
    if angle.sin() < 1e-6:
        return torch.lerp(first, second, share)
    return (torch.sin((1 - share) * angle) * first + torch.sin(share * angle) * second) / angle.sin()


def _cosine(first: Tensor, second: Tensor) -> float:
    """The cosine of the angle between two vectors; 0 where one of them is zero."""
    norms = first.norm() * second.norm()
    return 0.0 if norms == 0 else (first @ second / norms).item()


def _generator(seed: int, model: int, name: str) -> torch.Generator:
    """Random numbers of one tensor of one model, whatever else is merged."""
    digest = hashlib.sha256(f"{seed} {model} {name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))

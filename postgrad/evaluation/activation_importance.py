"""Importance of each weight of a linear layer by its size and its inputs, from forward passes alone (Wanda's score).

    I_ij = |W_ij| sqrt(mean over tokens of X_j^2)        X_j: the j-th input of the layer

Sun et al. 2023 (arXiv 2306.11695) prune by it, and source-shielded updates (Yamaguchi et al. 2025, arXiv 2512.04844) protect
the columns with the largest sums. Only linear layers of the blocks have one; the mean is over all positions of the rows.

Legend: B rows, T positions, I inputs and O outputs of a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from postgrad.data.loading.batch import Batch
from postgrad.evaluation.fisher import CONVERGENCE_CHECKS, ImportanceEstimate, compare_halves
from postgrad.models.model import Model


@torch.no_grad()
def estimate_activation_importance(
    model: Model, layers: Mapping[str, nn.Module], batches: Iterable[Batch], max_labels: int
) -> Iterator[int | ImportanceEstimate]:
    """Accumulate batches up to `max_labels` labels; yields the labels so far, and at last the estimate.

    `layers`: linear layers of the model, by the names of their weights. Batches go to two halves in turn; the model's weights
    do not change.
    """
    halves = [{name: _zeros(layer) for name, layer in layers.items()} for _ in range(2)]
    counts, index = [0, 0], 0

    def observe(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def add(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            halves[index % 2][name] += inputs[0].flatten(0, -2).float().square().sum(0)

        return add

    hooks = [layer.register_forward_pre_hook(observe(name)) for name, layer in layers.items()]
    checks = [max_labels >> shift for shift in reversed(range(CONVERGENCE_CHECKS))]
    convergence: list[dict[str, float]] = []
    model.eval()
    device = next(model.pretrained.parameters()).device
    try:
        for batch in batches:
            batch = batch.to(device)
            model(**batch.model_inputs)
            counts[index % 2] += batch.label_count
            index += 1
            seen = sum(counts)
            if index > 1 and checks and seen >= checks[0]:
                checks = [check for check in checks if check > seen]
                convergence.append({"labels": seen, **_agreement(layers, halves, counts)})
            yield seen
            if seen >= max_labels:
                break
    finally:
        for hook in hooks:
            hook.remove()
    sums = {name: halves[0][name] + halves[1][name] for name in layers}
    tensors = _scores(layers, sums, sum(counts))
    mean = sum(float(t.double().sum()) for t in tensors.values()) / max(1, sum(t.numel() for t in tensors.values()))
    yield ImportanceEstimate(tensors, sum(counts), mean, convergence)


def _zeros(layer: nn.Module) -> Tensor:
    weight: Tensor = layer.weight  # type: ignore[assignment]
    return torch.zeros(weight.shape[0 if isinstance(layer, Conv1D) else 1], device=weight.device)


def _scores(layers: Mapping[str, nn.Module], squares: dict[str, Tensor], tokens: int) -> dict[str, Tensor]:
    """`|W| sqrt(mean X^2)`, in the shape of each weight."""
    scores = {}
    for name, layer in layers.items():
        weight: Tensor = layer.weight  # type: ignore[assignment]
        size_I = (squares[name] / max(tokens, 1)).sqrt()
        scores[name] = weight.detach().float().abs() * (size_I[:, None] if isinstance(layer, Conv1D) else size_I)
    return scores


def _agreement(layers: Mapping[str, nn.Module], halves: list[dict[str, Tensor]], counts: list[int]) -> dict[str, float]:
    first, second = (list(_scores(layers, half, count).values()) for half, count in zip(halves, counts, strict=True))
    return compare_halves((first, second), (1, 1))

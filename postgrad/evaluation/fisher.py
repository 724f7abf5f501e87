"""Importance of each weight: the diagonal Fisher information, the empirical Fisher, and MAS, each a mean over labels.

    fisher      E_x E_{y ~ p(.|x)} (d log p(y|x) / d w)^2    the diagonal Fisher information
    empirical   E_(x, y) (d log p(y|x) / d w)^2              the same with the text's own labels, sample by sample
    mas         E_x |d ||f(x)||^2 / d w|                     of the logits f (Aljundi et al. 2018, arXiv 1711.09601)

The Fisher information needs no gradient of every single label. Labels are sampled from the model at each position, so given the
text their gradients are independent and of mean zero: in the square of the gradient of their *sum* all cross terms have mean
zero, and one backward pass for a batch gives an unbiased estimate of the sum of the squares. With the text's own labels that is
not so: their sum is the gradient of the loss, which is zero at an optimum, however important the weights. There each sample (a
document, or a row of a task) has its own backward pass.

For losses other than a negative log-likelihood the Fisher information is the curvature: a squared error is the log-likelihood
of a Gaussian of variance 1/2, and a mean over C classes counts C times the square of its gradient.

Legend: B batch, T time, C classes, N labelled positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from postgrad.data.layouts.rows import IGNORED
from postgrad.data.loading.batch import Batch
from postgrad.data.problem_type import ProblemType
from postgrad.models.finite import sampling_errors
from postgrad.models.model import Model, Output

Loss = Callable[[Output, Batch], tuple[Tensor, Tensor]]
"""An objective: the summed loss of a batch, and each row's part of it."""
_LOGITS_AT_ONCE = 1 << 24
CONVERGENCE_CHECKS = 5
"""Comparisons of the two halves, each at twice the labels of the one before."""


@dataclass(frozen=True)
class ImportanceMeasure:
    """The objective of a batch, whether its gradient is squared, and whether several samples may share a batch."""

    objective: Callable[[Output, Batch], Tensor]
    squared: bool
    batched: bool
    scale: float = 1.0


@dataclass(frozen=True)
class ImportanceEstimate:
    """The importance of weights by name, the number of labels, and the convergence.

    `convergence`: at some numbers of labels the `correlation` over all weights of two estimates from half the batches each, and
    `error`: the relative error of their mean, estimated from their difference.
    """

    tensors: dict[str, Tensor]
    labels: int
    mean: float
    convergence: list[dict[str, float]]


def fisher_measure(
    loss: Loss, problem: ProblemType, generator: torch.Generator, scale: float = 1.0
) -> ImportanceMeasure:
    """The Fisher information of a loss."""

    def sampled_loss(output: Output, batch: Batch) -> Tensor:
        labels = sample_labels(output, batch.labels, problem, generator)
        return loss(output, replace(batch, labels=labels))[0]

    return ImportanceMeasure(sampled_loss, squared=True, batched=True, scale=scale)


def empirical_fisher_measure(loss: Loss, scale: float = 1.0) -> ImportanceMeasure:
    """Squared gradients of the text's own labels."""
    return ImportanceMeasure(lambda output, batch: loss(output, batch)[0], squared=True, batched=False, scale=scale)


def mas_measure() -> ImportanceMeasure:
    """The absolute gradient of the squared norm of the logits at the labelled positions."""
    return ImportanceMeasure(squared_norm, squared=False, batched=False)


@torch.no_grad()
def sample_labels(output: Output, labels: Tensor, problem: ProblemType, generator: torch.Generator) -> Tensor:
    """Labels sampled from the model's predictions, in the places of `labels`; -100 stays.

    Classes, tags and tokens are sampled from the softmax, several labels each by itself, a number is the first logit with
    Gaussian noise of variance 1/2.
    """
    if problem == ProblemType.MULTI_LABEL:
        return _bernoulli(output.logits().float().sigmoid(), generator).to(labels.dtype)
    if problem == ProblemType.NUMBER:
        number_B = output.logits().float()[:, 0]
        noise_B = torch.randn(number_B.shape, generator=generator).to(number_B) * 0.5**0.5
        return (number_B + noise_B).to(labels.dtype)
    flat = output.hidden.flatten(0, -2)
    positions_N = (labels.flatten() != IGNORED).nonzero().flatten()
    drawn = labels.flatten().clone()
    for part in _chunks(output, flat, positions_N):
        shares_NV = _logits(output, flat[part]).float().softmax(-1)
        # Sampled on the CPU: reproducible on all devices.
        with sampling_errors("importance"):
            drawn[part] = torch.multinomial(shares_NV.cpu(), 1, generator=generator)[:, 0].to(drawn)
    return drawn.view(labels.shape)


def squared_norm(output: Output, batch: Batch) -> Tensor:
    """`sum ||f||^2` over the labelled positions, without holding all logits."""
    if output.head is None and output.hidden.dim() < 3:
        return output.hidden.float().square().sum()
    flat = output.hidden.flatten(0, -2)
    positions_N = (batch.labels.flatten() != IGNORED).nonzero().flatten()

    def norm(hidden: Tensor) -> Tensor:
        return _logits(output, hidden).float().square().sum()

    parts = [checkpoint(norm, flat[part], use_reentrant=False) for part in _chunks(output, flat, positions_N)]
    total = torch.stack(parts).sum()
    assert isinstance(total, Tensor)
    return total


def estimate_importance(
    model: Model, batches: Iterable[Batch], measure: ImportanceMeasure, max_labels: int
) -> Iterator[int | ImportanceEstimate]:
    """Accumulate batches up to `max_labels` labels; yields the labels so far, and at last the estimate.

    Batches go to two halves in turn. Unused weights have importance 0. The model's gradients are used and freed.
    """
    names, weights = zip(
        *((n, p) for n, p in model.pretrained.named_parameters() if p.is_floating_point()), strict=True
    )
    halves = [[torch.zeros_like(p, dtype=torch.float32) for p in weights] for _ in range(2)]
    counts = [0, 0]
    checks = [max_labels >> (CONVERGENCE_CHECKS - 1 - i) for i in range(CONVERGENCE_CHECKS)]
    convergence: list[dict[str, float]] = []
    model.eval()
    with _AllTrainable(weights):
        for index, batch in enumerate(batches):
            batch = batch.to(weights[0].device)
            measure.objective(model(**batch.model_inputs), batch).backward()
            _accumulate(halves[index % 2], weights, squared=measure.squared)
            counts[index % 2] += batch.label_count
            seen = sum(counts)
            while checks and seen >= checks[0] and index:
                checks = [check for check in checks if check > seen]
                convergence.append({"labels": seen, **compare_halves(halves, counts)})
            yield seen
            if seen >= max_labels:
                break
    seen = sum(counts)
    if counts[1] and (not convergence or convergence[-1]["labels"] < seen):
        convergence.append({"labels": seen, **compare_halves(halves, counts)})
    tensors = {name: (a + b).mul_(measure.scale / max(seen, 1)) for name, a, b in zip(names, *halves, strict=True)}
    numbers = sum(t.numel() for t in tensors.values())
    mean = sum(float(t.double().sum()) for t in tensors.values()) / numbers
    yield ImportanceEstimate(tensors, seen, mean, convergence)


class _AllTrainable:
    """Inside, every weight requires a gradient; afterwards `requires_grad` is restored and gradients are freed."""

    def __init__(self, weights: Sequence[nn.Parameter]) -> None:
        self.weights = weights

    def __enter__(self) -> None:
        self.previous = [p.requires_grad for p in self.weights]
        for p in self.weights:
            p.requires_grad_(True)

    def __exit__(self, *_: object) -> None:
        for p, before in zip(self.weights, self.previous, strict=True):
            p.grad = None
            p.requires_grad_(before)


@torch.no_grad()
def _accumulate(sums: list[Tensor], weights: Sequence[nn.Parameter], *, squared: bool) -> None:
    """Add the (squared or absolute) gradients, and free them."""
    pairs = [(total, p.grad.float()) for total, p in zip(sums, weights, strict=True) if p.grad is not None]
    totals, gradients = [total for total, _ in pairs], [gradient for _, gradient in pairs]
    if squared:
        torch._foreach_addcmul_(totals, gradients, gradients)
    else:
        torch._foreach_add_(totals, torch._foreach_abs(gradients))
    for p in weights:
        p.grad = None


def compare_halves(halves: Sequence[Sequence[Tensor]], counts: Sequence[int]) -> dict[str, float]:
    """The agreement of two estimates over all weights: their correlation, and `|a - b| / |a + b|`."""
    number = sum(t.numel() for t in halves[0])
    sums = torch.zeros(5, dtype=torch.float64)
    for first, second in zip(*halves, strict=True):
        a, b = (t.flatten().double().cpu() / max(n, 1) for t, n in zip((first, second), counts, strict=True))
        sums += torch.stack([a.sum(), b.sum(), a @ a, b @ b, a @ b])
    a, b, aa, bb, ab = sums.tolist()
    deviation = ((aa - a * a / number) * (bb - b * b / number)) ** 0.5
    apart, size = max(aa + bb - 2 * ab, 0.0) ** 0.5, (aa + bb + 2 * ab) ** 0.5
    return {
        "correlation": round((ab - a * b / number) / deviation, 4) if deviation else 0.0,
        "error": round(apart / size, 4) if size else 0.0,
    }


def _chunks(output: Output, flat: Tensor, positions_N: Tensor) -> tuple[Tensor, ...]:
    """Chunks of positions whose logits fit into memory."""
    width = output.hidden.shape[-1] if output.head is None else output.head.weight_VD.shape[0]
    return positions_N.split(max(1, _LOGITS_AT_ONCE // width))


def _logits(output: Output, hidden: Tensor) -> Tensor:
    return hidden if output.head is None else output.head.logits(hidden)


def _bernoulli(shares: Tensor, generator: torch.Generator) -> Tensor:
    return torch.bernoulli(shares.cpu(), generator=generator).to(shares.device)

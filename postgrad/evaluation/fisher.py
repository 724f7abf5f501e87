"""How much does each weight matter to what a model says? Three measures, each a mean over labels of what single ones say.

    fisher      E_x E_{y ~ p(.|x)} (d log p(y|x) / d w)^2    the diagonal Fisher information
    empirical   E_(x, y) (d log p(y|x) / d w)^2              the same with the text's own labels, sample by sample
    mas         E_x |d ||f(x)||^2 / d w|                     of the logits f (Aljundi et al. 2018, arXiv 1711.09601)

The Fisher information needs no gradient of every single label. What is read is the text; labels are drawn from the model at
each place, so given the text their gradients are independent and of mean zero: in the square of the gradient of their *sum* all
cross terms have mean zero, and one backward pass for a batch gives an unbiased estimate of the sum of the squares. With the
text's own labels that is not so: their sum is the gradient of the loss, which is zero at an optimum, however much the weights
matter. There each sample (a document, or a row of a task) has a backward pass of its own.

For losses other than a label's negative log-likelihood it is the curvature that the Fisher information stands for: a squared
error is that of a Gaussian of variance 1/2, and a mean over C classes counts C times the square of its gradient.

Legend: B batch, T time, C classes, N places with a label, V vocabulary.
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
from postgrad.models.model import Model, Output

Loss = Callable[[Output, Batch], tuple[Tensor, Tensor]]
"""An objective: the summed loss of a batch, and each row's part of it."""
_LOGITS_AT_ONCE = 1 << 24
_AGREEMENT_CHECKS = 5
"""How often the halves are compared, each time at twice the labels."""


@dataclass(frozen=True)
class ImportanceMeasure:
    """What is differentiated for a batch, what becomes of the gradient, and whether several samples may share a batch."""

    objective: Callable[[Output, Batch], Tensor]
    squared: bool
    batched: bool
    scale: float = 1.0


@dataclass(frozen=True)
class ImportanceEstimate:
    """The importance of weights by name, the labels that it is a mean over, and how the halves came to agree.

    `convergence`: at some counts of labels the `correlation` of two estimates from half of them each, over all weights, and
    `error`: how far their mean is off, relative to its size, as their difference tells.
    """

    tensors: dict[str, Tensor]
    labels: int
    mean: float
    convergence: list[dict[str, float]]


def fisher_measure(loss: Loss, problem: str, generator: torch.Generator, scale: float = 1.0) -> ImportanceMeasure:
    """The Fisher information of a loss. `problem`: what a classifier decides (see `drawn_labels`)."""

    def worth(output: Output, batch: Batch) -> Tensor:
        labels = sample_labels(output, batch.labels, problem, generator)
        return loss(output, replace(batch, labels=labels))[0]

    return ImportanceMeasure(worth, squared=True, batched=True, scale=scale)


def empirical_fisher_measure(loss: Loss, scale: float = 1.0) -> ImportanceMeasure:
    """Squared gradients of the text's own labels."""
    return ImportanceMeasure(lambda output, batch: loss(output, batch)[0], squared=True, batched=False, scale=scale)


def mas_measure() -> ImportanceMeasure:
    """The size of the gradient of the squared norm of the logits, at the places that have a label."""
    return ImportanceMeasure(squared_norm, squared=False, batched=False)


@torch.no_grad()
def sample_labels(output: Output, labels: Tensor, problem: str, generator: torch.Generator) -> Tensor:
    """Labels like those that are there, drawn from what the model says; -100 stays.

    `problem`: `class` and `tags` (one of the logits' classes, as a token is one of a vocabulary), `multi` (each class by
    itself), or `number` (the first logit and Gaussian noise of variance 1/2).
    """
    if problem == ProblemType.MULTI_LABEL:
        return _bernoulli(output.logits().float().sigmoid(), generator).to(labels.dtype)
    if problem == ProblemType.NUMBER:
        number_B = output.logits().float()[:, 0]
        noise_B = torch.randn(number_B.shape, generator=generator).to(number_B) * 0.5**0.5
        return (number_B + noise_B).to(labels.dtype)
    flat = output.hidden.flatten(0, -2)
    places_N = (labels.flatten() != IGNORED).nonzero().flatten()
    drawn = labels.flatten().clone()
    for part in _chunks(output, flat, places_N):
        shares_NV = _logits(output, flat[part]).float().softmax(-1)
        # Drawn on the host: the same everywhere.
        drawn[part] = torch.multinomial(shares_NV.cpu(), 1, generator=generator)[:, 0].to(drawn)
    return drawn.view(labels.shape)


def squared_norm(output: Output, batch: Batch) -> Tensor:
    """`sum ||f||^2` over the places that have a label, without ever holding all logits."""
    if output.head is None and output.hidden.dim() < 3:
        return output.hidden.float().square().sum()
    flat = output.hidden.flatten(0, -2)
    places_N = (batch.labels.flatten() != IGNORED).nonzero().flatten()

    def norm(read: Tensor) -> Tensor:
        return _logits(output, read).float().square().sum()

    parts = [checkpoint(norm, flat[part], use_reentrant=False) for part in _chunks(output, flat, places_N)]
    found = torch.stack(parts).sum()
    assert isinstance(found, Tensor)
    return found


def estimate_importance(
    model: Model, batches: Iterable[Batch], measure: ImportanceMeasure, max_labels: int
) -> Iterator[int | ImportanceEstimate]:
    """Look at batches until `most` labels are reached; hands out the labels so far, and at the end what was found.

    Batches go to two halves in turn. Weights that nothing reads have importance 0. The model's gradients are used and freed.
    """
    names, weights = zip(
        *((n, p) for n, p in model.pretrained.named_parameters() if p.is_floating_point()), strict=True
    )
    halves = [[torch.zeros_like(p, dtype=torch.float32) for p in weights] for _ in range(2)]
    counts = [0, 0]
    looks = [max_labels >> (_AGREEMENT_CHECKS - 1 - i) for i in range(_AGREEMENT_CHECKS)]
    convergence: list[dict[str, float]] = []
    model.eval()
    with _AllTrainable(weights):
        for index, batch in enumerate(batches):
            batch = batch.to(weights[0].device)
            measure.objective(model(**batch.inputs), batch).backward()
            _accumulate(halves[index % 2], weights, squared=measure.squared)
            counts[index % 2] += batch.label_count
            seen = sum(counts)
            while looks and seen >= looks[0] and index:
                looks = [look for look in looks if look > seen]
                convergence.append({"labels": seen, **_agreement(halves, counts)})
            yield seen
            if seen >= max_labels:
                break
    seen = sum(counts)
    if counts[1] and (not convergence or convergence[-1]["labels"] < seen):
        convergence.append({"labels": seen, **_agreement(halves, counts)})
    tensors = {name: (a + b).mul_(measure.scale / max(seen, 1)) for name, a, b in zip(names, *halves, strict=True)}
    numbers = sum(t.numel() for t in tensors.values())
    mean = sum(float(t.double().sum()) for t in tensors.values()) / numbers
    yield ImportanceEstimate(tensors, seen, mean, convergence)


class _AllTrainable:
    """Inside, every weight takes part in the backward pass; afterwards those that did before, and no gradient is left."""

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
    """Add what the gradients say, and free them."""
    pairs = [(total, p.grad.float()) for total, p in zip(sums, weights, strict=True) if p.grad is not None]
    totals, gradients = [total for total, _ in pairs], [gradient for _, gradient in pairs]
    if squared:
        torch._foreach_addcmul_(totals, gradients, gradients)
    else:
        torch._foreach_add_(totals, torch._foreach_abs(gradients))
    for p in weights:
        p.grad = None


def _agreement(halves: Sequence[Sequence[Tensor]], counts: Sequence[int]) -> dict[str, float]:
    """How alike two estimates are, over all weights: their correlation, and `|a - b| / |a + b|`."""
    number = sum(t.numel() for t in halves[0])
    sums = torch.zeros(5, dtype=torch.float64)
    for first, second in zip(*halves, strict=True):
        a, b = (t.flatten().double().cpu() / max(n, 1) for t, n in zip((first, second), counts, strict=True))
        sums += torch.stack([a.sum(), b.sum(), a @ a, b @ b, a @ b])
    a, b, aa, bb, ab = sums.tolist()
    spread = ((aa - a * a / number) * (bb - b * b / number)) ** 0.5
    apart, size = max(aa + bb - 2 * ab, 0.0) ** 0.5, (aa + bb + 2 * ab) ** 0.5
    return {
        "correlation": round((ab - a * b / number) / spread, 4) if spread else 0.0,
        "error": round(apart / size, 4) if size else 0.0,
    }


def _chunks(output: Output, flat: Tensor, places_N: Tensor) -> tuple[Tensor, ...]:
    """Places whose logits are taken together."""
    width = output.hidden.shape[-1] if output.head is None else output.head.weight_VD.shape[0]
    return places_N.split(max(1, _LOGITS_AT_ONCE // width))


def _logits(output: Output, hidden: Tensor) -> Tensor:
    return hidden if output.head is None else output.head.logits(hidden)


def _bernoulli(shares: Tensor, generator: torch.Generator) -> Tensor:
    return torch.bernoulli(shares.cpu(), generator=generator).to(shares.device)

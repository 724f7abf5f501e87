"""Linear probes: a linear classifier on each layer's frozen states, all trained simultaneously.

Legend: S states (L blocks and the embeddings), I items, B batch, D width, C outputs, V views, G strengths of the penalty.

A *view* is the input of one classifier: a single state, the sum of the last four, the last four concatenated, or a learnt mix
of all (Peters et al. 2018, arXiv 1802.05365, equation 1). Each view is trained with every strength of the penalty `strength / 2
* |W|^2` on top of the mean loss; the strength is selected on development items. All classifiers are parts of a few tensors and
of one loss: their weights are separate and Adam is elementwise, so they do not interact, and a step costs a few large products
in place of V x G small ones.

Every state is standardised by its own mean and deviation over the training items, so that a penalty means the same to all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from postgrad.data.problem_type import ProblemType
from postgrad.evaluation.classification_metrics import main_metric, metric_values

STRENGTHS = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
JOINED_LAYERS = 4
"""Last layers that are summed or concatenated (Devlin et al. 2019, table 7)."""
BATCH_ITEMS = 512
"""Items in a step."""
_STEPS, _RATE = 1500, 3e-2
_CHUNK_ITEMS = 4096

ViewKind = Literal["state", "sum", "concat", "mix"]


@dataclass(frozen=True)
class View:
    """The input of a classifier: its name, how states are joined, and which."""

    name: str
    kind: ViewKind
    states: tuple[int, ...]


def make_views(states: int, joined_layers: int = JOINED_LAYERS) -> list[View]:
    """Every state by itself, the last few joined, and a mix of all."""
    last = tuple(range(max(1, states - joined_layers), states))
    alone = [View("embeddings" if s == 0 else f"layer {s}", "state", (s,)) for s in range(states)]
    joined = [
        View(f"sum of last {len(last)}", "sum", last),
        View(f"concat of last {len(last)}", "concat", last),
    ]
    return [*alone, *(joined if len(last) > 1 else []), View("mix of all", "mix", tuple(range(states)))]


@dataclass(frozen=True)
class ProbeData:
    """Features of shape (S, I, D), and the label and document of each item."""

    states_SID: np.ndarray
    labels: np.ndarray
    document_I: np.ndarray

    def __len__(self) -> int:
        return len(self.document_I)


@dataclass(frozen=True)
class ProbeResult:
    """A view's classifier with the selected strength, and its predictions for the test items."""

    view: View
    strength: float
    dev_score: float
    predictions: np.ndarray
    share_S: tuple[float, ...] = ()
    """Of a mix: the share of each state."""


class _Classifiers(nn.Module):
    """The classifiers of all views and strengths, as a tensor for each kind of view."""

    mean: Tensor
    deviation: Tensor
    sum_mean: Tensor
    sum_deviation: Tensor
    strength: Tensor

    def __init__(
        self, views: Sequence[View], train: ProbeData, outputs: int, strengths: Sequence[float], *, number: bool
    ) -> None:
        super().__init__()
        # Numbers are standardised, so that rate and penalty have the same scale as for classes.
        self.label_mean = float(train.labels.mean()) if number else 0.0
        self.label_scale = (float(train.labels.std()) or 1.0) if number else 1.0
        states, _, width = train.states_SID.shape
        self.views, self.outputs = list(views), outputs
        self.state_views = [v.states[0] for v in views if v.kind == "state"]
        self.sums = [list(v.states) for v in views if v.kind == "sum"]
        self.concats = [list(v.states) for v in views if v.kind == "concat"]
        self.mixes = [list(v.states) for v in views if v.kind == "mix"]
        mean_SD, deviation_SD = _moments(train.states_SID, [[s] for s in range(states)])
        sum_mean, sum_deviation = _moments(train.states_SID, self.sums)
        for name, value in (("mean", mean_SD), ("deviation", deviation_SD)):
            self.register_buffer(name, value[:, None])
        for name, value in (("sum_mean", sum_mean), ("sum_deviation", sum_deviation)):
            self.register_buffer(name, value[:, None])
        strength_G = torch.tensor(strengths, dtype=torch.float32)
        self.register_buffer("strength", strength_G)
        many = len(strengths)

        def weights(count: int, width: int) -> tuple[nn.Parameter, nn.Parameter]:
            return (
                nn.Parameter(torch.zeros(count, width, many, outputs)),
                nn.Parameter(torch.zeros(count, 1, many, outputs)),
            )

        self.weight, self.bias = weights(len(self.state_views) + len(self.sums), width)
        self.concat_parameters = nn.ParameterList(p for side in self.concats for p in weights(1, width * len(side)))
        self.mix_parameters = nn.ParameterList()
        for mix in self.mixes:
            share, gamma = torch.zeros(many, len(mix)), torch.ones(many)
            self.mix_parameters.extend([nn.Parameter(share), nn.Parameter(gamma), *weights(1, width)])

    def forward(self, states_SBD: Tensor) -> Tensor:
        """Logits of every view and strength, of shape (V, B, G, C) in the order of the views."""
        plain_SBD = (states_SBD - self.mean) / self.deviation
        sums = [states_SBD[states].sum(0) for states in self.sums]
        inputs = [plain_SBD[self.state_views]]
        if sums:
            inputs.append((torch.stack(sums) - self.sum_mean) / self.sum_deviation)
        narrow = iter(_products(torch.cat(inputs), self.weight) + self.bias)
        found: dict[ViewKind, list[Tensor]] = {"state": [next(narrow) for _ in self.state_views], "sum": list(narrow)}
        found["concat"] = [
            (
                _products(torch.cat([*plain_SBD[side]], -1)[None], self.concat_parameters[2 * i])
                + self.concat_parameters[2 * i + 1]
            )[0]
            for i, side in enumerate(self.concats)
        ]
        found["mix"] = [
            self._mix(plain_SBD[mix], *self.mix_parameters[4 * i : 4 * i + 4]) for i, mix in enumerate(self.mixes)
        ]
        order = {kind: iter(logits) for kind, logits in found.items()}
        return torch.stack([next(order[view.kind]) for view in self.views]) * self.label_scale + self.label_mean

    def _mix(self, states_SBD: Tensor, share_GS: Tensor, gamma_G: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        # Mixing the states' logits equals the logits of the mix, and is one product in place of G sums of states.
        many, outputs = weight.shape[2:]
        logits_SBGC = (states_SBD @ weight.reshape(weight.shape[1], many * outputs)).unflatten(-1, (many, outputs))
        mixed_BGC = torch.einsum("gs,sbgc->bgc", torch.softmax(share_GS, 1), logits_SBGC)
        return gamma_G[:, None] * mixed_BGC + bias[0]

    def penalty(self) -> Tensor:
        """`strength / 2 * |W|^2`, summed over all classifiers; biases, mixes and gammas have no penalty."""
        matrices = [self.weight, *self.concat_parameters[::2], *self.mix_parameters[2::4]]
        size_G = sum((m.square().sum((0, 1, 3)) for m in matrices), torch.zeros_like(self.strength))
        return (self.strength * size_G).sum() / 2

    def shares(self, view: View, strength: int) -> tuple[float, ...]:
        """The share of each state in a mix."""
        mixes = [v for v in self.views if v.kind == "mix"]
        if view not in mixes:
            return ()
        return tuple(torch.softmax(self.mix_parameters[4 * mixes.index(view)][strength], 0).tolist())


def _products(features_VBD: Tensor, weight_VDGC: Tensor) -> Tensor:
    _, width, many, outputs = weight_VDGC.shape
    return torch.bmm(features_VBD, weight_VDGC.reshape(-1, width, many * outputs)).view(
        *features_VBD.shape[:2], many, outputs
    )


def _moments(states_SID: np.ndarray, groups: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """The mean and standard deviation of each group's sum over the items, of shape (groups, D)."""
    means, deviations = [], []
    for states in groups:
        total = square = np.zeros(states_SID.shape[2])
        for begin in range(0, states_SID.shape[1], _CHUNK_ITEMS):
            part = states_SID[list(states), begin : begin + _CHUNK_ITEMS].sum(0, dtype=np.float64)
            total, square = total + part.sum(0), square + (part**2).sum(0)
        mean = total / states_SID.shape[1]
        means.append(mean)
        # Constant features are not scaled up.
        deviation = np.sqrt(np.maximum(square / states_SID.shape[1] - mean**2, 0))
        deviations.append(np.where(deviation > 1e-6, deviation, 1.0))
    empty = np.zeros((0, states_SID.shape[2]))
    return tuple(torch.from_numpy(np.array(m) if m else empty).float() for m in (means, deviations))  # type: ignore[return-value]


def train_probes(
    train: ProbeData,
    dev: ProbeData,
    test: ProbeData,
    problem: ProblemType,
    outputs: int,
    *,
    names: Sequence[str] = (),
    views: Sequence[View] | None = None,
    strengths: Sequence[float] = STRENGTHS,
    steps: int = _STEPS,
    rate: float = _RATE,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[ProbeResult]:
    """Train all classifiers on `train`, select each view's strength on `dev`, and predict `test` once.

    Strengths are selected by `main_metric`, ties by the stronger one.
    """
    all_views = list(views) if views is not None else make_views(train.states_SID.shape[0])
    classifiers = _train_classifiers(all_views, train, problem, outputs, strengths, steps, rate, seed, progress)
    results: list[ProbeResult] = []
    dev_VIG = _predict(classifiers, dev, problem)
    test_VIG = _predict(classifiers, test, problem)
    name, best = main_metric(problem, names)
    for v, view in enumerate(all_views):
        scores = [
            metric_values(problem, *_flatten_predictions(dev_VIG[v, :, g], dev), names)[name]
            for g in range(len(strengths))
        ]
        g = max(range(len(strengths)), key=lambda i: (best * scores[i], strengths[i]))
        shares = classifiers.shares(view, g)
        results.append(ProbeResult(view, strengths[g], scores[g], test_VIG[v, :, g], shares))
    return results


def _flatten_predictions(predictions: np.ndarray, items: ProbeData) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Predictions, labels and documents of single decisions."""
    each = items.labels.shape[1] if items.labels.ndim == 2 else 1
    return predictions.reshape(-1), items.labels.reshape(-1), np.repeat(items.document_I, each)


def metric_inputs(result: ProbeResult, test: ProbeData) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A classifier's predictions, labels and documents as metrics take them."""
    return _flatten_predictions(result.predictions, test)


def _train_classifiers(
    views: Sequence[View],
    train: ProbeData,
    problem: ProblemType,
    outputs: int,
    strengths: Sequence[float],
    steps: int,
    rate: float,
    seed: int,
    progress: Callable[[int, int], None],
) -> _Classifiers:
    """All classifiers, trained by Adam with a cosine schedule on the same batches."""
    classifiers = _Classifiers(views, train, outputs, strengths, number=problem == ProblemType.NUMBER)
    optimizer = torch.optim.Adam(classifiers.parameters(), lr=rate)
    labels = torch.from_numpy(train.labels)
    rng = np.random.default_rng(seed)
    order, at = rng.permutation(len(train)), 0
    for step in range(steps):
        if at >= len(order):
            order, at = rng.permutation(len(train)), 0
        # Sorted within a batch, for sequential reads of the memory-mapped file.
        batch = np.sort(order[at : at + BATCH_ITEMS])
        at += BATCH_ITEMS
        logits_VBGC = classifiers(torch.from_numpy(np.ascontiguousarray(train.states_SID[:, batch])))
        loss = _loss(logits_VBGC, labels[batch], problem, classifiers.label_scale) + classifiers.penalty()
        for group in optimizer.param_groups:
            group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        progress(step + 1, steps)
    return classifiers


def _loss(logits_VBGC: Tensor, labels: Tensor, problem: ProblemType, label_scale: float) -> Tensor:
    """The mean loss of a batch, summed over all classifiers."""
    views, rows, many, outputs = logits_VBGC.shape
    each_VGBC = logits_VBGC.transpose(1, 2)
    match problem:
        case ProblemType.MULTI_LABEL:
            target = labels.float().expand(views, many, rows, outputs)
            return functional.binary_cross_entropy_with_logits(each_VGBC, target, reduction="sum") / (rows * outputs)
        case ProblemType.NUMBER:
            return ((each_VGBC[..., 0] - labels.float()) / label_scale).square().sum() / (2 * rows)
    target = labels.long().expand(views, many, rows).reshape(-1)
    return functional.cross_entropy(each_VGBC.reshape(-1, outputs), target, reduction="sum") / rows


@torch.no_grad()
def _predict(classifiers: _Classifiers, items: ProbeData, problem: ProblemType) -> np.ndarray:
    """The predictions of all classifiers: (V, I, G), for several labels at once (V, I, G, C)."""
    parts = []
    for begin in range(0, len(items), _CHUNK_ITEMS):
        part = torch.from_numpy(np.array(items.states_SID[:, begin : begin + _CHUNK_ITEMS]))
        logits_VBGC = classifiers(part)
        match problem:
            case ProblemType.MULTI_LABEL:
                parts.append((logits_VBGC > 0).numpy().astype(items.labels.dtype))
            case ProblemType.NUMBER:
                parts.append(logits_VBGC[..., 0].numpy())
            case _:
                parts.append(logits_VBGC.argmax(-1).numpy())
    return np.concatenate(parts, 1)

"""Perplexity: nats of every label of held-out text or of the answers of a task, and bits per byte.

Legend: B batch, T time, V vocabulary, R rows, N documents, I labelled items.

Sums are in float64, so batch size and padding matter only by rounding. Bits per byte, `nats / (ln 2 x UTF-8 bytes)`, is the
only number that can be compared between models with different tokenizers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from postgrad.data.layouts.rows import IGNORED
from postgrad.data.loading.batch import Batch, collate
from postgrad.data.problem_type import ProblemType
from postgrad.evaluation.classification_metrics import MetricEstimate, class_scores, compute_metrics, confusion_counts
from postgrad.evaluation.held_out import HeldOutSet
from postgrad.evaluation.length_batches import length_batches
from postgrad.models.model import Model, Output
from postgrad.stats.bootstrap import ratio_interval
from postgrad.stats.forgetting import MIN_DOCUMENTS

_TOKENS_AT_ONCE = 8192
_LOGITS_AT_ONCE = 1 << 25
MAX_CONFUSION_CLASSES = 50
"""With more classes a record holds no confusion matrix."""


@dataclass(frozen=True)
class Scores:
    """Summed nats and scored labels of each row (a window of a text, or an example), and each document's bytes.

    Of a classifier also the prediction, label and document of each item.
    """

    document_W: np.ndarray
    nats_W: np.ndarray
    tokens_W: np.ndarray
    bytes_N: np.ndarray
    predictions_I: np.ndarray = field(default_factory=lambda: np.empty(0))
    labels_I: np.ndarray = field(default_factory=lambda: np.empty(0))
    document_I: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    problem: str = ""
    """The problem type of a classifier; empty for anything else."""
    names: np.ndarray = field(default_factory=lambda: np.empty(0, np.str_))
    """The names of its classes, by their indices."""
    unknown_nats: float = 0.0
    """Summed nats of the tokens of unknown text, which are no part of `nats_W`."""
    unknown_tokens: int = 0

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> Scores:
        """Scores from their fields as arrays; one that an earlier version did not write has its default.

        Raises `KeyError` for a missing field, and `ValueError` for arrays that do not fit together.
        """
        columns = [arrays[name] for name in ("document_W", "nats_W", "tokens_W", "bytes_N")]
        documents, sizes = columns[0], columns[3]
        if any(column.ndim != 1 or column.dtype.kind not in "iuf" for column in columns):
            raise ValueError("a column that is no list of numbers")
        if len({len(column) for column in columns[:3]}) > 1 or documents.dtype.kind not in "iu":
            raise ValueError("columns of different lengths, or documents without numbers")
        if len(documents) and not 0 <= int(documents.min()) <= int(documents.max()) < len(sizes):
            raise ValueError("a document that does not exist")
        known: dict[str, Any] = {each.name: arrays[each.name] for each in fields(cls) if each.name in arrays}
        for name, kind in (("problem", str), ("unknown_nats", float), ("unknown_tokens", int)):
            if name in known:
                known[name] = kind(known[name])
        return cls(**known)

    @property
    def units(self) -> str:
        """The units of the bootstrap: documents, or windows when the documents are too few."""
        return "documents" if len(self.bytes_N) >= MIN_DOCUMENTS else "windows"

    def per_unit(self) -> tuple[np.ndarray, np.ndarray]:
        """`(nats, tokens)` of each unit."""
        if self.units == "windows":
            return self.nats_W, self.tokens_W
        count = len(self.bytes_N)
        return (
            np.bincount(self.document_W, self.nats_W, count),
            np.bincount(self.document_W, self.tokens_W, count),
        )

    @property
    def nats(self) -> float:
        """Mean nats per scored label."""
        return float(self.nats_W.sum() / max(self.tokens_W.sum(), 1))

    def compute_metrics(self) -> dict[str, MetricEstimate]:
        """A classifier's metrics, each with its interval."""
        return compute_metrics(
            ProblemType(self.problem), self.predictions_I, self.labels_I, self.document_I, self.names.tolist()
        )

    def class_summary(self) -> dict[str, Any]:
        """Of a classifier each class by itself, and how often each is taken for each; empty for anything else."""
        if not len(self.predictions_I) or not len(self.names) or self.problem == ProblemType.NUMBER:
            return {}
        problem, names = ProblemType(self.problem), self.names.tolist()
        if problem != ProblemType.MULTI_LABEL:  # a head may have more outputs than there are names
            largest = int(max(self.labels_I.max(), self.predictions_I.max()))
            names += [f"class {number}" for number in range(len(names), largest + 1)]
        found: dict[str, Any] = {
            "classes": [each.as_json() for each in class_scores(problem, self.predictions_I, self.labels_I, names)]
        }
        if problem != ProblemType.MULTI_LABEL and len(names) <= MAX_CONFUSION_CLASSES:
            found["confusion"] = confusion_counts(self.predictions_I, self.labels_I, len(names)).tolist()
        return found

    def unknown_summary(self) -> dict[str, Any]:
        """The tokens of unknown text: how many, their share, and their own loss."""
        count = self.unknown_tokens
        share = count / (count + int(self.tokens_W.sum()))
        return {"tokens": count, "share": share, "nats": self.unknown_nats / count}

    def summary(self) -> dict[str, Any]:
        """Nats per token with its 95 % interval, perplexity, bits per byte and counts; of a classifier also its `metrics`."""
        nats, tokens = self.per_unit()
        low, high = ratio_interval(nats, tokens)
        metrics = {"metrics": self.compute_metrics()} if len(self.predictions_I) else {}
        return {
            **metrics,
            **self.class_summary(),
            **({"unknown": self.unknown_summary()} if self.unknown_tokens else {}),
            "nats": self.nats,
            "low": low,
            "high": high,
            "perplexity": math.exp(min(self.nats, 700.0)),
            "bits_per_byte": float(self.nats_W.sum()) / (math.log(2) * max(int(self.bytes_N.sum()), 1)),
            "tokens": int(self.tokens_W.sum()),
            "bytes": int(self.bytes_N.sum()),
            "documents": len(self.bytes_N),
        }


BatchResult = tuple[int, Any]
"""The number of a batch, and its scores."""


@torch.no_grad()
def score_held_out(
    model: Model,
    held_out: HeldOutSet,
    *,
    context: int,
    gather: Callable[[list[BatchResult]], list[BatchResult]] | None = None,
    rank: int = 0,
    ranks: int = 1,
) -> Scores:
    """Score every document. Each of several ranks scores a part, and `gather` collects the parts of all.

    Every rank runs the same number of batches, as sharded models need.
    """
    pieces = list(held_out.iter_rows(context))
    unknown = held_out.unknown_part()
    apart = score_held_out(model, unknown, context=context, gather=gather, rank=rank, ranks=ranks) if unknown else None
    lengths = [len(piece.row.inputs["input_ids"]) for piece in pieces]
    batches = list(length_batches(lengths, _TOKENS_AT_ONCE))
    while len(batches) % ranks:
        batches.append(batches[-1])
    parts: list[BatchResult] = []
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    with torch.compiler.set_stance("force_eager"):
        for index in range(rank, len(batches), ranks):
            rows = [pieces[i].row for i in batches[index]]
            batch = collate(rows, [0] * len(rows), pad_token_id=held_out.pad).to(device)
            parts.append((index, _score_output(model(**batch.model_inputs), batch, held_out)))
    model.train(was_training)
    nats_W = np.zeros(len(pieces))
    items: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    for index, (nats, answers) in gather(parts) if gather else parts:
        nats_W[batches[index]] = nats
        items.update(zip(batches[index], answers, strict=True) if answers else ())
    document_W = np.array([piece.document for piece in pieces], np.int64)
    answered = [items[i] for i in range(len(pieces))] if items else []
    return Scores(
        document_W=document_W,
        nats_W=nats_W,
        tokens_W=np.array([piece.row.label_count for piece in pieces], np.int64),
        bytes_N=np.asarray(held_out.bytes, np.int64),
        predictions_I=np.concatenate([predicted for predicted, _ in answered]) if answered else np.empty(0),
        labels_I=np.concatenate([actual for _, actual in answered]) if answered else np.empty(0),
        document_I=np.repeat(document_W, [len(actual) for _, actual in answered])
        if answered
        else np.empty(0, np.int64),
        problem=held_out.problem if answered and held_out.problem else "",
        names=np.array(held_out.labels if answered else (), np.str_),
        unknown_nats=float(apart.nats_W.sum()) if apart else 0.0,
        unknown_tokens=int(apart.tokens_W.sum()) if apart else 0,
    )


def _score_output(
    output: Output, batch: Batch, held_out: HeldOutSet
) -> tuple[np.ndarray, list[tuple[np.ndarray, np.ndarray]]]:
    """Each row's nats, and of a classifier the predictions and labels of its items."""
    if output.head is not None:
        nats_BT = token_nats(output.hidden, batch.labels, output.head.logits)
        answers = _predict_label_words(output, batch, held_out.label_token_ids) if held_out.label_token_ids else []
        return nats_BT.double().sum(1).cpu().numpy(), answers
    count = len(batch.labels)
    losses, predicted = _classification_losses(output.hidden.float(), batch.labels, held_out.problem)
    losses, predicted, actual = (t.reshape(count, -1).cpu().numpy() for t in (losses, predicted, batch.labels))
    answers = [(p[a != IGNORED], a[a != IGNORED]) for p, a in zip(predicted, actual, strict=True)]
    return losses.sum(1), answers


def _predict_label_words(
    output: Output, batch: Batch, label_token_ids: tuple[int, ...]
) -> list[tuple[np.ndarray, np.ndarray]]:
    """The predicted and the actual label word at the one label of each row, as indices of the words."""
    assert output.head is not None
    position_B = (batch.labels != IGNORED).int().argmax(1)
    rows_B = torch.arange(len(position_B), device=position_B.device)
    tokens_W = torch.tensor(label_token_ids, device=position_B.device)
    logits_BW = output.head.logits(output.hidden[rows_B, position_B])[:, tokens_W]
    actual_B = (batch.labels[rows_B, position_B][:, None] == tokens_W).int().argmax(1)
    predicted, actual = logits_BW.argmax(1).cpu().numpy(), actual_B.cpu().numpy()
    return [(predicted[i : i + 1], actual[i : i + 1]) for i in range(len(predicted))]


def _classification_losses(logits: Tensor, labels: Tensor, problem: ProblemType | None) -> tuple[Tensor, Tensor]:
    """The loss and the prediction of each label, of shape (B, ...): by argmax, each class by itself, or a number."""
    match problem:
        case ProblemType.MULTI_LABEL:
            losses = functional.binary_cross_entropy_with_logits(logits, labels, reduction="none").mean(1, keepdim=True)
            return losses.double(), (logits > 0).to(labels.dtype)
        case ProblemType.NUMBER:
            number = logits[..., :1]
            return (number - labels[:, None]).double().square(), number
        case _:
            losses = functional.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="none")
            return losses.double().view(len(labels), -1), logits.argmax(-1).view(len(labels), -1)


def token_nats(hidden_BTD: Tensor, labels_BT: Tensor, logits: Callable[[Tensor], Tensor]) -> Tensor:
    """`-log p(label)` of each position, of shape (B, T) and 0 without a label, without holding all logits at once."""
    flat, labels = hidden_BTD.flatten(0, 1), labels_BT.flatten()
    scored = (labels != IGNORED).nonzero().flatten()
    out = torch.zeros(labels.shape, device=labels.device)
    if not len(scored):
        return out.view(labels_BT.shape)
    width = logits(flat[:1]).shape[-1]
    rows = max(1, _LOGITS_AT_ONCE // width)
    parts = [functional.cross_entropy(logits(flat[i]).float(), labels[i], reduction="none") for i in scored.split(rows)]
    return out.index_copy(0, scored, torch.cat(parts)).view(labels_BT.shape)

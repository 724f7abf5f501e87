"""Metrics of classifiers (accuracy, F1, MCC, span F1, correlations), with bootstrap intervals over documents.

Legend: I labelled items, N documents, S draws, C classes.

What a metric of classes needs (how often each class is right, actual and predicted, and the counts of spans) is a sum over
documents. So a draw of documents is a sum of their counts, and nothing is scored again.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Sequence
from typing import TypedDict

import numpy as np
from scipy import stats
from scipy.sparse import csr_array, hstack

from postgrad.data.problem_type import ProblemType
from postgrad.lineage.record import ClassRecord
from postgrad.stats.bootstrap import percentile_interval, resample_counts, resample_sums, undefined_draws

CountMetric = Callable[[np.ndarray], np.ndarray]
"""A metric of each draw, of shape (S,), from counts of shape (S, 3, C): how often each class is right, actual, predicted."""
ItemMetric = Callable[[np.ndarray, np.ndarray], float]
"""A metric of `(labels, predictions)`."""


class MetricEstimate(TypedDict):
    """A metric, or its change, with its 95 % interval over documents."""

    value: float
    low: float | None
    high: float | None


_TAG = re.compile(r"O|[BIES]-.+")
_SPAN_STARTS = ("B-", "I-", "S-")
_ENTRIES_AT_ONCE = 2_000_000


def _accuracy(counts_S3C: np.ndarray) -> np.ndarray:
    return counts_S3C[:, 0].sum(1) / counts_S3C[:, 1].sum(1)


def _f1(counts_S3C: np.ndarray) -> np.ndarray:
    """The harmonic mean of precision and recall of each class, of shape (S, C); NaN for one that does not occur."""
    with np.errstate(invalid="ignore"):
        return 2 * counts_S3C[:, 0] / (counts_S3C[:, 1] + counts_S3C[:, 2])


def _macro_f1(counts_S3C: np.ndarray) -> np.ndarray:
    """The mean over the classes that occur."""
    return np.nanmean(_f1(counts_S3C), 1)


def _positive_f1(counts_S3C: np.ndarray) -> np.ndarray:
    return np.nan_to_num(_f1(counts_S3C)[:, 1])


def _mcc(counts_S3C: np.ndarray) -> np.ndarray:
    """Matthews' correlation of labels and predictions (1975; Gorodkin 2004 for several classes); 0 where one is constant."""
    right_S, total_S = counts_S3C[:, 0].sum(1), counts_S3C[:, 1].sum(1)
    actual_SC, predicted_SC = counts_S3C[:, 1], counts_S3C[:, 2]
    covariance = right_S * total_S - (actual_SC * predicted_SC).sum(1)
    variances = (total_S**2 - (actual_SC**2).sum(1)) * (total_S**2 - (predicted_SC**2).sum(1))
    return np.where(variances > 0, covariance / np.sqrt(np.where(variances > 0, variances, 1)), 0.0)


def _mse(labels_I: np.ndarray, predictions_I: np.ndarray) -> float:
    return float(((labels_I - predictions_I) ** 2).mean())


def _pearson(labels_I: np.ndarray, predictions_I: np.ndarray) -> float:
    return float(np.corrcoef(labels_I, predictions_I)[0, 1]) if labels_I.std() and predictions_I.std() else 0.0


def _spearman(labels_I: np.ndarray, predictions_I: np.ndarray) -> float:
    """Pearson's correlation of the ranks, ties at their mean rank."""
    return _pearson(stats.rankdata(labels_I), stats.rankdata(predictions_I))


COUNT_METRICS: dict[ProblemType, dict[str, CountMetric]] = {
    ProblemType.CLASS: {"accuracy": _accuracy, "macro F1": _macro_f1, "MCC": _mcc},
    ProblemType.TAGS: {"accuracy": _accuracy, "macro F1": _macro_f1, "MCC": _mcc},
    ProblemType.MULTI_LABEL: {"accuracy": _accuracy, "F1": _positive_f1, "MCC": _mcc},
}
"""With several labels at once every pair of example and class is one decision (micro-averaged)."""
REGRESSION_METRICS: dict[str, ItemMetric] = {"MSE": _mse, "Pearson": _pearson, "Spearman": _spearman}
_SPAN_METRICS = ("span F1", "span precision", "span recall")


def metric_names(problem: ProblemType, names: Sequence[str] = ()) -> list[str]:
    """The metrics of a problem; `names` are those of its classes."""
    if problem == ProblemType.NUMBER:
        return [*REGRESSION_METRICS]
    spans = _SPAN_METRICS if problem == ProblemType.TAGS and is_span_tagging(names) else ()
    return [*spans, *COUNT_METRICS[problem]]


def main_metric(problem: ProblemType, names: Sequence[str]) -> tuple[str, int]:
    """The metric that classifiers are selected by, and 1 where higher is better, else -1."""
    if problem == ProblemType.TAGS and is_span_tagging(names):
        return "span F1", 1
    return {ProblemType.MULTI_LABEL: ("F1", 1), ProblemType.NUMBER: ("MSE", -1)}.get(problem, ("accuracy", 1))


def chance_corrected_metric(problem: ProblemType, names: Sequence[str] = ()) -> str:
    """The metric that verdicts are of: 0 for a model that answers everything alike, whatever share of it is right.

    Accuracy and the loss reward the answer that is most often right; MCC, the F1 of spans and a correlation do not.
    """
    if problem == ProblemType.NUMBER:
        return "Pearson"
    return "span F1" if problem == ProblemType.TAGS and is_span_tagging(names) else "MCC"


def compute_metrics(
    problem: ProblemType,
    predictions_I: np.ndarray,
    labels_I: np.ndarray,
    document_I: np.ndarray,
    names: Sequence[str] = (),
) -> dict[str, MetricEstimate]:
    """Each metric's value with its 95 % interval over documents.

    With the `names` of the classes, tags that mark spans (`B-x I-x O`, also with `E-` and `S-`) have the metrics of spans too.
    """
    values = metric_values(problem, predictions_I, labels_I, document_I, names)
    samples = _resampled_metrics(problem, predictions_I, labels_I, document_I, names)
    return {name: _value_with_interval(value, samples[name]) for name, value in values.items()}


def metric_values(
    problem: ProblemType,
    predictions_I: np.ndarray,
    labels_I: np.ndarray,
    document_I: np.ndarray,
    names: Sequence[str] = (),
) -> dict[str, float]:
    """Each metric's value alone."""
    if problem == ProblemType.NUMBER:
        return {name: measure(labels_I, predictions_I) for name, measure in REGRESSION_METRICS.items()}
    counts_NK = _document_counts(problem, predictions_I, labels_I, document_I, names)
    return {n: float(v[0]) for n, v in _metrics_of_sums(problem, np.asarray(counts_NK.sum(0))[None], names).items()}


def compare_metrics(
    problem: ProblemType,
    before_I: np.ndarray,
    after_I: np.ndarray,
    labels_I: np.ndarray,
    document_I: np.ndarray,
    names: Sequence[str] = (),
) -> dict[str, MetricEstimate]:
    """How much each metric changes from the predictions `before` to `after`, with its paired interval."""
    sides = (before_I, after_I)
    before, after = (metric_values(problem, side_I, labels_I, document_I, names) for side_I in sides)
    drawn_before, drawn_after = (_resampled_metrics(problem, side_I, labels_I, document_I, names) for side_I in sides)
    return {
        name: _value_with_interval(after[name] - before[name], drawn_after[name] - drawn_before[name]) for name in after
    }


def _value_with_interval(value: float, samples_S: np.ndarray) -> MetricEstimate:
    low, high = percentile_interval(samples_S)
    return {"value": value, "low": low, "high": high}


def _resampled_metrics(
    problem: ProblemType, predictions_I: np.ndarray, labels_I: np.ndarray, document_I: np.ndarray, names: Sequence[str]
) -> dict[str, np.ndarray]:
    """Each metric of every draw of documents, of shape (S,)."""
    if len(np.unique(document_I)) < 2:
        return dict.fromkeys(metric_names(problem, names), undefined_draws())
    if problem == ProblemType.NUMBER:
        return _resampled_regression(predictions_I, labels_I, document_I)
    counts_NK = _document_counts(problem, predictions_I, labels_I, document_I, names)
    return _metrics_of_sums(problem, resample_sums(counts_NK), names)


# --- class by class ---------------------------------------------------------------------------------------------------


def class_scores(
    problem: ProblemType, predictions_I: np.ndarray, labels_I: np.ndarray, names: Sequence[str]
) -> list[ClassRecord]:
    """Each class by itself, in the order of `names`; empty for numbers."""
    if problem == ProblemType.NUMBER or not names:
        return []
    if problem == ProblemType.MULTI_LABEL:
        actual_IC, predicted_IC = (side_I.reshape(-1, len(names)) > 0 for side_I in (labels_I, predictions_I))
        right_C, actual_C, predicted_C = (
            side_IC.sum(0) for side_IC in (actual_IC & predicted_IC, actual_IC, predicted_IC)
        )
    else:
        counts_CC = confusion_counts(predictions_I, labels_I, len(names))
        right_C, actual_C, predicted_C = counts_CC.diagonal(), counts_CC.sum(1), counts_CC.sum(0)
    rows = zip(names, right_C.tolist(), actual_C.tolist(), predicted_C.tolist(), strict=True)
    return [
        ClassRecord(
            name=str(name),
            precision=right / max(predicted, 1),
            recall=right / max(actual, 1),
            f1=2 * right / max(actual + predicted, 1),
            support=actual,
            predicted=predicted,
        )
        for name, right, actual, predicted in rows
    ]


def confusion_counts(predictions_I: np.ndarray, labels_I: np.ndarray, classes: int) -> np.ndarray:
    """How often each class (row) is taken for each class (column), of shape (C, C)."""
    pairs_I = labels_I.astype(np.int64) * classes + predictions_I.astype(np.int64)
    return np.bincount(pairs_I, minlength=classes * classes).reshape(classes, classes)


# --- counts of classes ------------------------------------------------------------------------------------------------


def _document_counts(
    problem: ProblemType, predictions_I: np.ndarray, labels_I: np.ndarray, document_I: np.ndarray, names: Sequence[str]
) -> csr_array:
    """Counts of each document, of shape (N, K): three of spans (where tags mark spans), then (3, C) of the classes."""
    documents, row_I = np.unique(document_I, return_inverse=True)
    both = np.concatenate([labels_I, predictions_I, [0, 1] if problem == ProblemType.MULTI_LABEL else []])
    classes, code = np.unique(both, return_inverse=True)
    size, width = len(labels_I), len(classes)
    actual_I, predicted_I = code[:size], code[size : 2 * size]
    right_I = np.flatnonzero(actual_I == predicted_I)
    rows = np.concatenate([row_I[right_I], row_I, row_I])
    columns = np.concatenate([actual_I[right_I], width + actual_I, 2 * width + predicted_I])
    counts_NK = csr_array((np.ones(len(rows)), (rows, columns)), shape=(len(documents), 3 * width))
    if problem == ProblemType.TAGS and is_span_tagging(names):
        spans_N3 = span_counts(predictions_I, labels_I, document_I, names)
        counts_NK = csr_array(hstack([csr_array(spans_N3), counts_NK]))
    return counts_NK


def _metrics_of_sums(problem: ProblemType, sums_SK: np.ndarray, names: Sequence[str]) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    if problem == ProblemType.TAGS and is_span_tagging(names):
        found, sums_SK = _span_metrics(sums_SK[:, :3]), sums_SK[:, 3:]
    counts_S3C = sums_SK.reshape(len(sums_SK), 3, -1)
    return found | {name: measure(counts_S3C) for name, measure in COUNT_METRICS[problem].items()}


# --- numbers ----------------------------------------------------------------------------------------------------------


def _resampled_regression(
    predictions_I: np.ndarray, labels_I: np.ndarray, document_I: np.ndarray
) -> dict[str, np.ndarray]:
    documents, row_I = np.unique(document_I, return_inverse=True)
    labels, predictions = labels_I.astype(np.float64), predictions_I.astype(np.float64)
    samples: dict[str, list[np.ndarray]] = {name: [] for name in REGRESSION_METRICS}
    rows = max(1, _ENTRIES_AT_ONCE // len(row_I))
    for counts_SN in resample_counts(len(documents)):
        for begin in range(0, len(counts_SN), rows):
            weights_SI = counts_SN[begin : begin + rows][:, row_I]
            samples["MSE"].append(weights_SI @ (labels - predictions) ** 2 / weights_SI.sum(1))
            samples["Pearson"].append(correlation(weights_SI @ correlation_moments(labels, predictions)))
            samples["Spearman"].append(
                _rank_correlation(_drawn_ranks(labels, weights_SI), _drawn_ranks(predictions, weights_SI), weights_SI)
            )
    return {name: np.concatenate(parts) for name, parts in samples.items()}


def correlation_moments(x_I: np.ndarray, y_I: np.ndarray) -> np.ndarray:
    """The sums that a correlation is made of, around the means so that nothing cancels, of shape (I, 6)."""
    x, y = x_I - x_I.mean(), y_I - y_I.mean()
    return np.stack([np.ones_like(x), x, y, x * x, y * y, x * y], 1)


def correlation(moments_S6: np.ndarray) -> np.ndarray:
    """Pearson's r; 0 where one side does not vary."""
    n, x, y, xx, yy, xy = moments_S6.T
    square = (xx - x * x / n) * (yy - y * y / n)
    return np.where(square > 1e-20 * n * n, (xy - x * y / n) / np.sqrt(np.maximum(square, 1e-300)), 0.0)


def _drawn_ranks(values_I: np.ndarray, weights_SI: np.ndarray) -> np.ndarray:
    """The rank that each item has in each draw, less the mean rank, of shape (S, I); ties at their mean rank."""
    group_I = np.unique(values_I, return_inverse=True)[1]
    order = np.argsort(group_I, kind="stable")
    begins = np.flatnonzero(np.diff(group_I[order], prepend=-1))
    size_SG = np.add.reduceat(weights_SI[:, order], begins, axis=1)
    rank_SG = size_SG.cumsum(1) - (size_SG - 1) / 2
    return (rank_SG - (weights_SI.sum(1, keepdims=True) + 1) / 2)[:, group_I]


def _rank_correlation(x_SI: np.ndarray, y_SI: np.ndarray, weights_SI: np.ndarray) -> np.ndarray:
    xx, yy, xy = ((weights_SI * product).sum(1) for product in (x_SI * x_SI, y_SI * y_SI, x_SI * y_SI))
    return np.where((xx > 0) & (yy > 0), xy / np.sqrt(np.maximum(xx * yy, 1e-300)), 0.0)


# --- spans ------------------------------------------------------------------------------------------------------------


def is_span_tagging(names: Sequence[str]) -> bool:
    """Whether tags mark spans, as in BIO, IOB2 and IOBES."""
    return all(_TAG.fullmatch(name) for name in names) and any(name.startswith(_SPAN_STARTS) for name in names)


def span_counts(
    predictions_I: np.ndarray, labels_I: np.ndarray, document_I: np.ndarray, names: Sequence[str]
) -> np.ndarray:
    """How many spans of each document are right, predicted and actual, of shape (N, 3).

    A span is right when its type, its first and its last word are. Spans are seqeval's (its default mode, that of CoNLL's
    script: an inside tag that continues nothing begins a span).
    """
    from seqeval.metrics.sequence_labeling import get_entities

    order = np.argsort(document_I, kind="stable")
    cuts = np.flatnonzero(np.diff(document_I[order])) + 1
    out = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for items in np.split(order, cuts):
            predicted, actual = (
                set(get_entities([names[int(tag)] for tag in tags[items]])) for tags in (predictions_I, labels_I)
            )
            out.append((len(predicted & actual), len(predicted), len(actual)))
    return np.array(out, np.int64)


def _span_metrics(counts_S3: np.ndarray) -> dict[str, np.ndarray]:
    """Micro-averaged over the types of spans; 0 where there is none."""
    right_S, predicted_S, actual_S = counts_S3.T
    values = (
        2 * right_S / np.maximum(predicted_S + actual_S, 1),
        right_S / np.maximum(predicted_S, 1),
        right_S / np.maximum(actual_S, 1),
    )
    return dict(zip(_SPAN_METRICS, values, strict=True))

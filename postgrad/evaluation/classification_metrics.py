"""How often is a classifier right? Metrics of what was said and meant, with intervals from resampled documents.

Legend: I labelled items, N documents, R draws, C classes.

A document that is drawn twice counts twice, so a draw is a count for each document, and nothing is measured anew: what a
metric is made of (how often each class was said for each other, spans that were found) adds up over documents.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Sequence

import numpy as np
from scipy import stats

from postgrad.data.problem_type import ProblemType

_DRAWS = 200

CountMetric = Callable[[np.ndarray], np.ndarray]
"""A metric of each draw, of shape (R,), from how often each class was meant and said, of shape (R, C meant, C said)."""
ItemMetric = Callable[[np.ndarray, np.ndarray], float]
"""A metric of `(meant, said)`."""

_TAG = re.compile(r"O|[BIES]-.+")
_SPAN_STARTS = ("B-", "I-", "S-")


def _accuracy(counts_RCC: np.ndarray) -> np.ndarray:
    return np.einsum("rcc->r", counts_RCC) / counts_RCC.sum((1, 2))


def _f1(counts_RCC: np.ndarray) -> np.ndarray:
    """The harmonic mean of precision and recall of each class, of shape (R, C); not a number for one that does not occur."""
    both_RC = counts_RCC.sum(1) + counts_RCC.sum(2)
    with np.errstate(invalid="ignore"):
        return 2 * np.einsum("rcc->rc", counts_RCC) / both_RC


def _macro_f1(counts_RCC: np.ndarray) -> np.ndarray:
    """The mean over the classes that occur."""
    return np.nanmean(_f1(counts_RCC), 1)


def _positive_f1(counts_RCC: np.ndarray) -> np.ndarray:
    return np.nan_to_num(_f1(counts_RCC)[:, 1])


def _mcc(counts_RCC: np.ndarray) -> np.ndarray:
    """The correlation of what is meant and said (Matthews 1975; Gorodkin 2004 for several classes); 0 where one is constant."""
    total_R, right_R = counts_RCC.sum((1, 2)), np.einsum("rcc->r", counts_RCC)
    meant_RC, said_RC = counts_RCC.sum(2), counts_RCC.sum(1)
    together = right_R * total_R - (meant_RC * said_RC).sum(1)
    alone = (total_R**2 - (meant_RC**2).sum(1)) * (total_R**2 - (said_RC**2).sum(1))
    return np.where(alone > 0, together / np.sqrt(np.where(alone > 0, alone, 1)), 0.0)


def _mse(labels_I: np.ndarray, predictions_I: np.ndarray) -> float:
    return float(((labels_I - predictions_I) ** 2).mean())


def _pearson(labels_I: np.ndarray, predictions_I: np.ndarray) -> float:
    return float(np.corrcoef(labels_I, predictions_I)[0, 1]) if labels_I.std() and predictions_I.std() else 0.0


def _spearman(labels_I: np.ndarray, predictions_I: np.ndarray) -> float:
    """Pearson's correlation of the ranks, ties sharing theirs."""
    return _pearson(stats.rankdata(labels_I), stats.rankdata(predictions_I))


COUNT_METRICS: dict[str, dict[str, CountMetric]] = {
    "class": {"accuracy": _accuracy, "macro F1": _macro_f1, "MCC": _mcc},
    "tags": {"accuracy": _accuracy, "macro F1": _macro_f1},
    "multi": {"accuracy": _accuracy, "F1": _positive_f1},
}
"""By what is decided. Of several classes at once every pair of example and class is one decision (micro-averaged)."""
REGRESSION_METRICS: dict[str, ItemMetric] = {"MSE": _mse, "Pearson": _pearson, "Spearman": _spearman}
PROBLEMS = (*COUNT_METRICS, "number")


def metric_names(problem: str, names: Sequence[str] = ()) -> list[str]:
    """The names of what `measured` measures."""
    if problem == ProblemType.NUMBER:
        return [*REGRESSION_METRICS]
    spans = [*_span_metrics(np.zeros((1, 3)))] if problem == ProblemType.TAGS and is_span_tagging(names) else []
    return [*spans, *COUNT_METRICS.get(problem, {})]


def compute_metrics(
    problem: str,
    predictions_I: np.ndarray,
    labels_I: np.ndarray,
    document_I: np.ndarray,
    names: Sequence[str] = (),
) -> dict[str, dict[str, float]]:
    """Each metric's value with its 95 % interval: documents (`item_I`) are drawn with replacement, seeded.

    With the `names` of the classes, tags that mark spans (`B-x I-x O`, also with `E-` and `S-`) have the metrics of spans too.
    """
    of_I = np.unique(document_I, return_inverse=True)[1]
    found = _resampled_metrics(problem, predictions_I, labels_I, of_I, names, _bootstrap_weights(int(of_I.max()) + 1))
    return {name: _value_with_interval(values_R) for name, values_R in found.items()}


def metric_values(
    problem: str, predictions_I: np.ndarray, labels_I: np.ndarray, document_I: np.ndarray, names: Sequence[str] = ()
) -> dict[str, float]:
    """Each metric's value alone."""
    of_I = np.unique(document_I, return_inverse=True)[1]
    once_1N = np.ones((1, int(of_I.max()) + 1), np.int64)
    return {
        n: float(values[0])
        for n, values in _resampled_metrics(problem, predictions_I, labels_I, of_I, names, once_1N).items()
    }


def compare_metrics(
    problem: str,
    before_I: np.ndarray,
    after_I: np.ndarray,
    labels_I: np.ndarray,
    document_I: np.ndarray,
    names: Sequence[str] = (),
) -> dict[str, dict[str, float]]:
    """How much each metric changes from what was said `before` to `after`, with its interval: both have the same draws."""
    of_I = np.unique(document_I, return_inverse=True)[1]
    times_RN = _bootstrap_weights(int(of_I.max()) + 1)
    before, after = (
        _resampled_metrics(problem, said_I, labels_I, of_I, names, times_RN) for said_I in (before_I, after_I)
    )
    return {name: _value_with_interval(after[name] - before[name]) for name in after}


def _resampled_metrics(
    problem: str,
    predictions_I: np.ndarray,
    labels_I: np.ndarray,
    document_I: np.ndarray,
    names: Sequence[str],
    weights_RN: np.ndarray,
) -> dict[str, np.ndarray]:
    """Each metric of every draw of documents: of shape (R,)."""
    if problem == ProblemType.NUMBER:
        return _regression_metrics(predictions_I, labels_I, document_I, weights_RN)
    counts_RCC = _confusion_counts(problem, predictions_I, labels_I, document_I, weights_RN)
    found = {name: measure(counts_RCC) for name, measure in COUNT_METRICS[problem].items()}
    if problem == ProblemType.TAGS and is_span_tagging(names):
        return _span_metrics(weights_RN @ span_counts(predictions_I, labels_I, document_I, names)) | found
    return found


def _bootstrap_weights(documents: int) -> np.ndarray:
    """How often each document is drawn, of shape (R, N); the first draw is the documents as they are."""
    draws = np.random.default_rng(0).integers(documents, size=(_DRAWS, documents))
    return np.stack([np.ones(documents, np.int64), *(np.bincount(draw, minlength=documents) for draw in draws)])


def _value_with_interval(values_R: np.ndarray) -> dict[str, float]:
    low, high = np.percentile(values_R[1:], [2.5, 97.5])
    return {"value": float(values_R[0]), "low": float(low), "high": float(high)}


def _confusion_counts(
    problem: str, predictions_I: np.ndarray, labels_I: np.ndarray, document_I: np.ndarray, weights_RN: np.ndarray
) -> np.ndarray:
    """How often each class was meant and said in each draw, of shape (R, C, C); of several at once: no and yes."""
    both, size = (
        np.concatenate([labels_I, predictions_I, [0, 1] if problem == ProblemType.MULTI_LABEL else []]),
        len(labels_I),
    )
    classes, code = np.unique(both, return_inverse=True)
    pair_I = code[:size] * len(classes) + code[size : 2 * size]
    shape = len(classes), len(classes)
    return np.stack([np.bincount(pair_I, times_N[document_I], np.prod(shape)).reshape(shape) for times_N in weights_RN])


def _regression_metrics(
    predictions_I: np.ndarray, labels_I: np.ndarray, document_I: np.ndarray, weights_RN: np.ndarray
) -> dict[str, np.ndarray]:
    drawn = [np.repeat(np.arange(len(document_I)), times_N[document_I]) for times_N in weights_RN]
    return {
        name: np.array([of(labels_I[i], predictions_I[i]) for i in drawn]) for name, of in REGRESSION_METRICS.items()
    }


# --- spans ----------------------------------------------------------------------------------------------------


def is_span_tagging(names: Sequence[str]) -> bool:
    """Whether tags mark spans, as in BIO, IOB2 and IOBES."""
    return all(_TAG.fullmatch(name) for name in names) and any(name.startswith(_SPAN_STARTS) for name in names)


def span_counts(
    predictions_I: np.ndarray, labels_I: np.ndarray, document_I: np.ndarray, names: Sequence[str]
) -> np.ndarray:
    """How many spans of each document were found, said and meant, of shape (N, 3).

    A span is found when its type, its first and its last word are right. What a span is, seqeval says (its default mode,
    as CoNLL's script has it: a tag that goes on with nothing begins a span).
    """
    from seqeval.metrics.sequence_labeling import get_entities

    order = np.argsort(document_I, kind="stable")
    cuts = np.flatnonzero(np.diff(document_I[order])) + 1
    out = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for items in np.split(order, cuts):
            said, meant = (
                set(get_entities([names[int(tag)] for tag in tags[items]])) for tags in (predictions_I, labels_I)
            )
            out.append((len(said & meant), len(said), len(meant)))
    return np.array(out, np.int64)


def _span_metrics(counts_R3: np.ndarray) -> dict[str, np.ndarray]:
    """Micro-averaged over the types of spans; 0 where there is none."""
    found_R, said_R, meant_R = counts_R3.T
    return {
        "span F1": 2 * found_R / np.maximum(said_R + meant_R, 1),
        "span precision": found_R / np.maximum(said_R, 1),
        "span recall": found_R / np.maximum(meant_R, 1),
    }

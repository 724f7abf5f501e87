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

_DRAWS = 200

OfCounts = Callable[[np.ndarray], np.ndarray]
"""A metric of each draw, of shape (R,), from how often each class was meant and said, of shape (R, C meant, C said)."""
OfItems = Callable[[np.ndarray, np.ndarray], float]
"""A metric of `(meant, said)`."""

_TAG = re.compile(r"O|[BIES]-.+")
_BEGINS = ("B-", "I-", "S-")


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


def _f1_of_yes(counts_RCC: np.ndarray) -> np.ndarray:
    return np.nan_to_num(_f1(counts_RCC)[:, 1])


def _mcc(counts_RCC: np.ndarray) -> np.ndarray:
    """The correlation of what is meant and said (Matthews 1975; Gorodkin 2004 for several classes); 0 where one is constant."""
    total_R, right_R = counts_RCC.sum((1, 2)), np.einsum("rcc->r", counts_RCC)
    meant_RC, said_RC = counts_RCC.sum(2), counts_RCC.sum(1)
    together = right_R * total_R - (meant_RC * said_RC).sum(1)
    alone = (total_R**2 - (meant_RC**2).sum(1)) * (total_R**2 - (said_RC**2).sum(1))
    return np.where(alone > 0, together / np.sqrt(np.where(alone > 0, alone, 1)), 0.0)


def _mse(meant_I: np.ndarray, said_I: np.ndarray) -> float:
    return float(((meant_I - said_I) ** 2).mean())


def _pearson(meant_I: np.ndarray, said_I: np.ndarray) -> float:
    return float(np.corrcoef(meant_I, said_I)[0, 1]) if meant_I.std() and said_I.std() else 0.0


def _spearman(meant_I: np.ndarray, said_I: np.ndarray) -> float:
    """Pearson's correlation of the ranks, ties sharing theirs."""
    return _pearson(stats.rankdata(meant_I), stats.rankdata(said_I))


COUNTED: dict[str, dict[str, OfCounts]] = {
    "class": {"accuracy": _accuracy, "macro F1": _macro_f1, "MCC": _mcc},
    "tags": {"accuracy": _accuracy, "macro F1": _macro_f1},
    "multi": {"accuracy": _accuracy, "F1": _f1_of_yes},
}
"""By what is decided. Of several classes at once every pair of example and class is one decision (micro-averaged)."""
OF_NUMBERS: dict[str, OfItems] = {"MSE": _mse, "Pearson": _pearson, "Spearman": _spearman}
PROBLEMS = (*COUNTED, "number")


def metrics_of(problem: str, names: Sequence[str] = ()) -> list[str]:
    """The names of what `measured` measures."""
    if problem == "number":
        return [*OF_NUMBERS]
    spans = [*_of_spans(np.zeros((1, 3)))] if problem == "tags" and mark_spans(names) else []
    return [*spans, *COUNTED.get(problem, {})]


def measured(
    problem: str,
    said_I: np.ndarray,
    meant_I: np.ndarray,
    item_I: np.ndarray,
    names: Sequence[str] = (),
) -> dict[str, dict[str, float]]:
    """Each metric's value with its 95 % interval: documents (`item_I`) are drawn with replacement, seeded.

    With the `names` of the classes, tags that mark spans (`B-x I-x O`, also with `E-` and `S-`) have the metrics of spans too.
    """
    of_I = np.unique(item_I, return_inverse=True)[1]
    found = _drawn(problem, said_I, meant_I, of_I, names, _times(int(of_I.max()) + 1))
    return {name: _with_interval(values_R) for name, values_R in found.items()}


def values_of(
    problem: str, said_I: np.ndarray, meant_I: np.ndarray, item_I: np.ndarray, names: Sequence[str] = ()
) -> dict[str, float]:
    """Each metric's value alone."""
    of_I = np.unique(item_I, return_inverse=True)[1]
    once_1N = np.ones((1, int(of_I.max()) + 1), np.int64)
    return {n: float(values[0]) for n, values in _drawn(problem, said_I, meant_I, of_I, names, once_1N).items()}


def compared(
    problem: str,
    before_I: np.ndarray,
    after_I: np.ndarray,
    meant_I: np.ndarray,
    item_I: np.ndarray,
    names: Sequence[str] = (),
) -> dict[str, dict[str, float]]:
    """How much each metric changes from what was said `before` to `after`, with its interval: both have the same draws."""
    of_I = np.unique(item_I, return_inverse=True)[1]
    times_RN = _times(int(of_I.max()) + 1)
    before, after = (_drawn(problem, said_I, meant_I, of_I, names, times_RN) for said_I in (before_I, after_I))
    return {name: _with_interval(after[name] - before[name]) for name in after}


def _drawn(
    problem: str,
    said_I: np.ndarray,
    meant_I: np.ndarray,
    of_I: np.ndarray,
    names: Sequence[str],
    times_RN: np.ndarray,
) -> dict[str, np.ndarray]:
    """Each metric of every draw of documents: of shape (R,)."""
    if problem == "number":
        return _of_numbers(said_I, meant_I, of_I, times_RN)
    counts_RCC = _counts(problem, said_I, meant_I, of_I, times_RN)
    found = {name: measure(counts_RCC) for name, measure in COUNTED[problem].items()}
    if problem == "tags" and mark_spans(names):
        return _of_spans(times_RN @ span_counts(said_I, meant_I, of_I, names)) | found
    return found


def _times(documents: int) -> np.ndarray:
    """How often each document is drawn, of shape (R, N); the first draw is the documents as they are."""
    draws = np.random.default_rng(0).integers(documents, size=(_DRAWS, documents))
    return np.stack([np.ones(documents, np.int64), *(np.bincount(draw, minlength=documents) for draw in draws)])


def _with_interval(values_R: np.ndarray) -> dict[str, float]:
    low, high = np.percentile(values_R[1:], [2.5, 97.5])
    return {"value": float(values_R[0]), "low": float(low), "high": float(high)}


def _counts(
    problem: str, said_I: np.ndarray, meant_I: np.ndarray, of_I: np.ndarray, times_RN: np.ndarray
) -> np.ndarray:
    """How often each class was meant and said in each draw, of shape (R, C, C); of several at once: no and yes."""
    both, size = np.concatenate([meant_I, said_I, [0, 1] if problem == "multi" else []]), len(meant_I)
    classes, code = np.unique(both, return_inverse=True)
    pair_I = code[:size] * len(classes) + code[size : 2 * size]
    shape = len(classes), len(classes)
    return np.stack([np.bincount(pair_I, times_N[of_I], np.prod(shape)).reshape(shape) for times_N in times_RN])


def _of_numbers(
    said_I: np.ndarray, meant_I: np.ndarray, of_I: np.ndarray, times_RN: np.ndarray
) -> dict[str, np.ndarray]:
    drawn = [np.repeat(np.arange(len(of_I)), times_N[of_I]) for times_N in times_RN]
    return {name: np.array([of(meant_I[i], said_I[i]) for i in drawn]) for name, of in OF_NUMBERS.items()}


# --- spans ----------------------------------------------------------------------------------------------------


def mark_spans(names: Sequence[str]) -> bool:
    """Whether tags mark spans, as in BIO, IOB2 and IOBES."""
    return all(_TAG.fullmatch(name) for name in names) and any(name.startswith(_BEGINS) for name in names)


def span_counts(said_I: np.ndarray, meant_I: np.ndarray, of_I: np.ndarray, names: Sequence[str]) -> np.ndarray:
    """How many spans of each document were found, said and meant, of shape (N, 3).

    A span is found when its type, its first and its last word are right. What a span is, seqeval says (its default mode,
    as CoNLL's script has it: a tag that goes on with nothing begins a span).
    """
    from seqeval.metrics.sequence_labeling import get_entities

    order = np.argsort(of_I, kind="stable")
    cuts = np.flatnonzero(np.diff(of_I[order])) + 1
    out = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for items in np.split(order, cuts):
            said, meant = (set(get_entities([names[int(tag)] for tag in tags[items]])) for tags in (said_I, meant_I))
            out.append((len(said & meant), len(said), len(meant)))
    return np.array(out, np.int64)


def _of_spans(counts_R3: np.ndarray) -> dict[str, np.ndarray]:
    """Micro-averaged over the types of spans; 0 where there is none."""
    found_R, said_R, meant_R = counts_R3.T
    return {
        "span F1": 2 * found_R / np.maximum(said_R + meant_R, 1),
        "span precision": found_R / np.maximum(said_R, 1),
        "span recall": found_R / np.maximum(meant_R, 1),
    }

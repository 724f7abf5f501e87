"""How often is a classifier right? Scikit-learn's metrics with intervals from resampled documents.

Legend: I labelled items, N documents.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np
from sklearn import metrics

Measure = Callable[[np.ndarray, np.ndarray], float]
"""A metric of `(meant, said)`."""

_DRAWS = 200


def _pearson(meant_I: np.ndarray, said_I: np.ndarray) -> float:
    return float(np.corrcoef(meant_I, said_I)[0, 1]) if meant_I.std() and said_I.std() else 0.0


def _macro_f1(meant_I: np.ndarray, said_I: np.ndarray) -> float:
    return float(metrics.f1_score(meant_I, said_I, average="macro", zero_division=0))


MEASURES: dict[str, dict[str, Measure]] = {
    "class": {"accuracy": metrics.accuracy_score, "macro F1": _macro_f1, "MCC": metrics.matthews_corrcoef},
    "tags": {"accuracy": metrics.accuracy_score, "macro F1": _macro_f1},
    "multi": {
        "accuracy": metrics.accuracy_score,
        "F1": lambda meant, said: float(metrics.f1_score(meant, said, zero_division=0)),
    },
    "number": {"MSE": metrics.mean_squared_error, "Pearson": _pearson},
}
"""By what is decided. Of several classes at once every pair of example and class is one decision (micro-averaged)."""


def measured(problem: str, said_I: np.ndarray, meant_I: np.ndarray, item_I: np.ndarray) -> dict[str, dict[str, float]]:
    """Each metric's value with its 95 % interval: documents are drawn with replacement, seeded, and measured again."""
    out: dict[str, dict[str, float]] = {}
    documents = np.unique(item_I)
    of_document = (
        [np.flatnonzero(item_I == document) for document in documents] if len(documents) < len(item_I) else None
    )
    draws = np.random.default_rng(0).integers(len(documents), size=(_DRAWS, len(documents)))
    for name, measure in MEASURES[problem].items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a draw may lack a class
            values = []
            for draw in draws:
                items = draw if of_document is None else np.concatenate([of_document[i] for i in draw])
                values.append(float(measure(meant_I[items], said_I[items])))
            low, high = np.percentile(values, [2.5, 97.5])
            out[name] = {"value": float(measure(meant_I, said_I)), "low": float(low), "high": float(high)}
    return out

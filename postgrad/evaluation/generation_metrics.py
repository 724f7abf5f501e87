"""Metrics of generated answers against references, with bootstrap intervals over items.

Legend: K prompt seeds, I items, S statistics of an item, D draws, L predicted or true labels.

A metric is two functions: the *statistics* of each item, which add up, and the *value* of their sum. So accuracy and a mean of
F1, but also BLEU of a whole corpus, macro F1 or a correlation, are resampled alike: items are drawn with replacement, their
statistics added, the value taken. The same draws serve every seed and both models, so that a change is paired.
"""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
from scipy.stats import rankdata

from postgrad.data.problem_type import ProblemType
from postgrad.errors import MissingExtra
from postgrad.evaluation.classification_metrics import COUNT_METRICS, correlation, correlation_moments
from postgrad.stats.bootstrap import percentile_interval, resample_sums
from postgrad.stats.forgetting import Verdict

MetricName = Literal[
    "accuracy",
    "macro-F1",
    "MCC",
    "exact-match",
    "F1",
    "ROUGE-1",
    "ROUGE-2",
    "ROUGE-L",
    "BLEU",
    "chrF",
    "numeric",
    "Pearson",
    "Spearman",
]

KEPT_MARGIN = 0.01
"""A metric is *kept* when the whole interval of its change lies within this share of its scale."""

Predictions = Sequence[str]
References = Sequence[Sequence[str]]
"""References of each item: one answer, or several of which the best counts."""


@dataclass(frozen=True)
class Metric:
    """`statistics` maps `(predictions, references)` to shape (I, S), `value` their sums (D, S) to values of shape (D,)."""

    statistics: Callable[[Predictions, References], np.ndarray]
    value: Callable[[np.ndarray], np.ndarray]
    scale: float = 1.0
    """Its largest value."""


@dataclass(frozen=True)
class TaskPredictions:
    """Predictions for each item, one per prompt seed, and their references."""

    predictions_KI: tuple[tuple[str, ...], ...]
    references_I: tuple[tuple[str, ...], ...]

    def __len__(self) -> int:
        return len(self.references_I)


# --- values and intervals --------------------------------------------------------------------------------


def metric_summary(name: MetricName, predictions: TaskPredictions) -> dict[str, Any]:
    """A metric's mean over the prompt seeds with its 95 % interval over items, each seed's value, and their spread.

    `spread` is the standard deviation (n - 1) between seeds; None with a single one.
    """
    metric = METRICS[name]
    per_seed_K = _seed_values(metric, predictions)
    low, high = percentile_interval(_resampled_means(metric, predictions))
    return {
        "value": float(per_seed_K.mean()),
        "low": low,
        "high": high,
        "seeds": [float(value) for value in per_seed_K],
        "spread": float(per_seed_K.std(ddof=1)) if len(per_seed_K) > 1 else None,
    }


def metric_change(name: MetricName, before: TaskPredictions, after: TaskPredictions) -> dict[str, Any]:
    """After minus before on the same items, with the 95 % interval of a paired bootstrap and a verdict; higher is better."""
    return joint_change([(name, before, after)])


def joint_change(tasks: Sequence[tuple[MetricName, TaskPredictions, TaskPredictions]]) -> dict[str, Any]:
    """The mean change over several tasks of one metric; items are drawn anew within each task (stratified bootstrap)."""
    differences, drawn = [], []
    for seed, (name, before, after) in enumerate(
        tasks
    ):  # a seed for each task: its items are independent of the others'
        metric = METRICS[name]
        differences.append(_seed_values(metric, after).mean() - _seed_values(metric, before).mean())
        drawn.append(_resampled_means(metric, after, seed) - _resampled_means(metric, before, seed))
    low, high = percentile_interval(np.mean(drawn, 0))
    difference = float(np.mean(differences))
    return {"difference": difference, "low": low, "high": high, "verdict": metric_verdict(tasks[0][0], low, high)}


def metric_verdict(name: MetricName, low: float, high: float) -> Verdict:
    """The verdict that the interval of a change of a metric supports."""
    margin = KEPT_MARGIN * METRICS[name].scale
    if -margin <= low and high <= margin:
        return "kept"
    return "learnt" if low > 0 else "forgot" if high < 0 else "no evidence"


def _seed_values(metric: Metric, predictions: TaskPredictions) -> np.ndarray:
    """The metric of each prompt seed, of shape (K,)."""
    parts = [
        metric.statistics(seed_predictions, predictions.references_I) for seed_predictions in predictions.predictions_KI
    ]
    return np.array([metric.value(np.ones((1, len(predictions))) @ part_IS)[0] for part_IS in parts])


def _resampled_means(metric: Metric, predictions: TaskPredictions, seed: int = 0) -> np.ndarray:
    """The mean over the prompt seeds for each draw of items, of shape (D,); all prompt seeds have the same draws."""
    parts = [
        metric.statistics(seed_predictions, predictions.references_I) for seed_predictions in predictions.predictions_KI
    ]
    return np.mean([metric.value(resample_sums(part_IS, seed)) for part_IS in parts], axis=0)


# --- one answer against its references -----------------------------------------------------------------

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NUMBER = re.compile(r"[-+]?(?:\d[\d,]*\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize_answer(text: str) -> str:
    """As SQuAD's evaluation compares answers (Rajpurkar et al. 2016): lower case, without punctuation and articles."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def exact_match(prediction: str, reference: str) -> float:
    """1 when both are the same once normalised."""
    return float(normalize_answer(prediction) == normalize_answer(reference))


def token_f1(prediction: str, reference: str) -> float:
    """The F1 of the normalised words, as SQuAD's evaluation takes it; two empty answers agree."""
    ours, theirs = normalize_answer(prediction).split(), normalize_answer(reference).split()
    if not ours or not theirs:
        return float(ours == theirs)
    common = sum((Counter(ours) & Counter(theirs)).values())
    return 2 * common / (len(ours) + len(theirs))


def final_number(text: str) -> float | None:
    """The number behind `####` where there is one (GSM8K writes it so), else the last number; commas are left out."""
    _, marked, behind = text.rpartition("####")
    found = _NUMBER.findall(behind if marked else text)
    if not found:
        return None
    return float((found[0] if marked else found[-1]).replace(",", ""))


def numeric_match(prediction: str, reference: str) -> float:
    """1 when both end in the same number."""
    ours, theirs = final_number(prediction), final_number(reference)
    return float(ours is not None and theirs is not None and math.isclose(ours, theirs, rel_tol=1e-9, abs_tol=1e-12))


@cache
def _rouge_scorer() -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        raise MissingExtra("ROUGE needs the package rouge-score", hint="pip install rouge-score") from None
    return RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)


def _rouge_f1(kind: str) -> Callable[[str, str], float]:
    return lambda prediction, reference: float(_rouge_scorer().score(reference, prediction)[kind].fmeasure)


# --- metrics of all answers ------------------------------------------------------------------------------


def _mean_metric(score_pair: Callable[[str, str], float]) -> Metric:
    """The mean of a score; of several references the best counts."""

    def statistics(predictions: Predictions, references: References) -> np.ndarray:
        best = [
            max(score_pair(each, reference) for reference in those)
            for each, those in zip(predictions, references, strict=True)
        ]
        return np.array([(score, 1.0) for score in best])

    return Metric(statistics, lambda sums_DS: sums_DS[:, 0] / sums_DS[:, 1])


def _label_metric(name: str) -> Metric:
    """A classification metric; labels are compared as they are."""
    measure = COUNT_METRICS[ProblemType.CLASS][name]

    def statistics(predictions: Predictions, references: References) -> np.ndarray:
        """Which label is right, actual and predicted, of shape (I, 3 L)."""
        actual = [those[0] for those in references]
        labels = sorted({*predictions, *actual})
        actual_IL, predicted_IL = (np.array(column)[:, None] == labels for column in (actual, predictions))
        return np.concatenate([actual_IL & predicted_IL, actual_IL, predicted_IL], 1).astype(np.float64)

    return Metric(statistics, lambda sums_DS: measure(sums_DS.reshape(len(sums_DS), 3, -1)))


_MISSING_NUMBER = -1.0
"""What an answer without a number counts as (as in T5's evaluation of STS-B)."""


def _number_pairs(predictions: Predictions, references: References) -> np.ndarray:
    """Predictions and references as numbers, of shape (I, 2)."""

    def read(text: str) -> float:
        found = final_number(text)
        return _MISSING_NUMBER if found is None else found

    return np.array([(read(ours), read(those[0])) for ours, those in zip(predictions, references, strict=True)])


def _ranks(pairs_I2: np.ndarray) -> np.ndarray:
    """Ranks of both columns, ties at their mean rank. They are ranked once: a draw keeps the ranks of the whole."""
    return np.stack([rankdata(column) for column in pairs_I2.T], 1)


def _sacrebleu_metric(kind: str) -> Metric:
    """BLEU or chrF of a whole corpus from 0 to 100, with sacrebleu's own statistics of each sentence."""

    @cache
    def metric() -> Any:
        try:
            from sacrebleu import metrics
        except ImportError:
            raise MissingExtra(f"{kind} needs the package sacrebleu", hint="pip install sacrebleu") from None
        return metrics.BLEU() if kind == "BLEU" else metrics.CHRF()

    def statistics(predictions: Predictions, references: References) -> np.ndarray:
        most = max(map(len, references))
        streams = [[those[n] if n < len(those) else None for those in references] for n in range(most)]
        return np.array(metric()._extract_corpus_statistics(list(predictions), streams), np.float64)

    def value(sums_DS: np.ndarray) -> np.ndarray:
        return np.array([metric()._compute_score_from_stats(row).score for row in sums_DS.astype(int).tolist()])

    return Metric(statistics, value, 100.0)


METRICS: Mapping[MetricName, Metric] = MappingProxyType(
    {
        "accuracy": _label_metric("accuracy"),
        "macro-F1": _label_metric("macro F1"),
        "MCC": _label_metric("MCC"),
        "exact-match": _mean_metric(exact_match),
        "F1": _mean_metric(token_f1),
        "ROUGE-1": _mean_metric(_rouge_f1("rouge1")),
        "ROUGE-2": _mean_metric(_rouge_f1("rouge2")),
        "ROUGE-L": _mean_metric(_rouge_f1("rougeL")),
        "BLEU": _sacrebleu_metric("BLEU"),
        "chrF": _sacrebleu_metric("chrF"),
        "numeric": _mean_metric(numeric_match),
        "Pearson": Metric(
            lambda predictions, references: correlation_moments(*_number_pairs(predictions, references).T), correlation
        ),
        "Spearman": Metric(
            lambda predictions, references: correlation_moments(*_ranks(_number_pairs(predictions, references)).T),
            correlation,
        ),
    }
)
"""By name. Labels are compared as they are; what is written, after SQuAD's normalisation or as each metric does."""

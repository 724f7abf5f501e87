"""How good are answers? Metrics of what was said against what may be said, with intervals from resampled items.

Legend: K prompt seeds, I items, S statistics of an item, D draws, L labels that are said or meant.

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

from postgrad.errors import MissingExtra
from postgrad.evaluation.classification_metrics import COUNT_METRICS
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

DRAWS = 1000
KEPT_MARGIN = 0.01
"""A metric is *kept* when the whole interval of its change lies within this share of its scale."""

Predictions = Sequence[str]
References = Sequence[Sequence[str]]
"""What may be said to each item: one answer, or several of which the best counts."""


@dataclass(frozen=True)
class Metric:
    """`statistics`: `(said, references)` to numbers of shape (I, S); `value`: their sums (D, S) to values of shape (D,)."""

    statistics: Callable[[Predictions, References], np.ndarray]
    value: Callable[[np.ndarray], np.ndarray]
    scale: float = 1.0
    """Its largest value."""


@dataclass(frozen=True)
class TaskPredictions:
    """What was said to each item, once for each prompt seed, and what may be said."""

    predictions_KI: tuple[tuple[str, ...], ...]
    references_I: tuple[tuple[str, ...], ...]

    def __len__(self) -> int:
        return len(self.references_I)


# --- values and intervals --------------------------------------------------------------------------------


def metric_summary(name: MetricName, predictions: TaskPredictions) -> dict[str, Any]:
    """A metric's mean over the prompt seeds with its 95 % interval over items, each seed's value, and their spread.

    `spread` is the standard deviation (n - 1) between seeds; None with a single one.
    """
    per_seed_K = _seed_values(name, predictions, _unit_weights(predictions))[:, 0]
    drawn_D = _seed_values(name, predictions, _bootstrap_weights(len(predictions))).mean(0)
    low, high = _interval(drawn_D, float(per_seed_K.mean()), len(predictions))
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
    for number, (name, before, after) in enumerate(tasks):
        every, draws = _unit_weights(before), _bootstrap_weights(len(before), number)
        differences.append(_seed_mean(name, after, every)[0] - _seed_mean(name, before, every)[0])
        drawn.append(_seed_mean(name, after, draws) - _seed_mean(name, before, draws))
    difference = float(np.mean(differences))
    low, high = _interval(np.mean(drawn, 0), difference, max(len(before) for _, before, _ in tasks))
    return {"difference": difference, "low": low, "high": high, "verdict": metric_verdict(tasks[0][0], low, high)}


def metric_verdict(name: MetricName, low: float, high: float) -> Verdict:
    """What an interval of a change of a metric allows to be said."""
    margin = KEPT_MARGIN * METRICS[name].scale
    if -margin <= low and high <= margin:
        return "kept"
    return "learnt" if low > 0 else "forgot" if high < 0 else "no evidence"


def _seed_mean(name: MetricName, predictions: TaskPredictions, weights_DI: np.ndarray) -> np.ndarray:
    return _seed_values(name, predictions, weights_DI).mean(0)


def _seed_values(name: MetricName, predictions: TaskPredictions, weights_DI: np.ndarray) -> np.ndarray:
    """The metric of each seed for each draw, of shape (K, D)."""
    metric = METRICS[name]
    return np.stack(
        [
            metric.value(weights_DI @ metric.statistics(said, predictions.references_I))
            for said in predictions.predictions_KI
        ]
    )


def _unit_weights(predictions: TaskPredictions) -> np.ndarray:
    return np.ones((1, len(predictions)))


def _bootstrap_weights(items: int, number: int = 0) -> np.ndarray:
    """How often each item is drawn, of shape (D, I)."""
    return np.random.default_rng(number).multinomial(items, np.full(items, 1 / items), size=DRAWS).astype(float)


def _interval(samples_D: np.ndarray, value: float, items: int) -> tuple[float, float]:
    """The 95 % percentile interval; a single item has none."""
    if items < 2:
        return value, value
    low, high = np.quantile(samples_D, [0.025, 0.975])
    return float(low), float(high)


# --- one answer against what may be said -----------------------------------------------------------------

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
    return lambda said, reference: float(_rouge_scorer().score(reference, said)[kind].fmeasure)


# --- metrics of all answers ------------------------------------------------------------------------------


def _mean_metric(score_pair: Callable[[str, str], float]) -> Metric:
    """The mean of a score; of several references the best counts."""

    def statistics(said: Predictions, references: References) -> np.ndarray:
        best = [
            max(score_pair(each, reference) for reference in those)
            for each, those in zip(said, references, strict=True)
        ]
        return np.array([(score, 1.0) for score in best])

    return Metric(statistics, lambda sums_DS: sums_DS[:, 0] / sums_DS[:, 1])


def _label_metric(name: str) -> Metric:
    """A metric of one label out of several, compared as they are."""
    measure = COUNT_METRICS["class"][name]

    def statistics(said: Predictions, references: References) -> np.ndarray:
        """Which label was meant and which was said, of shape (I, L L)."""
        meant = [those[0] for those in references]
        labels = {label: number for number, label in enumerate(sorted({*said, *meant}))}
        pairs = [labels[theirs] * len(labels) + labels[ours] for ours, theirs in zip(said, meant, strict=True)]
        return np.eye(len(labels) ** 2)[pairs]

    def value(sums_DS: np.ndarray) -> np.ndarray:
        labels = math.isqrt(sums_DS.shape[1])
        return measure(sums_DS.reshape(-1, labels, labels))

    return Metric(statistics, value)


_MISSING_NUMBER = -1.0
"""What an answer without a number counts as (as in T5's evaluation of STS-B)."""


def _number_pairs(predictions: Predictions, references: References) -> np.ndarray:
    """What was said and meant as numbers, of shape (I, 2)."""

    def read(text: str) -> float:
        found = final_number(text)
        return _MISSING_NUMBER if found is None else found

    return np.array([(read(ours), read(those[0])) for ours, those in zip(predictions, references, strict=True)])


def _moments(pairs_I2: np.ndarray) -> np.ndarray:
    """What a correlation is made of, around the means so that nothing cancels, of shape (I, 6)."""
    x, y = (pairs_I2 - pairs_I2.mean(0)).T
    return np.stack([np.ones_like(x), x, y, x * x, y * y, x * y], 1)


def _correlation(sums_DS: np.ndarray) -> np.ndarray:
    """Pearson's r; 0 where one side does not vary."""
    n, x, y, xx, yy, xy = sums_DS.T
    square = (xx - x * x / n) * (yy - y * y / n)
    return np.where(square > 1e-20 * n * n, (xy - x * y / n) / np.sqrt(np.maximum(square, 1e-300)), 0.0)


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

    def statistics(said: Predictions, references: References) -> np.ndarray:
        most = max(map(len, references))
        streams = [[those[n] if n < len(those) else None for those in references] for n in range(most)]
        return np.array(metric()._extract_corpus_statistics(list(said), streams), np.float64)

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
        "Pearson": Metric(lambda said, references: _moments(_number_pairs(said, references)), _correlation),
        "Spearman": Metric(lambda said, references: _moments(_ranks(_number_pairs(said, references))), _correlation),
    }
)
"""By name. Labels are compared as they are; what is written, after SQuAD's normalisation or as each metric does."""

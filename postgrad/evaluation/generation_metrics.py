"""Metrics of answers against references, with bootstrap intervals over items.

Legend: K prompt seeds, I items, S statistics of an item, D draws, L predicted or true labels, N bins.

A metric is two functions: the *statistics* of each item, which add up, and the *value* of their sum. So accuracy and a mean of
F1, but also BLEU of a whole corpus, macro F1 or a correlation, are resampled alike: items are drawn with replacement, their
statistics added, the value taken. The same draws serve every seed and both models, so that a change is paired.
"""

from __future__ import annotations

import math
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
import regex
from scipy.stats import rankdata

from postgrad.data.problem_type import ProblemType
from postgrad.data.words import has_unspaced_script, split_spaces, split_words
from postgrad.errors import MissingExtra
from postgrad.evaluation.abilities.rules import score_by_reference
from postgrad.evaluation.classification_metrics import COUNT_METRICS, correlation, correlation_moments
from postgrad.stats.bootstrap import percentile_interval, resample_sums, undefined_draws
from postgrad.stats.forgetting import Verdict, score_verdict

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
    "1-Brier",
    "1-ECE",
    "correct",
]

KEPT_MARGIN = 0.01
"""A metric is *kept* when the whole interval of its change lies within this share of its scale."""

Predictions = Sequence[str]
ChoiceProbabilities = Mapping[str, float]
"""Of one item: the probability of each choice by its name; they sum to 1."""
References = Sequence[Sequence[str]]
"""References of each item: one answer, or several of which the best counts."""


@dataclass(frozen=True)
class Metric:
    """`statistics` maps `(predictions, references)` to shape (I, S), `value` their sums (D, S) to values of shape (D,)."""

    statistics: Callable[[Any, References], np.ndarray]
    """Its predictions are texts, or with `of_probabilities` the probabilities of each item's choices."""
    value: Callable[[np.ndarray], np.ndarray]
    scale: float = 1.0
    """Its largest value."""
    split: Callable[[str], Sequence[str]] = str.split
    """What it counts of a reference: words, or parts between spaces."""
    tokenizer: Callable[[Sequence[str]], str] | None = None
    """The name of the tokenizer for an item with some references, where there is a choice."""
    of_probabilities: bool = False
    """Whether it scores the probabilities of the choices instead of the answers."""

    def item_statistics(self, predictions: TaskPredictions, seed: int) -> np.ndarray:
        """The statistics of all items under one prompt seed, of shape (I, S)."""
        by_seed = predictions.probabilities_KI if self.of_probabilities else predictions.predictions_KI
        return self.statistics(by_seed[seed], predictions.references_I)


@dataclass(frozen=True)
class TaskPredictions:
    """Predictions for each item, one per prompt seed, and their references."""

    predictions_KI: tuple[tuple[str, ...], ...]
    references_I: tuple[tuple[str, ...], ...]
    probabilities_KI: tuple[tuple[ChoiceProbabilities, ...], ...] = ()
    """Of multiple choice, where a metric reads them."""

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


def tokenizer_names(name: MetricName, references: References) -> list[str]:
    """The tokenizers of a metric that chooses one for each item by its references."""
    tokenizer = METRICS[name].tokenizer
    return sorted(set(map(tokenizer, references))) if tokenizer else []


def count_without_words(name: MetricName, references: References) -> int:
    """The items whose references have no words that a metric could count."""
    return sum(not any(map(METRICS[name].split, those)) for those in references)


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


def metric_verdict(name: MetricName, low: float | None, high: float | None) -> Verdict:
    """The verdict that the interval of a change of a metric supports."""
    return score_verdict(low, high, METRICS[name].scale)


def _seed_values(metric: Metric, predictions: TaskPredictions) -> np.ndarray:
    """The metric of each prompt seed, of shape (K,)."""
    parts = [metric.item_statistics(predictions, seed) for seed in range(len(predictions.predictions_KI))]
    return np.array([metric.value(np.ones((1, len(predictions))) @ part_IS)[0] for part_IS in parts])


def _resampled_means(metric: Metric, predictions: TaskPredictions, seed: int = 0) -> np.ndarray:
    """The mean over the prompt seeds for each draw of items, of shape (D,); all prompt seeds have the same draws."""
    if len(predictions) < 2:
        return undefined_draws()
    parts = [metric.item_statistics(predictions, number) for number in range(len(predictions.predictions_KI))]
    return np.mean([metric.value(resample_sums(part_IS, seed)) for part_IS in parts], axis=0)


# --- one answer against its references -----------------------------------------------------------------

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NUMBER = re.compile(r"[-+]?(?:\d[\d,]*\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_PUNCTUATION = regex.compile(r"\p{P}+")
_HAN = regex.compile(r"\p{Han}")
_NOT_LATIN = regex.compile(r"(?V1)[\p{L}--\p{Latin}]")


def normalize_answer(text: str) -> str:
    """As SQuAD's evaluation compares answers (Rajpurkar et al. 2016): lower case, without punctuation and articles.

    In other scripts than Latin all punctuation of Unicode is removed, as in MLQA's evaluation (Lewis et al. 2020).
    """
    text = unicodedata.normalize("NFC", text.lower()).translate(_NO_PUNCTUATION)
    if not text.isascii() and _NOT_LATIN.search(text):
        text = _PUNCTUATION.sub("", text)
    return " ".join(_ARTICLES.sub(" ", text).split())


def _split_normalized(text: str) -> list[str]:
    return split_spaces(normalize_answer(text))


def exact_match(prediction: str, reference: str) -> float:
    """1 when both are the same once normalised."""
    return float(normalize_answer(prediction) == normalize_answer(reference))


def token_f1(prediction: str, reference: str) -> float:
    """The F1 of the normalised words, as SQuAD's evaluation takes it; two empty answers agree.

    Text without spaces is divided into words, as in MLQA's evaluation.
    """
    ours, theirs = _split_normalized(prediction), _split_normalized(reference)
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


class _RougeTokenizer:
    """The words of any script; those in ASCII as the package's own tokenizer stems them."""

    def __init__(self, tokenize: Callable[[str], list[str]]) -> None:
        self._tokenize_ascii = tokenize

    def tokenize(self, text: str) -> list[str]:
        return [
            part for word in split_words(text) for part in (self._tokenize_ascii(word) if word.isascii() else [word])
        ]


@cache
def _rouge_scorer() -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer
        from rouge_score.tokenizers import DefaultTokenizer
    except ImportError:
        raise MissingExtra("ROUGE needs the package rouge-score", hint="pip install rouge-score") from None
    tokenizer = _RougeTokenizer(DefaultTokenizer(use_stemmer=True).tokenize)
    return RougeScorer(["rouge1", "rouge2", "rougeL"], tokenizer=tokenizer)


def _rouge_f1(kind: str) -> Callable[[str, str], float]:
    """The F1 of n-grams, or of the longest common subsequence; a reference without words is compared as a whole."""

    def score(prediction: str, reference: str) -> float:
        if not split_words(reference):
            return float(prediction.split() == reference.split())
        return float(_rouge_scorer().score(reference, prediction)[kind].fmeasure)

    return score


# --- metrics of all answers ------------------------------------------------------------------------------


def _mean_metric(score_pair: Callable[[str, str], float], split: Callable[[str], Sequence[str]]) -> Metric:
    """The mean of a score; of several references the best counts. `split`: what the score counts of a reference."""

    def statistics(predictions: Predictions, references: References) -> np.ndarray:
        best = [
            max(score_pair(each, reference) for reference in those)
            for each, those in zip(predictions, references, strict=True)
        ]
        return np.array([(score, 1.0) for score in best])

    return Metric(statistics, lambda sums_DS: sums_DS[:, 0] / sums_DS[:, 1], split=split)


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


@cache
def _sacrebleu_metric(kind: str, tokenizer: str | None = None) -> Any:
    try:
        from sacrebleu import metrics
    except ImportError:
        raise MissingExtra(f"{kind} needs the package sacrebleu", hint="pip install sacrebleu") from None
    return metrics.BLEU(tokenize=tokenizer) if kind == "BLEU" else metrics.CHRF()


def choose_bleu_tokenizer(references: Sequence[str]) -> str:
    """sacrebleu's name of the tokenizer of an item: `13a`, or by characters where most words are of scripts without spaces."""
    text = " ".join(references)
    if not has_unspaced_script(text):
        return "13a"
    words = split_words(text)
    unspaced = [word for word in words if has_unspaced_script(word)]
    if 2 * len(unspaced) < len(words):
        return "13a"
    return "zh" if all(map(_HAN.match, unspaced)) else "char"


def _corpus_metric(kind: str) -> Metric:
    """BLEU or chrF of a whole corpus from 0 to 100, with sacrebleu's own statistics of each sentence.

    Texts are composed (NFC). For BLEU each item is tokenised by its references' script.
    """

    def statistics(predictions: Predictions, references: References) -> np.ndarray:
        compose = partial(unicodedata.normalize, "NFC")
        predictions = list(map(compose, predictions))
        references = [list(map(compose, those)) for those in references]
        if kind == "BLEU":
            tokenize = [
                _sacrebleu_metric(kind, choose_bleu_tokenizer(those))._preprocess_segment for those in references
            ]
            predictions = [own(each) for own, each in zip(tokenize, predictions, strict=True)]
            references = [list(map(own, those)) for own, those in zip(tokenize, references, strict=True)]
        most = max(map(len, references))
        streams = [[those[n] if n < len(those) else None for those in references] for n in range(most)]
        return np.array(
            _sacrebleu_metric(kind, "none")._extract_corpus_statistics(list(predictions), streams), np.float64
        )

    def value(sums_DS: np.ndarray) -> np.ndarray:
        compute = _sacrebleu_metric(kind, "none")._compute_score_from_stats
        return np.array([compute(row).score for row in sums_DS.astype(int).tolist()])

    return Metric(statistics, value, 100.0, tokenizer=choose_bleu_tokenizer if kind == "BLEU" else None)


def _brier_statistics(probabilities: Sequence[ChoiceProbabilities], references: References) -> np.ndarray:
    """Half the squared distance of each item's probabilities from certainty of the right choice (0 to 1), of shape (I, 2)."""
    return np.array(
        [
            (sum((p - (name == those[0])) ** 2 for name, p in each.items()) / 2, 1.0)
            for each, those in zip(probabilities, references, strict=True)
        ]
    )


_CONFIDENCE_BINS = 10


def _confidence_statistics(probabilities: Sequence[ChoiceProbabilities], references: References) -> np.ndarray:
    """Right minus confidence, in the bin of the confidence, of shape (I, N + 1); the last column counts."""
    out_IN = np.zeros((len(probabilities), _CONFIDENCE_BINS + 1))
    for row_N, each, those in zip(out_IN, probabilities, references, strict=True):
        name, confidence = max(each.items(), key=lambda item: item[1])
        row_N[min(int(confidence * _CONFIDENCE_BINS), _CONFIDENCE_BINS - 1)] = (name == those[0]) - confidence
        row_N[-1] = 1
    return out_IN


METRICS: Mapping[MetricName, Metric] = MappingProxyType(
    {
        "accuracy": _label_metric("accuracy"),
        "macro-F1": _label_metric("macro F1"),
        "MCC": _label_metric("MCC"),
        "exact-match": _mean_metric(exact_match, _split_normalized),
        "F1": _mean_metric(token_f1, _split_normalized),
        "ROUGE-1": _mean_metric(_rouge_f1("rouge1"), split_words),
        "ROUGE-2": _mean_metric(_rouge_f1("rouge2"), split_words),
        "ROUGE-L": _mean_metric(_rouge_f1("rougeL"), split_words),
        "BLEU": _corpus_metric("BLEU"),
        "chrF": _corpus_metric("chrF"),
        "numeric": _mean_metric(numeric_match, str.split),
        "Pearson": Metric(
            lambda predictions, references: correlation_moments(*_number_pairs(predictions, references).T), correlation
        ),
        "Spearman": Metric(
            lambda predictions, references: correlation_moments(*_ranks(_number_pairs(predictions, references)).T),
            correlation,
        ),
        "1-Brier": Metric(_brier_statistics, lambda sums_DS: 1 - sums_DS[:, 0] / sums_DS[:, 1], of_probabilities=True),
        "1-ECE": Metric(
            _confidence_statistics,
            lambda sums_DS: 1 - np.abs(sums_DS[:, :-1]).sum(1) / sums_DS[:, -1],
            of_probabilities=True,
        ),
        "correct": Metric(
            lambda predictions, references: np.array(
                [(score_by_reference(*pair), 1.0) for pair in zip(predictions, references, strict=True)]
            ),
            lambda sums_DS: sums_DS[:, 0] / sums_DS[:, 1],
        ),
    }
)
"""By name; of each, higher is better. `1-Brier` is 1 less half the Brier score of all choices (Brier 1950), `1-ECE` 1 less the
expected calibration error in 10 bins of equal width (Guo et al. 2017, arXiv 1706.04599), `correct` the mean score by the rules
that an item's last reference holds. Labels are compared as they are; what is written, after SQuAD's normalisation or as each
metric does."""

"""How far is new text from old text? Distances between two corpora that need no training, each with its interval.

Legend: N documents, P passages, F hashed features.

Texts are first cut into passages of equally many words, so that long documents of one corpus and short ones of the other do
not differ by their length alone. What two samples of one and the same corpus differ by is measured beside each distance: only
what lies above that is a shift.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np

from postgrad.data.filter.ngrams import FEATURE_COUNT, WORD_PATTERN, count_buckets, hash_ngrams
from postgrad.errors import DataError

PASSAGE_WORDS = 100
"""Words of a passage."""
MIN_PASSAGES = 20
"""Passages of each text, below which nothing is estimated."""
_MAX_PASSAGES = 4000
"""Passages of each text that are looked at."""
_DRAWS = 200


@dataclass(frozen=True)
class ShiftEstimate:
    """A value with its 95 % interval, and, where it has one, what it would be without any shift (95th percentile)."""

    value: float
    low: float
    high: float
    same: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


class Passages(NamedTuple):
    """Passages of a text: each as it stands, its words, and the document that it begins in."""

    texts: list[str]
    words: list[list[str]]
    document_P: np.ndarray


def make_passages(documents: Sequence[str], name: str) -> Passages:
    """Cut documents into passages of `PASSAGE` words; a shorter rest is joined with what comes next.

    Raises `DataError` when there is too little text to say anything.
    """
    texts: list[str] = []
    words: list[list[str]] = []
    origins: list[int] = []
    rest, taken = "", list[str]()
    for number, document in enumerate(documents):
        begin = 0
        for word in WORD_PATTERN.finditer(document):
            taken.append(word.group())
            if len(taken) == PASSAGE_WORDS:
                texts.append(rest + document[begin : word.end()])
                words.append(taken)
                origins.append(number)
                begin, rest, taken = word.end(), "", []
        rest = f"{rest}{document[begin:]}\n" if taken else ""
    if len(words) < MIN_PASSAGES:
        total = len(words) * PASSAGE_WORDS + len(taken)
        raise DataError(
            f"{total:,} words are too few to measure a shift by",
            where=name,
            expected=f"at least {MIN_PASSAGES * PASSAGE_WORDS:,} words",
            hint="name more text; the model can write its own: postgrad synthesize",
        )
    if len(words) > _MAX_PASSAGES:
        chosen = np.sort(np.random.default_rng(0).permutation(len(words))[:_MAX_PASSAGES])
        return Passages([texts[i] for i in chosen], [words[i] for i in chosen], np.array(origins)[chosen])
    return Passages(texts, words, np.array(origins))


def refuse_same(old: Sequence[str], new: Sequence[str]) -> None:
    """Raise `DataError` when the new text is the old text."""
    common = set(old) & set(new)
    if len(common) * 2 > min(len(set(old)), len(set(new))):
        raise DataError(
            f"{len(common):,} documents stand in the old and in the new text alike",
            where="--new",
            expected="two different texts",
            hint="a shift is measured between what the model knows and what it is to learn",
        )


# --- hashed n-grams -----------------------------------------------------------------------------------


def ngram_counts(passages: Passages) -> np.ndarray:
    """How often each hashed word and pair of words occurs in each passage, of shape (P, F) and float32.

    The features of DSIR (Xie et al. 2023), as `postgrad.data.filter.ngrams` counts them.
    """
    return np.stack([count_buckets(hash_ngrams(words)) for words in passages.words]).astype(np.float32)


def log_ratio(old_PF: np.ndarray, new_PF: np.ndarray) -> ShiftEstimate:
    """How much likelier the new text's n-grams are under a model of the new text than under one of the old, in nats a gram.

    DSIR's importance weight (Xie et al. 2023, equation 3), averaged over passages that neither model was estimated on (two
    halves, each judged by the other). It estimates KL(new || old) of the hashed n-grams; `same`: of old text against old.
    """
    rng = np.random.default_rng(0)
    value, low, high = _log_ratio(old_PF, new_PF, rng)
    halves = [_log_ratio(*_random_halves(old_PF, rng), rng, draws=0)[0] for _ in range(10)]
    return ShiftEstimate(value, low, high, float(np.quantile(halves, 0.95)))


def _log_ratio(
    old_PF: np.ndarray, new_PF: np.ndarray, rng: np.random.Generator, draws: int = _DRAWS
) -> tuple[float, float, float]:
    size = min(len(old_PF), len(new_PF))
    old, new = (table[rng.permutation(len(table))[:size]] for table in (old_PF, new_PF))
    half = size // 2
    gains = []
    for learnt, judged in ((slice(0, half), slice(half, None)), (slice(half, None), slice(0, half))):
        weights = np.log(_shares(new[learnt])) - np.log(_shares(old[learnt]))
        gains.append(new[judged] @ weights / new[judged].sum(1))
    mean_P = np.concatenate(gains)
    found = [mean_P[rng.integers(0, len(mean_P), len(mean_P))].mean() for _ in range(draws)] or [mean_P.mean()]
    return float(mean_P.mean()), float(np.quantile(found, 0.025)), float(np.quantile(found, 0.975))


def _shares(counts_PF: np.ndarray) -> np.ndarray:
    """The share of each feature, with one added to every count."""
    total = counts_PF.sum(0, dtype=np.float64) + 1.0
    return total / total.sum()


def classifier_auc(old_PF: np.ndarray, new_PF: np.ndarray) -> ShiftEstimate:
    """The AUC of a classifier that tells held-out passages of the two texts apart: .5 when they are alike, 1 when never.

    A classifier two-sample test (Lopez-Paz & Oquab 2017, arXiv 1610.06545): logistic regression on n-gram shares, judged by
    five-fold cross-validation on equally many passages of each text.
    """
    from scipy.sparse import csr_matrix
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import StratifiedKFold, cross_val_predict

    rng = np.random.default_rng(0)
    size = min(len(old_PF), len(new_PF), 1000)
    picked = [table[rng.permutation(len(table))[:size]] for table in (old_PF, new_PF)]
    roots = csr_matrix(np.sqrt(np.concatenate(picked)))  # counts' variances grow with them; their roots' do not
    meant = np.repeat([0, 1], size)
    folds = StratifiedKFold(5, shuffle=True, random_state=0)
    said = cross_val_predict(LogisticRegression(solver="liblinear"), roots, meant, cv=folds, method="decision_function")
    values = []
    for _ in range(_DRAWS):
        draw = np.concatenate([rng.integers(0, size, size), rng.integers(size, 2 * size, size)])
        values.append(roc_auc_score(meant[draw], said[draw]))
    low, high = np.quantile(values, [0.025, 0.975])
    # Of two samples of one text the AUC is about normal around .5 (Mann-Whitney, equal sizes).
    same = 0.5 + 1.645 * float(np.sqrt((2 * size + 1) / (12 * size * size)))
    return ShiftEstimate(float(roc_auc_score(meant, said)), float(low), float(high), same)


def byte_counts(passages: Passages) -> np.ndarray:
    """How often each hashed run of three bytes occurs in each passage, of shape (P, F) and float32.

    The same features for every tokenizer and every language, which token shares are not.
    """
    out = np.zeros((len(passages.texts), FEATURE_COUNT), np.float32)
    for row, text in enumerate(passages.texts):
        bytes_ = np.frombuffer(text.encode(), np.uint8).astype(np.uint64)
        runs = (bytes_[:-2] << np.uint64(16)) | (bytes_[1:-1] << np.uint64(8)) | bytes_[2:]
        mixed = (runs * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(40)
        np.add.at(out[row], mixed % np.uint64(FEATURE_COUNT), 1.0)
    return out


# --- tokens -------------------------------------------------------------------------------------------


def js_divergence(old_PV: np.ndarray, new_PV: np.ndarray) -> ShiftEstimate:
    """The Jensen-Shannon divergence of two texts' token shares, in bits (0: alike, 1: no token in common).

    Both texts are taken at the same number of passages, as a divergence of samples shrinks as they grow. `same`: two halves
    of the old text, at half of that (which is a little too much, never too little).
    """
    rng = np.random.default_rng(0)
    size = min(len(old_PV), len(new_PV))
    draws = [
        _js_divergence(old_PV[rng.integers(0, len(old_PV), size)], new_PV[rng.integers(0, len(new_PV), size)])
        for _ in range(_DRAWS)
    ]
    # Drawing with replacement adds noise of its own; the spread is right, the mean is not.
    picked = old_PV[rng.permutation(len(old_PV))[:size]], new_PV[rng.permutation(len(new_PV))[:size]]
    value, centre = _js_divergence(*picked), float(np.mean(draws))
    low, high = (max(0.0, value + float(q) - centre) for q in np.quantile(draws, [0.025, 0.975]))
    same = [_js_divergence(*_random_halves(old_PV, rng)) for _ in range(_DRAWS)]
    return ShiftEstimate(value, low, min(high, 1.0), float(np.quantile(same, 0.95)))


def _js_divergence(one_PV: np.ndarray, other_PV: np.ndarray) -> float:
    one, other = (table.sum(0, dtype=np.float64) for table in (one_PV, other_PV))
    one, other = one / one.sum(), other / other.sum()
    middle = (one + other) / 2
    return float((_kl_bits(one, middle) + _kl_bits(other, middle)) / 2)


def _kl_bits(shares: np.ndarray, against: np.ndarray) -> float:
    some = shares > 0
    return float((shares[some] * np.log2(shares[some] / against[some])).sum())


def _random_halves(table: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    order = rng.permutation(len(table))
    half = len(table) // 2
    return table[order[:half]], table[order[half : 2 * half]]


def token_counts(passages: Passages, encode: Callable[[list[str]], list[list[int]]], vocabulary: int) -> np.ndarray:
    """How often each token occurs in each passage, of shape (P, V) and float32; `encode` gives the ids of texts."""
    out = np.zeros((len(passages.texts), vocabulary), np.float32)
    for row, ids in enumerate(encode(passages.texts)):
        np.add.at(out[row], np.array(ids, np.int64), 1.0)
    return out


@dataclass(frozen=True)
class Fertility:
    """How finely a tokenizer cuts a text."""

    tokens_per_word: float
    bytes_per_token: float
    unknown: float
    """Share of tokens that stand for nothing: unknown ones, and single bytes of a word."""


def fertility(
    documents: Sequence[str],
    encode: Callable[[list[str]], list[list[int]]],
    unknown: Sequence[int],
    max_documents: int = 200,
) -> Fertility:
    """Tokens per word, bytes per token, and the share of tokens that are in `unknown`, over the first documents."""
    texts = [document[:20_000] for document in documents[:max_documents]]
    ids = encode(texts)
    tokens = max(1, sum(map(len, ids)))
    words = max(1, sum(len(text.split()) for text in texts))
    bytes_ = sum(len(text.encode()) for text in texts)
    strange = set(unknown)
    return Fertility(tokens / words, bytes_ / tokens, sum(i in strange for row in ids for i in row) / tokens)

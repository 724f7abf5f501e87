"""Domain shift: distances between two corpora that need no training, each with its 95 % interval.

Legend: N documents, P passages, F hashed features.

Texts are cut into passages of equally many words, so that the length of documents makes no difference. Each distance comes with
the distance of two samples of one corpus: only the excess is a shift.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
from scipy.sparse import csr_array

from postgrad.data.filter.ngrams import FEATURE_COUNT, count_buckets, hash_ngrams
from postgrad.data.words import match_words_and_signs, split_spaces
from postgrad.errors import DataError
from postgrad.stats.bootstrap import percentile_interval, ratio_interval, resample_counts

PASSAGE_WORDS = 100
"""Words of a passage."""
MIN_PASSAGES = 20
"""The least number of passages of each text."""
_MAX_PASSAGES = 4000
"""The most passages of each text that are used."""
_SPLITS = 200
"""Splits of the old text into random halves, which show what two samples of one text differ by."""


@dataclass(frozen=True)
class ShiftEstimate:
    """A value with its 95 % interval, and its 95th percentile without any shift, where that is known."""

    value: float
    low: float | None
    """None for a single unit, such as a document, which has no interval; so is `high`."""
    high: float | None
    same: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


class Passages(NamedTuple):
    """Passages of a text: their text, their words, and the document that each begins in."""

    texts: list[str]
    words: list[list[str]]
    document_P: np.ndarray


def make_passages(documents: Sequence[str], name: str) -> Passages:
    """Cut documents into passages of `PASSAGE_WORDS` words; a shorter rest is joined with the next document.

    Raises `DataError` for too little text.
    """
    texts: list[str] = []
    words: list[list[str]] = []
    origins: list[int] = []
    rest, taken = "", list[str]()
    for number, document in enumerate(documents):
        begin = 0
        for word in match_words_and_signs(document):
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
            f"{len(common):,} documents are in both the old and the new text",
            where="--new",
            expected="two different texts",
            hint="compare text that the model was trained on with text that it is to learn",
        )


# --- hashed n-grams -----------------------------------------------------------------------------------


def ngram_counts(passages: Passages) -> np.ndarray:
    """Counts of each hashed word and pair of words in each passage, of shape (P, F) and float32.

    The features of DSIR (Xie et al. 2023), as `postgrad.data.filter.ngrams` counts them.
    """
    return np.stack([count_buckets(hash_ngrams(words)) for words in passages.words]).astype(np.float32)


def log_ratio(old_PF: np.ndarray, new_PF: np.ndarray) -> ShiftEstimate:
    """How much likelier the new text's n-grams are under a model of the new text than under one of the old, in nats a gram.

    DSIR's importance weight (Xie et al. 2023, equation 3), averaged over passages that neither model was estimated on (two
    halves, each scored by the other). It estimates KL(new || old) of the hashed n-grams; `same`: of old text against old.
    """
    rng = np.random.default_rng(0)
    ratio_P = _passage_log_ratios(old_PF, new_PF, rng)
    halves = [_passage_log_ratios(*_random_halves(old_PF, rng), rng).mean() for _ in range(10)]
    low, high = ratio_interval(ratio_P, np.ones(len(ratio_P)))
    return ShiftEstimate(float(ratio_P.mean()), low, high, float(np.quantile(halves, 0.95)))


def _passage_log_ratios(old_PF: np.ndarray, new_PF: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The mean log ratio of each of as many new passages as there are old ones, or the other way round, of shape (P,)."""
    size = min(len(old_PF), len(new_PF))
    old, new = (table[rng.permutation(len(table))[:size]] for table in (old_PF, new_PF))
    half = size // 2
    parts = []
    for fitted, scored in ((slice(0, half), slice(half, None)), (slice(half, None), slice(0, half))):
        weights_F = np.log(_shares(new[fitted])) - np.log(_shares(old[fitted]))
        parts.append(new[scored] @ weights_F / new[scored].sum(1))
    return np.concatenate(parts)


def _shares(counts_PF: np.ndarray) -> np.ndarray:
    """The share of each feature, with one added to every count."""
    total = counts_PF.sum(0, dtype=np.float64) + 1.0
    return total / total.sum()


def classifier_auc(old_PF: np.ndarray, new_PF: np.ndarray) -> ShiftEstimate:
    """The AUC of a classifier of held-out passages by their text: .5 for texts of one distribution, 1 for disjoint ones.

    A classifier two-sample test (Lopez-Paz & Oquab 2017, arXiv 1610.06545): logistic regression on n-gram shares, evaluated by
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
    labels = np.repeat([0, 1], size)
    folds = StratifiedKFold(5, shuffle=True, random_state=0)
    classifier = LogisticRegression(solver="liblinear")
    scores = cross_val_predict(classifier, roots, labels, cv=folds, method="decision_function")
    # The AUC is the share of pairs (old, new) whose scores are in order, ties by half: a sum over pairs of counts.
    old, new = scores[:size, None], scores[size:]
    ordered_PP = (new > old) + 0.5 * (new == old)
    drawn = zip(resample_counts(size, 0), resample_counts(size, 1), strict=True)
    low, high = percentile_interval(np.concatenate([(a @ ordered_PP * b).sum(1) for a, b in drawn]) / size**2)
    # Of two samples of one text the AUC is about normal around .5 (Mann-Whitney, equal sizes).
    same = 0.5 + 1.645 * float(np.sqrt((2 * size + 1) / (12 * size * size)))
    return ShiftEstimate(float(roc_auc_score(labels, scores)), low, high, same)


def byte_counts(passages: Passages) -> np.ndarray:
    """Counts of each hashed byte trigram in each passage, of shape (P, F) and float32.

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
    value = _js_divergence(*(table[rng.permutation(len(table))[:size]] for table in (old_PV, new_PV)))
    old, new = csr_array(old_PV), csr_array(new_PV)
    draws = zip(resample_counts(old_PV.shape[0], 0, size), resample_counts(new_PV.shape[0], 1, size), strict=True)
    samples = [_share_divergence(a_P @ old, b_P @ new) for both in draws for a_P, b_P in zip(*both, strict=True)]
    # Drawing with replacement adds noise of its own; the spread is right, the mean is not.
    low, high = percentile_interval(np.maximum(0.0, np.minimum(value + np.array(samples) - np.mean(samples), 1.0)))
    same = [_js_divergence(*_random_halves(old, rng)) for _ in range(_SPLITS)]
    return ShiftEstimate(value, low, high, float(np.quantile(same, 0.95)))


def _js_divergence(old_PV: np.ndarray | csr_array, new_PV: np.ndarray | csr_array) -> float:
    return _share_divergence(*(table.sum(0, dtype=np.float64) for table in (old_PV, new_PV)))


def _share_divergence(old_V: np.ndarray, new_V: np.ndarray) -> float:
    """Of the shares of two vectors of counts."""
    old, new = old_V / old_V.sum(), new_V / new_V.sum()
    middle = (old + new) / 2
    return float((_kl_bits(old, middle) + _kl_bits(new, middle)) / 2)


def _kl_bits(shares: np.ndarray, reference: np.ndarray) -> float:
    some = shares > 0
    return float((shares[some] * np.log2(shares[some] / reference[some])).sum())


def _random_halves(table: Any, rng: np.random.Generator) -> tuple[Any, Any]:
    order = rng.permutation(table.shape[0])
    half = len(order) // 2
    return table[order[:half]], table[order[half : 2 * half]]


def token_counts(passages: Passages, encode: Callable[[list[str]], list[list[int]]], vocabulary: int) -> np.ndarray:
    """Counts of each token in each passage, of shape (P, V) and float32; `encode` gives the ids of texts."""
    out = np.zeros((len(passages.texts), vocabulary), np.float32)
    for row, ids in enumerate(encode(passages.texts)):
        np.add.at(out[row], np.array(ids, np.int64), 1.0)
    return out


@dataclass(frozen=True)
class Fertility:
    """Tokens per word and bytes per token of a text."""

    tokens_per_word: float
    bytes_per_token: float
    unknown: float
    """Share of unknown tokens and single-byte tokens."""


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
    words = max(1, sum(len(split_spaces(text)) for text in texts))
    bytes_ = sum(len(text.encode()) for text in texts)
    strange = set(unknown)
    return Fertility(tokens / words, bytes_ / tokens, sum(i in strange for row in ids for i in row) / tokens)

"""Document selection: importance resampling (DSIR), near-duplicate removal, and a band of quantiles.

Legend: N documents, F hashed features.

Documents are decoded from a token store in batches, so that rows of every kind can be selected, and only a few numbers for
each document are in memory.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer

from postgrad.data.filter.near_duplicates import NearDuplicateIndex
from postgrad.data.filter.ngrams import FEATURE_COUNT, count_buckets, hash_ngrams
from postgrad.data.tokens.store import TokenStore
from postgrad.data.words import split_words_and_signs
from postgrad.errors import DataError

MIN_WORDS = 1000
"""Words that target text needs for an estimate."""
MIN_DOCUMENTS = 10
"""Documents that a source needs for a selection of a share of them."""
_DECODE_TOKENS = 1 << 17
"""Tokens decoded at once."""

CountCallback = Callable[[int], None]
"""Called with the number of documents done."""


def ignore_progress(_: int) -> None:
    pass


def decode_documents(store: TokenStore, tokenizer: Tokenizer) -> Iterator[str]:
    """The decoded text of every document of a store, in order, without special tokens."""
    batch: list[list[int]] = []
    size = 0
    for document in range(len(store)):
        batch.append(store.read(document).tolist())
        size += len(batch[-1])
        if size >= _DECODE_TOKENS:
            yield from tokenizer.decode_batch(batch, skip_special_tokens=True)
            batch, size = [], 0
    yield from tokenizer.decode_batch(batch, skip_special_tokens=True)


# --- importance resampling ----------------------------------------------------------------------------


def target_counts(texts: Iterable[str], where: str) -> np.ndarray:
    """Counts of the hashed n-grams of the target texts, of shape (F,). Raises `DataError` for too few words."""
    total_F, word_count = np.zeros(FEATURE_COUNT, np.int64), 0
    for text in texts:
        words = split_words_and_signs(text)
        word_count += len(words)
        total_F += count_buckets(hash_ngrams(words))
    if word_count < MIN_WORDS:
        raise DataError(
            f"{word_count:,} words are too few for target text",
            where=where,
            expected=f"at least {MIN_WORDS:,} words",
            hint="name more or longer files",
        )
    return total_F


@dataclass(frozen=True)
class ImportanceWeights:
    """The log importance weight of every document, and its number of n-grams."""

    log_weights_N: np.ndarray
    ngram_count_N: np.ndarray

    @property
    def nats_per_ngram_N(self) -> np.ndarray:
        """Log weight per n-gram, independent of a document's length."""
        return self.log_weights_N / np.maximum(self.ngram_count_N, 1)


def importance_weights(
    texts: Iterable[str], target_F: np.ndarray, on_progress: CountCallback = ignore_progress
) -> ImportanceWeights:
    """`log p(z) - log q(z)` of each document z: the sum of `log p_j - log q_j` over its n-grams.

    DSIR (Xie et al. 2023, arXiv 2302.03169, equations 2 and 3): p and q are the n-gram shares in the target text and in all
    documents, each with one added to every count. Words are in lower case.
    """
    raw_F = np.zeros(FEATURE_COUNT, np.int64)
    ngram_counts: list[int] = []
    with tempfile.TemporaryFile() as spool:  # n-grams are needed twice, and may not fit in memory
        for text in texts:
            buckets = hash_ngrams(split_words_and_signs(text))
            raw_F += count_buckets(buckets)
            ngram_counts.append(len(buckets))
            spool.write(buckets.tobytes())
            on_progress(len(ngram_counts))
        spool.seek(0)
        log_ratio_F = np.log(_smoothed_shares(target_F)) - np.log(_smoothed_shares(raw_F))
        logs = [log_ratio_F[np.frombuffer(spool.read(2 * count), np.uint16)].sum() for count in ngram_counts]
    return ImportanceWeights(np.array(logs, np.float64), np.array(ngram_counts, np.int64))


def _smoothed_shares(counts_F: np.ndarray) -> np.ndarray:
    """The share of each feature with add-one smoothing, so that features missing from a short target weigh little.

    The authors' code adds 1e-8 to each share instead.
    """
    return (counts_F + 1.0) / (counts_F.sum() + len(counts_F))


def resample(log_weights_N: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Sample the sorted indices of `count` documents without replacement, in proportion to their weights.

    Gumbel top-k: the largest of log weight + Gumbel noise (Kool et al. 2019, arXiv 1903.06059; Xie et al. 2023, section 3).
    """
    keys_N = log_weights_N + np.random.default_rng(seed).gumbel(size=len(log_weights_N))
    return np.sort(np.argsort(-keys_N, kind="stable")[:count])


def share_to_count(share: float, documents: int, where: str) -> int:
    """The number of documents in a share, rounded. Raises `DataError` when there are too few, or none would be kept."""
    require_documents(documents, where)
    count = round(share * documents)
    if not count:
        raise DataError(
            f"{share:.3%} of {documents:,} documents is less than one",
            where=where,
            expected=f"at least {1 / documents:.3%}",
            hint="keep more, or split the text into more documents with `document_unit`",
        )
    return count


def require_documents(documents: int, where: str) -> None:
    """Raise `DataError` for too few documents to select a share of."""
    if documents < MIN_DOCUMENTS:
        raise DataError(
            f"{documents} documents are too few to select a share of",
            where=where,
            expected=f"at least {MIN_DOCUMENTS} documents",
            hint="split the text into more documents with `document_unit: passages`, or remove this selection",
        )


# --- near duplicates --------------------------------------------------------------------------------------


def find_near_duplicates(
    texts: Iterable[str], threshold: float, on_progress: CountCallback = ignore_progress
) -> np.ndarray:
    """For each document the index of its first near duplicate, or -1 if it is new, of shape (N,)."""
    index, new_documents, out = NearDuplicateIndex(threshold), list[int](), list[int]()
    for number, text in enumerate(texts):
        duplicate = index.find_or_add(text)
        out.append(-1 if duplicate is None else new_documents[duplicate])
        if duplicate is None:
            new_documents.append(number)
        on_progress(number + 1)
    return np.array(out, np.int64)


# --- a band of quantiles -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class QuantileBand:
    """Documents within a band of values, and its edges."""

    indices: np.ndarray
    low: float
    high: float


def select_band(values_N: np.ndarray, low: float, high: float, where: str) -> QuantileBand:
    """The documents with values between two quantiles (edges included), in order, without those of no value (NaN).

    Raises `DataError` for too few documents.
    """
    known = values_N[~np.isnan(values_N)]
    if len(known) < min(len(values_N), MIN_DOCUMENTS):
        raise DataError(
            f"only {len(known):,} of {len(values_N):,} documents are long enough for a score",
            where=where,
            expected=f"at least {MIN_DOCUMENTS} of two tokens or more",
            hint="use longer documents, or remove this selection",
        )
    require_documents(len(known), where)
    edges = np.quantile(known, [low, high])
    # Quantiles are interpolated: rounding must not exclude a document at the edge.
    slack = 1e-9 * max(1.0, float(np.abs(edges).max()))
    within = (values_N >= edges[0] - slack) & (values_N <= edges[1] + slack)
    return QuantileBand(np.flatnonzero(within), float(edges[0]), float(edges[1]))

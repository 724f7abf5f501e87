"""Which documents of a source are worth reading? Importance resampling, near copies, and a band of values.

Legend: N documents, F hashed features.

Documents are taken from a token store as text again, one batch after the other, so that rows of every kind can be selected,
and nothing but a few numbers of each document is held in memory.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer

from postgrad.data.filter.near_duplicates import NearDuplicateIndex
from postgrad.data.filter.ngrams import FEATURE_COUNT, count_buckets, hash_ngrams, split_words
from postgrad.data.tokens.store import TokenStore
from postgrad.errors import DataError

MIN_WORDS = 1000
"""Words of the texts that others are to be like, below which nothing is estimated."""
MIN_DOCUMENTS = 10
"""Documents, below which no share of them is told from chance."""
_DECODE_TOKENS = 1 << 17
"""Tokens that are made text again at once."""

CountCallback = Callable[[int], None]
"""Told how many documents are done."""


def ignore_progress(_: int) -> None:
    """Tells nobody."""


def decode_documents(store: TokenStore, tokenizer: Tokenizer) -> Iterator[str]:
    """The text of every document of a store, in its order, as its tokenizer gives it back; special tokens are left out."""
    held: list[list[int]] = []
    size = 0
    for document in range(len(store)):
        held.append(store.read(document).tolist())
        size += len(held[-1])
        if size >= _DECODE_TOKENS:
            yield from tokenizer.decode_batch(held, skip_special_tokens=True)
            held, size = [], 0
    yield from tokenizer.decode_batch(held, skip_special_tokens=True)


# --- importance resampling ----------------------------------------------------------------------------


def target_counts(texts: Iterable[str], where: str) -> np.ndarray:
    """How often each hashed n-gram occurs in the texts that others are to be like, of shape (F,).

    Raises `DataError` when there are too few words to estimate anything.
    """
    total_F, words = np.zeros(FEATURE_COUNT, np.int64), 0
    for text in texts:
        met = split_words(text.lower())
        words += len(met)
        total_F += count_buckets(hash_ngrams(met))
    if words < MIN_WORDS:
        raise DataError(
            f"{words:,} words are too few to say what text is like them",
            where=where,
            expected=f"at least {MIN_WORDS:,} words",
            hint="name more files, or longer ones",
        )
    return total_F


@dataclass(frozen=True)
class ImportanceWeights:
    """The log importance weight of every document, and how many n-grams it is the sum of."""

    log_weights_N: np.ndarray
    ngram_count_N: np.ndarray

    @property
    def nats_per_ngram_N(self) -> np.ndarray:
        """Nats for each n-gram: what does not depend on a document's length."""
        return self.log_weights_N / np.maximum(self.ngram_count_N, 1)


def importance_weights(
    texts: Iterable[str], target_F: np.ndarray, on_progress: CountCallback = ignore_progress
) -> ImportanceWeights:
    """`log p(z) - log q(z)` of each document z: the sum over its n-grams of `log p_j - log q_j`.

    DSIR (Xie et al. 2023, arXiv 2302.03169, equations 2 and 3): p has the shares of n-grams in the text that the documents are
    to be like, q those in all documents, each with one added to every count. Words are compared in lower case.
    """
    raw_F = np.zeros(FEATURE_COUNT, np.int64)
    grams: list[int] = []
    with tempfile.TemporaryFile() as spool:  # n-grams are needed twice, and may be more than fit
        for text in texts:
            buckets = hash_ngrams(split_words(text.lower()))
            raw_F += count_buckets(buckets)
            grams.append(len(buckets))
            spool.write(buckets.tobytes())
            on_progress(len(grams))
        spool.seek(0)
        gain_F = np.log(_smoothed_shares(target_F)) - np.log(_smoothed_shares(raw_F))
        logs = [gain_F[np.frombuffer(spool.read(2 * count), np.uint16)].sum() for count in grams]
    return ImportanceWeights(np.array(logs, np.float64), np.array(grams, np.int64))


def _smoothed_shares(counts_F: np.ndarray) -> np.ndarray:
    """The share of each feature, with one added to every count, so that a short target says little of what it does not hold.

    The authors' code adds 1e-8 to each share in place of it.
    """
    return (counts_F + 1.0) / (counts_F.sum() + len(counts_F))


def resample(log_weights_N: np.ndarray, count: int, seed: int) -> np.ndarray:
    """The numbers of `count` documents, drawn without replacement in proportion to their weights, in their order.

    The largest of log weight + Gumbel noise (Kool et al. 2019, arXiv 1903.06059; Xie et al. 2023, section 3).
    """
    keys_N = log_weights_N + np.random.default_rng(seed).gumbel(size=len(log_weights_N))
    return np.sort(np.argsort(-keys_N, kind="stable")[:count])


def share_to_count(share: float, documents: int, where: str) -> int:
    """How many documents a share is, rounded. Raises `DataError` when there are too few, or none would be kept."""
    require_documents(documents, where)
    count = round(share * documents)
    if not count:
        raise DataError(
            f"{share:.3%} of {documents:,} documents is none",
            where=where,
            expected=f"at least {1 / documents:.3%}",
            hint="keep more, or cut the text into more documents with `documents`",
        )
    return count


def require_documents(documents: int, where: str) -> None:
    """Raises `DataError` for so few documents that a share of them says nothing."""
    if documents < MIN_DOCUMENTS:
        raise DataError(
            f"{documents} documents are too few to keep some of them by a share",
            where=where,
            expected=f"at least {MIN_DOCUMENTS} documents",
            hint="cut the text into more documents with `documents: passages`, or leave this selection out",
        )


# --- near copies --------------------------------------------------------------------------------------


def find_near_duplicates(
    texts: Iterable[str], threshold: float, on_progress: CountCallback = ignore_progress
) -> np.ndarray:
    """For each document the number of the first that it is nearly the same as, or -1 for one that is new, of shape (N,)."""
    seen, kept, out = NearDuplicateIndex(threshold), list[int](), list[int]()
    for number, text in enumerate(texts):
        met = seen.find_or_add(text)
        out.append(-1 if met is None else kept[met])
        if met is None:
            kept.append(number)
        on_progress(number + 1)
    return np.array(out, np.int64)


# --- a band -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class QuantileBand:
    """Documents inside of a band of values, and its edges."""

    indices: np.ndarray
    low: float
    high: float


def select_band(values_N: np.ndarray, low: float, high: float, where: str) -> QuantileBand:
    """The documents whose value lies between two quantiles (edges included), in their order; none without a value (NaN).

    Raises `DataError` for too few documents.
    """
    known = values_N[~np.isnan(values_N)]
    if len(known) < min(len(values_N), MIN_DOCUMENTS):
        raise DataError(
            f"of {len(values_N):,} documents {len(known):,} are long enough to be judged",
            where=where,
            expected=f"at least {MIN_DOCUMENTS} of two tokens or more",
            hint="give longer documents, or leave this selection out",
        )
    require_documents(len(known), where)
    edges = np.quantile(known, [low, high])
    # A quantile between two documents is no value of either: rounding must not push one out.
    slack = 1e-9 * max(1.0, float(np.abs(edges).max()))
    within = (values_N >= edges[0] - slack) & (values_N <= edges[1] + slack)
    return QuantileBand(np.flatnonzero(within), float(edges[0]), float(edges[1]))

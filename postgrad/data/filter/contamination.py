"""Contamination: held-out text that occurs in the training text, as exact duplicates and as 13-grams.

A document is an exact duplicate when its content has the same digest. Its 13-grams are 13 successive words (`data.words`),
whatever is between them. A document with fewer words is compared whole, with other such documents.

Words and 13-grams are compared as 64-bit polynomial hashes, computed by numpy without a loop over words. For bytes b (mapped
by a table T of random numbers) and an odd P, prefix[n] = sum over j < n of T[b_j] P^j mod 2^64, so the hash of bytes [i, j)
is (prefix[j] - prefix[i]) P^-i, independent of the word's position. 13-grams are hashes of 13 word hashes in the same way.
Each hash ends with the finaliser of splitmix64, as the low bits of such sums are weak. The probability of any false hit
between 10^9 training and 10^6 held-out 13-grams is 10^15 / 2^64, one in 18,000.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from postgrad.data.random_streams import mix_bits
from postgrad.data.read.documents import Document
from postgrad.data.tokens.store import digest
from postgrad.data.words import separate_words

GRAM_WORDS = 13
"""Words in a gram, as in the contamination analysis of GPT-3 (arXiv 2005.14165, appendix C)."""

MAX_EXAMPLES = 10

_BLOCK = 2**20
"""Bytes hashed at once; longer documents are split between words."""
_FILTER_BITS = 24

_MULTIPLIER = 0x9E3779B97F4A7C15


class OverlapExample(NamedTuple):
    """A held-out document, the first training document that shares text with it, and the shared fraction."""

    heldout: str
    training: str
    share: float


@dataclass(frozen=True)
class OverlapReport:
    """How much of the held-out text is in the training text.

    `shares`: for each non-empty held-out document the fraction of its 13-grams that occur in training, 1 for an exact
    duplicate. `overlapping` documents share any of them, `half_overlapping` at least half.
    """

    documents: int
    duplicates: int
    overlapping: int
    half_overlapping: int
    shares: np.ndarray
    examples: tuple[OverlapExample, ...]


def measure_overlap(heldout: Iterable[Document], training: Iterable[Document]) -> OverlapReport:
    """Search the training documents (streamed) for the held-out documents (in memory as hashes)."""
    locations: list[str] = []
    digests: list[np.ndarray] = []
    keys: list[np.ndarray] = []
    owners: list[np.ndarray] = []
    for block in _hash_documents(heldout):
        keys.append(block.keys)
        owners.append(block.documents.astype(np.int64) + len(locations))
        digests.append(block.digests)
        locations += block.locations
    key_index = _HashIndex(_concatenate(keys))
    digest_index = _HashIndex(_concatenate(digests))
    for block in _hash_documents(training):
        key_index.record_matches(block.keys, block.documents, block.locations)
        digest_index.record_matches(block.digests, np.arange(len(block.locations)), block.locations)

    is_matched = key_index.is_matched
    owner = _concatenate(owners).astype(np.int64)
    totals = np.bincount(owner, minlength=len(locations))
    hits = np.bincount(owner, weights=is_matched, minlength=len(locations))
    shares = hits / np.maximum(totals, 1)
    is_duplicate = digest_index.is_matched
    shares[is_duplicate] = 1.0
    return OverlapReport(
        documents=len(locations),
        duplicates=int(is_duplicate.sum()),
        overlapping=int((shares > 0).sum()),
        half_overlapping=int((shares >= 0.5).sum()),
        shares=shares,
        examples=_worst_examples(locations, shares, owner, key_index, digest_index),
    )


def _worst_examples(
    locations: list[str], shares: np.ndarray, owner: np.ndarray, keys: _HashIndex, digests: _HashIndex
) -> tuple[OverlapExample, ...]:
    """The largest shares, each with its duplicate, or the first training document with a common gram."""
    worst = [int(n) for n in np.argsort(-shares, kind="stable")[:MAX_EXAMPLES] if shares[n] > 0]
    gram_locations, duplicate_locations = keys.location_indices, digests.location_indices
    examples = []
    for document in worst:
        training = digests.get_location(int(duplicate_locations[document]))
        if training is None:
            hits = gram_locations[owner == document]
            training = keys.get_location(int(hits[hits >= 0][0]))
        examples.append(OverlapExample(locations[document], training or "", float(shares[document])))
    return tuple(examples)


class _HashIndex:
    """An index of hashes, and the first training document in which each occurs."""

    def __init__(self, hashes: np.ndarray) -> None:
        self._sorted, self._inverse = np.unique(hashes, return_inverse=True)
        self._first_match = np.full(len(self._sorted), -1, np.int64)
        self._locations: list[str] = []
        # Nearly all lookups miss: a small table (a one-hash Bloom filter) rejects them without a search.
        self._filter = np.zeros(2**_FILTER_BITS, np.bool_)
        self._filter[self._slot(self._sorted)] = True

    @staticmethod
    def _slot(hashes: np.ndarray) -> np.ndarray:
        return (hashes >> np.uint64(64 - _FILTER_BITS)).astype(np.int64)

    def record_matches(self, hashes: np.ndarray, documents: np.ndarray, locations: Sequence[str]) -> None:
        if not len(self._sorted):
            return
        likely = np.flatnonzero(self._filter[self._slot(hashes)])
        if not len(likely):
            return
        hashes = hashes[likely]
        entries = np.minimum(np.searchsorted(self._sorted, hashes), len(self._sorted) - 1)
        is_new = (self._sorted[entries] == hashes) & (self._first_match[entries] < 0)
        # Reversed: of several writes to one entry numpy keeps the last, which is then the first match.
        entries, documents = entries[is_new][::-1], documents[likely][is_new][::-1]
        if not len(entries):
            return
        matched, local = np.unique(documents, return_inverse=True)
        self._first_match[entries] = len(self._locations) + local
        self._locations += [locations[n] for n in matched.tolist()]

    @property
    def location_indices(self) -> np.ndarray:
        """The location index of each hash in its original order, or -1 without a match."""
        return self._first_match[self._inverse]

    @property
    def is_matched(self) -> np.ndarray:
        return self.location_indices >= 0

    def get_location(self, number: int) -> str | None:
        return self._locations[number] if number >= 0 else None


# --- hashing ------------------------------------------------------------------------------------------


class _HashedDocuments(NamedTuple):
    """Documents of one block: their keys (13-grams, or a short document as a whole) and each key's document."""

    keys: np.ndarray
    documents: np.ndarray
    digests: np.ndarray
    locations: list[str]


def _hash_documents(documents: Iterable[Document]) -> Iterator[_HashedDocuments]:
    """The documents' keys, about a block at a time."""
    batch: list[Document] = []
    size = 0
    for document in documents:
        if document.is_empty:
            continue
        batch.append(document)
        content = document.text if document.text is not None else document.ids
        size += len(content) if content is not None else 0
        if size >= _BLOCK:
            yield _hash_block(batch)
            batch, size = [], 0
    if batch:
        yield _hash_block(batch)


def _hash_block(documents: list[Document]) -> _HashedDocuments:
    words: list[np.ndarray] = []
    counts = np.zeros(len(documents), np.int64)
    digests = np.zeros(len(documents), np.uint64)
    texts: list[bytes] = []
    size, first = 0, 0

    def flush(until: int) -> None:
        nonlocal size, first
        if texts:
            hashes, counts[first:until] = _hash_words(texts)
            words.append(hashes)
            texts.clear()
        size, first = 0, until

    for number, document in enumerate(documents):
        if document.text is None:
            flush(number)
            assert document.ids is not None
            ids = np.ascontiguousarray(document.ids, "<u4")
            digests[number] = digest(ids.data)
            words.append(mix_bits(ids.astype(np.uint64)))
            counts[number] = len(ids)
            first = number + 1
            continue
        data = document.text.encode()
        digests[number] = digest(data)
        lowered = data.lower() if document.text.isascii() else " ".join(separate_words(document.text)).encode()
        if len(lowered) > _BLOCK:
            flush(number)
            pieces = [_hash_words([piece])[0] for piece in _split_bytes(lowered)]
            words += pieces
            counts[number] = sum(map(len, pieces))
            first = number + 1
            continue
        if size + len(lowered) >= _BLOCK:
            flush(number)
        texts.append(lowered)
        size += len(lowered) + 1
    flush(len(documents))
    keys, owners = _hash_grams(_concatenate(words), counts)
    return _HashedDocuments(keys, owners, digests, [document.location for document in documents])


def _split_bytes(data: bytes) -> Iterator[bytes]:
    """Pieces smaller than a block, split between words (or anywhere, in a word longer than a block)."""
    start = 0
    while start < len(data):
        end = min(start + _BLOCK - 1, len(data))
        if end < len(data):
            tail = np.frombuffer(data, np.uint8, min(2**12, end - start), end - min(2**12, end - start))
            gaps = np.flatnonzero(~_IS_WORD_BYTE[tail])
            end = end - len(tail) + int(gaps[-1]) + 1 if len(gaps) else end
        yield data[start:end]
        start = end


def _hash_words(texts: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """The hash of every word of the texts in order, and the number of words of each text."""
    data = np.frombuffer(b"\n".join([*texts, b""]), np.uint8)
    inside = _IS_WORD_BYTE[data]
    edges = np.flatnonzero(inside[1:] != inside[:-1]) + 1
    if inside[0]:
        edges = np.concatenate([[0], edges])
    starts, ends = edges[0::2], edges[1::2]  # the last byte is a line break, so every word ends
    hashes = mix_bits(_hash_spans(_BYTE_HASHES[data], starts, ends))
    borders = np.cumsum([len(text) + 1 for text in texts])
    return hashes, np.diff(np.searchsorted(starts, borders), prepend=0)


def _hash_grams(words: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The hashes of each document's 13-grams, or of a document with fewer words as a whole, and their documents."""
    starts = np.cumsum(counts) - counts
    short = np.flatnonzero((counts > 0) & (counts < GRAM_WORDS))
    grams = np.maximum(counts - GRAM_WORDS + 1, 0)
    owners = np.repeat(np.arange(len(counts)), grams)
    begin = np.arange(int(grams.sum())) - np.repeat(np.cumsum(grams) - grams, grams) + starts[owners]
    begin = np.concatenate([begin, starts[short]])
    end = np.concatenate([begin[: len(owners)] + GRAM_WORDS, starts[short] + counts[short]])
    lengths = (end - begin).astype(np.uint64)  # part of the hash: a short document never equals a gram
    hashes: list[np.ndarray] = []
    for at in range(0, max(1, len(begin)), _BLOCK // 8):
        part = slice(at, at + _BLOCK // 8)
        if not len(begin[part]):
            break
        low, high = int(begin[part].min()), int(end[part].max())
        sums = _hash_long_spans(words[low:high], begin[part] - low, end[part] - low)
        hashes.append(mix_bits(sums + lengths[part] * _LENGTH_MULTIPLIER))
    return _concatenate(hashes), np.concatenate([owners, short])


def _hash_spans(values: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """sum over j in [start, end) of values[j] P^(j - start) mod 2^64, for at most a block of values."""
    prefix = np.zeros(len(values) + 1, np.uint64)
    np.cumsum(values * _POWERS[: len(values)], out=prefix[1:])
    return (prefix[ends] - prefix[starts]) * _INVERSE_POWERS[starts]


def _hash_long_spans(values: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """`_hash_spans` for more values than the table has powers, by halves."""
    if len(values) <= len(_POWERS):
        return _hash_spans(values, starts, ends)
    middle = len(starts) // 2
    halves = (slice(0, middle), slice(middle, None))
    parts = []
    for half in halves:
        low, high = int(starts[half].min()), int(ends[half].max())
        parts.append(_hash_long_spans(values[low:high], starts[half] - low, ends[half] - low))
    return np.concatenate(parts)


def _concatenate(parts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(parts) if parts else np.zeros(0, np.uint64)


def _powers(base: int, count: int) -> np.ndarray:
    powers = np.full(count, base, np.uint64)
    powers[0] = 1
    return np.cumprod(powers)


def _word_byte_table() -> np.ndarray:
    table = np.zeros(256, np.bool_)
    table[np.frombuffer(b"0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ", np.uint8)] = True
    table[128:] = True  # bytes of letters beyond ASCII
    return table


_IS_WORD_BYTE = _word_byte_table()
_BYTE_HASHES = mix_bits(np.arange(1, 257, dtype=np.uint64) * np.uint64(_MULTIPLIER))
_LENGTH_MULTIPLIER = np.uint64(0xD6E8FEB86659FD93)
_POWERS = _powers(_MULTIPLIER, _BLOCK + 2)
_INVERSE_POWERS = _powers(pow(_MULTIPLIER, -1, 2**64), _BLOCK + 2)

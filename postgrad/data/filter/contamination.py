"""Does held-out text occur in the training text?

Two answers. A document is an exact duplicate when its bytes have the same digest. And its 13-grams are looked
for in the training text: 13 words in a row, lower-cased, a word being letters and digits, whatever stands
between them. A document with fewer words is compared whole, with other such documents.

Words and 13-grams are compared as 64-bit hashes, made by numpy without a loop over words. For bytes b
(through a table T of random numbers) and an odd P, prefix[n] = sum over j < n of T[b_j] P^j mod 2^64, so that
the hash of bytes [i, j) is (prefix[j] - prefix[i]) P^-i, wherever the word stands. The same again over 13
words instead of bytes; each ends in the finaliser of splitmix64, for the low bits of such sums are weak. That
there is any false hit between 10^9 training 13-grams and 10^6 held-out ones has a chance of 10^15 / 2^64, one
in 18,000.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from postgrad.data.read.documents import Document
from postgrad.data.tokens.store import digest

GRAM_WORDS = 13
"""Words in a gram: the length by which GPT-3 (arXiv 2005.14165, appendix C) told contaminated documents."""

MAX_EXAMPLES = 10

_BLOCK = 2**20
"""Bytes that are hashed at once; longer documents are cut between two words."""
_FILTER_BITS = 24

_MULTIPLIER = 0x9E3779B97F4A7C15


class OverlapExample(NamedTuple):
    """A held-out document, where text of it was met in training first, and the share of it that was met."""

    heldout: str
    training: str
    share: float


@dataclass(frozen=True)
class OverlapReport:
    """How much of the held-out text is in the training text.

    `shares` has a number for each held-out document that is not empty: the part of its 13-grams that occur in
    training, 1 for an exact duplicate. `touched` documents share any of them, `half` at least half.
    """

    documents: int
    duplicates: int
    overlapping: int
    half_overlapping: int
    shares: np.ndarray
    examples: tuple[OverlapExample, ...]


def measure_overlap(heldout: Iterable[Document], training: Iterable[Document]) -> OverlapReport:
    """Looks for the held-out documents (kept in memory as hashes) in the training documents (streamed)."""
    places: list[str] = []
    digests: list[np.ndarray] = []
    keys: list[np.ndarray] = []
    owners: list[np.ndarray] = []
    for block in _hash_documents(heldout):
        keys.append(block.keys)
        owners.append(block.documents.astype(np.int64) + len(places))
        digests.append(block.digests)
        places += block.locations
    wanted_keys = _HashIndex(_concatenate(keys))
    wanted_digests = _HashIndex(_concatenate(digests))
    for block in _hash_documents(training):
        wanted_keys.record_matches(block.keys, block.documents, block.locations)
        wanted_digests.record_matches(block.digests, np.arange(len(block.locations)), block.locations)

    found = wanted_keys.is_matched
    owner = _concatenate(owners).astype(np.int64)
    totals = np.bincount(owner, minlength=len(places))
    hits = np.bincount(owner, weights=found, minlength=len(places))
    shares = hits / np.maximum(totals, 1)
    same = wanted_digests.is_matched
    shares[same] = 1.0
    return OverlapReport(
        documents=len(places),
        duplicates=int(same.sum()),
        overlapping=int((shares > 0).sum()),
        half_overlapping=int((shares >= 0.5).sum()),
        shares=shares,
        examples=_worst_examples(places, shares, owner, wanted_keys, wanted_digests),
    )


def _worst_examples(
    locations: list[str], shares: np.ndarray, owner: np.ndarray, keys: _HashIndex, digests: _HashIndex
) -> tuple[OverlapExample, ...]:
    """The largest shares; an exact duplicate names its duplicate, any other where a gram was met first."""
    worst = [int(n) for n in np.argsort(-shares, kind="stable")[:MAX_EXAMPLES] if shares[n] > 0]
    met, same = keys.location_indices, digests.location_indices
    examples = []
    for document in worst:
        training = digests.get_location(int(same[document]))
        if training is None:
            hits = met[owner == document]
            training = keys.get_location(int(hits[hits >= 0][0]))
        examples.append(OverlapExample(locations[document], training or "", float(shares[document])))
    return tuple(examples)


class _HashIndex:
    """Hashes that are looked for, and the training document in which each was met first."""

    def __init__(self, hashes: np.ndarray) -> None:
        self._sorted, self._inverse = np.unique(hashes, return_inverse=True)
        self._first_match = np.full(len(self._sorted), -1, np.int64)
        self._locations: list[str] = []
        # Nearly all that is looked up is not there: one byte of a small table says so without a search.
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
        at = np.minimum(np.searchsorted(self._sorted, hashes), len(self._sorted) - 1)
        new = (self._sorted[at] == hashes) & (self._first_match[at] < 0)
        at, documents = at[new][::-1], documents[likely][new][::-1]
        if not len(at):
            return
        inside, local = np.unique(documents, return_inverse=True)
        self._first_match[at] = (
            len(self._locations) + local
        )  # reversed: of two writes to one place the first hit is last
        self._locations += [locations[n] for n in inside.tolist()]

    @property
    def location_indices(self) -> np.ndarray:
        """For each hash as given, the number of a place, or -1 where it was not met."""
        return self._first_match[self._inverse]

    @property
    def is_matched(self) -> np.ndarray:
        return self.location_indices >= 0

    def get_location(self, number: int) -> str | None:
        return self._locations[number] if number >= 0 else None


# --- hashing ------------------------------------------------------------------------------------------


class _HashedDocuments(NamedTuple):
    """Documents of one block: their keys (13-grams, or the whole of a short one) and each key's document."""

    keys: np.ndarray
    documents: np.ndarray
    digests: np.ndarray
    locations: list[str]


def _hash_documents(documents: Iterable[Document]) -> Iterator[_HashedDocuments]:
    """The documents' keys, about a block at a time."""
    held: list[Document] = []
    size = 0
    for document in documents:
        if document.is_empty:
            continue
        held.append(document)
        content = document.text if document.text is not None else document.ids
        size += len(content) if content is not None else 0
        if size >= _BLOCK:
            yield _hash_block(held)
            held, size = [], 0
    if held:
        yield _hash_block(held)


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
            words.append(_mix_bits(ids.astype(np.uint64)))
            counts[number] = len(ids)
            first = number + 1
            continue
        data = document.text.encode()
        digests[number] = digest(data)
        lowered = data.lower() if document.text.isascii() else document.text.lower().encode()
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
    """Pieces below a block, cut between two words (or, in a word of a whole block, anywhere)."""
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
    """The hash of every word of the texts in their order, and how many words each text has."""
    data = np.frombuffer(b"\n".join([*texts, b""]), np.uint8)
    inside = _IS_WORD_BYTE[data]
    edges = np.flatnonzero(inside[1:] != inside[:-1]) + 1
    if inside[0]:
        edges = np.concatenate([[0], edges])
    starts, ends = edges[0::2], edges[1::2]  # the last byte is a line break, so every word has an end
    hashes = _mix_bits(_hash_spans(_BYTE_HASHES[data], starts, ends))
    borders = np.cumsum([len(text) + 1 for text in texts])
    return hashes, np.diff(np.searchsorted(starts, borders), prepend=0)


def _hash_grams(words: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The 13-grams inside each document, or the whole of a document that has fewer words."""
    starts = np.cumsum(counts) - counts
    short = np.flatnonzero((counts > 0) & (counts < GRAM_WORDS))
    grams = np.maximum(counts - GRAM_WORDS + 1, 0)
    owners = np.repeat(np.arange(len(counts)), grams)
    begin = np.arange(int(grams.sum())) - np.repeat(np.cumsum(grams) - grams, grams) + starts[owners]
    begin = np.concatenate([begin, starts[short]])
    end = np.concatenate([begin[: len(owners)] + GRAM_WORDS, starts[short] + counts[short]])
    lengths = (end - begin).astype(np.uint64)  # a short document is never taken for a gram or a longer one
    hashes: list[np.ndarray] = []
    for at in range(0, max(1, len(begin)), _BLOCK // 8):
        part = slice(at, at + _BLOCK // 8)
        if not len(begin[part]):
            break
        low, high = int(begin[part].min()), int(end[part].max())
        sums = _hash_long_spans(words[low:high], begin[part] - low, end[part] - low)
        hashes.append(_mix_bits(sums + lengths[part] * _LENGTH_MULTIPLIER))
    return _concatenate(hashes), np.concatenate([owners, short])


def _hash_spans(values: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """sum over j in [start, end) of values[j] P^(j - start) mod 2^64, for at most a block of values."""
    prefix = np.zeros(len(values) + 1, np.uint64)
    np.cumsum(values * _POWERS[: len(values)], out=prefix[1:])
    return (prefix[ends] - prefix[starts]) * _INVERSE_POWERS[starts]


def _hash_long_spans(values: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """As `_spans`, for more values than there are powers in the table."""
    if len(values) <= len(_POWERS):
        return _hash_spans(values, starts, ends)
    middle = len(starts) // 2
    halves = (slice(0, middle), slice(middle, None))
    parts = []
    for half in halves:
        low, high = int(starts[half].min()), int(ends[half].max())
        parts.append(_hash_long_spans(values[low:high], starts[half] - low, ends[half] - low))
    return np.concatenate(parts)


def _mix_bits(hashes: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64 (Steele, Lea and Flood 2014): every bit depends on every other."""
    hashes = (hashes ^ (hashes >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    hashes = (hashes ^ (hashes >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return hashes ^ (hashes >> np.uint64(31))


def _concatenate(parts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(parts) if parts else np.zeros(0, np.uint64)


def _powers(base: int, count: int) -> np.ndarray:
    powers = np.full(count, base, np.uint64)
    powers[0] = 1
    return np.cumprod(powers)


def _word_byte_table() -> np.ndarray:
    table = np.zeros(256, np.bool_)
    table[np.frombuffer(b"0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ", np.uint8)] = True
    table[128:] = True  # parts of letters beyond ASCII
    return table


_IS_WORD_BYTE = _word_byte_table()
_BYTE_HASHES = _mix_bits(np.arange(1, 257, dtype=np.uint64) * np.uint64(_MULTIPLIER))
_LENGTH_MULTIPLIER = np.uint64(0xD6E8FEB86659FD93)
_POWERS = _powers(_MULTIPLIER, _BLOCK + 2)
_INVERSE_POWERS = _powers(pow(_MULTIPLIER, -1, 2**64), _BLOCK + 2)

"""Which tokens suit these texts? A byte-level BPE vocabulary, learnt from documents that may be trained on.

Byte-pair encoding (Sennrich et al. 2016, arXiv 1508.07909) over bytes (Radford et al. 2019), by the `tokenizers` package. Every
source counts by its share of what the stage reads: the fraction of its documents that makes up its share is taken, chosen by
content, or all of them several times. The result is a function of the texts alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from postgrad.data.read.documents import Document, read_documents
from postgrad.data.read.files import RawSource
from postgrad.data.tokens.held_out_split import held_out_mask
from postgrad.data.tokens.store import digest
from postgrad.data.tokens.tokenize import source_fingerprint
from postgrad.errors import DataError
from postgrad.storage.atomic import write_atomically

_FORMAT = 1
MAX_BYTES = 128 * 2**20
"""Of text; more changes the vocabulary little."""
_MIN_FREQUENCY = 2
_DIGEST_MULTIPLIER = np.uint64(0xD1342543DE82EF95)
"""Mixes digests, so that which documents are chosen has nothing to do with which are held out."""


@dataclass(frozen=True)
class VocabularySource:
    """A source, and the share of so many documents that is held out."""

    source: RawSource
    held_out_share: Callable[[int], float]


SharesFunction = Callable[[Sequence[int]], Sequence[float]]
"""The share of each source, when so many documents of each may be trained on."""


def train_vocabulary(
    sources: Sequence[VocabularySource],
    shares: SharesFunction,
    *,
    shares_key: object,
    size: int,
    special_tokens: Sequence[str],
    held_out_sources: Sequence[RawSource],
    cache: Path,
    progress: Callable[[int, int], None] | None = None,
    max_bytes: int = MAX_BYTES,
) -> str:
    """A tokenizer as the JSON of `tokenizer.json`: `size` tokens, those in `special` first. `rule`: `shares` as plain data.

    What a source holds out is not looked at, nor is any copy of a document of `away`. It has fewer tokens where no more pairs
    occur twice. Raises `DataError` for sources of token ids, and when no document is left.
    """
    read = [[_source_key(p.source, cache), p.held_out_share(1), p.held_out_share(10**6)] for p in sources]
    asked = [
        _FORMAT,
        size,
        list(special_tokens),
        max_bytes,
        read,
        shares_key,
        [_source_key(source, cache) for source in held_out_sources],
    ]
    place = cache / "vocabularies" / f"{hashlib.sha256(json.dumps(asked).encode()).hexdigest()}.json"
    if place.exists():
        return place.read_text("utf-8")
    copies = np.unique(
        np.concatenate([np.empty(0, np.uint64), *(_digests_and_sizes(source)[0] for source in held_out_sources)])
    )
    measured = [(*_digests_and_sizes(p.source), p) for p in sources]
    times = _repeat_counts(measured, shares, copies, max_bytes)
    if not any(n.any() for n in times):
        raise DataError(
            "no document is left that a vocabulary could be learnt from",
            where=sources[0].source.where,
            expected="documents that are not in a held-out set",
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        min_frequency=_MIN_FREQUENCY,
        special_tokens=list(special_tokens),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    total = sum(int(sizes @ n) for (_, sizes, _), n in zip(measured, times, strict=True))
    tokenizer.train_from_iterator(_repeat_texts(sources, times, total, progress), trainer)
    written = tokenizer.to_str(pretty=False)
    write_atomically(place, written)
    return written


def _source_key(source: RawSource, cache: Path) -> list[object]:
    return [source_fingerprint(source, cache), dict(source.columns), source.documents, source.kind]


def _read_texts(source: RawSource) -> Iterator[str]:
    """The documents of a source that a store has too."""
    for document in read_documents(source):
        if not document.is_empty:
            yield _document_text(document, source)


def _document_text(document: Document, source: RawSource) -> str:
    if document.text is None:
        raise DataError(
            f"'{source.name}' holds token ids, and a new tokenizer is learnt from text",
            where=document.location,
            expected="text, or the tokenizer that these ids are of, as model.tokenizer",
        )
    return document.text


def _digests_and_sizes(source: RawSource) -> tuple[np.ndarray, np.ndarray]:
    """The content hash and the bytes of each document."""
    digests: list[int] = []
    sizes: list[int] = []
    for text in _read_texts(source):
        data = text.encode()
        digests.append(digest(data))
        sizes.append(len(data))
    return np.array(digests, np.uint64), np.array(sizes, np.int64)


def _repeat_counts(
    measured: Sequence[tuple[np.ndarray, np.ndarray, VocabularySource]],
    shares: SharesFunction,
    copies: np.ndarray,
    max_bytes: int,
) -> list[np.ndarray]:
    """How often each document of each source is read, so that the bytes of the sources have their shares."""
    allowed = [~held_out_mask(d, p.held_out_share(len(d))) & ~np.isin(d, copies) for d, _, p in measured]
    there = [int(sizes[free].sum()) for (_, sizes, _), free in zip(measured, allowed, strict=True)]
    total = min(max_bytes, sum(there))
    given = shares([int(free.sum()) for free in allowed])
    out: list[np.ndarray] = []
    for (digests, sizes, _), free, have, share in zip(measured, allowed, there, given, strict=True):
        whole, rest = divmod(round(share * total), max(have, 1))
        order = np.argsort(digests * _DIGEST_MULTIPLIER, kind="stable")
        order = order[free[order]]
        times = np.where(free, whole, 0)
        times[order[: np.searchsorted(np.cumsum(sizes[order]), rest)]] += 1
        out.append(times)
    return out


def _repeat_texts(
    sources: Sequence[VocabularySource],
    repeat_counts: Sequence[np.ndarray],
    total: int,
    progress: Callable[[int, int], None] | None,
) -> Iterator[str]:
    done = 0
    for portion, wanted in zip(sources, repeat_counts, strict=True):
        for text, count in zip(_read_texts(portion.source), wanted.tolist(), strict=True):
            for _ in range(count):
                yield text
            done += count * len(text.encode())
            if progress and count:
                progress(done, total)

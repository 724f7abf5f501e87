"""Training of a byte-level BPE vocabulary on the training documents of a stage.

Byte-pair encoding (Sennrich et al. 2016, arXiv 1508.07909) over bytes (Radford et al. 2019), by the `tokenizers` package. Each
source is sampled in proportion to its share in the stage: a fraction of its documents, selected by content, or all of them
several times. The result is a function of the texts alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from postgrad.data.read.documents import Document, read_documents
from postgrad.data.read.files import RawSource
from postgrad.data.tokens.held_out_split import held_out_mask
from postgrad.data.tokens.source_files import source_fingerprint
from postgrad.data.tokens.store import digest
from postgrad.errors import DataError
from postgrad.storage.checked_files import read_cached_json, write_checked_json

_FORMAT = 1
MAX_BYTES = 128 * 2**20
"""Text to train on; more changes the vocabulary little."""
_MIN_FREQUENCY = 2
_DIGEST_MULTIPLIER = np.uint64(0xD1342543DE82EF95)
"""Rehashes digests, so that the sample is independent of the held-out split."""


@dataclass(frozen=True)
class VocabularySource:
    """A source, and its held-out share as a function of its number of documents."""

    source: RawSource
    held_out_share: Callable[[int], float]


SharesFunction = Callable[[Sequence[int]], Sequence[float]]
"""The share of each source, from the number of training documents of each."""


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
    """Train a tokenizer: the JSON of a `tokenizer.json` with `size` tokens, `special_tokens` first.

    `shares_key`: `shares` as plain data, for the cache key. Held-out documents and copies of documents of `held_out_sources`
    are not used. The vocabulary is smaller when no more pairs occur twice. Raises `DataError` for sources of token ids, and
    when no document remains.
    """
    source_keys = [[_source_key(p.source, cache), p.held_out_share(1), p.held_out_share(10**6)] for p in sources]
    held_out_keys = [_source_key(source, cache) for source in held_out_sources]
    key = [_FORMAT, size, list(special_tokens), max_bytes, source_keys, shares_key, held_out_keys]
    name = hashlib.sha256(json.dumps(key).encode()).hexdigest()
    path = cache / "vocabularies" / f"{name}.json"
    if found := read_cached_json(path, dict[str, Any], name):
        # An earlier version wrote the tokenizer.json itself.
        return found["tokenizer"] if "tokenizer" in found else path.read_text("utf-8")
    copies = np.unique(
        np.concatenate([np.empty(0, np.uint64), *(_digests_and_sizes(source)[0] for source in held_out_sources)])
    )
    measured = [(*_digests_and_sizes(p.source), p) for p in sources]
    times = _repeat_counts(measured, shares, copies, max_bytes)
    if not any(n.any() for n in times):
        raise DataError(
            "no document remains to train a vocabulary on",
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
    tokenizer_json = tokenizer.to_str(pretty=False)
    write_checked_json(path, {"tokenizer": tokenizer_json}, name)
    return tokenizer_json


def _source_key(source: RawSource, cache: Path) -> list[object]:
    return [source_fingerprint(source, cache), dict(source.columns), source.documents, source.kind]


def _read_texts(source: RawSource) -> Iterator[str]:
    """The non-empty documents of a source."""
    for document in read_documents(source):
        if not document.is_empty:
            yield _document_text(document, source)


def _document_text(document: Document, source: RawSource) -> str:
    if document.text is None:
        raise DataError(
            f"'{source.name}' has token ids, but a tokenizer is trained on text",
            where=document.location,
            expected="text, or the tokenizer of these ids as model.tokenizer",
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
    """How often to read each document of each source, so that the bytes of the sources are in proportion to their shares."""
    allowed = [~held_out_mask(d, p.held_out_share(len(d))) & ~np.isin(d, copies) for d, _, p in measured]
    available = [int(sizes[mask].sum()) for (_, sizes, _), mask in zip(measured, allowed, strict=True)]
    total = min(max_bytes, sum(available))
    source_shares = shares([int(mask.sum()) for mask in allowed])
    out: list[np.ndarray] = []
    columns = zip(measured, allowed, available, source_shares, strict=True)
    for (digests, sizes, _), mask, source_bytes, share in columns:
        # All documents `passes` times, and a hash-ordered sample of them, of `rest` bytes, once more.
        passes, rest = divmod(round(share * total), max(source_bytes, 1))
        order = np.argsort(digests * _DIGEST_MULTIPLIER, kind="stable")
        order = order[mask[order]]
        times = np.where(mask, passes, 0)
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
    for each, counts in zip(sources, repeat_counts, strict=True):
        for text, count in zip(_read_texts(each.source), counts.tolist(), strict=True):
            for _ in range(count):
                yield text
            done += count * len(text.encode())
            if progress and count:
                progress(done, total)

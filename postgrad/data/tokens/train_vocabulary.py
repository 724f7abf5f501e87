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

from postgrad.data.layouts.rows import held_out_mask
from postgrad.data.read.documents import Document, read_documents
from postgrad.data.read.files import Source
from postgrad.data.tokens.store import digest
from postgrad.data.tokens.tokenize import inputs_fingerprint
from postgrad.errors import DataError
from postgrad.storage.atomic import write_atomically

_FORMAT = 1
MOST_BYTES = 128 * 2**20
"""Of text; more changes the vocabulary little."""
_LEAST_FREQUENCY = 2
_CHOICE = np.uint64(0xD1342543DE82EF95)
"""Mixes digests, so that which documents are chosen has nothing to do with which are held out."""


@dataclass(frozen=True)
class Portion:
    """A source, and the share of so many documents that is held out."""

    source: Source
    held_out: Callable[[int], float]


Shares = Callable[[Sequence[int]], Sequence[float]]
"""The share of each source, when so many documents of each may be trained on."""


def learn_vocabulary(
    portions: Sequence[Portion],
    shares: Shares,
    *,
    rule: object,
    size: int,
    special: Sequence[str],
    away: Sequence[Source],
    cache: Path,
    progress: Callable[[int, int], None] | None = None,
    most: int = MOST_BYTES,
) -> str:
    """A tokenizer as the JSON of `tokenizer.json`: `size` tokens, those in `special` first. `rule`: `shares` as plain data.

    What a source holds out is not looked at, nor is any copy of a document of `away`. It has fewer tokens where no more pairs
    occur twice. Raises `DataError` for sources of token ids, and when no document is left.
    """
    read = [[_known_by(p.source, cache), p.held_out(1), p.held_out(10**6)] for p in portions]
    asked = [_FORMAT, size, list(special), most, read, rule, [_known_by(source, cache) for source in away]]
    place = cache / "vocabularies" / f"{hashlib.sha256(json.dumps(asked).encode()).hexdigest()}.json"
    if place.exists():
        return place.read_text("utf-8")
    copies = np.unique(np.concatenate([np.empty(0, np.uint64), *(_measured(source)[0] for source in away)]))
    measured = [(*_measured(p.source), p) for p in portions]
    times = _times(measured, shares, copies, most)
    if not any(n.any() for n in times):
        raise DataError(
            "no document is left that a vocabulary could be learnt from",
            where=portions[0].source.where,
            expected="documents that are not in a held-out set",
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        min_frequency=_LEAST_FREQUENCY,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    total = sum(int(sizes @ n) for (_, sizes, _), n in zip(measured, times, strict=True))
    tokenizer.train_from_iterator(_repeated(portions, times, total, progress), trainer)
    written = tokenizer.to_str(pretty=False)
    write_atomically(place, written)
    return written


def _known_by(source: Source, cache: Path) -> list[object]:
    return [inputs_fingerprint(source, cache), dict(source.columns), source.documents, source.kind]


def _texts(source: Source) -> Iterator[str]:
    """The documents of a source that a store has too."""
    for document in read_documents(source):
        if not document.empty:
            yield _text(document, source)


def _text(document: Document, source: Source) -> str:
    if document.text is None:
        raise DataError(
            f"'{source.name}' holds token ids, and a new tokenizer is learnt from text",
            where=document.place,
            expected="text, or the tokenizer that these ids are of, as model.tokenizer",
        )
    return document.text


def _measured(source: Source) -> tuple[np.ndarray, np.ndarray]:
    """The content hash and the bytes of each document."""
    digests: list[int] = []
    sizes: list[int] = []
    for text in _texts(source):
        data = text.encode()
        digests.append(digest(data))
        sizes.append(len(data))
    return np.array(digests, np.uint64), np.array(sizes, np.int64)


def _times(
    measured: Sequence[tuple[np.ndarray, np.ndarray, Portion]], shares: Shares, copies: np.ndarray, most: int
) -> list[np.ndarray]:
    """How often each document of each source is read, so that the bytes of the sources have their shares."""
    allowed = [~held_out_mask(d, p.held_out(len(d))) & ~np.isin(d, copies) for d, _, p in measured]
    there = [int(sizes[free].sum()) for (_, sizes, _), free in zip(measured, allowed, strict=True)]
    total = min(most, sum(there))
    given = shares([int(free.sum()) for free in allowed])
    out: list[np.ndarray] = []
    for (digests, sizes, _), free, have, share in zip(measured, allowed, there, given, strict=True):
        whole, rest = divmod(round(share * total), max(have, 1))
        order = np.argsort(digests * _CHOICE, kind="stable")
        order = order[free[order]]
        times = np.where(free, whole, 0)
        times[order[: np.searchsorted(np.cumsum(sizes[order]), rest)]] += 1
        out.append(times)
    return out


def _repeated(
    portions: Sequence[Portion], times: Sequence[np.ndarray], total: int, progress: Callable[[int, int], None] | None
) -> Iterator[str]:
    done = 0
    for portion, wanted in zip(portions, times, strict=True):
        for text, count in zip(_texts(portion.source), wanted.tolist(), strict=True):
            for _ in range(count):
                yield text
            done += count * len(text.encode())
            if progress and count:
                progress(done, total)

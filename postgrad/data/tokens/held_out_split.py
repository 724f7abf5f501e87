"""The held-out split of a source: documents to train on, and documents kept for evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

_CHUNK = 1 << 20


class DocumentStore(Protocol):
    """What rows need of a token store: the document table and the ids of a document."""

    @property
    def documents(self) -> np.ndarray: ...

    def read(self, document: int, start: int = 0, stop: int | None = None) -> np.ndarray: ...


def held_out_mask(digests: np.ndarray, share: float) -> np.ndarray:
    """Which documents are held out: a function of the document's content alone, so copies always fall on one side."""
    # The digest is uniform; a second mixing keeps the split independent of any other use of the digest.
    mixed = digests * np.uint64(0x9E3779B97F4A7C15)
    return (mixed >> np.uint64(11)).astype(np.float64) / float(1 << 53) < share


@dataclass(frozen=True)
class SelectedDocuments:
    """The documents that may be trained on, how much of each is read, and what was left out."""

    documents: np.ndarray
    sizes: np.ndarray
    read: int
    held_out: int
    dropped: int
    truncated: int


def select_documents(
    store: DocumentStore, *, held_out: float = 0.0, excluded: np.ndarray | None = None, max_tokens: int | None = None
) -> SelectedDocuments:
    """Leave out the held-out share, copies of `excluded` digests and documents of one token; cut the rest at `most`."""
    table = store.documents
    documents, sizes = [], []
    read = held = dropped = truncated = 0
    for begin in range(0, len(table), _CHUNK):
        chunk = table[begin : begin + _CHUNK]
        tokens, digests = chunk["tokens"].astype(np.int64), chunk["digest"]
        out = held_out_mask(digests, held_out)
        # A document of one token has nothing to predict; a copy of a held-out document must not be trained on.
        drop = ~out & (tokens < 2)
        if excluded is not None and len(excluded):
            drop |= ~out & np.isin(digests, excluded)
        kept = ~(out | drop)
        size = tokens if max_tokens is None else np.minimum(tokens, max_tokens)
        read += int(tokens.sum())
        held += int(tokens[out].sum())
        dropped += int(tokens[drop].sum())
        truncated += int((tokens - size)[kept].sum())
        documents.append(np.flatnonzero(kept) + begin)
        sizes.append(size[kept])
    return SelectedDocuments(
        np.concatenate(documents) if documents else np.empty(0, np.int64),
        np.concatenate(sizes) if sizes else np.empty(0, np.int64),
        read,
        held,
        dropped,
        truncated,
    )

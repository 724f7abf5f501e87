"""The held-out split of a source: the documents to train on, and those kept for evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

_CHUNK = 1 << 20


class DocumentStore(Protocol):
    """The part of a token store that rows read: the document table, and the ids of a document."""

    @property
    def documents(self) -> np.ndarray: ...

    def read(self, document: int, start: int = 0, stop: int | None = None) -> np.ndarray: ...


def held_out_mask(digests: np.ndarray, share: float) -> np.ndarray:
    """Which documents are held out. It depends on the content alone, so all copies of a document fall on one side."""
    # The digests are uniform; a second hash keeps the split independent of any other use of them.
    mixed = digests * np.uint64(0x9E3779B97F4A7C15)
    return (mixed >> np.uint64(11)).astype(np.float64) / float(1 << 53) < share


@dataclass(frozen=True)
class SelectedDocuments:
    """Documents to train on (their indices, and the tokens used of each), and the token counts of the ledger."""

    documents: np.ndarray
    sizes: np.ndarray
    read: int
    held_out: int
    dropped: int
    truncated: int


def select_documents(
    store: DocumentStore, *, held_out: float = 0.0, excluded: np.ndarray | None = None, max_tokens: int | None = None
) -> SelectedDocuments:
    """Drop the held-out share, documents with `excluded` digests and single tokens; truncate the rest to `max_tokens`."""
    table = store.documents
    documents, sizes = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    read = held = dropped = truncated = 0
    for begin in range(0, len(table), _CHUNK):
        chunk = table[begin : begin + _CHUNK]
        tokens, digests = chunk["tokens"].astype(np.int64), chunk["digest"]
        is_held_out = held_out_mask(digests, held_out)
        # A document of one token has no label; a copy of a held-out document must not be trained on.
        is_dropped = ~is_held_out & (tokens < 2)
        if excluded is not None and len(excluded):
            is_dropped |= ~is_held_out & np.isin(digests, excluded)
        is_selected = ~(is_held_out | is_dropped)
        size = tokens if max_tokens is None else np.minimum(tokens, max_tokens)
        read += int(tokens.sum())
        held += int(tokens[is_held_out].sum())
        dropped += int(tokens[is_dropped].sum())
        truncated += int((tokens - size)[is_selected].sum())
        documents.append(np.flatnonzero(is_selected) + begin)
        sizes.append(size[is_selected])
    return SelectedDocuments(np.concatenate(documents), np.concatenate(sizes), read, held, dropped, truncated)

"""What is a row? The arrays a model is called with, and the labels of what it should have said.

Legend: T positions in a row.

A source's documents become rows in one of several layouts; each is a class of its own that keeps to `Rows`. What they
share is here: which documents may be trained on at all, and the ledger that says where every token went:

    read   = held_out + dropped + truncated + placed
    placed = trained + context        (context: tokens that are read and not predicted)
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import NamedTuple, Protocol

import numpy as np

IGNORED = -100
"""The label of a position that is not trained (the convention of PyTorch and Hugging Face)."""

_CHUNK = 1 << 20


class DocumentStore(Protocol):
    """What rows need of a token store: the document table and the ids of a document."""

    @property
    def documents(self) -> np.ndarray: ...

    def read(self, document: int, start: int = 0, stop: int | None = None) -> np.ndarray: ...


class Row(NamedTuple):
    """`inputs` by the names that models take them under, `labels`, and how many of the labels count."""

    inputs: dict[str, np.ndarray]
    labels: np.ndarray
    label_count: int


def ignore_labels(row: Row) -> Row:
    """The same row with no label that counts. A label that is a number stays one; `counted` says that it counts nothing."""
    whole = np.issubdtype(row.labels.dtype, np.integer)
    return Row(row.inputs, np.full_like(row.labels, IGNORED) if whole else row.labels, 0)


@dataclass(frozen=True)
class Ledger:
    """Where every token of a source went (tokens, EOS and BOS included)."""

    read: int
    held_out: int
    dropped: int
    truncated: int
    placed: int
    padding: int
    trained: int
    context: int

    def as_dict(self) -> dict[str, int]:
        """The counts by name."""
        return asdict(self)


class Rows(Protocol):
    """The rows of a source in one layout; `layout` is equal for rows that can stand in one batch.

    `document_R`: the document that each row is of, where each is of one. `drawn`: what is read of a row depends on the
    position too.
    """

    layout: str
    ledger: Ledger

    @property
    def document_R(self) -> np.ndarray | None: ...

    @property
    def is_random(self) -> bool: ...

    def __len__(self) -> int: ...

    def get_row(self, row: int, position: int) -> Row:
        """Row number `row` as it stands at `position` of the mixture: what is drawn at random depends on both alone."""
        ...


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

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

from postgrad.data.render.frame import EMPTY_FRAME, Frame
from postgrad.data.tokens.held_out_split import DocumentStore, SelectedDocuments, select_documents

IGNORED = -100
"""The label of a position that is not trained (the convention of PyTorch and Hugging Face)."""


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


@dataclass(frozen=True, eq=False)
class RowOptions:
    """Options shared by all layouts: the size of a row, its frame, and which documents become rows.

    `length`: positions of a row. `lead`: tokens at each document's start that the frame replaces (1 for a BOS or [CLS]).
    `held_out`: share of the documents kept for evaluation. `excluded`: digests of documents that are dropped.
    """

    length: int
    frame: Frame = EMPTY_FRAME
    lead: int = 0
    held_out: float = 0.0
    excluded: np.ndarray | None = None
    max_document_tokens: int | None = None

    def select_documents(self, store: DocumentStore) -> SelectedDocuments:
        """The documents to train on."""
        return select_documents(
            store, held_out=self.held_out, excluded=self.excluded, max_tokens=self.max_document_tokens
        )

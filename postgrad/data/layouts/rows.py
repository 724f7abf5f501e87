"""Rows: the model inputs and labels of one training example, and what all row layouts share.

Legend: T positions in a row.

Each layout is a class that implements `Rows`. All layouts share `RowOptions` and the ledger, which accounts for every token:

    read   = held_out + dropped + truncated + placed
    placed = trained + context        (context: tokens that are inputs but never labels)
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
    """Model inputs by argument name, labels, and the number of labels that count."""

    inputs: dict[str, np.ndarray]
    labels: np.ndarray
    label_count: int


def ignore_labels(row: Row) -> Row:
    """The row without labels. The float labels of a regression stay, but `label_count` is 0."""
    is_integer = np.issubdtype(row.labels.dtype, np.integer)
    return Row(row.inputs, np.full_like(row.labels, IGNORED) if is_integer else row.labels, 0)


@dataclass(frozen=True)
class Ledger:
    """Token counts of a source, EOS and BOS included."""

    read: int
    held_out: int
    dropped: int
    truncated: int
    placed: int
    padding: int
    trained: int
    context: int

    def as_dict(self) -> dict[str, int]:
        return asdict(self)


class Rows(Protocol):
    """The rows of a source in one layout. Rows of equal `layout` can share a batch.

    `document_R`: the document of each row; None where a row can hold several. `is_random`: whether the contents of a row
    depend on its position in the mixture.
    """

    layout: str
    ledger: Ledger

    @property
    def document_R(self) -> np.ndarray | None: ...

    @property
    def is_random(self) -> bool: ...

    def __len__(self) -> int: ...

    def get_row(self, row: int, position: int) -> Row:
        """Row number `row` as read at `position` of the mixture; random choices depend on these two (and the seed) alone."""
        ...


@dataclass(frozen=True, eq=False)
class RowOptions:
    """Options shared by all layouts: the size of a row, its frame, and which documents become rows.

    `length`: positions of a row. `lead`: tokens at each document's start that the frame replaces (1 for a BOS or [CLS]).
    `held_out`: fraction of the documents kept for evaluation. `excluded`: digests of documents to drop.
    """

    length: int
    frame: Frame = EMPTY_FRAME
    lead: int = 0
    held_out: float = 0.0
    excluded: np.ndarray | None = None
    max_document_tokens: int | None = None

    def select_documents(self, store: DocumentStore) -> SelectedDocuments:
        """The documents of a store to train on."""
        return select_documents(
            store, held_out=self.held_out, excluded=self.excluded, max_tokens=self.max_document_tokens
        )

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


class RowContext(NamedTuple):
    """Tokens that only a teacher reads, before the position `position` of a row.

    They belong to the piece of a document from position `begin` up to `stop`.
    """

    ids: np.ndarray
    position: int
    begin: int
    stop: int

    @property
    def first_label(self) -> int:
        """The first position of the row whose prediction comes after the context."""
        return max(self.position - 1, self.begin)


class Row(NamedTuple):
    """Model inputs by argument name, labels, and the number of labels that count; `contexts` of a teacher, in order."""

    inputs: dict[str, np.ndarray]
    labels: np.ndarray
    label_count: int
    contexts: tuple[RowContext, ...] = ()


def ignore_labels(row: Row) -> Row:
    """The row without labels. The float labels of a regression stay, but `label_count` is 0."""
    is_integer = np.issubdtype(row.labels.dtype, np.integer)
    return row._replace(labels=np.full_like(row.labels, IGNORED) if is_integer else row.labels, label_count=0)


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
class BeginningContext:
    """The beginning of a document as a context: at most `max_tokens` and the `share` of its text, up to a sentence's end.

    `ends_sentence_V`: whether each id ends a sentence. Without an end, the context ends in a sentence.
    """

    max_tokens: int
    share: float
    ends_sentence_V: np.ndarray


@dataclass(frozen=True, eq=False)
class ContextOptions:
    """Teacher contexts: those that the store has, or the documents' beginnings; `max_positions` that a teacher reads."""

    max_positions: int | None = None
    beginning: BeginningContext | None = None


@dataclass(frozen=True, eq=False)
class RowOptions:
    """Options shared by all layouts: the size of a row, its frame, and which documents become rows.

    `length`: positions of a row. `lead`: tokens at each document's start that the frame replaces (1 for a BOS or [CLS]).
    `held_out`: fraction of the documents kept for evaluation. `excluded`: digests of documents to drop. `context`: the rows
    have contexts for a teacher.
    """

    length: int
    frame: Frame = EMPTY_FRAME
    lead: int = 0
    held_out: float = 0.0
    excluded: np.ndarray | None = None
    max_document_tokens: int | None = None
    context: ContextOptions | None = None

    def select_documents(self, store: DocumentStore) -> SelectedDocuments:
        """The documents of a store to train on."""
        return select_documents(
            store, held_out=self.held_out, excluded=self.excluded, max_tokens=self.max_document_tokens
        )

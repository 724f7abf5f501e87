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

"""Windows of documents: the text of a stored document without its prefix and EOS, and long texts split into windows.

Legend: N documents, R rows.

A stored document is `prefix + text + [eos]`. Layouts with a frame of their own read the text alone. The ledger counts the
stored prefix and EOS with the text: in a row the frame, or the row's own EOS, takes their place.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from postgrad.data.layouts.rows import Ledger
from postgrad.data.tokens.held_out_split import DocumentStore, SelectedDocuments
from postgrad.errors import StageError

TooLongPolicy = Literal["cut-context", "cut-end", "drop"]
"""For an example that does not fit: cut its beginning, cut its end, or drop it."""


class MarkedStore(DocumentStore, Protocol):
    """A token store with marks: one number for each token, or None for running text."""

    def marks(self, document: int, start: int = 0, stop: int | None = None) -> np.ndarray | None: ...


def has_marks(store: MarkedStore) -> bool:
    """Whether the documents of a store have marks: all have, or none."""
    return len(store.documents) > 0 and store.marks(0) is not None


def read_marks(store: MarkedStore, document: int, start: int, stop: int) -> np.ndarray:
    """The marks of a document in a store that has them."""
    marks = store.marks(document, start, stop)
    assert marks is not None, "either all documents of a store have marks, or none"
    return marks


@dataclass(frozen=True)
class TextSpans:
    """Where the text of each selected document lies: tokens `start_N` to `stop_N`; `has_eos_N`: an EOS follows it."""

    document_N: np.ndarray
    start_N: np.ndarray
    stop_N: np.ndarray
    has_eos_N: np.ndarray

    @property
    def size_N(self) -> np.ndarray:
        """Tokens of each text."""
        return self.stop_N - self.start_N

    def select(self, mask_N: np.ndarray) -> TextSpans:
        return TextSpans(*(column[mask_N] for column in (self.document_N, self.start_N, self.stop_N, self.has_eos_N)))

    def spans(self) -> Iterator[tuple[int, int, int]]:
        """`(document, start, stop)` of each text."""
        return zip(self.document_N.tolist(), self.start_N.tolist(), self.stop_N.tolist(), strict=True)


def locate_texts(store: DocumentStore, selected: SelectedDocuments, lead: int) -> TextSpans:
    """The texts of the selected documents, without their first `lead` tokens (a prefix) and without the EOS."""
    tokens = np.asarray(store.documents)["tokens"][selected.documents].astype(np.int64)
    has_eos = selected.sizes == tokens  # a truncated document has lost its EOS
    stop = selected.sizes - has_eos
    return TextSpans(selected.documents, np.minimum(lead, stop), stop, has_eos)


@dataclass(frozen=True)
class Windows:
    """Pieces of texts, one for each row: tokens `start_R` to `stop_R` of a document.

    `has_eos_R`: the document's EOS follows the window. `stored_R`: stored tokens that the window accounts for: its own, the
    prefix in a document's first window, and the EOS in its last.
    """

    document_R: np.ndarray
    start_R: np.ndarray
    stop_R: np.ndarray
    has_eos_R: np.ndarray
    stored_R: np.ndarray

    def __len__(self) -> int:
        return len(self.document_R)

    @property
    def size_R(self) -> np.ndarray:
        """Tokens of each window."""
        return self.stop_R - self.start_R

    def span(self, row: int) -> tuple[int, int, int]:
        """`(document, start, stop)` of a window."""
        return int(self.document_R[row]), int(self.start_R[row]), int(self.stop_R[row])

    def select(self, mask_R: np.ndarray) -> Windows:
        columns = (self.document_R, self.start_R, self.stop_R, self.has_eos_R, self.stored_R)
        return Windows(*(column[mask_R] for column in columns))


def split_windows(texts: TextSpans, max_tokens: int) -> Windows:
    """Split each text into the fewest windows of at most `max_tokens`, all of equal size (to within a token).

    Equal windows avoid a short remainder with next to no context.
    """
    size_N = texts.size_N
    count_N = -(-size_N // max_tokens)
    text_R = np.repeat(np.arange(len(size_N)), count_N)
    # The number of a window within its text: its row, less the rows of all texts before.
    number_R = np.arange(len(text_R)) - (np.cumsum(count_N) - count_N)[text_R]
    origin_R, size_R, count_R = texts.start_N[text_R], size_N[text_R], count_N[text_R]
    start_R = origin_R + number_R * size_R // count_R
    stop_R = origin_R + (number_R + 1) * size_R // count_R
    has_eos_R = (number_R + 1 == count_R) & texts.has_eos_N[text_R]
    stored_R = stop_R - start_R + origin_R * (number_R == 0) + has_eos_R
    return Windows(texts.document_N[text_R], start_R, stop_R, has_eos_R, stored_R)


def max_text_tokens(length: int, frame_tokens: int, min_tokens: int, *, where: str = "data.sequence_length") -> int:
    """Tokens of text in a row of `length` with a frame. Raises `StageError` when fewer than `min_tokens` fit."""
    if length - frame_tokens < min_tokens:
        raise StageError(
            f"rows of {length:,} tokens leave no room for text beside a frame of {frame_tokens:,} tokens",
            where=where,
            expected=f"at least {frame_tokens + min_tokens:,}",
        )
    return length - frame_tokens


def make_ledger(
    selected: SelectedDocuments, *, placed: int, truncated: int = 0, padding: int = 0, trained: int
) -> Ledger:
    """The ledger of rows that hold `placed` tokens; selected tokens neither placed nor truncated count as dropped."""
    return Ledger(
        read=selected.read,
        held_out=selected.held_out,
        dropped=selected.dropped + int(selected.sizes.sum()) - placed - truncated,
        truncated=selected.truncated + truncated,
        placed=placed,
        padding=padding,
        trained=trained,
        context=placed - trained,
    )

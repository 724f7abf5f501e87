"""Which tokens of a stored document are its own text, and where is a long one cut?

Legend: N documents, R rows.

A stored document is `[bos] + text + [eos]`. Rows that set a frame of their own around a text read the text alone. In the
ledger the stored BOS and EOS go with the text: a row has its frame, or an EOS of its own, in their place.
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
"""What becomes of an example that does not fit: without its beginning, without its end, or left out."""


class MarkedStore(DocumentStore, Protocol):
    """A token store that can say what each token is: a number for each, or None where the documents are plain text."""

    def marks(self, document: int, start: int = 0, stop: int | None = None) -> np.ndarray | None: ...


def has_marks(store: MarkedStore) -> bool:
    """Whether the documents of a store are marked: all are, or none."""
    return len(store.documents) > 0 and store.marks(0) is not None


@dataclass(frozen=True)
class TextSpans:
    """Where the text of each kept document lies: tokens `start_N` to `stop_N`; `ended_N`: the EOS stands behind it."""

    document_N: np.ndarray
    start_N: np.ndarray
    stop_N: np.ndarray
    has_eos_N: np.ndarray

    @property
    def size_N(self) -> np.ndarray:
        """Tokens of each text."""
        return self.stop_N - self.start_N

    def select(self, mask_N: np.ndarray) -> TextSpans:
        """The texts that a mask chooses."""
        return TextSpans(*(column[mask_N] for column in (self.document_N, self.start_N, self.stop_N, self.has_eos_N)))

    def spans(self) -> Iterator[tuple[int, int, int]]:
        """`(document, start, stop)` of each."""
        return zip(self.document_N.tolist(), self.start_N.tolist(), self.stop_N.tolist(), strict=True)


def locate_texts(store: DocumentStore, selected: SelectedDocuments, lead: int) -> TextSpans:
    """The texts of the kept documents, without their first `lead` tokens (a BOS) and without the EOS."""
    tokens = np.asarray(store.documents)["tokens"][selected.documents].astype(np.int64)
    ended = selected.sizes == tokens  # a document that was cut has lost its EOS
    stop = selected.sizes - ended
    return TextSpans(selected.documents, np.minimum(lead, stop), stop, ended)


@dataclass(frozen=True)
class Windows:
    """Pieces of texts, one to a row: tokens `start_R` to `stop_R` of a document.

    `ended_R`: the document's EOS stands behind the window. `stored_R`: the stored tokens that a window stands for: its own,
    with the BOS in a document's first and the EOS in its last.
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

    def select(self, mask_R: np.ndarray) -> Windows:
        """The windows that a mask chooses."""
        columns = (self.document_R, self.start_R, self.stop_R, self.has_eos_R, self.stored_R)
        return Windows(*(column[mask_R] for column in columns))


def split_windows(texts: TextSpans, max_tokens: int) -> Windows:
    """Each text in the fewest windows of at most `most` tokens, all windows of a text equally long (to within a token).

    Equal windows leave no scrap at the end that has next to no context.
    """
    size_N = texts.size_N
    count_N = -(-size_N // max_tokens)
    text_R = np.repeat(np.arange(len(size_N)), count_N)
    number_R = np.arange(len(text_R)) - (np.cumsum(count_N) - count_N)[text_R]
    origin_R, size_R, count_R = texts.start_N[text_R], size_N[text_R], count_N[text_R]
    start_R = origin_R + number_R * size_R // count_R
    stop_R = origin_R + (number_R + 1) * size_R // count_R
    ended_R = (number_R + 1 == count_R) & texts.has_eos_N[text_R]
    stored_R = stop_R - start_R + origin_R * (number_R == 0) + ended_R
    return Windows(texts.document_N[text_R], start_R, stop_R, ended_R, stored_R)


def max_text_tokens(length: int, frame_tokens: int, min_tokens: int, *, where: str = "data.sequence_length") -> int:
    """Tokens of text in a row of `length` beside `framed` others. Raises `StageError` when fewer than `least` are left."""
    if length - frame_tokens < min_tokens:
        raise StageError(
            f"rows of {length:,} tokens have no room for text beside the {frame_tokens:,} tokens around it",
            where=where,
            expected=f"at least {frame_tokens + min_tokens:,}",
        )
    return length - frame_tokens


def make_ledger(
    selected: SelectedDocuments, *, placed: int, truncated: int = 0, padding: int = 0, trained: int
) -> Ledger:
    """The ledger of rows that hold `placed` tokens of the kept documents; what is neither placed nor cut is dropped."""
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

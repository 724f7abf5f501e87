"""Packed running text: documents are concatenated and cut into rows of `length` tokens.

Legend: T positions in a row.

Every document ends with one EOS, which is always a label; its first token and the special tokens before its text are none.
Documents do not attend to each other: position ids restart at 0 with each piece of a document in a row. A row is a window of
T + 1 tokens whose last token is only a label, so a document that crosses a row border loses no label, and beside the ledger
of all layouts `rows T = placed + padding` holds. (A final EOS that would be alone in a row has none: it is the last label of
the row before.)
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from postgrad.data.layouts.rows import IGNORED, Row, RowOptions
from postgrad.data.layouts.windows import make_ledger
from postgrad.data.tokens.held_out_split import DocumentStore


class PackedRows:
    """Rows of running text: `input_ids`, `position_ids` and labels, all of shape (T,). The frame is not used."""

    layout = "packed"
    is_random = False
    document_R: np.ndarray | None = None

    def __init__(self, store: DocumentStore, options: RowOptions) -> None:
        self.store, self.length, self.lead = store, options.length, max(options.lead, 1)
        selected = options.select_documents(store)
        self.document_ids: np.ndarray = selected.documents
        self.ends: np.ndarray = np.cumsum(selected.sizes)
        placed = int(self.ends[-1]) if len(self.ends) else 0
        self.row_count = -(-(placed - 1) // self.length) if placed else 0
        padding = max(0, self.row_count * self.length - placed)
        trained = placed - int(np.minimum(selected.sizes, self.lead).sum())
        self.ledger = make_ledger(selected, placed=placed, padding=padding, trained=trained)

    def __len__(self) -> int:
        return self.row_count

    def pieces(self, row: int) -> Iterator[tuple[int, int, int]]:
        """`(document, start, stop)` of each piece in the T + 1 tokens of a row, in order."""
        begin = row * self.length
        end = min(begin + self.length + 1, int(self.ends[-1]))
        index = int(np.searchsorted(self.ends, begin, side="right"))
        while begin < end:
            document_begin = int(self.ends[index - 1]) if index else 0
            stop = min(end, int(self.ends[index]))
            yield int(self.document_ids[index]), begin - document_begin, stop - document_begin
            begin, index = stop, index + 1

    def get_row(self, row: int, position: int) -> Row:
        if not 0 <= row < self.row_count:
            raise IndexError(row)
        length = self.length
        ids = np.zeros(length + 1, np.int64)
        labels = np.full(length, IGNORED, np.int64)
        # Padding positions restart at 0 like one more document, so nothing attends to it and it attends to nothing.
        positions = np.arange(length + 1, dtype=np.int64)
        begin = label_count = 0
        for document, start, stop in self.pieces(row):
            piece = self.store.read(document, start, stop)
            end = begin + len(piece)
            ids[begin:end] = piece
            positions[begin:] = np.arange(length + 1 - begin)
            # The token at `first` is the first label: every one after the special tokens, and after the piece's own first.
            first = min(max(start + 1, self.lead), stop) - start
            labels[begin + first - 1 : end - 1] = piece[first:]
            label_count += len(piece) - first
            begin = end
        positions[begin:] = np.arange(length + 1 - begin)
        return Row({"input_ids": ids[:length], "position_ids": positions[:length]}, labels, label_count)

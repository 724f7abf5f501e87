"""Which tokens form a row of running text? Documents laid end to end and cut every `length` tokens.

Legend: T positions in a row.

Every document ends with one EOS, which is always a label; documents do not attend to each other, so each piece of a
document inside a row starts again at position 0. A row is a window of T + 1 tokens: the last one is only a label, so a
document that is cut at a row's border loses nothing: beside the ledger of all layouts, `rows T = placed + padding`. (One EOS
that would have a row to itself has none: it is the last label of the row before, and nothing follows from it.)
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from postgrad.data.layouts.rows import IGNORED, Ledger, Row, RowOptions
from postgrad.data.tokens.held_out_split import DocumentStore


class PackedRows:
    """The rows of a source: `len(rows)`, `rows.at(i, position)`, and the ledger of how they came to be."""

    layout = "packed"
    is_random = False
    document_R: np.ndarray | None = None

    def __init__(
        self,
        store: DocumentStore,
        options: RowOptions,
    ) -> None:
        self.store = store
        self.length = length = options.length
        kept = options.select_documents(store)
        self.document_ids: np.ndarray = kept.documents
        self.ends: np.ndarray = np.cumsum(kept.sizes)
        placed = int(self.ends[-1]) if len(self.ends) else 0
        self.row_count = -(-(placed - 1) // length) if placed else 0
        self.ledger = Ledger(
            read=kept.read,
            held_out=kept.held_out,
            dropped=kept.dropped,
            truncated=kept.truncated,
            placed=placed,
            padding=max(0, self.row_count * length - placed),
            trained=placed - len(self.document_ids),
            context=len(self.document_ids),
        )

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
        """The row's ids, its labels, and positions that restart with each document, all of shape (T,)."""
        if not 0 <= row < self.row_count:
            raise IndexError(row)
        length = self.length
        ids = np.zeros(length + 1, np.int64)
        labels = np.full(length, IGNORED, np.int64)
        # Padding positions count on from 0 like one more document, so nothing attends to it and it attends to nothing.
        positions = np.arange(length + 1, dtype=np.int64)
        at = counted = 0
        for document, start, stop in self.pieces(row):
            piece = self.store.read(document, start, stop)
            end = at + len(piece)
            ids[at:end] = piece
            positions[at:] = np.arange(length + 1 - at)
            labels[at : end - 1] = piece[1:]
            counted += len(piece) - 1
            at = end
        positions[at:] = np.arange(length + 1 - at)
        return Row({"input_ids": ids[:length], "position_ids": positions[:length]}, labels, counted)

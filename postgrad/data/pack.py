"""Which tokens form a row? Documents laid end to end and cut every `length` tokens.

Legend: T positions in a row.

Every document ends with one EOS, which is always a label; documents do not attend to each other, so each piece of a
document inside a row starts again at position 0. A row is a window of T + 1 tokens: the last one is only a label, so a
document that is cut at a row's border loses nothing. The token ledger is exact:

    read   = held_out + dropped + truncated + placed
    rows T = placed + padding
    placed = trained + context        (context: the first token of each document, which nothing predicts)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import NamedTuple, Protocol

import numpy as np

IGNORED = -100
"""The label of a position that is not trained (the convention of PyTorch and Hugging Face)."""

_CHUNK = 1 << 20


class Documents(Protocol):
    """What packing needs of a token store: the document table and the ids of a document."""

    @property
    def documents(self) -> np.ndarray: ...

    def read(self, document: int, start: int = 0, stop: int | None = None) -> np.ndarray: ...


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


class Row(NamedTuple):
    """One training row: ids, labels and positions, each of shape (T,); positions restart with each document."""

    ids_T: np.ndarray
    labels_T: np.ndarray
    positions_T: np.ndarray


def held_out_mask(digests: np.ndarray, share: float) -> np.ndarray:
    """Which documents are held out: a function of the document's content alone, so copies always fall on one side."""
    # The digest is uniform; a second mixing keeps the split independent of any other use of the digest.
    mixed = digests * np.uint64(0x9E3779B97F4A7C15)
    return (mixed >> np.uint64(11)).astype(np.float64) / float(1 << 53) < share


class PackedRows:
    """The rows of a source: `len(rows)`, `rows[i]`, and the ledger of how they came to be."""

    def __init__(
        self,
        store: Documents,
        length: int,
        *,
        held_out: float = 0.0,
        excluded: np.ndarray | None = None,
        max_document_tokens: int | None = None,
    ) -> None:
        self.store, self.length = store, length
        table = store.documents
        kept, sizes = [], []
        read = held = dropped = truncated = 0
        for begin in range(0, len(table), _CHUNK):
            chunk = table[begin : begin + _CHUNK]
            tokens, digests = chunk["tokens"].astype(np.int64), chunk["digest"]
            out = held_out_mask(digests, held_out)
            # A document of one token has nothing to predict; a copy of a held-out document must not be trained on.
            drop = ~out & (tokens < 2)
            if excluded is not None and len(excluded):
                drop |= ~out & np.isin(digests, excluded)
            keep = ~(out | drop)
            size = tokens if max_document_tokens is None else np.minimum(tokens, max_document_tokens)
            read += int(tokens.sum())
            held += int(tokens[out].sum())
            dropped += int(tokens[drop].sum())
            truncated += int((tokens - size)[keep].sum())
            kept.append(np.flatnonzero(keep) + begin)
            sizes.append(size[keep])
        self.kept: np.ndarray = np.concatenate(kept) if kept else np.empty(0, np.int64)
        self.ends: np.ndarray = np.cumsum(np.concatenate(sizes) if sizes else np.empty(0, np.int64))
        placed = int(self.ends[-1]) if len(self.ends) else 0
        self.rows = -(-placed // length)
        self.ledger = Ledger(
            read=read,
            held_out=held,
            dropped=dropped,
            truncated=truncated,
            placed=placed,
            padding=self.rows * length - placed,
            trained=placed - len(self.kept),
            context=len(self.kept),
        )

    def __len__(self) -> int:
        return self.rows

    def pieces(self, row: int) -> Iterator[tuple[int, int, int]]:
        """`(document, start, stop)` of each piece in the T + 1 tokens of a row, in order."""
        begin = row * self.length
        end = min(begin + self.length + 1, int(self.ends[-1]))
        index = int(np.searchsorted(self.ends, begin, side="right"))
        while begin < end:
            document_begin = int(self.ends[index - 1]) if index else 0
            stop = min(end, int(self.ends[index]))
            yield int(self.kept[index]), begin - document_begin, stop - document_begin
            begin, index = stop, index + 1

    def __getitem__(self, row: int) -> Row:
        if not 0 <= row < self.rows:
            raise IndexError(row)
        length = self.length
        ids = np.zeros(length + 1, np.int64)
        labels = np.full(length, IGNORED, np.int64)
        # Padding positions count on from 0 like one more document, so nothing attends to it and it attends to nothing.
        positions = np.arange(length + 1, dtype=np.int64)
        at = 0
        for document, start, stop in self.pieces(row):
            piece = self.store.read(document, start, stop)
            end = at + len(piece)
            ids[at:end] = piece
            positions[at:] = np.arange(length + 1 - at)
            labels[at : end - 1] = piece[1:]
            at = end
        positions[at:] = np.arange(length + 1 - at)
        return Row(ids[:length], labels, positions[:length])

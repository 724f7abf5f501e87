"""Packing: what is a label, where positions restart, and a ledger that adds up."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from postgrad.data.layouts.packed_text import PackedRows
from postgrad.data.layouts.rows import IGNORED, Row
from postgrad.data.tokens.held_out_split import held_out_mask
from tests.data.memory import lay_out

EOS = 1


class Memory:
    """A token store in memory: documents are lists of ids."""

    def __init__(self, documents: list[list[int]], digests: list[int] | None = None) -> None:
        self.ids = [np.array(d, np.uint16) for d in documents]
        self.documents = np.zeros(len(documents), [("tokens", "<u4"), ("digest", "<u8")])
        self.documents["tokens"] = [len(d) for d in documents]
        self.documents["digest"] = range(len(documents)) if digests is None else digests

    def read(self, document: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        return self.ids[document][start:stop]


def test_one_row_by_hand() -> None:
    rows = lay_out(PackedRows, Memory([[5, 6, EOS], [7, 8, 9, 10, EOS]]), 6)
    ids, labels, positions = arrays(rows.get_row(0, 0))
    assert ids.tolist() == [5, 6, EOS, 7, 8, 9]
    assert labels.tolist() == [6, EOS, IGNORED, 8, 9, 10]  # the EOS is a label, the next document's first token is not
    assert positions.tolist() == [0, 1, 2, 0, 1, 2]
    ids, labels, positions = arrays(rows.get_row(1, 0))
    assert ids[:2].tolist() == [10, EOS] and labels.tolist() == [EOS] + [IGNORED] * 5
    assert positions.tolist() == [0, 1, 0, 1, 2, 3]  # padding is a document of its own


def arrays(row: Row) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return row.inputs["input_ids"], row.labels, row.inputs["position_ids"]


documents = st.lists(st.integers(1, 40).map(lambda n: [*range(2, n + 1), EOS]), min_size=1, max_size=30)


@settings(max_examples=200)
@given(documents, st.integers(2, 16), st.sampled_from([None, 2, 7]), st.sampled_from([0.0, 0.3]))
def test_the_ledger_adds_up(docs: list[list[int]], length: int, cap: int | None, held: float) -> None:
    store = Memory(docs, [(i * 7919 + 13) ** 3 for i in range(len(docs))])
    rows = lay_out(
        PackedRows, store, length, held_out=held, max_document_tokens=cap, excluded=np.array([13**3], np.uint64)
    )
    book = rows.ledger
    assert book.read == book.held_out + book.dropped + book.truncated + book.placed
    alone = book.placed % length == 1  # an EOS that is only a label of the last row
    assert len(rows) * length == book.placed - alone + book.padding
    assert book.placed == book.trained + book.context
    read = [rows.get_row(i, 0) for i in range(len(rows))]
    assert sum(int((r.labels != IGNORED).sum()) for r in read) == sum(r.label_count for r in read) == book.trained
    assert sum(int((r.inputs["input_ids"] != 0).sum()) for r in read) == book.placed - alone
    assert all(r.label_count for r in read)


def test_no_row_is_without_a_label() -> None:
    """An EOS behind a full row would be one: a step of such rows alone would divide by nothing."""
    rows = lay_out(PackedRows, Memory([[5, 6, 7, EOS], [8, 9, 10, 11, EOS]]), 4)
    assert len(rows) == 2 and [rows.get_row(i, 0).label_count for i in range(2)] == [3, 4]
    assert rows.ledger.padding == 0 and rows.ledger.trained == 7
    _, labels, _ = arrays(rows.get_row(1, 0))
    assert labels.tolist() == [9, 10, 11, EOS]


def labels_of(docs: list[list[int]], length: int) -> list[int]:
    rows = lay_out(PackedRows, Memory(docs), length)
    return [int(x) for i in range(len(rows)) for x in rows.get_row(i, 0).labels if x != IGNORED]


@given(documents, st.integers(2, 16))
def test_every_token_but_a_documents_first_is_a_label_exactly_once(docs: list[list[int]], length: int) -> None:
    wanted = [x for d in docs for x in d[1:]]
    assert labels_of(docs, length) == wanted


def test_a_window_without_the_extra_token_would_lose_labels() -> None:
    """The mutant: labels shifted inside a row of T tokens lose one label at each cut."""
    document = [*range(2, 40), EOS]
    rows = lay_out(PackedRows, Memory([document]), 8)
    shifted = [int(x) for i in range(len(rows)) for x in rows.get_row(i, 0).inputs["input_ids"][1:] if x != 0]
    assert len(shifted) < len(document) - 1 == len(labels_of([document], 8))


def test_split_follows_content_and_has_the_asked_share() -> None:
    digests = np.random.default_rng(0).integers(0, 2**64, 200_000, dtype=np.uint64)
    mask = held_out_mask(digests, 0.02)
    assert mask.mean() == pytest.approx(0.02, abs=0.002)
    assert (held_out_mask(digests[::-1], 0.02) == mask[::-1]).all()


def test_copies_of_held_out_documents_are_dropped() -> None:
    rows = lay_out(PackedRows, Memory([[5, 6, EOS], [7, 8, EOS]], [100, 200]), 4, excluded=np.array([200], np.uint64))
    assert rows.ledger.dropped == 3 and rows.document_ids.tolist() == [0]

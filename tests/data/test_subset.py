"""A part of a store reads like a store of those documents alone, in their order."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from postgrad.data.layouts.classification import LabelledRows
from postgrad.data.layouts.masked_lm import MaskedRows
from postgrad.data.layouts.packed_examples import PackedExampleRows
from postgrad.data.layouts.packed_text import PackedRows
from postgrad.data.render.frame import Frame
from postgrad.data.tokens.subset import Subset
from tests.data.memory import InMemoryStore, lay_out

DOCUMENTS = [[5, 6, 7, 1], [8, 9, 1], [10, 11, 12, 13, 1], [14, 15, 16, 1]]
MARKS = [[0, 1, 1, 1], [0, 1, 1], [0, 0, 0, 1, 1], [0, 1, 1, 1]]
VALUES = [[0.0], [1.0], [0.0], [1.0]]


def memory(chosen: list[int] | None = None, *, marked: bool = True) -> InMemoryStore:
    """All documents, or those that are chosen as a store of their own."""
    which = range(len(DOCUMENTS)) if chosen is None else chosen
    store = InMemoryStore(
        [DOCUMENTS[i] for i in which],
        [MARKS[i] for i in which] if marked else None,
        [VALUES[i] for i in which],
        ["a", "b"],
    )
    whole = InMemoryStore(DOCUMENTS)
    store.documents["digest"] = whole.documents["digest"][list(which)]
    return store


chosen_documents = st.lists(st.integers(0, 3), min_size=1, max_size=6)


@settings(max_examples=60)
@given(chosen_documents, st.integers(0, 5), st.none() | st.integers(0, 5), st.booleans())
def test_a_part_reads_as_a_store_of_its_own(chosen: list[int], start: int, stop: int | None, marked: bool) -> None:
    part, alone = Subset(memory(marked=marked), np.array(chosen)), memory(chosen, marked=marked)  # type: ignore[arg-type]
    assert np.array_equal(part.documents, alone.documents)
    assert part.values is not None and np.array_equal(part.values, alone.values)
    assert part.labels == alone.labels
    for i in range(len(chosen)):
        assert np.array_equal(part.read(i, start, stop), alone.read(i, start, stop))
        mine, its = part.marks(i, start, stop), alone.marks(i, start, stop)
        assert (mine is None and its is None and not marked) or np.array_equal(mine, its)


def test_a_part_without_values_or_labels_has_none() -> None:
    store = InMemoryStore(DOCUMENTS)
    store.labels = None  # as a store of running text has it
    part = Subset(store, np.array([2]))  # type: ignore[arg-type]
    assert part.values is None and part.labels == ()


@pytest.mark.parametrize(
    "make",
    [
        lambda store: lay_out(PackedRows, store, 6),
        lambda store: lay_out(PackedExampleRows, store, 8, frame=Frame((90,)), pack=False),
        lambda store: lay_out(LabelledRows, store, 8, kind="class"),
        lambda store: lay_out(MaskedRows, store, 8, mask_id=3, vocabulary=99, special_ids=[0, 1], seed=0),
    ],
)
def test_rows_of_a_part_are_those_of_its_documents(make: object) -> None:
    chosen = [3, 0, 2]
    mine = make(Subset(memory(), np.array(chosen)))  # type: ignore[operator,arg-type]
    its = make(memory(chosen))  # type: ignore[operator]
    other = make(memory([3, 0, 1]))  # type: ignore[operator]
    assert mine.ledger == its.ledger != other.ledger or len(mine) == len(its)

    def contents(rows: object) -> list[object]:
        return [
            ({name: a.tolist() for name, a in row.inputs.items()}, row.labels.tolist(), row.label_count)
            for row in (rows.get_row(i, i) for i in range(len(rows)))  # type: ignore[attr-defined,arg-type]
        ]

    assert contents(mine) == contents(its) != contents(other)

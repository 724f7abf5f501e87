"""Prefixes: before an answer, or drawn in running text; only what comes after one is asked for."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from postgrad.data.layouts.packed_examples import PackedExampleRows
from postgrad.data.layouts.prefix_lm import PrefixRows
from postgrad.data.layouts.rows import IGNORED, Row
from postgrad.data.render.frame import EMPTY_FRAME, Frame
from tests.data.memory import InMemoryStore, lay_out

EOS, X = 1, IGNORED


def arrays(row: Row) -> tuple[list[int], list[int], list[int], list[int]]:
    """Ids, labels, positions and prefix."""
    assert row.label_count == int((row.labels != IGNORED).sum())
    names = ("input_ids", "position_ids", "prefix")
    ids, positions, prefix = (row.inputs[name].tolist() for name in names)
    return ids, row.labels.tolist(), positions, prefix


def test_examples_by_hand() -> None:
    store = InMemoryStore([[5, 6, 7, 8, EOS], [9, 10, EOS]], [[0, 0, 1, 1, 1], [0, 1, 1]])
    rows = lay_out(PrefixRows, store, 8, seed=0)
    ids, labels, positions, prefix = arrays(rows.get_row(0, 0))
    assert ids == [5, 6, 7, 8, 9, 10, 0, 0]
    assert labels == [X, 7, 8, EOS, 10, EOS, X, X]
    assert positions == [0, 1, 2, 3, 0, 1, 0, 1]
    assert prefix == [1, 1, 0, 0, 1, 0, 0, 0]
    assert (rows.ledger.trained, rows.ledger.context) == (5, 3)
    assert arrays(rows.get_row(0, 7)) == arrays(rows.get_row(0, 0))  # nothing is drawn


def test_a_frame_is_part_of_the_prefix() -> None:
    store = InMemoryStore([[2, 5, 6, 7, 8, EOS]], [[0, 0, 0, 1, 1, 1]])
    rows = lay_out(PrefixRows, store, 10, seed=0, frame=Frame((2, 90), (92,)), lead=1)
    ids, labels, _, prefix = arrays(rows.get_row(0, 0))
    assert ids == [2, 90, 5, 6, 92, 7, 8, 0, 0, 0]
    assert labels == [X, X, X, X, 7, 8, EOS, X, X, X]
    assert prefix == [1, 1, 1, 1, 1, 0, 0, 0, 0, 0]


def test_of_a_text_every_end_of_a_prefix_is_as_likely() -> None:
    rows = lay_out(PrefixRows, InMemoryStore([[5, 6, 7, 8, EOS]]), 4, seed=0)
    met = Counter()
    for position in range(2000):
        ids, labels, _, prefix = arrays(rows.get_row(0, position))
        size = sum(prefix)
        assert ids == [5, 6, 7, 8] and prefix == [1] * size + [0] * (4 - size)
        assert labels == [X] * (size - 1) + [6, 7, 8, EOS][size - 1 :]
        met[size] += 1
    assert met.keys() == {1, 2, 3, 4}
    assert all(400 < count < 600 for count in met.values())


def test_the_end_of_a_prefix_is_of_seed_row_and_position() -> None:
    texts = InMemoryStore([[*range(2, 40), EOS], [*range(2, 40), EOS]])

    def prefixes(seed: int, row: int) -> list[int]:
        rows = lay_out(PrefixRows, texts, 38, seed=seed)
        return [int(rows.get_row(row, position).inputs["prefix"].sum()) for position in range(12)]

    assert prefixes(0, 0) == prefixes(0, 0)
    assert len({tuple(prefixes(seed, row)) for seed in (0, 1) for row in (0, 1)}) == 4
    assert len(set(prefixes(0, 0))) > 6  # the mutant, one cut for all positions, would have one


def test_what_stands_before_a_text_does_not_change_what_is_asked_for() -> None:
    """A soft prompt is held against the model without it on the same tokens. The mutant: a draw that counts it."""
    texts = InMemoryStore([[*range(2, 40), EOS], [*range(2, 9), EOS], [2, EOS]])
    plain = lay_out(PrefixRows, texts, 20, seed=0, pack=False)
    prompted = lay_out(PrefixRows, texts, 25, seed=0, frame=Frame(tuple(range(90, 95))), pack=False)
    assert len(plain) == len(prompted) == 4
    for i in range(len(plain)):
        for position in range(9):
            one, other = plain.get_row(i, position), prompted.get_row(i, position)
            assert one.labels[one.labels != X].tolist() == other.labels[other.labels != X].tolist()
            assert one.label_count == other.label_count > 0
            assert other.inputs["prefix"].sum() == one.inputs["prefix"].sum() + 5


sizes = st.lists(st.integers(0, 40), min_size=1, max_size=8)
frames = st.sampled_from([EMPTY_FRAME, Frame((90, 91))])


@settings(max_examples=200)
@given(sizes, st.integers(4, 24), frames, st.booleans(), st.integers(0, 3))
def test_a_text_is_asked_for_behind_its_prefix(
    counts: list[int], length: int, frame: Frame, together: bool, position: int
) -> None:
    """Labels are those of plain rows, but for the ones inside of a prefix; every piece has a prefix and something to say."""
    store = InMemoryStore([[*range(2, 2 + n), EOS] for n in counts])
    rows = lay_out(PrefixRows, store, length, seed=3, frame=frame, pack=together)
    plain = lay_out(PackedExampleRows, store, length, frame=frame, pack=together)
    assert len(rows) == len(plain)
    for i in range(len(rows)):
        ids, labels, positions, prefix = arrays(rows.get_row(i, position))
        other = plain.get_row(i, position)
        assert ids == other.inputs["input_ids"].tolist() and positions == other.inputs["position_ids"].tolist()
        starts = [at for at, p in enumerate(positions) if p == 0]
        pieces = list(zip(starts, [*starts[1:], len(ids)], strict=True))
        for begin, end in pieces[: len(rows.row_pieces(i))]:
            size = sum(prefix[begin:end])
            assert size >= 1 and prefix[begin:end] == [1] * size + [0] * (end - begin - size)
            assert labels[begin : begin + size - 1] == [X] * (size - 1)
            asked = labels[begin + size - 1 : end]
            assert asked == other.labels[begin + size - 1 : end].tolist() and X not in asked and asked
        for begin, end in pieces[len(rows.row_pieces(i)) :]:  # padding
            assert not any(prefix[begin:end]) and set(labels[begin:end]) == {X}


@settings(max_examples=30)
@given(sizes, st.integers(4, 24), frames)
def test_the_ledger_is_right_on_average(counts: list[int], length: int, frame: Frame) -> None:
    store = InMemoryStore([[*range(2, 2 + n), EOS] for n in counts])
    rows = lay_out(PrefixRows, store, length, seed=0, frame=frame)
    ledger = rows.ledger
    assert ledger.read == ledger.held_out + ledger.dropped + ledger.truncated + ledger.placed
    assert ledger.placed == ledger.trained + ledger.context
    found = [sum(rows.get_row(i, position).label_count for i in range(len(rows))) for position in range(150)]
    assert np.mean(found) == pytest.approx(ledger.trained, rel=0.25, abs=1)

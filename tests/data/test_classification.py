"""Rows with labels: classes, numbers, tags and a word at the mask, in a frame that is never cut."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from postgrad.data.layouts.classification import ClozeRows, LabelledRows, TaggedRows
from postgrad.data.layouts.rows import IGNORED, Ledger, Row
from postgrad.data.loading.batch import collate
from postgrad.data.problem_type import ProblemType
from postgrad.data.render.frame import EMPTY_FRAME, Frame
from postgrad.errors import DataError, StageError
from tests.data.memory import InMemoryStore, lay_out

CLS, SEP, MASK = 2, 1, 3
BERT = Frame((CLS,), (SEP,), (SEP,))
X = IGNORED

PAIR = InMemoryStore(
    [[CLS, 5, 6, 7, 8, 9, SEP], [CLS, 5, 6, SEP]],
    [[0, 0, 0, 0, 1, 1, 0], [0, 0, 0, 0]],
    [[1], [0]],
    ["no", "yes"],
)


def labelled(store: InMemoryStore, length: int = 16, **changes: Any) -> LabelledRows:
    return lay_out(LabelledRows, store, length, **({"kind": "class", "frame": BERT, "lead": 1} | changes))


def test_a_pair_and_a_single_text_by_hand() -> None:
    rows = labelled(PAIR, token_types=True)
    two, one = rows.get_row(0, 0), rows.get_row(1, 0)
    assert two.inputs["input_ids"].tolist() == [CLS, 5, 6, 7, SEP, 8, 9, SEP]
    assert two.inputs["token_type_ids"].tolist() == [0, 0, 0, 0, 0, 1, 1, 1]
    assert one.inputs["input_ids"].tolist() == [CLS, 5, 6, SEP]  # nothing between one text
    assert one.inputs["token_type_ids"].tolist() == [0, 0, 0, 0]
    assert two.inputs["attention_mask"].tolist() == [1] * 8
    assert (two.labels.shape, two.labels.dtype, int(two.labels), two.label_count) == ((), np.int64, 1, 1)
    assert set(labelled(PAIR).get_row(0, 0).inputs) == {"input_ids", "attention_mask"}
    assert rows.ledger.trained == 2 and rows.ledger.context == 9


@pytest.mark.parametrize(
    ("kind", "values", "label"),
    [("number", [[0.5], [-2.0]], np.float32(0.5)), ("multi", [[1, 0, 1], [0, 0, 0]], np.float32([1, 0, 1]))],
)
def test_numbers_and_several_classes(kind: ProblemType, values: list[list[float]], label: np.ndarray) -> None:
    rows = labelled(InMemoryStore([[CLS, 5, SEP], [CLS, 6, SEP]], None, values, ["a", "b", "c"]), kind=kind)
    row = rows.get_row(0, 0)
    assert isinstance(row.labels, np.ndarray) and row.labels.dtype == np.float32
    assert row.labels.shape == label.shape and (row.labels == label).all() and row.label_count == 1
    batch = collate([rows.get_row(0, 0), rows.get_row(1, 0)], [0, 0])
    assert batch.labels.dtype == torch.float32 and batch.labels.shape == (2, *label.shape)


def test_a_batch_of_classes() -> None:
    rows = labelled(PAIR, token_types=True)
    batch = collate([rows.get_row(0, 0), rows.get_row(1, 0)], [0, 0])
    assert batch.labels.dtype == torch.int64 and batch.labels.tolist() == [1, 0]
    assert batch.inputs["input_ids"].shape == batch.inputs["token_type_ids"].shape == (2, 8)
    assert batch.inputs["attention_mask"].sum(1).tolist() == [8, 4]


@pytest.mark.parametrize(
    ("kind", "value", "met"),
    [
        ("class", 2, "2 as a label"),
        ("class", 0.5, "0.5"),
        ("class", -1, "-1"),
        ("multi", 2, "2"),
        ("number", np.nan, "nan"),
    ],
)
def test_a_label_that_is_none_of_its_kind_is_refused(kind: ProblemType, value: float, met: str) -> None:
    store = InMemoryStore([[CLS, 5, SEP]] * 2, None, [[0], [value]], ["a", "b"])
    with pytest.raises(DataError, match=met) as told:
        labelled(store, kind=kind)
    assert "document 1" in str(told.value)
    with pytest.raises(DataError, match="without labels"):
        labelled(InMemoryStore([[CLS, 5, SEP]]))


@pytest.mark.parametrize(
    ("first", "second", "length", "kept"),
    [
        (3, 2, 8, (3, 2)),
        (3, 2, 7, (2, 2)),
        (5, 1, 7, (3, 1)),
        (1, 5, 7, (1, 3)),
        (6, 6, 8, (3, 2)),  # equally long: the first keeps the odd one
        (6, 0, 7, (5, 0)),  # one text has the room of what would stand between two
    ],
)
def test_the_longer_text_is_cut_first(first: int, second: int, length: int, kept: tuple[int, int]) -> None:
    document = [CLS, *range(100, 100 + first), *range(200, 200 + second), SEP]
    rows = labelled(InMemoryStore([document], [[0] * (1 + first) + [1] * second + [0]], [[0]], ["a"]), length)
    ids = rows.get_row(0, 0).inputs["input_ids"].tolist()
    wanted = (np.arange(100, 100 + kept[0]), np.arange(200, 200 + kept[1]) if second else None)
    assert ids == BERT.wrap(*wanted).tolist()
    assert rows.ledger.truncated == first + second - sum(kept)
    assert rows.truncations == {"the end of the longer text": int(rows.ledger.truncated > 0)}


sizes = st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12), st.integers(0, 2)), min_size=1, max_size=12)
options = st.fixed_dictionaries(
    {
        "frame": st.sampled_from([EMPTY_FRAME, BERT, Frame((CLS, 90, 91), (92, SEP), (93, SEP))]),
        "held_out": st.sampled_from([0.0, 0.3]),
        "max_document_tokens": st.sampled_from([None, 7]),
    }
)


def check_ledger(book: Ledger, read: list[Row], placed: int) -> None:
    assert book.read == book.held_out + book.dropped + book.truncated + book.placed
    assert book.placed == book.trained + book.context == placed
    assert sum(r.label_count for r in read) == book.trained and min(book.as_dict().values()) >= 0


@settings(max_examples=200)
@given(sizes, st.integers(9, 24), options)
def test_the_frame_stands_whole_and_the_ledger_adds_up(
    sizes: list[tuple[int, int, int]], length: int, chosen: dict
) -> None:
    """Law: a row is the frame around the beginnings of the texts, cut only where they do not fit, and then full."""
    documents = [[CLS, *range(100, 100 + a), *range(200, 200 + b), SEP] for a, b, _ in sizes]
    marks = [[0] * (1 + a) + [1] * b + [0] for a, b, _ in sizes]
    store = InMemoryStore(documents, marks, [[c] for _, _, c in sizes], ["a", "b", "c"])
    rows = labelled(store, length, **chosen)
    read = [rows.get_row(i, 0) for i in range(len(rows))]
    frame, most, own = chosen["frame"], chosen["max_document_tokens"], 0
    for document, row in zip(rows.document_R.tolist(), read, strict=True):
        ids = row.inputs["input_ids"]
        first, second = ids[(ids >= 100) & (ids < 200)], ids[ids >= 200]
        assert ids.tolist() == frame.wrap(first, second if len(second) else None).tolist()
        a, b, label = sizes[document]
        if most:
            a, b = min(a, most - 1), max(0, min(b, most - 1 - a))
        assert first.tolist() == list(range(100, 100 + len(first)))
        assert second.tolist() == list(range(200, 200 + len(second)))
        assert (len(first), len(second)) == (a, b) or len(ids) == length
        assert len(ids) <= length
        if len(first) < a and len(second) < b:
            assert 0 <= len(first) - len(second) <= 1
        elif len(first) < a:
            assert len(first) >= len(second)
        elif len(second) < b:
            assert len(second) >= len(first) - 1
        assert int(row.labels) == label
        ended = most is None or len(documents[document]) <= most
        own += len(first) + len(second) + 1 + ended
    check_ledger(rows.ledger, read, own)


def test_documents_without_text_are_left_out() -> None:
    rows = labelled(InMemoryStore([[CLS, SEP], [CLS, 5, SEP]], None, [[0], [1]], ["a", "b"]))
    assert len(rows) == 1 and rows.skipped == {"no text": 1} and rows.ledger.dropped == 2
    assert int(rows.get_row(0, 0).labels) == 1


def test_a_decoder_needs_no_frame() -> None:
    rows = labelled(PAIR, frame=EMPTY_FRAME, lead=0)
    assert rows.get_row(1, 0).inputs["input_ids"].tolist() == [CLS, 5, 6]


def test_rows_without_room_are_refused() -> None:
    with pytest.raises(StageError, match="no room"):
        labelled(PAIR, 4)


# --- tags ---------------------------------------------------------------------------------------------


def test_tags_by_hand() -> None:
    """Three words of two, one and two sub-tokens, with tags 0, 4 and 1."""
    store = InMemoryStore([[CLS, 10, 11, 12, 13, 14, SEP]], [[0, 1, 0, 5, 2, 0, 0]])
    rows = lay_out(TaggedRows, store, 16, frame=Frame((CLS, 90), (), (SEP,)), lead=1)
    row = rows.get_row(0, 0)
    assert row.inputs["input_ids"].tolist() == [CLS, 90, 10, 11, 12, 13, 14, SEP]
    assert row.labels.tolist() == [X, X, 0, X, 4, 1, X, X] and row.label_count == 3
    cut = lay_out(TaggedRows, store, 6, frame=Frame((CLS, 90), (), (SEP,)), lead=1)
    assert cut.get_row(0, 0).labels.tolist() == [X, X, 0, X, 4, X] and cut.ledger.truncated == 2
    assert cut.truncations == {"their end": 1}


tags = st.lists(st.lists(st.integers(0, 4), max_size=14), min_size=1, max_size=12)


@settings(max_examples=200)
@given(tags, st.integers(4, 16), st.sampled_from([0.0, 0.3]), st.sampled_from([None, 7]))
def test_every_tag_stands_where_its_word_begins(
    marks: list[list[int]], length: int, held: float, most: int | None
) -> None:
    """Law, with the ledger: the label of a token is its tag, where it has one."""
    documents = [[CLS, *range(100, 100 + len(m)), SEP] for m in marks]
    store = InMemoryStore(documents, [[0, *m, 0] for m in marks])
    rows = lay_out(
        TaggedRows, store, length, frame=Frame((CLS,), (), (SEP,)), lead=1, held_out=held, max_document_tokens=most
    )
    read, own = [rows.get_row(i, 0) for i in range(len(rows))], 0
    for document, row in zip(rows.document_R.tolist(), read, strict=True):
        text = row.inputs["input_ids"][1:-1]
        assert text.tolist() == documents[document][1 : 1 + len(text)]
        wanted = [mark - 1 if mark else X for mark in marks[document][: len(text)]]
        assert row.labels.tolist() == [X, *wanted, X]
        assert row.label_count == int((row.labels != X).sum()) > 0
        whole = len(marks[document]) if most is None else min(len(marks[document]), most - 1)
        assert len(text) == min(whole, length - 2)
        own += 1 + len(text) + (most is None or len(documents[document]) <= most)
    check_ledger(rows.ledger, read, own)


def test_texts_without_tags_are_left_out_or_refused() -> None:
    rows = lay_out(TaggedRows, InMemoryStore([[5, SEP], [5, 6, SEP]], [[0, 0], [0, 1, 0]]), 8)
    assert len(rows) == 1 and rows.skipped == {"no tags": 1}
    with pytest.raises(DataError, match="without tags"):
        lay_out(TaggedRows, InMemoryStore([[5, SEP]]), 8)


# --- cloze --------------------------------------------------------------------------------------------


def cloze(store: InMemoryStore, frame: Frame, length: int = 16, **changes: Any) -> ClozeRows:
    chosen = {"mask_id": MASK, "verbalisers": [40, 41], "lead": 1}
    return lay_out(ClozeRows, store, length, frame=frame, **(chosen | changes))


@pytest.mark.parametrize(
    ("frame", "ids", "labels"),
    [
        (Frame((CLS, MASK, 90), (SEP,), (SEP,)), [CLS, MASK, 90, 5, 6, SEP, 7, SEP], [X, 41, X, X, X, X, X, X]),
        (Frame((CLS,), (90, MASK), (SEP,)), [CLS, 5, 6, 90, MASK, 7, SEP], [X, X, X, X, 41, X, X]),
        (Frame((CLS,), (90,), (91, MASK, SEP)), [CLS, 5, 6, 90, 7, 91, MASK, SEP], [X] * 6 + [41, X]),
    ],
)
def test_the_word_stands_at_the_mask_by_hand(frame: Frame, ids: list[int], labels: list[int]) -> None:
    row = cloze(InMemoryStore([[CLS, 5, 6, 7, SEP]], [[0, 0, 0, 1, 0]], [[1]], ["no", "yes"]), frame).get_row(0, 0)
    assert row.inputs["input_ids"].tolist() == ids and row.labels.tolist() == labels and row.label_count == 1


@settings(max_examples=200)
@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9), st.integers(0, 1)), min_size=1, max_size=8),
    st.sampled_from([Frame((CLS, MASK), (SEP,), (SEP,)), Frame((CLS,), (90, SEP), (91, MASK, SEP))]),
    st.integers(9, 20),
)
def test_the_one_label_is_at_the_frames_mask(sizes: list[tuple[int, int, int]], frame: Frame, length: int) -> None:
    """Law, also where the texts are full of masks themselves."""
    documents = [[CLS, *[MASK] * (a + b), SEP] for a, b, _ in sizes]
    store = InMemoryStore(
        documents, [[0] * (1 + a) + [1] * b + [0] for a, b, _ in sizes], [[c] for *_, c in sizes], ["no", "yes"]
    )
    rows = cloze(store, frame, length)
    read = [rows.get_row(i, 0) for i in range(len(rows))]
    for (_, _, label), row in zip(sizes, read, strict=True):
        place = 1 if frame.prefix_ids[-1] == MASK else len(row.labels) - 2
        assert np.flatnonzero(row.labels != X).tolist() == [place]
        assert row.labels[place] == (40, 41)[label] and row.inputs["input_ids"][place] == MASK
    check_ledger(rows.ledger, read, rows.ledger.placed)


def test_a_place_that_ignores_the_first_text_would_miss_the_mask() -> None:
    """The mutant: the mask's place in the frame alone."""
    rows = cloze(InMemoryStore([[CLS, 5, 6, SEP]], None, [[0]], ["no", "yes"]), Frame((CLS,), (), (MASK, SEP)))
    row = rows.get_row(0, 0)
    assert row.inputs["input_ids"][1] != MASK and row.labels[3] == 40


def test_a_frame_without_one_mask_and_classes_without_words_are_refused() -> None:
    for frame in (BERT, Frame((MASK,), (), (MASK,))):
        with pytest.raises(StageError, match="one mask"):
            cloze(PAIR, frame)
    with pytest.raises(StageError, match="one word for each class"):
        cloze(PAIR, Frame((MASK,)), verbalisers=[40])
    with pytest.raises(DataError, match="document 1"):
        cloze(PAIR, Frame((CLS,), (MASK,), (SEP,)))

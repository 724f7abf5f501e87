"""Whole examples: what is a label, where the frame stands, what is cut, and a ledger that adds up."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from postgrad.data.layouts.packed_examples import PackedExampleRows, TooLongPolicy, _cut_context, assign_rows
from postgrad.data.layouts.packed_text import PackedRows
from postgrad.data.layouts.rows import IGNORED, Row
from postgrad.data.render.frame import EMPTY_FRAME, Frame
from postgrad.errors import StageError
from tests.data.memory import InMemoryStore, lay_out

EOS = 1
X = IGNORED


def arrays(row: Row) -> tuple[list[int], list[int], list[int]]:
    return row.inputs["input_ids"].tolist(), row.labels.tolist(), row.inputs["position_ids"].tolist()


def test_two_examples_in_a_row_by_hand() -> None:
    store = InMemoryStore(
        [[5, 6, 7, 8, EOS], [9, 10, 11, EOS]],
        [[0, 0, 1, 1, 1], [0, 1, 0, 0]],  # the second's answer does not run to its end
    )
    rows = lay_out(PackedExampleRows, store, 9)
    ids, labels, positions = arrays(rows.get_row(0, 0))
    assert ids == [5, 6, 7, 8, 9, 10, 11, 0, 0]  # an EOS is only a label
    assert labels == [X, 7, 8, EOS, 10, X, X, X, X]
    assert positions == [0, 1, 2, 3, 0, 1, 2, 0, 1]  # padding is a document of its own
    assert rows.get_row(0, 0).label_count == 4
    every = arrays(lay_out(PackedExampleRows, store, 9, train_on="all").get_row(0, 0))[1]
    assert every == [6, 7, 8, EOS, 10, 11, EOS, X, X]


def test_a_frame_by_hand() -> None:
    store = InMemoryStore([[2, 5, 6, 7, 8, EOS]], [[0, 0, 0, 1, 1, 1]])
    rows = lay_out(PackedExampleRows, store, 10, frame=Frame((2, 90, 91), (92,)), lead=1)
    ids, labels, positions = arrays(rows.get_row(0, 0))
    assert ids == [2, 90, 91, 5, 6, 92, 7, 8, 0, 0]
    assert labels == [X, X, X, X, X, 7, 8, EOS, X, X]
    assert positions == [*range(8), 0, 1]


def test_plain_text_in_windows_by_hand() -> None:
    """The last label of a window is the next one's first token, which is no label there."""
    store = InMemoryStore([[5, 6, 7, 8, 9, 10, 11, EOS]])
    rows = lay_out(PackedExampleRows, store, 5, frame=Frame((90, 91)))
    read = [arrays(rows.get_row(i, 0))[:2] for i in range(len(rows))]
    assert read == [
        ([90, 91, 5, 6, 7], [X, 5, 6, 7, 8]),
        ([90, 91, 8, 9, 10], [X, X, 9, 10, 11]),
        ([90, 91, 11, 0, 0], [X, X, EOS, X, X]),
    ]
    assert rows.ledger.trained == 8 and rows.ledger.context == 0


LONG = InMemoryStore([[5, 6, 7, 8, 9, 10, 11, 12, EOS]], [[0, 0, 1, 1, 0, 0, 1, 1, 1]])


@pytest.mark.parametrize(
    ("length", "too_long", "kept", "asked"),
    [
        (8, "cut-context", [5, 6, 7, 8, 9, 10, 11, 12], [7, 8, 11, 12, EOS]),
        (7, "cut-context", [6, 7, 8, 9, 10, 11, 12], [7, 8, 11, 12, EOS]),
        (6, "cut-context", [9, 10, 11, 12], [11, 12, EOS]),  # it would begin inside the first answer
        (3, "cut-context", [10, 11, 12], [11, 12, EOS]),
        (6, "cut-end", [5, 6, 7, 8, 9, 10], [7, 8, 11]),
        (2, "cut-end", [5, 6], [7]),
    ],
)
def test_what_is_cut_of_a_long_example(length: int, too_long: TooLongPolicy, kept: list[int], asked: list[int]) -> None:
    rows = lay_out(PackedExampleRows, LONG, length, too_long=too_long)
    ids, labels, _ = arrays(rows.get_row(0, 0))
    assert ids[: len(kept)] == kept and [x for x in labels if x != X] == asked
    book = rows.ledger
    assert book.truncated == 9 - len(kept) - 1 and book.read == book.truncated + book.placed
    lost = "their beginning" if too_long == "cut-context" else "their end"
    assert rows.truncations == ({lost: 1} if book.truncated else {})


def test_what_does_not_fit_is_left_out_and_counted() -> None:
    assert lay_out(PackedExampleRows, LONG, 2).skipped["answer too long"] == 1
    assert lay_out(PackedExampleRows, LONG, 1, too_long="cut-end").skipped["answer too long"] == 1
    assert lay_out(PackedExampleRows, LONG, 7, too_long="drop").skipped["too long"] == 1
    dropped = lay_out(PackedExampleRows, LONG, 7, too_long="drop")
    assert len(dropped) == 0 and (dropped.ledger.dropped, dropped.ledger.truncated) == (9, 0)
    nothing = InMemoryStore([[5, 6, EOS], [EOS, EOS], [5, EOS]], [[0, 0, 0], [0, 0], [1, 1]])
    assert lay_out(PackedExampleRows, nothing, 8, lead=1).skipped["nothing to learn"] == 3
    text = InMemoryStore([[5, 6, 7, EOS], [5, 6, 7, 8, 9, 10, EOS]])
    assert lay_out(PackedExampleRows, text, 4, too_long="drop").skipped == {"nothing to learn": 0, "too long": 1}
    assert (
        lay_out(PackedExampleRows, text, 4, too_long="cut-end").truncations == {"their end": 1}
        and not lay_out(PackedExampleRows, text, 4).truncations
    )
    cut = lay_out(PackedExampleRows, text, 4, too_long="cut-end").ledger
    assert cut.truncated == 2 and cut.trained == 3 + 4


def test_an_answer_that_fits_only_without_its_frame_is_left_out() -> None:
    store = InMemoryStore([[5, 6, 7, 8, EOS]], [[0, 1, 1, 1, 1]])
    assert len(lay_out(PackedExampleRows, store, 5, frame=Frame((90,)))) == 1
    assert len(lay_out(PackedExampleRows, store, 5, frame=Frame((90, 91)))) == 0


def test_a_frame_with_no_place_is_refused() -> None:
    with pytest.raises(StageError, match="after the text"):
        lay_out(PackedExampleRows, LONG, 9, frame=Frame(suffix_ids=(3,)))
    with pytest.raises(StageError, match="running text"):
        lay_out(PackedExampleRows, InMemoryStore([[5, EOS]]), 9, frame=Frame(separator_ids=(3,)))
    with pytest.raises(StageError, match="no room"):
        lay_out(PackedExampleRows, LONG, 2, frame=Frame((3, 4)))


def test_rows_of_their_own_are_not_padded() -> None:
    store = InMemoryStore([[5, 6, EOS], [7, EOS]], [[0, 1, 1], [1, 1]])
    rows = lay_out(PackedExampleRows, store, 8, pack=False)
    assert [arrays(rows.get_row(i, 0))[0] for i in range(2)] == [[5, 6], [7]]
    assert rows.document_R is not None and rows.document_R.tolist() == [0, 1] and rows.ledger.padding == 0


marked = st.lists(
    st.lists(st.booleans(), min_size=1, max_size=20).map(lambda m: [*map(int, m), 0]), min_size=1, max_size=20
)
frames = st.sampled_from([EMPTY_FRAME, Frame((90,)), Frame((90, 91), (92,)), Frame((), (92, 93))])
options = st.fixed_dictionaries(
    {
        "frame": frames,
        "train_on": st.sampled_from(["answers", "all"]),
        "too_long": st.sampled_from(["cut-context", "cut-end", "drop"]),
        "lead": st.integers(0, 1),
        "pack": st.booleans(),
        "held_out": st.sampled_from([0.0, 0.3]),
        "max_document_tokens": st.sampled_from([None, 7]),
    }
)


def store_of(marks: list[list[int]]) -> InMemoryStore:
    """Token k of document i is 100 (i + 1) + k, so each says where it is from."""
    return InMemoryStore([[*range(100 * i + 100, 100 * i + 99 + len(m)), EOS] for i, m in enumerate(marks)], marks)


def check_ledger(rows: PackedExampleRows) -> list[Row]:
    read = [rows.get_row(i, 0) for i in range(len(rows))]
    book = rows.ledger
    assert book.read == book.held_out + book.dropped + book.truncated + book.placed
    assert book.placed == book.trained + book.context and min(book.as_dict().values()) >= 0
    assert sum(int((r.labels != IGNORED).sum()) for r in read) == sum(r.label_count for r in read) == book.trained
    assert sum(int((r.inputs["input_ids"] == 0).sum()) for r in read) == book.padding
    assert all(r.label_count for r in read)
    return read


@settings(max_examples=300)
@given(marked, st.integers(4, 30), options)
def test_the_ledger_of_examples_adds_up(marks: list[list[int]], length: int, chosen: dict) -> None:
    rows = lay_out(PackedExampleRows, store_of(marks), length, **chosen)
    read = check_ledger(rows)
    # Placed: a piece's text but its last token stands in the row, that one is its last label, and a BOS was replaced.
    mine = sum(int((r.inputs["input_ids"] >= 100).sum()) for r in read)
    assert rows.ledger.placed == mine + len(rows.pieces) * (1 + chosen["lead"])


@settings(max_examples=300)
@given(marked, st.integers(4, 30), options)
def test_every_label_is_the_next_marked_token(marks: list[list[int]], length: int, chosen: dict) -> None:
    """Law: a label is the token that follows in the text, and it is an answer (or everything is asked for)."""
    rows = lay_out(PackedExampleRows, store_of(marks), length, **chosen)
    for row in (rows.get_row(i, 0) for i in range(len(rows))):
        ids, labels, positions = arrays(row)
        for t, label in enumerate(labels):
            if label == X:
                continue
            follows = t + 1 < len(ids) and positions[t + 1] == positions[t] + 1
            assert not follows or ids[t + 1] == label  # what follows in the same piece
            if label >= 100:
                document, at = divmod(label - 100, 100)
                assert chosen["train_on"] == "all" or marks[document][at] == 1
                assert ids[t] in (90, 91, 92, 93) or ids[t] == label - 1
            else:
                document, at = divmod(ids[t] - 100, 100)
                assert label == EOS and at == len(marks[document]) - 2
                assert chosen["train_on"] == "all" or marks[document][at] == 1


@given(marked, frames)
def test_every_answer_is_a_label(marks: list[list[int]], frame: Frame) -> None:
    """Law, where everything fits: each marked token, and the EOS behind one, when anything stands before it."""
    rows = lay_out(PackedExampleRows, store_of(marks), 100, frame=frame)
    asked = Counter(x for i in range(len(rows)) for x in rows.get_row(i, 0).labels.tolist() if x != X)
    wanted = [
        100 * i + 100 + k for i, m in enumerate(marks) for k, mark in enumerate(m[:-1]) if mark and (k or frame.size(2))
    ]
    ends = sum(m[-2] == 1 for m in marks)
    assert asked == Counter([*wanted, *[EOS] * ends])


@given(st.lists(st.integers(2, 60), min_size=1, max_size=12), st.integers(3, 20), st.integers(0, 2))
def test_every_token_of_plain_text_is_a_label_once(sizes: list[int], length: int, framed: int) -> None:
    """Law: all but a document's first token, and that too when a frame stands before it."""
    documents = [[*range(100 * i + 100, 100 * i + 99 + n), EOS] for i, n in enumerate(sizes)]
    rows = lay_out(PackedExampleRows, InMemoryStore(documents), length, frame=Frame((90, 91)[:framed]))
    labels = Counter(x for r in check_ledger(rows) for x in r.labels.tolist() if x != X)
    assert labels == Counter(x for d in documents for x in d[0 if framed else 1 :])
    if not framed:
        packed = lay_out(PackedRows, InMemoryStore(documents), length)
        assert labels == Counter(x for i in range(len(packed)) for x in packed.get_row(i, 0).labels.tolist() if x != X)


def test_windows_that_do_not_overlap_would_lose_labels() -> None:
    """The mutant: windows of T tokens side by side have no label for each window's first token."""
    document = [*range(100, 140), EOS]
    rows = lay_out(PackedExampleRows, InMemoryStore([document]), 8)
    inside = sum(len(document[i : i + 8]) - 1 for i in range(0, len(document), 8))
    assert inside < rows.ledger.trained == len(document) - 1


@given(st.lists(st.booleans(), min_size=2, max_size=40).map(np.array), st.integers(1, 39))
def test_a_cut_context_begins_with_context_and_ends_with_a_whole_answer(answered: np.ndarray, most: int) -> None:
    """Law, for what is too long: the kept part is the end, starts outside any answer, and has the last answer whole."""
    most = min(most, len(answered) - 1)
    begin, end = _cut_context(answered, most)
    if end:
        assert end == len(answered) and end - begin <= most
        assert not answered[begin]
        assert answered[begin:].any() or not answered.any()
    else:
        last = np.flatnonzero(answered)[-1]
        before = np.flatnonzero(~answered[: last + 1])
        run = int(before[-1]) if len(before) else -1  # the last context token before the last answer
        assert run < len(answered) - most  # it does not fit


@given(st.lists(st.integers(1, 50), max_size=60))
def test_no_row_overflows_and_every_row_is_used(sizes: list[int]) -> None:
    row = assign_rows(np.array(sizes, np.int64), 50)
    filled = np.bincount(row, np.array(sizes))
    assert (filled <= 50).all() and (filled > 0).all()


def test_best_fit_leaves_less_empty_than_one_row_after_the_other() -> None:
    sizes = np.clip(np.random.default_rng(0).lognormal(5.3, 0.8, 5000).astype(np.int64), 2, 512)
    best = 1 - sizes.sum() / (512 * (assign_rows(sizes, 512).max() + 1))
    rows, room = 1, 512
    for size in sizes.tolist():
        rows, room = (rows, room - size) if size <= room else (rows + 1, 512 - size)
    assert best < 0.02 < 0.15 < 1 - sizes.sum() / (512 * rows)

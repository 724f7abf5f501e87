"""Masked language modelling: how many labels, which tokens never, what stands in their place."""

from collections import Counter

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from postgrad.data.layouts.masked_lm import MaskedRows
from postgrad.data.layouts.rows import IGNORED, Row
from postgrad.data.loading.batch import collate
from postgrad.data.render.frame import Frame
from tests.data.memory import InMemoryStore, lay_out

CLS, SEP, MASK, UNKNOWN = 1, 2, 3, 4
SPECIAL = (0, CLS, SEP, MASK, UNKNOWN)
BERT = Frame((CLS,), (), (SEP,))
X = IGNORED


def rows_of(documents: list[list[int]], length: int = 512, **changes: object) -> MaskedRows:
    chosen = {"frame": BERT, "mask_id": MASK, "vocabulary": 1000, "special_ids": SPECIAL, "seed": 0, "lead": 1}
    return lay_out(MaskedRows, InMemoryStore(documents), length, **(chosen | changes))


def original(row: Row) -> np.ndarray:
    """The ids as they were: labels tell what stood where something was hidden."""
    return np.where(row.labels == X, row.inputs["input_ids"], row.labels)


def test_one_row_by_hand() -> None:
    """Of five tokens with everything asked for, all but [UNK] are labels, and the frame never is."""
    row = rows_of([[CLS, 50, 51, UNKNOWN, 52, SEP]], mask_rate=1.0).get_row(0, 0)
    assert row.labels.tolist() == [X, 50, 51, X, 52, X]
    assert original(row).tolist() == [CLS, 50, 51, UNKNOWN, 52, SEP]
    assert row.inputs["input_ids"][[0, 3, 5]].tolist() == [CLS, UNKNOWN, SEP]
    assert row.inputs["attention_mask"].tolist() == [1] * 6 and row.label_count == 3


def test_a_long_text_in_equal_windows_by_hand() -> None:
    rows = rows_of([[CLS, *range(50, 60), SEP]], 8)
    assert [original(rows.get_row(i, 0)).tolist() for i in range(2)] == [
        [CLS, *range(50, 55), SEP],
        [CLS, *range(55, 60), SEP],
    ]
    assert rows.document_R.tolist() == [0, 0]
    assert rows.ledger.placed == 12 and rows.ledger.trained == 2


texts = st.lists(st.lists(st.integers(4, 60), max_size=40).map(lambda text: [CLS, *text, SEP]), min_size=1, max_size=12)


@settings(max_examples=200)
@given(
    texts,
    st.integers(3, 20),
    st.sampled_from([0.01, 0.15, 0.5, 1.0]),
    st.sampled_from([0.0, 0.3]),
    st.sampled_from([None, 7]),
    st.booleans(),
    st.integers(0, 2**40),
)
def test_the_ledger_adds_up_and_the_count_is_exact(
    documents: list[list[int]],
    length: int,
    share: float,
    held: float,
    most: int | None,
    whole: bool,
    position: int,
) -> None:
    """Law: max(1, round(share n)) of the n tokens that may be masked are labels, and no other."""
    continues = (np.arange(1000) % 3 == 0) if whole else None
    rows = rows_of(documents, length, mask_rate=share, held_out=held, max_document_tokens=most, continues_V=continues)
    book = rows.ledger
    assert book.read == book.held_out + book.dropped + book.truncated + book.placed
    assert book.placed == book.trained + book.context and book.padding == 0
    read = [rows.get_row(i, position) for i in range(len(rows))]
    assert sum(r.label_count for r in read) == book.trained
    for row in read:
        text = original(row)[1:-1]
        maskable = int((~np.isin(text, SPECIAL)).sum())
        assert (row.labels != X).sum() == row.label_count == max(1, round(share * maskable))
        assert not np.isin(row.labels, SPECIAL).any()
        assert row.labels[0] == row.labels[-1] == X
        assert len(text) + 2 <= length
    # Of each document that is placed, BOS and what is read of its windows; the EOS unless it was cut off.
    placed = sum(len(original(r)) - 2 for r in read)
    ends = np.unique(rows.windows.document_R).size + int(rows.windows.has_eos_R.sum())
    assert book.placed <= placed + ends and (book.placed == placed + ends or book.dropped)


@given(texts, st.integers(3, 20), st.integers(0, 50), st.booleans())
def test_the_text_is_untouched_where_nothing_is_asked(
    documents: list[list[int]], length: int, position: int, whole: bool
) -> None:
    """Law: labels in place, the windows of a document are its text."""
    documents = [[token for token in d if token != UNKNOWN] for d in documents]
    continues = (np.arange(1000) % 2 == 0) if whole else None
    rows = rows_of(documents, length, continues_V=continues)
    told: dict[int, list[int]] = {}
    for i in range(len(rows)):
        told.setdefault(int(rows.document_R[i]), []).extend(original(rows.get_row(i, position))[1:-1].tolist())
    assert told == {i: d[1:-1] for i, d in enumerate(documents) if len(d) > 2}


def test_masks_belong_to_row_and_position() -> None:
    rows = rows_of([[CLS, *range(50, 250), SEP]] * 2)

    def at(row: int, position: int, rows: MaskedRows = rows) -> bytes:
        return rows.get_row(row, position).labels.tobytes() + rows.get_row(row, position).inputs["input_ids"].tobytes()

    assert at(0, 7) == at(0, 7)
    other = rows_of([[CLS, *range(50, 250), SEP]] * 2, seed=1)
    assert len({at(0, 7), at(1, 7), at(0, 8), at(0, 7, other)}) == 4


def test_eight_in_ten_hidden_one_replaced_one_as_it_was() -> None:
    rows = rows_of([[CLS, *range(100, 610), SEP]])
    fates: Counter[str] = Counter()
    replaced: set[int] = set()
    places: Counter[int] = Counter()
    for position in range(300):
        row = rows.get_row(0, position)
        ids = row.inputs["input_ids"]
        for t in np.flatnonzero(row.labels != X).tolist():
            places[t] += 1
            if ids[t] == MASK:
                fates["hidden"] += 1
            elif ids[t] == row.labels[t]:
                fates["kept"] += 1
            else:
                fates["replaced"] += 1
                replaced.add(int(ids[t]))
    total = sum(fates.values())
    assert total == 300 * 76  # round(0.15 * 510) is 76 (76.5 goes to the even number)
    shares = {name: count / total for name, count in fates.items()}
    assert abs(shares["hidden"] - 0.8) < 0.01 and abs(shares["replaced"] - 0.1) < 0.01
    assert not replaced & set(SPECIAL) and min(replaced) < 30 and max(replaced) > 980
    assert len(places) == 510 and max(places.values()) < 90  # 45 on average


def in_part(rows: MaskedRows, continues: np.ndarray, position: int) -> int:
    """How many words of row 0 are masked in part."""
    row = rows.get_row(0, position)
    text, asked = original(row)[1:-1], (row.labels != X)[1:-1]
    word = np.cumsum(~continues[text]) - 1
    size, hit = np.bincount(word), np.bincount(word, asked)
    return int(((hit > 0) & (hit < size)).sum())


def test_whole_words_are_masked_whole_but_for_the_last() -> None:
    """Law, and its mutant: masking token by token leaves many words in part."""
    rng = np.random.default_rng(0)
    continues = np.arange(1000) >= 600
    document = [CLS, 50, *rng.integers(10, 1000, 509).tolist(), SEP]
    whole, single = rows_of([document], continues_V=continues), rows_of([document])
    assert max(in_part(whole, continues, p) for p in range(100)) <= 1
    assert min(in_part(single, continues, p) for p in range(100)) > 10
    assert whole.ledger == single.ledger


def test_windows_with_nothing_to_mask_are_left_out() -> None:
    rows = rows_of([[CLS, UNKNOWN, SEP], [CLS, SEP], [CLS, 50, SEP]])
    assert len(rows) == 1 and rows.skipped == {"nothing to mask": 1}
    assert rows.ledger.dropped == 5 and rows.ledger.placed == 3


def test_rows_of_unequal_lengths_are_one_batch() -> None:
    rows = rows_of([[CLS, *range(50, 60), SEP], [CLS, 50, SEP]])
    batch = collate([rows.get_row(0, 0), rows.get_row(1, 0)], [0, 0])
    assert batch.inputs["input_ids"].shape == batch.labels.shape == (2, 16)
    assert batch.inputs["attention_mask"].sum(1).tolist() == [12, 3] and batch.label_count == 3

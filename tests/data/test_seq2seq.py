"""Source and target: what the encoder reads, what the decoder should say, what is cut."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from postgrad.data.layouts.rows import Row
from postgrad.data.layouts.seq2seq import Seq2SeqRows
from postgrad.data.layouts.windows import TooLongPolicy
from postgrad.data.render.frame import Frame
from postgrad.errors import StageError
from tests.data.memory import InMemoryStore, lay_out

EOS, START = 1, 0
ENDED = Frame(suffix_ids=(EOS,))


def rows_of(store: InMemoryStore, length: int = 64, target_length: int = 64, **changes: object) -> Seq2SeqRows:
    chosen = {"target": ENDED, "decoder_start": START, "seed": 0, "frame": ENDED}
    return lay_out(Seq2SeqRows, store, length, target_length=target_length, **(chosen | changes))


def arrays(row: Row) -> tuple[list[int], list[int]]:
    ids, labels = row.inputs["input_ids"].tolist(), row.labels.tolist()
    assert row.inputs["attention_mask"].tolist() == [1] * len(ids)
    assert row.inputs["decoder_input_ids"].tolist() == [START, *labels[:-1]]
    assert row.label_count == len(labels)
    return ids, labels


EXAMPLE = InMemoryStore([[5, 6, 7, 8, 9, EOS]], [[0, 0, 0, 1, 1, 1]])


def test_an_example_by_hand() -> None:
    row = rows_of(EXAMPLE).get_row(0, 0)
    assert arrays(row) == ([5, 6, 7, EOS], [8, 9, EOS])
    framed = rows_of(EXAMPLE, frame=Frame((90, 91), (), (92, EOS))).get_row(0, 0)
    assert arrays(framed) == ([90, 91, 5, 6, 7, 92, EOS], [8, 9, EOS])


@pytest.mark.parametrize(
    ("length", "target", "ids", "labels"),
    [
        (4, 3, [5, 6, 7, EOS], [8, 9, EOS]),
        (3, 3, [5, 6, EOS], [8, 9, EOS]),
        (4, 2, [5, 6, 7, EOS], [8, 9]),  # no EOS: the answer goes on, as far as the model is told
        (2, 1, [5, EOS], [8]),
    ],
)
def test_what_is_cut(length: int, target: int, ids: list[int], labels: list[int]) -> None:
    rows = rows_of(EXAMPLE, length, target)
    assert arrays(rows.get_row(0, 0)) == (ids, labels)
    assert rows.ledger.truncated == 6 - (len(ids) - 1) - len(labels)
    lost = {"the end of the source": int(length < 4), "the end of the target": int(target < 2)}
    assert rows.truncations == lost


def test_a_long_source_loses_its_beginning_its_end_or_all_of_it() -> None:
    for lead in (0, 1):
        bos = [2] * lead
        store = InMemoryStore(
            [[*bos, 5, 6, 7, 8, 9, EOS], [*bos, 5, 8, EOS]], [[*[0] * lead, 0, 0, 0, 1, 1, 1], [*[0] * lead, 0, 1, 1]]
        )
        beginning = rows_of(store, 3, too_long="cut-context", lead=lead)
        assert arrays(beginning.get_row(0, 0)) == ([6, 7, EOS], [8, 9, EOS])
        assert beginning.truncations["the beginning of the source"] == 1 and beginning.ledger.truncated == 1
        end = rows_of(store, 3, too_long="cut-end", lead=lead)
        assert arrays(end.get_row(0, 0)) == ([5, 6, EOS], [8, 9, EOS]) and end.truncations["the end of the source"] == 1
        dropped = rows_of(store, 3, too_long="drop", lead=lead)
        assert arrays(dropped.get_row(0, 0)) == ([5, EOS], [8, EOS]) and dropped.document_R.tolist() == [1]
        assert dropped.skipped == {"no answer": 0, "too long": 1} and not any(dropped.truncations.values())
        assert dropped.ledger.dropped == 6 + lead and dropped.ledger.truncated == 0


def test_of_a_conversation_the_last_answer_is_the_target() -> None:
    store = InMemoryStore([[2, 5, 6, 7, 8, 9, EOS], [2, 5, 6, 7, EOS]], [[0, 0, 1, 0, 1, 1, 1], [0, 0, 1, 0, 0]])
    rows = rows_of(store, lead=1)
    assert arrays(rows.get_row(0, 0)) == ([5, 6, 7, EOS], [8, 9, EOS])
    assert arrays(rows.get_row(1, 0)) == ([5, EOS], [6, EOS])
    assert rows.ledger.truncated == 1  # what stands behind the last answer


def test_examples_without_an_answer_are_left_out() -> None:
    rows = rows_of(InMemoryStore([[5, 6, EOS], [7, EOS], [5, EOS]], [[0, 0, 0], [1, 1], [0, 1]]))
    assert len(rows) == 1 and rows.skipped == {"no answer": 2, "too long": 0} and rows.document_R.tolist() == [1]
    assert arrays(rows.get_row(0, 0)) == ([EOS], [7, EOS])


def test_plain_text_is_cut_anew_at_each_position() -> None:
    rows = rows_of(InMemoryStore([[5, 6, 7, EOS]]))
    seen = {tuple(map(tuple, arrays(rows.get_row(0, position)))) for position in range(40)}
    assert seen == {((5, EOS), (6, 7, EOS)), ((5, 6, EOS), (7, EOS))}
    assert arrays(rows.get_row(0, 3)) == arrays(rows.get_row(0, 3))


marks = st.lists(
    st.lists(st.booleans(), min_size=0, max_size=20).map(lambda m: [*map(int, m), *map(int, m[-1:] or [0])]),
    min_size=1,
    max_size=12,
)
options = st.fixed_dictionaries(
    {
        "frame": st.sampled_from([ENDED, Frame((90,), (), (91, EOS))]),
        "target": st.sampled_from([ENDED, Frame((93,), (), (EOS,)), Frame((), (), (EOS, 94))]),
        "lead": st.integers(0, 1),
        "held_out": st.sampled_from([0.0, 0.3]),
        "max_document_tokens": st.sampled_from([None, 7]),
    }
)
asked = st.sampled_from(["cut-context", "cut-end", "drop"])


def check_ledger(rows: Seq2SeqRows, read: list[Row], lead: int) -> None:
    book = rows.ledger
    assert book.read == book.held_out + book.dropped + book.truncated + book.placed
    assert book.placed == book.trained + book.context
    # Of the ids no frame, but the EOS of each row that has one, and the BOS of each document.
    mine = sum(int((ids >= 100).sum()) for r in read for ids in (r.inputs["input_ids"], r.labels))
    ended = sum(target_of(rows, r.labels.tolist())[1] for r in read)
    assert book.placed == mine + ended + np.unique(rows.document_R).size * lead


def target_of(rows: Seq2SeqRows, labels: list[int]) -> tuple[list[int], bool]:
    """The target of a row without its frame, and whether the row ends it."""
    prefix, suffix = list(rows.target.prefix_ids), list(rows.target.suffix_ids)
    assert labels[: len(prefix)] == prefix
    ended = labels[-len(suffix) :] == suffix
    return labels[len(prefix) : len(labels) - ended * len(suffix)], ended


@settings(max_examples=300)
@given(marks, st.integers(4, 20), st.integers(2, 12), options, asked)
def test_source_and_target_are_the_example(
    marks: list[list[int]], length: int, target: int, chosen: dict, too_long: TooLongPolicy
) -> None:
    """Law: the target starts where the source ends or was cut; only a finished answer ends."""
    documents = [[*range(100 * i + 100, 100 * i + 99 + len(m)), EOS] for i, m in enumerate(marks)]
    rows = rows_of(InMemoryStore(documents, marks), length, target, too_long=too_long, **chosen)
    read = [rows.get_row(i, 0) for i in range(len(rows))]
    cut = dict.fromkeys(rows.truncations, 0)
    check_ledger(rows, read, chosen["lead"])
    assert sum(r.label_count for r in read) == rows.ledger.trained
    around = len(chosen["frame"].prefix_ids), len(chosen["frame"].suffix_ids)
    for document, row in zip(rows.document_R.tolist(), read, strict=True):
        ids, labels = arrays(row)
        source = ids[around[0] : len(ids) - around[1]]
        whole, mark = documents[document][: chosen["max_document_tokens"]], marks[document]
        answer, ended = target_of(rows, labels)
        begin = whole.index(answer[0])
        assert mark[begin] == 1 and (begin == chosen["lead"] or mark[begin - 1] == 0)
        room = length - sum(around)
        fits = slice(-room, None) if too_long == "cut-context" else slice(room)
        assert source == whole[chosen["lead"] : begin][fits]
        assert source == whole[chosen["lead"] : begin] or too_long != "drop"
        cut["the beginning of the source" if too_long == "cut-context" else "the end of the source"] += (
            source != whole[chosen["lead"] : begin]
        )
        assert source == whole[chosen["lead"] : begin] or len(ids) == length
        assert answer == whole[begin : begin + len(answer)]
        last = begin + len(answer)
        if ended:
            assert last >= len(documents[document]) - 1 or not any(mark[last:-1])
        else:
            room = target - len(labels)
            assert 0 <= room < len(rows.target.suffix_ids) or len(whole) < len(documents[document])
            cut["the end of the target"] += last < len(whole) - (whole[-1] == EOS) and bool(mark[last])
    assert cut == rows.truncations


@settings(max_examples=200)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=10), st.integers(6, 20), st.integers(4, 20), options)
def test_a_plain_text_is_its_sources_and_targets(sizes: list[int], length: int, target: int, chosen: dict) -> None:
    """Law: source and target of a document's rows, laid end to end, are its text; only the last has its EOS."""
    documents = [[*range(100 * i + 100, 100 * i + 100 + n), EOS] for i, n in enumerate(sizes)]
    rows = rows_of(InMemoryStore(documents), length, target, **chosen)
    told: dict[int, list[int]] = {}
    read = [rows.get_row(i, 5) for i in range(len(rows))]
    check_ledger(rows, read, chosen["lead"])
    around = len(chosen["frame"].prefix_ids), len(chosen["frame"].suffix_ids)
    for document, row in zip(rows.document_R.tolist(), read, strict=True):
        ids, labels = arrays(row)
        assert len(ids) <= length and len(labels) <= target and len(ids) > sum(around)
        answer, ended = target_of(rows, labels)
        told.setdefault(document, []).extend([*ids[around[0] : len(ids) - around[1]], *answer, *[EOS] * ended])
    for document, tokens in told.items():
        assert tokens == documents[document][: chosen["max_document_tokens"]][chosen["lead"] :]


def test_what_is_trained_of_plain_text_is_right_on_average() -> None:
    rows = rows_of(InMemoryStore([[*range(100, 130), EOS], [*range(200, 211), EOS]]), 16, 16)
    counts = [sum(rows.get_row(i, position).label_count for i in range(len(rows))) for position in range(500)]
    assert np.mean(counts) == pytest.approx(rows.ledger.trained, abs=0.5)
    assert min(counts) < rows.ledger.trained < max(counts)


def test_a_target_that_is_not_shifted_would_show_the_answer() -> None:
    """The mutant: a decoder that reads the labels themselves."""
    row = rows_of(EXAMPLE).get_row(0, 0)
    broken = row._replace(inputs=row.inputs | {"decoder_input_ids": row.labels})
    with pytest.raises(AssertionError):
        arrays(broken)


def test_no_room_is_refused() -> None:
    with pytest.raises(StageError, match="no room"):
        rows_of(EXAMPLE, 3, frame=Frame((90, 91), (), (EOS,)))
    with pytest.raises(StageError, match="target_length"):
        rows_of(InMemoryStore([[5, 6, EOS]]), 9, 2)

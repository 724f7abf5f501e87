"""Span corruption: published lengths, the spans' law, and a text that can be rebuilt."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from postgrad.data.layouts.rows import IGNORED, Row
from postgrad.data.layouts.span_corruption import SpanCorruptionRows, _random_borders, corrupted_lengths, noise_counts
from postgrad.data.render.frame import Frame
from postgrad.errors import StageError
from tests.data.memory import InMemoryStore, lay_out

EOS, START = 1, 0
ENDED = Frame(suffix_ids=(EOS,))
SENTINELS = tuple(range(999, 899, -1))


def rows_of(documents: list[list[int]], length: int = 512, **changes: object) -> SpanCorruptionRows:
    chosen = {"sentinels": SENTINELS, "target": ENDED, "decoder_start": START, "seed": 0, "frame": ENDED}
    return lay_out(SpanCorruptionRows, InMemoryStore(documents), length, **(chosen | changes))


def rebuilt(row: Row, sentinels: tuple[int, ...] = SENTINELS) -> list[int]:
    """The text: each sentinel of the inputs gives way to what stands behind it in the targets."""
    spans: dict[int, list[int]] = {}
    for token in row.labels.tolist()[:-1]:
        if token in sentinels:
            span = spans[token] = []
        else:
            span.append(token)
    inputs = row.inputs["input_ids"].tolist()
    assert row.labels[-1] == inputs[-1] == EOS
    return [x for token in inputs[:-1] for x in spans.get(token, [token])]


def test_the_published_lengths() -> None:
    assert corrupted_lengths(512) == (568, 114)  # the authors' own figures for density 0.15 and spans of 3


@given(st.integers(3, 700), st.sampled_from([0.05, 0.15, 0.3, 0.5]), st.sampled_from([1.0, 2.0, 3.0, 8.0]))
def test_the_lengths_are_the_longest_that_fit(inputs: int, density: float, mean_span: float) -> None:
    def told(raw: int) -> tuple[int, int]:
        noise, spans = noise_counts(np.array([raw]), density, mean_span)
        return raw - int(noise[0]) + int(spans[0]) + 1, int(noise[0]) + int(spans[0]) + 1

    raw, targets = corrupted_lengths(inputs, density, mean_span)
    assert told(raw)[0] <= inputs < told(raw + 1)[0] and told(raw)[1] == targets


def test_one_row_by_hand() -> None:
    """Two tokens can only be cut in one way."""
    row = rows_of([[5, 6, EOS]]).get_row(0, 0)
    assert row.inputs["input_ids"].tolist() == [5, 999, EOS]
    assert row.inputs["attention_mask"].tolist() == [1, 1, 1]
    assert row.labels.tolist() == [999, 6, EOS]
    assert row.inputs["decoder_input_ids"].tolist() == [START, 999, 6]
    framed = rows_of([[2, 5, 6, EOS]], frame=Frame((90,), (), (91, EOS)), lead=1).get_row(0, 0)
    assert framed.inputs["input_ids"].tolist() == [90, 5, 999, 91, EOS]


def test_a_full_row_has_the_published_lengths() -> None:
    rows = rows_of([[*range(2, 570), EOS]])
    for position in range(20):
        row = rows.get_row(0, position)
        assert len(row.inputs["input_ids"]) == 512 and len(row.labels) == row.label_count == 114
        assert rebuilt(row) == list(range(2, 570))


documents = st.lists(st.integers(0, 60).map(lambda n: [*range(2, n + 2), EOS]), min_size=1, max_size=10)


@settings(max_examples=300)
@given(
    documents,
    st.integers(4, 40),
    st.sampled_from([0.05, 0.15, 0.3, 0.5]),
    st.sampled_from([2.0, 3.0]),
    st.sampled_from([0.0, 0.3]),
    st.sampled_from([None, 9]),
    st.integers(0, 2**40),
)
def test_inputs_and_targets_rebuild_the_text(
    documents: list[list[int]],
    length: int,
    density: float,
    mean_span: float,
    held: float,
    most: int | None,
    position: int,
) -> None:
    """Law: nothing is lost and nothing is told twice, in rows and in the ledger."""
    rows = rows_of(documents, length, density=density, mean_span=mean_span, held_out=held, max_document_tokens=most)
    told: dict[int, list[int]] = {}
    read = [rows.get_row(i, position) for i in range(len(rows))]
    for document, row in zip(rows.document_R.tolist(), read, strict=True):
        assert len(row.inputs["input_ids"]) <= length and (row.labels != IGNORED).all()
        sentinels = [t for t in row.labels.tolist() if t in SENTINELS]
        assert sentinels == list(SENTINELS[: len(sentinels)])
        assert [t for t in row.inputs["input_ids"].tolist() if t in SENTINELS] == sentinels
        assert row.inputs["decoder_input_ids"].tolist() == [START, *row.labels.tolist()[:-1]]
        told.setdefault(document, []).extend(rebuilt(row))
    for document, text in told.items():
        assert text == documents[document][: most or None][: len(documents[document]) - 1]
    book = rows.ledger
    assert book.read == book.held_out + book.dropped + book.truncated + book.placed
    assert book.placed == book.trained + book.context
    assert sum(r.label_count for r in read) == book.trained
    assert book.placed == sum(map(len, told.values())) + int(rows.windows.has_eos_R.sum())


def test_a_target_without_its_first_span_does_not_rebuild() -> None:
    """The mutant."""
    row = rows_of([[*range(2, 60), EOS]]).get_row(0, 0)
    cut = np.flatnonzero(row.labels == SENTINELS[1])[0]
    broken = row._replace(labels=np.concatenate(([SENTINELS[0]], row.labels[cut:])))
    assert rebuilt(broken) != rebuilt(row)


def test_spans_belong_to_row_and_position_and_fall_everywhere() -> None:
    document = [*range(2, 102), EOS]
    rows = rows_of([document] * 2)
    assert rows.get_row(0, 3).labels.tolist() == rows.get_row(0, 3).labels.tolist()
    assert rows.get_row(0, 3).labels.tolist() != rows.get_row(0, 4).labels.tolist()
    assert rows.get_row(0, 3).labels.tolist() != rows.get_row(1, 3).labels.tolist()
    hidden = Counter(t for p in range(800) for t in rows.get_row(0, p).labels.tolist() if 2 <= t < 102)
    # The text begins with a stretch that stays, and ends with noise, as in the published algorithm.
    assert 2 not in hidden and hidden[101] == 800 and len(hidden) == 99
    inner = [hidden[t] for t in range(12, 90)]
    assert 0.5 * np.mean(inner) < min(inner) and max(inner) < 1.6 * np.mean(inner)


def test_every_way_to_part_is_as_likely() -> None:
    draws = np.random.default_rng(0)
    seen = Counter(tuple(np.diff(_random_borders(5, 3, draws))) for _ in range(3000))
    assert len(seen) == 6 and min(seen.values()) > 420
    assert all(sum(parts) == 5 and min(parts) > 0 for parts in seen)


def test_too_few_sentinels_are_refused() -> None:
    with pytest.raises(StageError, match="up to 28 corrupted spans, but only 27"):
        rows_of([[5, 6, EOS]], sentinels=SENTINELS[:27])
    assert len(rows_of([[5, 6, EOS]], sentinels=SENTINELS[:28])) == 1


def test_a_single_token_is_left_out() -> None:
    rows = rows_of([[5, EOS], [5, 6, EOS]])
    assert len(rows) == 1 and rows.skipped == {"a single token": 1} and rows.ledger.dropped == 2


def test_rows_with_no_room_for_two_tokens_and_one_more_are_refused() -> None:
    """Equal windows of at most two tokens could be of one, and that one be lost."""
    with pytest.raises(StageError, match="at least 4"):
        rows_of([[5, 6, 7, EOS]], 3)
    assert len(rows_of([[5, 6, 7, EOS]], 4)) == 1

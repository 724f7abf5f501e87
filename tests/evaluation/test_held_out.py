"""What is scored: every token once, the same ones whatever stands before them; rows of a task document by document."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from postgrad.data.layouts.rows import IGNORED, Row
from postgrad.data.problem_type import ProblemType
from postgrad.data.render.frame import TextPrefix
from postgrad.evaluation import held_out
from postgrad.evaluation.held_out import HeldOutRows, HeldOutText

BOS, VIRTUAL = 1, (900, 901, 902)


def text(
    documents: Sequence[Sequence[int]],
    before: tuple[int, ...] = (),
    special: tuple[int, ...] = (),
    reserved: int = 0,
) -> HeldOutText:
    return HeldOutText(
        "text",
        "learned",
        tuple(np.array(d, np.int64) for d in documents),
        np.full(len(documents), 9),
        "f",
        prefix=TextPrefix((), special, before),
        reserved_positions=reserved,
    )


def scored(found: HeldOutText, context: int) -> list[tuple[int, int, int]]:
    """Document, label and the token before it, of everything that is scored, in order."""
    out = []
    for document, row in found.iter_rows(context):
        ids, labels = row.inputs["input_ids"], row.labels
        assert len(ids) == len(labels) <= context
        assert row.label_count == int((labels != IGNORED).sum())
        assert labels[-1] == IGNORED  # there is nothing behind the last id that it could be the label of
        for place in np.flatnonzero(labels != IGNORED).tolist():
            assert ids[place + 1] == labels[place]  # the next token
            out.append((document, int(labels[place]), int(ids[place])))
    return out


texts = st.lists(st.lists(st.integers(2, 99), min_size=1, max_size=60), min_size=1, max_size=4)


@settings(max_examples=150)
@given(texts, st.integers(8, 40), st.integers(0, 3), st.integers(0, 3), st.booleans())
def test_every_token_is_scored_once_whatever_stands_before(
    documents: list[list[int]], context: int, count: int, spare: int, bos: bool
) -> None:
    documents = [[BOS, *d] if bos else d for d in documents]
    found = text(documents, before=VIRTUAL[:count], reserved=spare, special=(BOS,) if bos else ())
    met = scored(found, context)
    # All but a document's first, which nothing stands before; with a BOS that is the BOS.
    assert [(d, label) for d, label, _ in met] == [(i, t) for i, doc in enumerate(documents) for t in doc[1:]]
    assert found.tokens == len(met)
    # Each is read behind the one before it; behind a BOS the prompt stands between.
    for document, label, before in met:
        pairs = set(zip(documents[document], documents[document][1:], strict=False))
        assert (before, label) in pairs or (bos and before in VIRTUAL and label == documents[document][1])


@settings(max_examples=100)
@given(texts, st.integers(8, 40), st.booleans())
def test_a_prompt_and_as_much_room_left_free_cut_alike(documents: list[list[int]], context: int, bos: bool) -> None:
    """The start model, which has no prompt, is scored on the same windows of the same documents."""
    documents = [[BOS, *d] if bos else d for d in documents]
    both = {"special": (BOS,) if bos else ()}
    prompted = list(text(documents, before=VIRTUAL, **both).iter_rows(context))
    spared = list(text(documents, reserved=len(VIRTUAL), **both).iter_rows(context))
    assert len(prompted) == len(spared)
    for (one, with_prompt), (other, without) in zip(prompted, spared, strict=True):
        assert one == other and with_prompt.label_count == without.label_count
        ids = with_prompt.inputs["input_ids"].tolist()
        begins = int(bos and ids[0] == BOS)
        assert tuple(ids[begins : begins + 3]) == VIRTUAL
        assert ids[:begins] + ids[begins + 3 :] == without.inputs["input_ids"].tolist()
        labels = with_prompt.labels[with_prompt.labels != IGNORED]
        assert labels.tolist() == without.labels[without.labels != IGNORED].tolist()


def test_without_the_room_left_free_windows_would_differ() -> None:
    """The mutant of the law above."""
    long = [list(range(2, 60))]
    counts = {spare: [p.row.label_count for p in text(long, reserved=spare).iter_rows(16)] for spare in (0, 3)}
    assert counts[0] != counts[3]


def test_a_prompt_by_hand() -> None:
    found = text([[BOS, 5, 6, 7, 8, 9, 10, 11]], before=VIRTUAL[:2], special=(BOS,))
    rows = [(p.row.inputs["input_ids"].tolist(), p.row.labels.tolist()) for p in found.iter_rows(8)]
    x = IGNORED
    assert rows == [
        ([BOS, 900, 901, 5, 6, 7, 8, 9], [x, x, 5, 6, 7, 8, 9, x]),
        ([900, 901, 6, 7, 8, 9, 10, 11], [x, x, x, x, x, 10, 11, x]),
    ]


def test_a_prompt_stands_behind_a_bos_and_before_anything_else() -> None:
    ids = np.array([BOS, 5, 6])
    behind = TextPrefix((), (BOS,), VIRTUAL)
    assert behind.insert(ids).tolist() == [BOS, *VIRTUAL, 5, 6]
    assert behind.insert(ids[1:]).tolist() == [*VIRTUAL, 5, 6]
    assert TextPrefix((), (), VIRTUAL).insert(ids).tolist() == [*VIRTUAL, BOS, 5, 6]
    assert TextPrefix((), (BOS,)).insert(ids).tolist() == ids.tolist()
    assert behind.insert(ids[:0]).tolist() == list(VIRTUAL)
    assert TextPrefix((), (BOS, 5), VIRTUAL).insert(ids).tolist() == [BOS, 5, *VIRTUAL, 6]
    assert TextPrefix(VIRTUAL[:1], (BOS,), VIRTUAL[1:]).insert(ids).tolist() == [VIRTUAL[0], BOS, *VIRTUAL[1:], 5, 6]


def test_scores_are_kept_by_all_that_decides_them() -> None:
    plain = text([[2, 3, 4], [5, 6]])
    others = [
        plain,
        replace(plain, prefix=TextPrefix((), (), VIRTUAL)),
        replace(plain, reserved_positions=3),
        plain.take_tokens(3),
        replace(plain, fingerprint="g"),
    ]
    assert len({str(h.identity) for h in others}) == len(others)
    # The same documents under another name or role score the same.
    assert replace(plain, name="other", role="retained").identity == plain.identity


# -- rows of a task ------------------------------------------------------------------------------------------------------


def made(documents: Sequence[int], sizes: Sequence[int]) -> HeldOutRows:
    """Rows of the documents `documents`, which have so many tokens each."""
    rows = tuple(Row({"input_ids": np.arange(sizes[d])}, np.array(i, np.int64), 1) for i, d in enumerate(documents))
    count = len(sizes)
    return HeldOutRows(
        "rows",
        "learned",
        rows,
        np.array(documents),
        np.arange(count) + 10,
        "f",
        np.arange(count),
        np.array(sizes),
        ProblemType.CLASS,
    )


@pytest.mark.parametrize(
    ("tokens", "documents"),
    [(0, 1), (3, 1), (4, 1), (8, 1), (9, 2), (13, 2), (14, 3), (1000, 3)],
)
def test_the_first_documents_are_whole_and_fit(tokens: int, documents: int) -> None:
    """Documents of 4, 5 and 5 tokens in 2, 1 and 3 rows."""
    found = made([0, 0, 1, 2, 2, 2], [4, 5, 5]).take_tokens(tokens)
    assert len(found) == documents
    assert len(found.rows) == [2, 3, 6][documents - 1] == found.tokens
    assert found.document_R.tolist() == [0, 0, 1, 2, 2, 2][: len(found.rows)]
    assert [int(row.labels) for row in found.rows] == list(range(len(found.rows)))
    for part in (found.bytes, found.digests, found.tokens_N):
        assert len(part) == documents
    assert [(piece.document, int(piece.row.labels)) for piece in found.iter_rows(7)] == [
        (d, i) for i, d in enumerate(found.document_R)
    ]


@settings(max_examples=100)
@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 3)), min_size=1, max_size=8), st.integers(0, 60))
def test_the_first_of_the_first_are_the_first(sizes: list[tuple[int, int]], tokens: int) -> None:
    whole = made([d for d, (_, rows) in enumerate(sizes) for _ in range(rows)], [size for size, _ in sizes])
    part = whole.take_tokens(tokens)
    assert part.take_tokens(tokens).identity == part.identity
    assert len(part) == 1 or part.tokens_N.sum() <= tokens
    assert len(part) == len(whole) or part.tokens_N.sum() + whole.tokens_N[len(part)] > tokens
    assert set(part.document_R.tolist()) == set(range(len(part)))


def test_rows_are_told_apart_by_what_stands_around_them() -> None:
    plain = made([0, 1], [3, 3])
    others = [
        plain,
        replace(plain, framing=((1,), (), ())),
        replace(plain, framing=((), (), (1,))),
        replace(plain, label_token_ids=(5, 6)),
        replace(plain, label_token_ids=(6, 5)),
        replace(plain, problem=ProblemType.MULTI_LABEL),
        replace(plain, fingerprint="g"),
        plain.take_tokens(3),
    ]
    assert len({str(h.identity) for h in others}) == len(others)


def test_windows_that_leave_a_token_out_would_be_met(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutant: windows that begin to score one token late."""
    real = held_out.windows

    def late(length: int, context: int, document: int = 0, lead: int = 1) -> object:
        return (
            replace(w, scored_from=min(w.scored_from + 1, w.end - 1)) for w in real(length, context, document, lead)
        )

    monkeypatch.setattr(held_out, "windows", late)
    assert [label for _, label, _ in scored(text([list(range(2, 40))]), 16)] != list(range(3, 40))

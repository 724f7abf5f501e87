"""Texts of stored documents: what is text, equal windows, and draws that belong to a row."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from postgrad.data.layouts.windows import has_marks, locate_texts, max_text_tokens, split_windows
from postgrad.data.random_streams import RandomStreams
from postgrad.data.tokens.held_out_split import select_documents
from postgrad.errors import StageError
from tests.data.memory import InMemoryStore

BOS, EOS = 2, 1


def test_the_text_of_a_document_by_hand() -> None:
    store = InMemoryStore([[BOS, 5, 6, 7, EOS], [BOS, EOS], [BOS, 5, 6, EOS]])
    texts = locate_texts(store, select_documents(store, max_tokens=4), lead=1)
    assert texts.start_N.tolist() == [1, 1, 1]
    assert texts.stop_N.tolist() == [4, 1, 3]  # the first is cut at four tokens and has lost its EOS
    assert texts.has_eos_N.tolist() == [False, True, True]
    assert not has_marks(store) and has_marks(InMemoryStore([[5, EOS]], [[0, 1]]))


@given(st.lists(st.integers(0, 40), min_size=1, max_size=10), st.integers(0, 2), st.integers(1, 12))
def test_windows_part_a_text(sizes: list[int], lead: int, most: int) -> None:
    """Law: windows of a text follow one another without a gap, as few and as equal as can be."""
    store = InMemoryStore([[BOS] * lead + [5] * size + [EOS, EOS] for size in sizes])
    windows = split_windows(locate_texts(store, select_documents(store), lead), most)
    for document, size in enumerate(size + 1 for size in sizes):
        mine = windows.select(windows.document_R == document)
        assert len(mine) == -(-size // most)
        covered = [token for a, b in zip(mine.start_R, mine.stop_R, strict=True) for token in range(a, b)]
        assert covered == list(range(lead, lead + size))
        assert mine.size_R.max() <= most and mine.size_R.max() - mine.size_R.min() <= 1
        assert mine.has_eos_R.tolist() == [False] * (len(mine) - 1) + [True]
        assert mine.stored_R.sum() == lead + size + 1


def test_a_row_without_room_is_refused() -> None:
    assert max_text_tokens(10, 9, 1) == 1
    with pytest.raises(StageError, match="at least 11"):
        max_text_tokens(10, 10, 1)


def test_draws_belong_to_seed_row_and_position() -> None:
    def first(seed: int, row: int, position: int) -> list[float]:
        return RandomStreams(seed).generator(row, position).random(4).tolist()

    assert first(0, 1, 2) == first(0, 1, 2)
    seen = {tuple(first(s, r, p)) for s in range(3) for r in range(5) for p in range(5)}
    assert len(seen) == 75
    large = RandomStreams(0).generator(2**40, 2**40).random()
    assert 0 <= large < 1
    assert np.mean([first(0, row, 7)[0] for row in range(400)]) == pytest.approx(0.5, abs=0.05)


def test_draws_of_two_rows_share_no_number() -> None:
    """Law: no row's stream runs into that of the next row or position."""
    places = [(0, 0), (1, 0), (2, 0), (0, 1), (1, 1)]
    drawn = [set(RandomStreams(0).generator(*place).random(2000).tolist()) for place in places]
    assert len(set.union(*drawn)) == sum(map(len, drawn))

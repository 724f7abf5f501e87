"""Is a near copy known for one, and a new text for new?"""

from __future__ import annotations

import random

import numpy as np
import pytest

from postgrad.data.filter.near_duplicates import RUN_WORDS, NearDuplicateIndex, repetition_share

WORDS = [f"w{i}" for i in range(2000)]


def text(seed: int, words: int = 200) -> list[str]:
    return random.Random(seed).choices(WORDS, k=words)


def jaccard(one: list[str], other: list[str]) -> float:
    runs = [{tuple(words[i : i + RUN_WORDS]) for i in range(len(words) - RUN_WORDS + 1)} for words in (one, other)]
    return len(runs[0] & runs[1]) / len(runs[0] | runs[1])


def test_copies_are_known_by_number_and_other_texts_are_not() -> None:
    seen = NearDuplicateIndex()
    for seed in range(50):
        assert seen.find_or_add(" ".join(text(seed))) is None
    assert len(seen) == 50
    assert seen.find_or_add(" ".join(text(17))) == 17
    assert seen.find_or_add(" ".join(text(17)).upper() + "!") == 17  # case and signs make no difference
    assert len(seen) == 50


def test_a_text_with_a_few_words_changed_is_known() -> None:
    known = 0
    for seed in range(40):
        words = text(seed)
        near = [*words[:-6], *text(seed + 1000, 6)]
        assert jaccard(words, near) > 0.9
        seen = NearDuplicateIndex()
        seen.find_or_add(" ".join(words))
        known += seen.find_or_add(" ".join(near)) is not None
    assert known >= 38


def test_a_text_with_half_of_its_words_changed_is_new() -> None:
    for seed in range(40):
        words = text(seed)
        half = [*words[:120], *text(seed + 1000, 80)]
        assert 0.35 < jaccard(words, half) < 0.65
        seen = NearDuplicateIndex()
        seen.find_or_add(" ".join(words))
        assert seen.find_or_add(" ".join(half)) is None


def test_the_signature_estimates_the_common_share() -> None:
    words = text(0)
    other = [*words[:150], *text(1, 50)]
    seen = NearDuplicateIndex()
    estimates = float((seen._signature(" ".join(words)) == seen._signature(" ".join(other))).mean())
    assert estimates == pytest.approx(jaccard(words, other), abs=3 * np.sqrt(0.25 / 128))


@pytest.mark.parametrize(
    ("words", "share"),
    [(list(range(40)), 0.0), (list(range(10)) * 4, 0.75), ([1] * 50, 49 / 50), ([], 0.0), ([1, 2], 0.0)],
)
def test_repeats_are_counted_from_the_second_time_on(words: list[int], share: float) -> None:
    assert repetition_share(words) == pytest.approx(share, abs=0.001)

"""How choices are compared: every formula by hand on small numbers, and what a wrong one would say."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from postgrad.errors import DataError, StageError
from postgrad.evaluation.choices.normalization import CONTENT_FREE, Normalization, calibrate_scores, normalize_scores

TEXTS = ["no", "ünwahr", "it is true"]
LOG_P = np.array([-3.0, -6.0, -8.0])
TOKENS = np.array([1, 4, 4])
ALONE = np.array([-1.0, -7.0, -7.5])

# By hand: bytes 2, 7 (the u with dots has two), 10; characters 2, 6, 10.
BY_HAND: dict[Normalization, list[float]] = {
    "sum": [-3.0, -6.0, -8.0],
    "token": [-3.0, -1.5, -2.0],
    "byte": [-1.5, -6 / 7, -0.8],
    "character": [-1.5, -1.0, -0.8],
    "answer-only": [-2.0, 1.0, -0.5],
}


@pytest.mark.parametrize("by", BY_HAND)
def test_scores_are_those_of_the_formula(by: Normalization) -> None:
    found = normalize_scores(LOG_P, by, texts=TEXTS, tokens_C=TOKENS, unconditional_C=ALONE)
    assert found == pytest.approx(BY_HAND[by])
    # The mutants: any other way says something else.
    assert all(found != pytest.approx(other) for name, other in BY_HAND.items() if name != by)


def test_ways_prefer_different_choices() -> None:
    best = {
        by: int(normalize_scores(LOG_P, by, texts=TEXTS, tokens_C=TOKENS, unconditional_C=ALONE).argmax())
        for by in BY_HAND
    }
    assert best == {"sum": 0, "token": 1, "byte": 2, "character": 2, "answer-only": 1}


@pytest.mark.parametrize(
    ("by", "given", "what"),
    [
        ("token", {}, "tokens_C: 3 choices and 0 values"),
        ("byte", {"texts": TEXTS[:2]}, "texts: 3 choices and 2 values"),
        ("character", {"texts": ["", "a", "b"]}, "empty choice"),
        ("answer-only", {"unconditional_C": ALONE[:1]}, "unconditional_C: 3 choices and 1 values"),
    ],
)
def test_what_a_way_needs(by: Normalization, given: dict[str, object], what: str) -> None:
    with pytest.raises(DataError, match=what):
        normalize_scores(LOG_P, by, **given)  # type: ignore[arg-type]


def test_a_way_that_there_is_not() -> None:
    with pytest.raises(StageError, match=r"'bytes'[\s\S]*sum, token, byte, character, answer-only[\s\S]*'byte'"):
        normalize_scores(LOG_P, "bytes")  # type: ignore[arg-type]


# -- contextual calibration -------------------------------------------------------------------------------------------


def test_calibration_by_hand() -> None:
    """Two labels; without content the model says the first with 0.8, so 0.7 for the first means the second."""
    log_p = np.log([0.35, 0.15])  # 0.7 and 0.3 among the two
    free = np.log([[0.4, 0.1]])  # 0.8 and 0.2
    q = np.exp(calibrate_scores(log_p, free))
    # W p = (0.7 / 0.8, 0.3 / 0.2) = (0.875, 1.5), normalised.
    assert q == pytest.approx([0.875 / 2.375, 1.5 / 2.375])
    assert int(log_p.argmax()) == 0
    assert int(q.argmax()) == 1
    # The mutant that multiplies by p_cf would say the first even more.
    assert int((log_p + free[0]).argmax()) == 0


def test_inputs_without_content_are_averaged_before_they_are_normalised() -> None:
    """By hand: mean of (0.6, 0.2) and (0.1, 0.1) is (0.35, 0.15), so 0.7 and 0.3; p is (0.5, 0.5)."""
    free = np.log([[0.6, 0.2], [0.1, 0.1]])
    q = np.exp(calibrate_scores(np.log([0.2, 0.2]), free))
    assert q == pytest.approx([(0.5 / 0.7) / (0.5 / 0.7 + 0.5 / 0.3), (0.5 / 0.3) / (0.5 / 0.7 + 0.5 / 0.3)])
    # The mutants: the other order (0.625 and 0.375), and a mean of logarithms.
    assert q[0] != pytest.approx((0.5 / 0.625) / (0.5 / 0.625 + 0.5 / 0.375))
    mean = np.log([0.2, 0.2]) - free.mean(0)
    assert q[0] != pytest.approx(np.exp(mean - np.logaddexp.reduce(mean))[0])


numbers = st.lists(st.floats(-50, 0), min_size=4, max_size=4).map(np.array)


@settings(max_examples=100)
@given(numbers, st.lists(numbers, min_size=1, max_size=3).map(np.stack), st.floats(-20, 20))
def test_calibration_is_a_probability_and_knows_no_scale(log_p: np.ndarray, free: np.ndarray, shift: float) -> None:
    q = calibrate_scores(log_p, free)
    assert math.isclose(np.exp(q).sum(), 1)
    # A factor common to all choices cancels, in the item and without content.
    assert calibrate_scores(log_p + shift, free + 2 * shift) == pytest.approx(q)
    # What is said without content, said again, is told from nothing: all choices alike.
    assert calibrate_scores(free[0], free[:1]) == pytest.approx(np.full(4, -math.log(4)))
    # Without a habit nothing changes but the scale.
    even = calibrate_scores(log_p, np.zeros((1, 4)))
    assert even - even[0] == pytest.approx(log_p - log_p[0])


def test_the_published_inputs() -> None:
    assert CONTENT_FREE == ("N/A", "", "[MASK]")

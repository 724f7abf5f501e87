"""Is a dip that heals told from forgetting that stays, and from noise?"""

from __future__ import annotations

import math

import pytest

from postgrad.stats.stability_gap import EvaluationPoint, stability_gap


def curve(changes: list[float], wide: float = 0.01) -> list[EvaluationPoint]:
    return [EvaluationPoint(i / (len(changes) - 1), c, c - wide, c + wide) for i, c in enumerate(changes)]


def test_a_rise_that_comes_back_is_a_gap() -> None:
    found = stability_gap(curve([0.0, 0.3, 0.4, 0.3, 0.2, 0.15, 0.1, 0.1, 0.12, 0.1]))
    assert found is not None
    assert (found.peak_x, found.peak, found.recovery) == (pytest.approx(2 / 9), 0.4, 0.1)
    assert found.recovery_x == pytest.approx(6 / 9) and found.recovered_share == pytest.approx(0.75)


@pytest.mark.parametrize(
    "changes",
    [
        [0.0, 0.1, 0.2, 0.3, 0.4, 0.5],  # it only gets worse
        [0.0, 0.3, 0.35, 0.34, 0.36, 0.35, 0.34, 0.35],  # it stays
        [0.0, 0.02, 0.1, 0.2, 0.4, 0.5, 0.4, 0.2],  # the highest loss is late: that is no switch
        [0.0, -0.1, -0.2, -0.2, -0.3],  # it never rises
        [0.0, 0.02, 0.015, 0.012, 0.011, 0.011],  # within what can be told apart
        [0.0, 0.4],
        [],
    ],
)
def test_anything_else_is_none(changes: list[float]) -> None:
    looks = curve(changes) if len(changes) > 1 else []
    assert stability_gap(looks) is None


def test_the_first_quarter_is_that_of_the_looks_wherever_they_begin() -> None:
    rising = [0.0, 0.1, 0.2, 0.4, 0.3, 0.2, 0.1, 0.1, 0.1]
    assert stability_gap(curve(rising)) is None  # highest at 3/8
    early = [0.0, 0.1, 0.4, *rising[4:], 0.1]
    found = stability_gap([look._replace(x=look.x + 5) for look in curve(early)])
    assert found is not None and found.peak_x == pytest.approx(5.25)  # just at a quarter
    assert stability_gap([look._replace(x=look.x + 5) for look in curve(rising)]) is None


def test_a_tenth_of_the_rise_must_come_back() -> None:
    assert stability_gap(curve([0.0, 0.4, 0.39, 0.37, 0.37, 0.37], wide=0.001)) is None
    found = stability_gap(curve([0.0, 0.4, 0.39, 0.35, 0.35, 0.35], wide=0.001))
    assert found is not None and found.recovered_share == pytest.approx(0.125)


def test_wide_intervals_say_nothing_and_unknown_looks_are_passed_over() -> None:
    changes = [0.0, 0.4, 0.3, 0.2, 0.1, 0.1]
    assert stability_gap(curve(changes)) is not None
    assert stability_gap(curve(changes, wide=0.2)) is None
    looks = curve(changes)
    looks.insert(1, EvaluationPoint(0.1, math.nan, math.nan, math.nan))
    assert stability_gap(looks) == stability_gap(curve(changes))

"""Laws of the choice between combinations: the bound, dominance, the budget of pilots, and the share between two."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pytest

from postgrad.analysis import lever_choice
from postgrad.analysis.law_fitting import Estimate
from postgrad.analysis.lever_choice import (
    MIN_STEPS,
    Forecast,
    Trial,
    forecast,
    plan_rounds,
    promote,
    rank,
    refine_share,
)
from postgrad.errors import StageError

RUN_STEPS, BOUND = 1000.0, 0.1


def trial(name: str, steps: float, rise: float, loss: float) -> Trial:
    return Trial(name, steps, {"old": Estimate(rise, rise - 0.01, rise + 0.01)}, {"new": loss})


def forecasts(measured: Mapping[str, tuple[float, float]], run_steps: float = RUN_STEPS) -> list[Forecast]:
    """Of combinations with a rise and a loss in a pilot of 50 steps, and 5 % less of both in one of 25."""
    trials = [
        trial(name, steps, rise * factor, loss / factor)
        for name, (rise, loss) in measured.items()
        for steps, factor in ((25, 0.95), (50, 1.0))
    ]
    return forecast(trials, run_steps, {"old": BOUND})


@pytest.mark.parametrize("mutant", [None, "by-loss-alone"])
def test_of_those_that_keep_the_bound_the_one_that_learns_most_is_chosen(
    mutant: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = forecasts({"careful": (0.01, 2.0), "better": (0.02, 1.8), "careless": (0.5, 1.5)})
    ranked = sorted(found, key=lambda item: item.total_loss) if mutant else rank(found)
    assert ([item.name for item in ranked] == ["better", "careful", "careless"]) == (mutant is None)


def test_what_forgets_less_and_learns_more_is_never_behind() -> None:
    for rise in (0.0, 0.03, 0.08, 0.2):
        for loss in (1.5, 2.0):
            found = rank(forecasts({"worse": (rise + 0.02, loss + 0.05), "better": (rise, loss)}))
            assert found[0].name == "better"


def test_without_any_that_keeps_the_bound_the_closest_comes_first() -> None:
    found = rank(forecasts({"far": (0.9, 1.5), "near": (0.3, 2.5)}))
    assert [item.name for item in found] == ["near", "far"] and found[0].probability < 0.9


def test_a_pilot_as_long_as_the_run_is_its_own_forecast() -> None:
    (found,) = forecast([trial("whole", RUN_STEPS, 0.04, 2.0)], RUN_STEPS, {"old": BOUND})
    assert found.rises["old"].value == pytest.approx(0.04) and found.losses["new"].value == pytest.approx(2.0)
    (ahead,) = forecast([trial("short", RUN_STEPS / 20, 0.04, 2.0)], RUN_STEPS, {"old": BOUND})
    width = {
        each: item.rises["old"].high - item.rises["old"].low for each, item in (("whole", found), ("short", ahead))
    }
    assert width["short"] > width["whole"]
    assert ahead.losses["new"].value < 2.0


def test_the_rise_grows_as_the_pilots_show() -> None:
    """Pilots that show no growth are extrapolated with less of it than pilots that show much."""
    shown = {
        name: forecast([trial("a", 25, early, 2.0), trial("a", 50, 0.05, 1.9)], RUN_STEPS, {"old": BOUND})[0].rises[
            "old"
        ]
        for name, early in (("still", 0.05), ("growing", 0.02))
    }
    assert shown["still"].value < shown["growing"].value


def test_the_pilots_cost_at_most_the_budget_and_are_long_enough() -> None:
    run_tokens = [1e6, 1.33e6, 1.05e6, 2e6]
    rounds = plan_rounds(run_tokens, 4e5, RUN_STEPS)
    assert rounds.max_tokens <= 4e5 + 1
    assert rounds.fractions[0] * RUN_STEPS >= MIN_STEPS
    assert [b / a for a, b in zip(rounds.fractions, rounds.fractions[1:], strict=False)] == pytest.approx([2, 2])
    assert rounds.counts[0] >= rounds.counts[1] >= rounds.counts[2]
    assert plan_rounds(run_tokens, 3e5, RUN_STEPS).counts[0] <= rounds.counts[0]
    with pytest.raises(StageError, match="too short"):
        plan_rounds(run_tokens, 1e4, RUN_STEPS)


@pytest.mark.parametrize("mutant", [None, "best-only"])
def test_what_forgets_least_is_tried_at_length_before_a_bound_is_called_impossible(
    mutant: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = forecasts({"a": (0.05, 1.0), "b": (0.06, 1.1), "safest": (0.01, 3.0)})
    names = [item.name for item in rank(found, 0.5)][:2] if mutant else promote(found, 2)
    assert ("safest" in names) == (mutant is None)
    assert promote(found, 1) == ["a"]


def test_a_share_between_two_lies_where_the_bound_is_met() -> None:
    share = refine_share((0.05, 0.25), (0.4, -0.4))
    assert share is not None and 0.05 < share < 0.25
    middle = 1 / (1 + math.exp(-(math.log(0.05 / 0.95) + math.log(0.25 / 0.75)) / 2))
    assert share == pytest.approx(middle, abs=0.001)
    assert refine_share((0.05, 0.25), (-0.1, -0.4)) is None  # the smaller one suffices
    assert refine_share((0.05, 0.25), (0.4, 0.1)) is None  # neither does
    assert lever_choice.refine_share((0.24, 0.25), (0.1, -0.1)) is None


@pytest.mark.parametrize("mutant", [None, "falls-count-as-none"])
def test_a_loss_that_falls_is_expected_to_fall(mutant: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """By what the pilot measured, with an interval in proportion, however small the bound; and without a jump at no change."""
    if mutant:
        right = lever_choice._forecast_rise
        monkeypatch.setattr(lever_choice, "_forecast_rise", lambda rise, *rest: right(max(rise, 0.0), *rest))
    (found,) = forecast([trial("whole", RUN_STEPS, -0.04, 2.0)], RUN_STEPS, {"old": 1e-5})
    rise = found.rises["old"]
    assert (rise.value == pytest.approx(-0.04) and rise.high - rise.low > 0.004) == (mutant is None)
    trials = (trial("a", 50, rise, 2.0) for rise in (-1e-9, 1e-9))
    near = [forecast([each], RUN_STEPS, {"old": BOUND})[0].rises["old"].value for each in trials]
    assert near[0] == pytest.approx(near[1], abs=1e-7)

"""Published laws: their own numbers, known parameters found again, and points that are too few.

The numbers are the papers': CMR (arXiv 2407.17467, tables 2 and 5), D-CPT (arXiv 2406.01375, table 5). The rest is worked
out by hand or drawn from known parameters.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from postgrad.analysis import scaling_laws
from postgrad.analysis.law_fitting import Fit, Law, Parameter, fit_law
from postgrad.analysis.loss_curve_law import CPT_LAW, SHIFT_LAW, annealing_area, forward_area
from postgrad.errors import DataError

CMR = {  # a, s, b, and the published share in % at 20B tokens
    "460M": (0.22524761, 0.26944345, -0.48139982, 29.8),
    "940M": (0.7520627, 0.13720245, -1.06581937, 34.9),
    "1.6B": (-2.36384831, -0.15125569, 1.59223649, 41.4),
    "3.1B": (-2.5368197, -0.42071423, 0.84375368, 47.8),
}
SHARES = np.array([0.90, 0.91, 0.92, 0.924, 0.93, 0.94, 1.0])
"""Of chemistry, with D-CPT's losses on general text and on chemistry at 1.8B weights and 10B tokens."""
GENERAL = [2.9052, 2.9193, 2.9376, 2.9445, 2.9644, 2.9848, 3.4667]


@pytest.fixture(scope="module")
def general() -> Fit:
    return fit_law(scaling_laws.DCPT_RATIO, {"ratio": 1 - SHARES}, GENERAL, draws=20)


@pytest.mark.parametrize("size", CMR)
def test_critical_ratios_are_the_published_ones(size: str) -> None:
    a, s, b, published = CMR[size]
    found = scaling_laws.CRITICAL_RATIO_LAW(
        {"tokens": np.array([20e9 / scaling_laws.CMR_UNIT])}, {"a": a, "s": s, "b": b}
    )
    assert round(100 * float(found[0]), 1) == published
    # From ratios at smaller budgets, the published one is found again.
    tokens = np.array([30.0, 40.0, 50.0, 65.0, 80.0])
    ratios = scaling_laws.CRITICAL_RATIO_LAW({"tokens": tokens}, {"a": a, "s": s, "b": b})
    again = fit_law(scaling_laws.CRITICAL_RATIO_LAW, {"tokens": tokens}, ratios, draws=2)
    assert round(100 * again.predict(tokens=100.0).value, 1) == pytest.approx(published, abs=0.11)


def test_a_held_out_mixture_is_within_a_twentieth_of_a_percent() -> None:
    fitted = fit_law(scaling_laws.MIXTURE_LAW, {"ratio": [1, 0.75, 0.5, 1 / 3]}, [1.4628, 1.4844, 1.5122, 1.5387])
    found = fitted.predict(ratio=0.25)
    assert found.value == pytest.approx(1.5561, rel=5e-4)
    assert found.low < 1.5561 < found.high and found.high - found.low < 0.05
    # A straight line through the same points misses it by far more.
    line = np.polyval(np.polyfit([1, 0.75, 0.5, 1 / 3], [1.4628, 1.4844, 1.5122, 1.5387], 1), 0.25)
    assert abs(line / 1.5561 - 1) > 5e-4


def test_the_best_mixture_is_the_published_one(general: Fit) -> None:
    limit = 1.03 * 2.8602
    assert limit == pytest.approx(2.9460, abs=1e-4)
    found = scaling_laws.best_mixture(general, limit)
    assert round(found.value, 3) == 0.924
    assert found.low < 0.924 < found.high
    assert scaling_laws.best_mixture(general, 3.0).value > found.value > scaling_laws.best_mixture(general, 2.92).value
    assert scaling_laws.best_mixture(general, 9.0).value == 1.0
    # Without its term for old text that is gone, the law does not find it.
    without = replace(scaling_laws.DCPT_RATIO, formula=lambda ratio, E, B, eta, C, eps, g: E + B * ratio**eta)
    mistaken = fit_law(without, {"ratio": 1 - SHARES}, GENERAL, draws=0)
    assert mistaken.spread > 10 * general.spread
    with pytest.raises(DataError, match="no share keeps the loss within 1"):
        scaling_laws.best_mixture(general, 1.0)


def test_the_critical_ratio_of_a_fit_is_where_it_meets_the_bound() -> None:
    values = {"a": 0.4, "s": 1.5, "b": 2.0}
    ratio = np.linspace(0.05, 1, 8)
    fitted = fit_law(
        scaling_laws.MIXTURE_LAW, {"ratio": ratio}, scaling_laws.MIXTURE_LAW({"ratio": ratio}, values), draws=2
    )
    assert scaling_laws.critical_ratio(fitted, 2.05).value == pytest.approx((0.05 / 0.4) ** (1 / 1.5), abs=1e-4)


def test_a_draw_that_allows_nothing_widens_the_interval() -> None:
    """Losses 0.4 R + b: at most 2.2 where R <= (2.2 - b) / 0.4; for a b above 2.2 there is no such share."""
    draws_SP = np.array([[0.4, 1.0, b] for b in np.linspace(1.9, 2.5, 61)])
    fitted = Fit(scaling_laws.MIXTURE_LAW, np.array([0.4, 1.0, 2.0]), draws_SP, 0.01, 8)
    found = scaling_laws.critical_ratio(fitted, 2.2)
    assert found.value == pytest.approx(0.5, abs=1e-4)
    assert found.low == 0.0 < found.high  # without those draws it would be .02, as if half of them had not been drawn
    law = Fit(
        scaling_laws.BETHUNE,
        np.array([2.0, 1.0, 1.0, 10.0, 1.0]),
        np.array([[2.0, a, 1.0, 10.0, 1.0] for a in (1, 20)]),
        0,
        9,
    )
    # (1 + 10 p) 1 = A D / 0.5: p = .1 at A = 1, D = 1, and 3.9 at A = 20, which is more than all.
    found = scaling_laws.injected_share(law, new_tokens=1.0, size=1.0, rise=0.5)
    assert (found.value, found.low) == (pytest.approx(0.1), pytest.approx(0.1)) and 0.9 < found.high <= 1.0
    with pytest.raises(DataError, match=r"no share of old text keeps the rise of its loss within 0\.01"):
        scaling_laws.injected_share(law, new_tokens=1.0, size=1.0, rise=0.01)


def test_areas_of_a_schedule() -> None:
    rates = np.array([4.0, 3.0, 3.0, 1.0])
    assert forward_area(rates).tolist() == [4, 7, 10, 11]
    # Falls 0, 1, 0, 2; held with momentum 1/2: 0, 1, .5, 2.25; summed.
    assert annealing_area(rates, 0.5).tolist() == [0, 1, 1.5, 3.75]
    assert annealing_area(rates, 1.0).tolist() == [0, 1, 2, 5]
    assert annealing_area(rates, 0.5, before=2.0)[0] == -2
    # The double sum, written out.
    rng = np.random.default_rng(0)
    rates = rng.uniform(0, 1, 12)
    falls = np.concatenate([[0.0], rates[:-1] - rates[1:]])
    written = [sum(falls[k] * 0.999 ** (i - k) for i in range(t + 1) for k in range(i + 1)) for t in range(12)]
    assert annealing_area(rates) == pytest.approx(written)
    assert annealing_area(rates, 1.0) != pytest.approx(written, rel=1e-4)


def test_formulas_are_those_of_the_papers() -> None:
    """Each law at one point, worked out by hand from the formula of its paper."""

    def at(law: Law, point: dict[str, float], values: dict[str, float]) -> float:
        return float(law({name: np.array([value]) for name, value in point.items()}, values)[0])

    # 1.5 + .6 (3 + 1)^-.5 - .2 * .5 - .3 * 2 + .4 (1 - (1 + 8 * 1)^-.5)
    values = {"L0": 1.5, "A": 0.6, "a": 0.5, "C1": 0.2, "C2": 0.3, "B": 0.4, "E": 8.0, "b": 0.5}
    point = {"forward": 1.0, "annealing": 2.0, "forward_before": 3.0, "annealing_before": 0.5}
    assert at(CPT_LAW, point, values) == pytest.approx(1.5 + 0.3 - 0.1 - 0.6 + 0.4 * (1 - 1 / 3))
    # 2 - .3 * 2 + .4 (1 - (1 + 8 * 1)^-.5)
    values = {"C": 0.3, "B": 0.4, "E": 8.0, "b": 0.5}
    assert at(SHIFT_LAW, {"forward": 1.0, "annealing": 2.0, "base": 2.0}, values) == pytest.approx(1.4 + 0.4 * 2 / 3)
    # 1 + .5 / 4^.5 + .9 * .25^.5 / 9^.5 + .06 / (.25 + .11)^.5
    values = {"E": 1.0, "A": 0.5, "a": 0.5, "B": 0.9, "eta": 0.5, "b": 0.5, "C": 0.06, "eps": 0.11, "g": 0.5}
    assert at(scaling_laws.DCPT, {"size": 4.0, "tokens": 9.0, "ratio": 0.25}, values) == pytest.approx(
        1 + 0.25 + 0.15 + 0.1
    )
    values = {key: value for key, value in values.items() if key not in ("A", "a", "b")}
    assert at(scaling_laws.DCPT_RATIO, {"ratio": 0.25}, values) == pytest.approx(1 + 0.45 + 0.1)
    # 2 + 3 * 16^.5 / ((1 + 100 * .03) * 9)^.5
    values = {"L0": 2.0, "A": 3.0, "b": 0.5, "B": 100.0, "a": 0.5}
    assert at(scaling_laws.BETHUNE, {"new_tokens": 16.0, "size": 9.0, "share": 0.03}, values) == pytest.approx(
        2 + 12 / 6
    )


def test_few_points_to_spare_make_wide_intervals() -> None:
    """A law of one parameter, four points: the residuals' spread by three to spare, and Student's t of a prediction."""
    law = Law("flat", (Parameter("b", (1.0,)),), ("x",), lambda x, b: b + 0 * x, "a mean")
    log_N = np.array([-0.0009, -0.0003, 0.0003, 0.0009])  # within what Huber's loss squares
    fitted = fit_law(law, {"x": np.arange(4.0)}, np.exp(log_N), draws=1500)
    spread = float(np.std(log_N, ddof=1))
    assert fitted.spread == pytest.approx(spread, rel=1e-3)
    parameter, found = fitted.parameter("b"), fitted.predict(x=5.0)
    t = 3.182  # of three degrees of freedom, 97.5 %
    assert (parameter.high - parameter.low) / 2 == pytest.approx(t * spread / 2, rel=0.15)
    # What would be measured has that noise, and that of the mean: wider than the mean alone, and than without Student's tail.
    assert (found.high - found.low) / 2 > 1.25 * (parameter.high - parameter.low) / 2
    assert (parameter.high - parameter.low) / 2 > 1.3 * 1.96 * spread / 2


def drawn(law: Law, inputs: dict[str, np.ndarray], values: dict[str, float], seed: int, noise: float) -> np.ndarray:
    return law(inputs, values) * np.exp(np.random.default_rng(seed).normal(0, noise, len(next(iter(inputs.values())))))


CASES = {
    "mixture": (
        scaling_laws.MIXTURE_LAW,
        {"ratio": np.linspace(0.1, 1, 10)},
        {"a": -0.5, "s": 0.3, "b": 2.0},
        {"ratio": 0.05},
    ),
    "shift": (
        SHIFT_LAW,
        {
            "forward": np.tile(np.linspace(0.02, 0.5, 8), 2),
            "annealing": np.concatenate([np.zeros(8), np.linspace(0.0, 0.2, 8)]),
            "base": np.full(16, 2.0),
        },
        {"C": 0.5, "B": 0.6, "E": 20.0, "b": 0.5},
        {"forward": 0.8, "annealing": 0.1, "base": 2.0},
    ),
    "bethune": (
        scaling_laws.BETHUNE,
        {
            "new_tokens": np.tile([1.0, 3.0, 10.0, 30.0], 4),
            "size": np.repeat([41.0, 41.0, 334.0, 334.0], 4),
            "share": np.repeat([0.0, 0.01, 0.0, 0.05], 4),
        },
        {"L0": 2.5, "A": 5.0, "b": 0.35, "B": 830.0, "a": 0.6},
        {"new_tokens": 60.0, "size": 334.0, "share": 0.005},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_known_parameters_are_within_the_interval(case: str) -> None:
    law, inputs, values, unseen = CASES[case]
    truth = float(law({k: np.array([v]) for k, v in unseen.items()}, values)[0])
    covered, wrong = [], []
    for seed in range(6):
        fitted = fit_law(law, inputs, drawn(law, inputs, values, seed, 0.002), seed=seed, draws=30)
        covered += [
            fitted.parameter(name).low <= value <= fitted.parameter(name).high for name, value in values.items()
        ]
        found = fitted.predict(**unseen)
        covered.append(found.low <= truth <= found.high)
        assert found.value == pytest.approx(truth, rel=0.05)
        wrong.append(found.low <= truth * 1.2 <= found.high)
    assert np.mean(covered) > 0.8
    assert np.mean(wrong) < 0.2  # an interval that holds everything would say nothing


def test_without_noise_the_parameters_themselves_are_found() -> None:
    values = {"L0": 1.5, "A": 0.6, "a": 0.4, "C1": 0.2, "C2": 0.3, "B": 0.5, "E": 8.0, "b": 0.4}
    rng = np.random.default_rng(0)
    inputs = {name: rng.uniform(0.01, 3, 40) for name in CPT_LAW.inputs}
    fitted = fit_law(CPT_LAW, inputs, CPT_LAW(inputs, values), draws=0)
    assert fitted.spread < 1e-3
    new = {name: rng.uniform(0.01, 3, 10) for name in CPT_LAW.inputs}
    assert CPT_LAW(new, fitted.values) == pytest.approx(CPT_LAW(new, values), rel=2e-3)
    dcpt = {"E": 1.2, "A": 0.5, "a": 0.3, "B": 0.4, "eta": 0.8, "b": 0.3, "C": 0.05, "eps": 0.05, "g": 0.6}
    inputs = {
        "size": rng.choice([0.5, 1.8, 4.0], 40),
        "tokens": rng.uniform(0.5, 26, 40),
        "ratio": rng.uniform(0, 1, 40),
    }
    fitted = fit_law(scaling_laws.DCPT, inputs, scaling_laws.DCPT(inputs, dcpt), draws=0)
    assert scaling_laws.DCPT(inputs, fitted.values) == pytest.approx(scaling_laws.DCPT(inputs, dcpt), rel=5e-3)


def test_the_injected_share_is_the_formula_solved() -> None:
    law, inputs, values, _ = CASES["bethune"]
    fitted = fit_law(law, inputs, law(inputs, values), draws=5)
    share = scaling_laws.injected_share(fitted, new_tokens=10.0, size=41.0, rise=0.1).value
    back = law({"new_tokens": np.array([10.0]), "size": np.array([41.0]), "share": np.array([share])}, values)
    assert back[0] - values["L0"] == pytest.approx(0.1, rel=0.05)
    assert scaling_laws.injected_share(fitted, new_tokens=1e-6, size=41.0, rise=10.0).value == 0.0
    with pytest.raises(DataError, match="a rise of -1 nats"):
        scaling_laws.injected_share(fitted, new_tokens=10.0, size=41.0, rise=-1.0)
    # One per cent of old text takes away most of the forgetting, as the paper says (B of Wikipedia: 830).
    old = {"new_tokens": np.array([10.0]), "size": np.array([41.0])}
    rises = [law({**old, "share": np.array([p])}, values)[0] - values["L0"] for p in (0.0, 0.01)]
    assert rises[1] / rises[0] == pytest.approx(9.3**-0.6)


def test_an_outlier_moves_the_fit_less_than_it_would_by_squares() -> None:
    ratio = np.linspace(0.1, 1, 12)
    losses = scaling_laws.MIXTURE_LAW({"ratio": ratio}, {"a": -0.5, "s": 0.3, "b": 2.0})
    losses[5] *= 1.2
    fitted = fit_law(scaling_laws.MIXTURE_LAW, {"ratio": ratio}, losses, draws=0)
    others = np.arange(12) != 5
    assert scaling_laws.MIXTURE_LAW({"ratio": ratio}, fitted.values)[others] == pytest.approx(losses[others], rel=2e-3)
    squares = np.polyval(np.polyfit(np.log(ratio), losses, 3), np.log(ratio))
    assert squares[others] != pytest.approx(losses[others], rel=2e-3)


@pytest.mark.parametrize(
    ("ratio", "losses", "said"),
    [
        ([0.1, 0.5, 1.0], [2.0, 1.9, 1.8], "3 different points are too few to fit 3 parameters"),
        ([0.1, 0.5, 0.5, 0.5], [2.0, 1.9, 1.9, 1.9], "2 different points are too few"),
        ([0.1, 0.5, 0.7, 1.0], [2.0, 1.9, float("nan"), 1.8], "point 3: a point has loss nan"),
        ([0.1, 0.5, 0.7, 1.0], [2.0, 1.9, 0.0, 1.8], "point 3: a point has loss 0"),
        ([0.1, -0.5, 0.7, 1.0], [2.0, 1.9, 1.8, 1.8], "point 2: a point has ratio -0.5"),
    ],
)
def test_points_that_cannot_be_fitted_are_refused(ratio: list[float], losses: list[float], said: str) -> None:
    with pytest.raises(DataError, match=said) as error:
        fit_law(scaling_laws.MIXTURE_LAW, {"ratio": ratio}, losses)
    assert "4 or more different points" in str(error.value) or "finite numbers" in str(error.value)


@pytest.mark.parametrize("inputs", [{"ratio": [0.1, 0.5, 0.7]}, {}, {"share": [0.1, 0.5, 0.7, 1.0]}])
def test_points_and_losses_that_do_not_belong_together_are_refused(inputs: dict[str, list[float]]) -> None:
    with pytest.raises(DataError, match=r"[03] values of ratio") as error:
        fit_law(scaling_laws.MIXTURE_LAW, inputs, [2.0, 1.9, 1.8, 1.7])  # type: ignore[arg-type]
    assert "a number for each of 4 losses" in str(error.value)

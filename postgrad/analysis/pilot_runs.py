"""Pilot runs: laws of forgetting and learning by replay share and peak rate, fitted to a few short runs.

Legend: N pilots, K coefficients.

A pilot is the whole stage in small, its schedule shortened with it. With r the share of replay, n the steps and N those of the
longest pilot, the rise F of the loss on old text and the loss L on new text follow laws that are straight in the logarithms:

    ln F = c + q ln(n / 200) + a f(n) ln((1 - r) / r) + p ln(peak)       q: one below 200 steps, another one above
    ln L = d - u ln(n / N)   + g ln(1 - r)            + h ln(peak)       u: one up to N, another one beyond

So F is a power of the odds of new text to replay, whose effect grows over the first 200 steps (f). L falls by a power of the
steps, and the power among the pilots predicts that of the run. Few pilots cannot determine all coefficients, so each has a
prior from real runs (`RISE_PRIORS`, `LOSS_PRIORS`): Bayesian linear regression, with the noise estimated too. A coefficient
that the pilots do not vary keeps its prior's spread, and predictions have that uncertainty.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

from postgrad.analysis.law_fitting import Estimate
from postgrad.errors import DataError, StageError

MIN_PILOTS, MAX_PILOTS = 4, 12
"""Bounds of the number of pilots."""
MAX_COST = 0.095
"""The largest share of the run's tokens that all pilots take."""
_CONFIRMING_SHARE = 0.5
"""The share of the pilots' tokens for the last one, which confirms the proposed setting."""
_MIN_STEPS = 6
"""The fewest steps of a pilot."""
MIN_SHARE, MAX_SHARE = 0.01, 0.75
"""Bounds of the proposed replay share. Even a little guards against surprises."""
MIN_PEAK = 0.25
"""The lowest proposed peak as a share of the stage's own, which is the highest."""
CONFIDENCE = 0.9
"""The probability that the whole run stays within the bound."""
_UPPER_QUANTILE = 0.975
"""The upper end of a 95 % interval."""
_DESIGN = (
    (0.40, 1.0, 1.0), (0.03, 1.0, 1.0), (0.10, 0.4, 2.0), (0.15, 1.0, 1.0), (0.35, 0.4, 2.0), (0.05, 0.65, 1.5),
    (0.25, 0.65, 1.5), (0.01, 1.0, 1.0), (0.03, 0.4, 2.0), (0.60, 1.0, 1.0), (0.08, 1.0, 1.0),
)  # fmt: skip
"""Exploratory pilots in order: replay share, part of the stage's peak, relative length (longer at a low peak)."""


class Setting(NamedTuple):
    """The replay share and the peak rate of a run."""

    share: float
    peak: float


@dataclass(frozen=True)
class Pilot:
    """A short run with a setting."""

    setting: Setting
    tokens: int


@dataclass(frozen=True)
class PilotResult:
    """The result of a pilot in nats per token: the rise of the loss on retained sets, and the loss on learned ones."""

    pilot: Pilot
    rises: Mapping[str, float]
    losses: Mapping[str, float]
    exploratory: bool
    """One of the short ones."""


class Prior(NamedTuple):
    """The prior of a coefficient: mean and standard deviation."""

    mean: float
    spread: float


_FLAT_PRIOR = Prior(0.0, 30.0)
"""Of a constant: uninformative."""
RISE_PRIORS = (
    _FLAT_PRIOR, Prior(-0.08, 0.08), Prior(0.06, 0.04), Prior(0.42, 0.10), Prior(0.35, 0.17),
    Prior(0.0, 0.15), Prior(0.20, 0.20),
)  # fmt: skip
"""The constant, steps below and above `_FELT`, share, peak; and what is added to constant and peak of a pilot that explores.

These and those of `LOSS` were set on 18 runs: a model of 260 thousand weights that was trained to the end, on five kinds of
text, and one of a million that was not, on three; from pilots of 7 to 190 steps to runs of 780 to 3,900
(benchmarks/results/advice_beginnings.json).
"""
LOSS_PRIORS = (
    _FLAT_PRIOR, Prior(0.09, 0.10), Prior(0.04, 0.04), Prior(-0.30, 0.06), Prior(-0.10, 0.04),
    Prior(-0.05, 0.05),
)  # fmt: skip
"""The constant, the power so far, what the power to come has besides `_LASTS` of it (`slowing` is added), share, peak; and what
is added to the peak's of a pilot that explores."""
_FULL_EFFECT_STEPS, _EFFECT_SLOPE = 200, 0.20
"""Steps from which on all of the replay is felt, and the part that is missing for each natural logarithm before."""
REMAINING_POWER = 0.6
"""Of the power by which the loss on new text fell among the pilots, what is left of it beyond them."""
_NOISE, _NOISE_WEIGHT = {"rise": 0.08, "loss": 0.01}, 4.0
"""The spread of a pilot around the laws, and as how many pilots this counts against what the pilots show."""


def replay_effect(steps: float) -> float:
    """The part of the replay's effect after so many steps (measured: .4 in 7, .7 in 40, 1 in 200)."""
    return min(1.0, max(0.3, 1.0 - _EFFECT_SLOPE * math.log(_FULL_EFFECT_STEPS / steps)))


def power_slowdown(steps: float) -> float:
    """What is added to the power to come when the longest pilot has so many steps: the longer, the slower the fall."""
    return -0.02 * math.log(steps / 40)


def make_exploratory_pilots(count: int, peak: float, tokens: int, step: float) -> list[Pilot]:
    """The exploratory pilots of a run of `tokens` tokens, `step` of them in a step; a confirming one follows.

    Raises `StageError` when the run is too short.
    """
    if not MIN_PILOTS <= count <= MAX_PILOTS:
        raise StageError(f"{count} pilots", where="--pilots", expected=f"{MIN_PILOTS} to {MAX_PILOTS}")
    unit = _shortest_pilot_tokens(tokens, count)
    if unit < _MIN_STEPS * step:
        able = [n for n in range(MIN_PILOTS, count) if _shortest_pilot_tokens(tokens, n) >= _MIN_STEPS * step]
        shortest = tokens * _MIN_STEPS * step / _shortest_pilot_tokens(tokens, MIN_PILOTS)
        raise StageError(
            f"a run of {tokens:,} tokens has {tokens / step:,.0f} steps; of {count} pilots, which may take {MAX_COST:.1%} of "
            f"that, the shortest would have {unit / step:.1f}",
            where="--pilots",
            expected=f"pilots of {_MIN_STEPS} steps or more",
            hint=f"--pilots {able[-1]}"
            if able
            else f"a budget of {shortest:,.0f} tokens or more, or fewer sequences in a batch",
        )
    return [Pilot(Setting(share, part * peak), int(unit * length)) for share, part, length in _DESIGN[: count - 1]]


def _shortest_pilot_tokens(tokens: int, count: int) -> float:
    """Tokens of the shortest of so many pilots."""
    return (1 - _CONFIRMING_SHARE) * MAX_COST * tokens / sum(length for _, _, length in _DESIGN[: count - 1])


def make_confirming_pilot(setting: Setting, tokens: int) -> Pilot:
    """The last and longest pilot, with the setting that the others propose."""
    return Pilot(setting, int(_CONFIRMING_SHARE * MAX_COST * tokens))


# --- the laws -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LogLinear:
    """The posterior of the coefficients of a law that is linear in the logarithms."""

    mean_K: np.ndarray
    covariance_KK: np.ndarray
    noise: float

    def predict(self, row_K: np.ndarray) -> tuple[float, float]:
        """The mean and the standard deviation of one run's logarithm."""
        spread = float(row_K @ self.covariance_KK @ row_K) + self.noise**2
        return float(row_K @ self.mean_K), math.sqrt(spread)


def fit_log_linear(rows_NK: np.ndarray, logs_N: np.ndarray, priors: Sequence[Prior], noise: float) -> LogLinear:
    """Bayesian linear regression; the noise is estimated from its prior and the residuals."""
    mean_K = np.array([item.mean for item in priors])
    precision_KK = np.diag([item.spread**-2.0 for item in priors])
    sigma = noise
    for _ in range(50):
        covariance_KK = np.linalg.inv(precision_KK + rows_NK.T @ rows_NK / sigma**2)
        posterior_K = covariance_KK @ (precision_KK @ mean_K + rows_NK.T @ logs_N / sigma**2)
        residual_N = logs_N - rows_NK @ posterior_K
        sigma = math.sqrt((_NOISE_WEIGHT * noise**2 + float(residual_N @ residual_N)) / (_NOISE_WEIGHT + len(logs_N)))
    return LogLinear(posterior_K, covariance_KK, sigma)


@dataclass(frozen=True)
class Laws:
    """Predictions for the whole run: a law of the rise for each retained set, and of the loss for each learned one."""

    tokens: Callable[[Setting], float]
    """Of the whole run, replay included."""
    peak: float
    """The stage's own."""
    step: float
    """Tokens in a step."""
    longest: float
    """Steps of the longest pilot."""
    rises: Mapping[str, LogLinear]
    losses: Mapping[str, LogLinear]

    def rise(
        self, name: str, setting: Setting, *, tokens: float | None = None, confidence: float = _UPPER_QUANTILE
    ) -> Estimate:
        """The rise of a set's loss in nats per token after the whole run, or after `tokens`, with its 95 % interval.

        The interval's upper end is the quantile `confidence`.
        """
        steps = (tokens or self.tokens(setting)) / self.step
        return _make_estimate(self.rises[name], _rise_row(setting, steps, self.peak, explored=False), confidence)

    def loss(self, name: str, setting: Setting) -> Estimate:
        """A set's loss in nats per token after the whole run, with its 95 % interval."""
        steps = self.tokens(setting) / self.step
        row_K = _loss_row(setting, steps, self.peak, longest=self.longest, explored=False)
        return _make_estimate(self.losses[name], row_K, _UPPER_QUANTILE)


def _make_estimate(law: LogLinear, row_K: np.ndarray, confidence: float) -> Estimate:
    log, spread = law.predict(row_K)
    above = NormalDist().inv_cdf(confidence)
    return Estimate(math.exp(log), math.exp(log - 1.96 * spread), math.exp(log + above * spread))


def _rise_row(setting: Setting, steps: float, peak: float, *, explored: bool) -> np.ndarray:
    length, high = math.log(steps / _FULL_EFFECT_STEPS), math.log(setting.peak / peak)
    pull = replay_effect(steps) * math.log((1 - setting.share) / setting.share)
    return np.array([1.0, min(0.0, length), max(0.0, length), pull, high, float(explored), explored * high])


def _loss_row(setting: Setting, steps: float, peak: float, *, longest: float, explored: bool) -> np.ndarray:
    length, high = math.log(steps / longest), math.log(setting.peak / peak)
    so_far, to_come = (-length, 0.0) if length <= 0 else (-REMAINING_POWER * length, -length)
    return np.array([1.0, so_far, to_come, math.log(1 - setting.share), high, explored * high])


def fit_pilots(
    results: Sequence[PilotResult], tokens: Callable[[Setting], float], peak: float, floor: float, step: float
) -> Laws:
    """Fit the laws to pilots of a run of so many `tokens`, `step` of them in a step, whose stage's own peak is `peak`.

    A rise of less than `floor` nats per token cannot be told from none and counts as so much. Raises `DataError` for fewer
    pilots than can be fitted.
    """
    if len(results) < MIN_PILOTS - 1:
        raise DataError(
            f"{len(results)} pilots are too few to fit",
            where="advise",
            expected=f"at least {MIN_PILOTS - 1}, and one more that tries what they propose",
        )
    longest = max(item.pilot.tokens for item in results) / step

    def law(row: Callable[..., np.ndarray], values: list[float], begin: Sequence[Prior], kind: str) -> LogLinear:
        rows_NK = np.array([row(i.pilot.setting, i.pilot.tokens / step, peak, explored=i.exploratory) for i in results])
        return fit_log_linear(rows_NK, np.log(values), begin, _NOISE[kind])

    def rise(name: str) -> LogLinear:
        return law(_rise_row, [max(item.rises[name], floor) for item in results], RISE_PRIORS, "rise")

    def loss(name: str) -> LogLinear:
        constant, so_far, to_come, *others = LOSS_PRIORS
        begin = [constant, so_far, Prior(to_come.mean + power_slowdown(longest), to_come.spread), *others]
        return law(partial(_loss_row, longest=longest), [item.losses[name] for item in results], begin, "loss")

    rises, losses = {name: rise(name) for name in results[0].rises}, {name: loss(name) for name in results[0].losses}
    return Laws(tokens, peak, step, longest, rises, losses)


# --- the choice -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SettingChoice:
    """A setting, and whether it meets every bound with the required confidence; if not, it comes closest."""

    setting: Setting
    is_within_bounds: bool


def choose_setting(
    laws: Laws, bounds: Mapping[str, float], *, confidence: float = CONFIDENCE, max_share: float = MAX_SHARE
) -> SettingChoice:
    """The setting with the lowest predicted loss on learned sets among those that meet the bounds.

    `bounds`: the largest rise of each retained set's loss, in nats per token. `max_share`: the largest share with enough text.
    """

    def excess(setting: Setting) -> float:
        """The log ratio of the worst set's upper rise to its bound."""
        return max(
            math.log(laws.rise(name, setting, confidence=confidence).high / bound) for name, bound in bounds.items()
        )

    able = []
    for peak in laws.peak * np.geomspace(MIN_PEAK, 1.0, 17):
        low, high = (Setting(share, float(peak)) for share in (min(MIN_SHARE, max_share), max_share))
        if excess(high) > 0:
            continue
        able.append(low if excess(low) <= 0 else _smallest_share(excess, low, high))
    if not able:
        return SettingChoice(Setting(max_share, MIN_PEAK * laws.peak), False)
    return SettingChoice(
        min(able, key=lambda setting: sum(laws.loss(name, setting).value for name in laws.losses)), True
    )


def _smallest_share(excess: Callable[[Setting], float], low: Setting, high: Setting) -> Setting:
    """The smallest share that meets the bounds, to a thousandth, by bisection; `low` does not, `high` does."""
    below, above = low.share, high.share
    while above - below > 1e-4:
        middle = (below + above) / 2
        below, above = (below, middle) if excess(Setting(middle, low.peak)) <= 0 else (middle, above)
    return Setting(min(math.ceil(above * 1000) / 1000, high.share), low.peak)

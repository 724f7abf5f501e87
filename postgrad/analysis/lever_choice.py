"""The choice between combinations of methods: how long each is tried, what the whole run is expected to be, which is taken.

All combinations are tried in short pilots, half of them in pilots of twice the length, and the best three in pilots of four
times the length (successive halving, Jamieson & Talwalkar 2016). Lengths are fractions of the run, of as many new tokens with
much replay as with little. The last pilots are extrapolated: with n the steps of new text of a pilot and N those of the run,

    ln(F(N) + s) = ln(F(n) + s) + q ln(N / n)          F: rise of the loss on old text; s: half of the bound
    ln L(N)      = ln L(n)      - u ln(N / n)          L: loss on new text

The powers q and u are common to all combinations, so what differs at equal length differs at the end: the one that both
forgets less and learns more in the last pilots is preferred. Pilots of several lengths show the powers; u follows the law of
`pilot_runs` for the power to come.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

from postgrad.analysis.law_fitting import Estimate
from postgrad.analysis.pilot_runs import CONFIDENCE, LOSS_PRIORS, REMAINING_POWER, Prior, power_slowdown
from postgrad.errors import StageError

LENGTHS = (1, 2, 4)
"""Lengths of the pilots of each round, in those of the first."""
FINALISTS = 3
"""Combinations that reach the last round."""
MIN_STEPS = 10
"""The fewest steps of new text of a pilot."""
MIN_COMBINATIONS = 2
_GROWTH = Prior(0.10, 0.15)
"""The power by which the rise grows with the length of a run, before any pilot."""
_GROWTH_SPREAD = 0.08
"""Standard deviation of a combination's power around the common one."""
_RISE_NOISE, _LOSS_NOISE = 0.08, 0.01
"""Standard deviation of the logarithm of a single run."""
_INTERVAL = NormalDist().inv_cdf(0.975)


# --- rounds -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PilotRounds:
    """How many combinations are tried in each round, and in which fraction of the run."""

    counts: tuple[int, ...]
    fractions: tuple[float, ...]
    max_tokens: int
    """Trained tokens of all pilots, replay included, at most."""


def plan_rounds(run_tokens: Sequence[float], budget: float, run_steps: float) -> PilotRounds:
    """The rounds of as many of the combinations, in their order, as the budget allows.

    `run_tokens`: trained tokens of the whole run with each combination, replay included. `budget`: those of all pilots.
    `run_steps`: steps of new text of the whole run. Raises `StageError` when two pilots of `MIN_STEPS` steps cost more.
    """
    for count in range(len(run_tokens), MIN_COMBINATIONS - 1, -1):
        first = budget / sum(_round_tokens(run_tokens[:count], LENGTHS))
        if first * run_steps >= MIN_STEPS:
            fractions = [min(first * length, 1.0) for length in LENGTHS]
            tokens = math.ceil(sum(_round_tokens(run_tokens[:count], fractions)))
            return PilotRounds(_count_rounds(count), tuple(fractions), tokens)
    fewest = run_tokens[:MIN_COMBINATIONS]
    needed = sum(_round_tokens(fewest, LENGTHS)) * MIN_STEPS / run_steps / (sum(fewest) / len(fewest))
    raise StageError(
        f"a run with {run_steps:,.0f} steps of new text is too short: pilots of {len(fewest)} combinations, the shortest with "
        f"{MIN_STEPS} steps, cost {needed:.0%} of it",
        where="--cost",
        expected=f"{math.ceil(100 * needed)}% or more",
        hint="raise --cost, or give the stage more tokens or smaller batches",
    )


def _count_rounds(count: int) -> tuple[int, ...]:
    half = max(MIN_COMBINATIONS, math.ceil(count / 2))
    return count, half, min(FINALISTS, half)


def _round_tokens(run_tokens: Sequence[float], fractions: Sequence[float]) -> list[float]:
    """Trained tokens of each round at most: as if those with the longest runs went on."""
    longest = sorted(run_tokens, reverse=True)
    counts = _count_rounds(len(longest))
    return [fraction * sum(longest[:count]) for count, fraction in zip(counts, fractions, strict=True)]


# --- what the pilots show -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trial:
    """What a pilot of a combination measured, in nats per token."""

    name: str
    steps: float
    """Steps of new text: its new tokens by the tokens of a step."""
    rises: Mapping[str, Estimate]
    """Of the loss on each retained set, with the interval over documents."""
    losses: Mapping[str, float]
    """On each learned set."""


@dataclass(frozen=True)
class Forecast:
    """What the whole run with a combination is expected to measure, with 95 % intervals, in nats per token."""

    name: str
    rises: Mapping[str, Estimate]
    losses: Mapping[str, Estimate]
    probability: float
    """That the upper end of every retained set's interval stays within the bound, as the retention gate asks."""
    excess: float
    """Above zero, the bound is broken at the confidence required: the logarithm of the largest ratio of the upper end of a
    rise to its bound, both shifted by half of the bound."""

    @property
    def total_loss(self) -> float:
        """The sum of the losses on learned sets."""
        return sum(each.value for each in self.losses.values())


@dataclass(frozen=True)
class _Power:
    """A power of the length, and the standard deviation of a combination's own."""

    mean: float
    spread: float


def forecast(trials: Sequence[Trial], run_steps: float, bounds: Mapping[str, float]) -> list[Forecast]:
    """What is expected of every combination, each from its longest pilot; `bounds`: the largest rise of each set."""
    by_name: dict[str, list[Trial]] = {}
    for trial in sorted(trials, key=lambda trial: trial.steps):
        by_name.setdefault(trial.name, []).append(trial)
    last = [each[-1] for each in by_name.values()]
    pairs = [(each[-2], each[-1]) for each in by_name.values() if len(each) > 1 and each[-1].steps > each[-2].steps]
    growth = {name: _rise_power(pairs, name, bound) for name, bound in bounds.items()}
    falls = {name: _loss_power(pairs, name) for name in last[0].losses}
    return [_forecast_run(trial, run_steps, bounds, growth, falls) for trial in last]


def _rise_power(pairs: Sequence[tuple[Trial, Trial]], name: str, bound: float) -> _Power:
    """The posterior of the common power of the rise; every pair of pilots of one combination is an observation."""
    precision, weighted = _GROWTH.spread**-2, _GROWTH.mean * _GROWTH.spread**-2
    for short, long in pairs:
        ratio = math.log(long.steps / short.steps)
        observed = (_shifted(long.rises[name].value, bound) - _shifted(short.rises[name].value, bound)) / ratio
        variance = 2 * (_RISE_NOISE / ratio) ** 2 + _GROWTH_SPREAD**2
        precision, weighted = precision + 1 / variance, weighted + observed / variance
    return _Power(weighted / precision, math.sqrt(1 / precision + _GROWTH_SPREAD**2))


def _loss_power(pairs: Sequence[tuple[Trial, Trial]], name: str) -> _Power:
    """The power by which the loss on new text falls beyond the pilots, from the mean power among them."""
    so_far, to_come = LOSS_PRIORS[1:3]
    powers = [
        math.log(short.losses[name] / long.losses[name]) / math.log(long.steps / short.steps) for short, long in pairs
    ]
    known = sum(powers) / len(powers) if powers else so_far.mean
    slowdown = power_slowdown(max(long.steps for _, long in pairs)) if pairs else 0.0
    unknown = 0.0 if powers else REMAINING_POWER * so_far.spread
    return _Power(-(REMAINING_POWER * known + to_come.mean + slowdown), math.hypot(to_come.spread, unknown))


def _shifted(rise: float, bound: float) -> float:
    """The logarithm of a rise that may be zero or below: half of the bound is added."""
    return math.log(max(rise + bound / 2, bound / 8))


def _forecast_run(
    trial: Trial,
    run_steps: float,
    bounds: Mapping[str, float],
    growth: Mapping[str, _Power],
    falls: Mapping[str, _Power],
) -> Forecast:
    ahead = max(0.0, math.log(run_steps / trial.steps))
    rises, probability, excess = {}, 1.0, -math.inf
    for name, bound in bounds.items():
        spread = math.hypot(_RISE_NOISE, growth[name].spread * ahead)
        rises[name] = _forecast_rise(trial.rises[name].value, bound, growth[name].mean * ahead, spread)
        over = _shifted(trial.rises[name].high, bound) + growth[name].mean * ahead - _shifted(bound, bound)
        probability = min(probability, NormalDist(0, spread).cdf(-over))
        excess = max(excess, over + NormalDist().inv_cdf(CONFIDENCE) * spread)
    losses = {}
    for name, loss in trial.losses.items():
        spread = math.hypot(_LOSS_NOISE, falls[name].spread * ahead)
        value = loss * math.exp(falls[name].mean * ahead)
        losses[name] = Estimate(value, value * math.exp(-_INTERVAL * spread), value * math.exp(_INTERVAL * spread))
    return Forecast(trial.name, rises, losses, probability, excess)


def _forecast_rise(rise: float, bound: float, growth: float, spread: float) -> Estimate:
    """The rise that grows by `growth` and varies by `spread`, both of logarithms; a fall shrinks and varies by the same."""
    shift = bound / 2
    grown, fallen = math.log(max(rise, 0.0) + shift) + growth, min(rise, 0.0) * math.exp(-growth)
    ends = (sign * _INTERVAL * spread for sign in (0, -1, 1))
    return Estimate(*(math.exp(grown + end) - shift + fallen * math.exp(-end) for end in ends))


# --- the choice -----------------------------------------------------------------------------------------------


def rank(forecasts: Sequence[Forecast], confidence: float = CONFIDENCE) -> list[Forecast]:
    """Best first: what keeps the bounds with this probability, by the loss on new text; then the rest by their rise."""

    def key(item: Forecast) -> tuple[float, ...]:
        if item.probability >= confidence:
            return 0, item.total_loss, item.excess
        return 1, item.excess, item.total_loss

    return sorted(forecasts, key=key)


def promote(forecasts: Sequence[Forecast], count: int) -> list[str]:
    """The combinations of the next round: the best as far as can be known yet, and the one that forgets least.

    So a bound is not called impossible before what comes closest to it has been tried at length.
    """
    names = [item.name for item in rank(forecasts, confidence=0.5)]
    safest = min(forecasts, key=lambda item: (item.excess, item.total_loss)).name
    chosen = names[:count]
    return chosen if safest in chosen or count == 1 else [*chosen[: count - 1], safest]


def refine_share(shares: tuple[float, float], excesses: tuple[float, float]) -> float | None:
    """A replay share between two, of which the first breaks the bound and the second keeps it: where both meet it.

    `excesses`: those of the forecasts; the rise is a power of the odds of replay. None where there is no such share, or none
    that differs from both by a tenth.
    """
    (low, high), (over, under) = shares, excesses
    if not (0 < low < high < 1 and over > 0 >= under):
        return None
    odds = [math.log(share / (1 - share)) for share in (low, high)]
    found = 1 / (1 + math.exp(-(odds[0] + (odds[1] - odds[0]) * over / (over - under))))
    share = math.ceil(found * 1000) / 1000
    return share if 1.1 * low < share < high / 1.1 else None

"""Pilots: what they may cost, laws found again from drawn runs, and a choice that keeps within its bound."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from postgrad.analysis import pilot_runs as p
from postgrad.errors import DataError, StageError

TOKENS, PEAK, STEP = 1_000_000, 1e-3, 256
LONGEST = p.make_confirming_pilot(p.Setting(0.2, PEAK), TOKENS).tokens / STEP
"""Steps of the longest pilot."""


class World:
    """A model and texts: what runs of them forget and learn, with slopes drawn as real runs have them.

    The laws are written out here once more, from the text of the module.
    """

    def __init__(self, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        self.rise = [math.log(0.2), *(self.rng.normal(b.mean, b.spread) for b in p.RISE_PRIORS[1:])]
        self.loss = [math.log(2.5), *(self.rng.normal(b.mean, b.spread) for b in p.LOSS_PRIORS[1:])]
        self.loss[2] += p.power_slowdown(LONGEST)

    def truth(self, setting: p.Setting, tokens: float, *, explored: bool = False) -> tuple[float, float]:
        """The rise and the loss of a run without noise."""
        steps, odds, high = tokens / STEP, (1 - setting.share) / setting.share, setting.peak / PEAK
        level, early, late, pull, peak, short, short_peak = self.rise
        rise = math.exp(level) * (min(steps, 200) / 200) ** early * (max(steps, 200) / 200) ** late
        rise *= (
            odds ** (pull * p.replay_effect(steps))
            * high ** (peak + explored * short_peak)
            * math.exp(explored * short)
        )
        level, so_far, to_come, share, peak, short_peak = self.loss
        fell = so_far if steps <= LONGEST else 0.6 * so_far + to_come
        loss = math.exp(level) * (steps / LONGEST) ** -fell * (1 - setting.share) ** share
        return rise, loss * high ** (peak + explored * short_peak)

    def drawn(self, pilot: p.Pilot, *, explored: bool) -> p.PilotResult:
        rise, loss = self.truth(pilot.setting, pilot.tokens, explored=explored)
        rise, loss = rise * math.exp(self.rng.normal(0, 0.06)), loss * math.exp(self.rng.normal(0, 0.005))
        return p.PilotResult(pilot, {"old": rise}, {"new": loss}, explored)


def drawn(pilot: p.Pilot, rng: np.random.Generator, *, explored: bool) -> p.PilotResult:
    world = World()
    world.rng = rng
    return world.drawn(pilot, explored=explored)


def fitted(found: list[p.PilotResult], floor: float = 1e-4) -> p.Laws:
    return p.fit_pilots(found, lambda _: TOKENS, PEAK, floor, STEP)


def advised(world: World, bound: float, count: int = 6) -> tuple[p.Laws, p.SettingChoice]:
    found = [world.drawn(t, explored=True) for t in p.make_exploratory_pilots(count, PEAK, TOKENS, STEP)]
    first = p.choose_setting(fitted(found), {"old": bound}, confidence=0.5)
    found.append(world.drawn(p.make_confirming_pilot(first.setting, TOKENS), explored=False))
    laws = fitted(found)
    return laws, p.choose_setting(laws, {"old": bound})


@pytest.mark.parametrize("count", [4, 5, 8, 12])
def test_pilots_cost_less_than_a_tenth_and_differ(count: int) -> None:
    explored = p.make_exploratory_pilots(count, PEAK, TOKENS, 256)
    assert len(explored) == count - 1 == len({pilot.setting for pilot in explored})
    total = sum(pilot.tokens for pilot in explored) + p.make_confirming_pilot(explored[0].setting, TOKENS).tokens
    assert 0.09 * TOKENS < total < 0.1 * TOKENS
    assert all(0 < pilot.setting.share < 1 and 0 < pilot.setting.peak <= PEAK for pilot in explored)
    assert len({pilot.setting.peak for pilot in explored}) > 1


def test_a_run_too_short_for_pilots_says_what_is_needed() -> None:
    with pytest.raises(StageError, match="of 12 pilots") as error:
        p.make_exploratory_pilots(12, PEAK, 400_000, 512)
    able = int(str(error.value).rsplit("--pilots ", 1)[1])
    assert len(p.make_exploratory_pilots(able, PEAK, 400_000, 512)) == able - 1
    with pytest.raises(StageError):
        p.make_exploratory_pilots(able + 1, PEAK, 400_000, 512)
    with pytest.raises(StageError, match="a budget of") as error:
        p.make_exploratory_pilots(4, PEAK, 20_000, 512)
    needed = int(str(error.value).split("a budget of ")[1].split(" ")[0].replace(",", ""))
    assert p.make_exploratory_pilots(4, PEAK, needed + 1, 512)
    for count in (3, 13):
        with pytest.raises(StageError, match=f"{count} pilots"):
            p.make_exploratory_pilots(count, PEAK, TOKENS, 256)


def test_log_linear_is_the_closed_form_of_its_noise() -> None:
    rng = np.random.default_rng(0)
    rows, logs = rng.normal(size=(9, 3)), rng.normal(size=9)
    begin = [p.Prior(0.0, 2.0), p.Prior(1.0, 0.5), p.Prior(-1.0, 1e-6)]
    found = p.fit_log_linear(rows, logs, begin, 0.3)
    # The same as least squares with the beginnings as further, weighted rows.
    weights = np.array([b.spread for b in begin])
    stacked = np.concatenate([rows / found.noise, np.diag(1 / weights)])
    aims = np.concatenate([logs / found.noise, np.array([b.mean for b in begin]) / weights])
    assert found.mean_K == pytest.approx(np.linalg.lstsq(stacked, aims, rcond=None)[0], abs=1e-6)
    assert found.covariance_KK == pytest.approx(np.linalg.inv(stacked.T @ stacked), abs=1e-9)
    assert found.mean_K[2] == pytest.approx(-1.0, abs=1e-4)  # so sure before that nothing moves it
    log, spread = found.predict(np.array([1.0, 0.0, 0.0]))
    assert log == pytest.approx(found.mean_K[0])
    assert spread == pytest.approx(math.sqrt(found.covariance_KK[0, 0] + found.noise**2))
    # Much data outweighs the beginning.
    rows = np.c_[np.ones(4000), rng.normal(size=(4000, 2))]
    logs = rows @ [0.5, 2.0, 3.0] + rng.normal(0, 0.2, 4000)
    settled = p.fit_log_linear(rows, logs, [p.Prior(0, 1)] * 3, 0.05)
    assert settled.mean_K == pytest.approx([0.5, 2.0, 3.0], abs=0.02)
    assert settled.noise == pytest.approx(0.2, rel=0.05)


@pytest.mark.parametrize("bound", [0.2, 0.3, 0.5])
def test_what_is_advised_keeps_within_the_bound_and_wastes_little(bound: float) -> None:
    kept, careless, wasted, covered = [], [], [], []
    for seed in range(60):
        world = World(seed)
        laws, choice = advised(world, bound)
        if not choice.is_within_bounds:
            continue
        rise, loss = world.truth(choice.setting, TOKENS)
        kept.append(rise <= bound)
        odds = (bound / world.truth(p.Setting(0.5, choice.setting.peak), TOKENS)[0]) ** (1 / world.rise[3])
        wasted.append(choice.setting.share / max(1 / (1 + odds), p.MIN_SHARE))
        for found, value in ((laws.rise("old", choice.setting), rise), (laws.loss("new", choice.setting), loss)):
            covered.append(found.low <= value <= found.high)
        # The mutant: a choice by what is expected, without a margin.
        hoped = p.choose_setting(laws, {"old": bound}, confidence=0.5).setting
        careless.append(world.truth(hoped, TOKENS)[0] <= bound)
    assert len(kept) > 40
    assert np.mean(kept) >= p.CONFIDENCE - 0.07
    assert np.mean(careless) < p.CONFIDENCE - 0.15
    assert np.median(wasted) < 1.6
    assert np.mean(covered) >= 0.9


def test_a_tighter_bound_takes_more_replay_and_an_impossible_one_is_told() -> None:
    laws, _ = advised(World(), 0.2)
    shares = []
    for bound in (0.15, 0.2, 0.3, 0.5):
        choice = p.choose_setting(laws, {"old": bound})
        shares.append(choice.setting.share * PEAK / choice.setting.peak)
        at = laws.rise("old", choice.setting, confidence=p.CONFIDENCE).high
        assert choice.is_within_bounds and at <= bound
        # A little less replay would not do, unless it is the least there is.
        less = p.Setting(choice.setting.share - 0.002, choice.setting.peak)
        assert choice.setting.share <= p.MIN_SHARE or laws.rise("old", less, confidence=p.CONFIDENCE).high > bound
    assert shares == sorted(shares, reverse=True)
    never = p.choose_setting(laws, {"old": 1e-4})
    assert not never.is_within_bounds and never.setting == p.Setting(p.MAX_SHARE, p.MIN_PEAK * PEAK)
    assert p.choose_setting(laws, {"old": 0.1}, max_share=0.2).setting.share <= 0.2
    assert p.choose_setting(laws, {"old": 50.0}).setting.share == p.MIN_SHARE


def test_the_strictest_of_several_bounds_decides() -> None:
    laws, choice = advised(World(), 0.2)
    both = replace(laws, rises={"old": laws.rises["old"], "older": laws.rises["old"]})
    strict = p.choose_setting(laws, {"old": 0.1})
    assert p.choose_setting(both, {"old": 0.2, "older": 0.1}) == strict != choice


def test_changes_that_are_none_count_as_the_floor_and_few_pilots_are_refused() -> None:
    rng = np.random.default_rng(0)
    found = [drawn(t, rng, explored=True) for t in p.make_exploratory_pilots(4, PEAK, TOKENS, 256)]
    found[0] = replace(found[0], rises={"old": -0.01})
    at_floor = replace(found[0], rises={"old": 0.001})
    both = [fitted([one, *found[1:]], floor=0.001) for one in (found[0], at_floor)]
    assert both[0].rises["old"].mean_K == pytest.approx(both[1].rises["old"].mean_K)
    with pytest.raises(DataError, match="2 pilots are too few to fit"):
        fitted(found[:2])


def piloted(fell: float, seed: int = 0) -> p.Laws:
    """Laws of pilots of a text whose loss fell by this power of the steps among them."""
    world = World(seed)
    world.loss[1] = fell
    found = [world.drawn(t, explored=True) for t in p.make_exploratory_pilots(5, PEAK, TOKENS, STEP)]
    return fitted([*found, world.drawn(p.make_confirming_pilot(p.Setting(0.2, PEAK), TOKENS), explored=False)])


def test_what_fell_fast_among_the_pilots_falls_on_fast() -> None:
    at = p.Setting(0.2, PEAK)
    slow, fast = piloted(0.02), piloted(0.22)
    ratio = TOKENS / STEP / LONGEST
    assert math.log(slow.loss("new", at).value / fast.loss("new", at).value) == pytest.approx(
        0.6 * 0.2 * math.log(ratio), rel=0.25
    )
    # However fast it fell, the loss stays above zero, and the old text is foretold as before.
    assert piloted(0.6).loss("new", at).low > 0
    assert slow.rise("old", at).value == pytest.approx(fast.rise("old", at).value)


def test_a_loss_falls_the_slower_the_longer_the_pilots_were() -> None:
    # Of abstracts, 15 % replay: the loss after so many steps, and the power from one to the next.
    steps, losses = (39, 195, 3906), (3.2593, 2.6867, 1.9923)
    powers = [math.log(losses[i] / losses[i + 1]) / math.log(steps[i + 1] / steps[i]) for i in range(2)]
    foretold = p.REMAINING_POWER * powers[0] + p.LOSS_PRIORS[2].mean + p.power_slowdown(steps[1])
    assert foretold == pytest.approx(powers[1], abs=0.02)
    assert p.power_slowdown(40) == 0 and p.power_slowdown(400) < p.power_slowdown(100) < 0


def test_replay_is_felt_more_in_longer_runs() -> None:
    # Of abstracts: the rise at 15 % over that at 40 % replay after 39 and 195 steps (1e-3), as a power of the odds.
    for steps, few, more in ((39, 0.3630, 0.2336), (195, 0.3894, 0.2086)):
        power = math.log(few / more) / math.log((0.85 / 0.15) / (0.6 / 0.4))
        assert p.replay_effect(steps) * p.RISE_PRIORS[3].mean == pytest.approx(power, abs=0.06)
    assert p.replay_effect(200) == p.replay_effect(1e6) == 1.0 and p.replay_effect(0.01) == 0.3
    assert p.replay_effect(20) < p.replay_effect(60) < p.replay_effect(150) < 1

"""Schedules against hand-written tables and the values their papers' own code gives."""

import itertools
import math
import re
from typing import Any

import pytest
from pydantic import TypeAdapter

from postgrad.config.schedules import AnySchedule
from postgrad.optim import lr_schedules as s
from postgrad.plan.lr_schedule import warmup_notes

STEPS = 100_000
WARMUP = 1_000


def after_warmup(share: float) -> float:
    return WARMUP + share * (STEPS - WARMUP)


@pytest.mark.parametrize(("share", "rate"), [(0, 3e-4), (0.25, 2.605e-4), (0.5, 1.65e-4), (0.75, 6.95e-5), (1, 3e-5)])
def test_cosine_after_warmup_has_the_published_values(share: float, rate: float) -> None:
    curve = s.rewarm(steps=STEPS, peak=3e-4, floor=3e-5, warmup=WARMUP)
    assert curve(after_warmup(share)) == pytest.approx(rate, abs=5e-8)


def test_warmup_is_linear_from_zero_and_reaches_the_peak() -> None:
    curve = s.rewarm(steps=STEPS, peak=3e-4, floor=3e-5, warmup=WARMUP)
    assert curve(0) == 0
    assert curve(1) == pytest.approx(3e-7)
    assert curve(500) == pytest.approx(1.5e-4)
    assert curve(WARMUP) == 3e-4


@pytest.mark.parametrize(
    ("x", "rate"), [(0, 3.000e-4), (0.1, 2.434e-4), (0.25, 2.100e-4), (0.5, 1.856e-4), (1, 1.650e-4)]
)
def test_inverse_sqrt_cooldown_has_the_published_values(x: float, rate: float) -> None:
    assert s.inverse_sqrt(3e-4, 1.65e-4, 10)(x) == pytest.approx(rate, rel=3e-4)


def paper_infinite(shape: str) -> s.Schedule:
    return s.infinite(
        steps=STEPS,
        peak=3e-4,
        constant_rate=1.65e-4,
        floor=3e-5,
        warmup=WARMUP,
        cooldown=0.6 * (STEPS - WARMUP),
        constant_until=after_warmup(0.85),
        cooldown_shape=shape,
    )


@pytest.mark.parametrize("shape", ["cosine", "inverse-sqrt"])
def test_infinite_has_four_phases(shape: str) -> None:
    curve = paper_infinite(shape)
    assert curve(WARMUP) == 3e-4
    if shape == "cosine":
        assert curve(after_warmup(0.3)) == pytest.approx(2.325e-4)
    assert [curve(after_warmup(x)) for x in (0.6, 0.7, 0.85)] == pytest.approx([1.65e-4] * 3)
    assert curve(after_warmup(0.925)) == pytest.approx(7.036e-5, rel=2e-4)
    assert curve(STEPS) == pytest.approx(3e-5)


def test_where_the_constant_phase_ends_is_a_point_and_not_a_length() -> None:
    """The two public implementations disagree here; a length of .85 would leave no room for an anneal."""
    curve = paper_infinite("cosine")
    assert curve(after_warmup(0.85)) == pytest.approx(1.65e-4)
    assert curve(after_warmup(0.86)) < 1.65e-4


def test_wsd_is_flat_until_the_decay() -> None:
    curve = s.wsd(steps=1000, peak=1e-3, floor=1e-5, warmup=10, decay=100, shape="1-sqrt")
    assert [curve(step) for step in (10, 500, 900)] == [1e-3] * 3
    assert curve(925) == pytest.approx(1e-5 + (1e-3 - 1e-5) * 0.5)
    assert curve(1000) == pytest.approx(1e-5)


@pytest.mark.parametrize("name", sorted(s.SHAPES))
def test_every_shape_meets_both_ends_and_never_rises(name: str) -> None:
    curve = s.SHAPES[name](1e-3, 1e-5)
    values = [curve(i / 64) for i in range(65)]
    assert values[0] == pytest.approx(1e-3) and values[-1] == pytest.approx(1e-5)
    assert all(a >= b for a, b in itertools.pairwise(values))


def test_wsd_s_anneal_is_the_harmonic_mean() -> None:
    assert s.inverse_linear(4e-4, 1e-4)(0.5) == pytest.approx(1 / (0.5 / 1e-4 + 0.5 / 4e-4))


def test_then_skips_empty_pieces_and_holds_the_last_value() -> None:
    curve = s.chain((s.linear(0, 1), 0), (s.linear(5, 3), 4))
    assert [curve(x) for x in (1, 2, 4, 9)] == [4.5, 4, 3, 3]
    assert not math.isnan(curve(0))


def test_a_switch_at_a_fifth_of_the_rate_is_found_after_the_peak() -> None:
    curve = s.rewarm(steps=1000, peak=1e-3, floor=1e-5, warmup=100)
    step = s.first_step_at_or_below(curve, 0.2, 1000)
    assert step > 100 and curve(step) <= 2e-4 < curve(step - 1)
    assert s.first_step_at_or_below(s.chain((s.constant(1e-3), 10)), 0.2, 10) == 10


def test_sampled_keeps_both_ends() -> None:
    points = s.sample_schedule(lambda step: step, 12_345, 100)
    assert points[0][0] == 1 and points[-1][0] == 12_345 and len(points) <= 125


# --- the shortest warm-up ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "beta2", "wanted"),
    [(37, 0.95, 5), (100, 0.95, 10), (400, 0.95, 40), (100_000, 0.95, 40), (100_000, 0.999, 2000), (3, 0.95, 3)],
)
def test_the_shortest_warmup(steps: int, beta2: float, wanted: int) -> None:
    assert s.shortest_warmup(steps, beta2) == wanted


@pytest.mark.parametrize(
    ("schedule", "steps", "is_told"),
    [
        ({"kind": "rewarm", "peak": 1e-3, "floor": 0}, 37, True),  # 1 % of 37 steps is none
        ({"kind": "rewarm", "peak": 1e-3, "floor": 0, "warmup": "5 steps"}, 37, False),
        ({"kind": "rewarm", "peak": 1e-3, "floor": 0, "warmup": "4 steps"}, 37, True),
        ({"kind": "rewarm", "peak": 1e-3, "floor": 0}, 4000, False),
        ({"kind": "rewarm", "peak": 1e-3, "floor": 0, "start": 9e-4}, 37, False),  # it does not begin at zero
        ({"kind": "constant", "peak": 1e-3}, 37, True),
        ({"kind": "wsd", "peak": 1e-3, "floor": 1e-4}, 37, True),
        ({"kind": "anneal", "start": 1e-3, "floor": 1e-5}, 37, False),  # it has no warm-up
        ({"kind": "from-floor", "start": 1e-3, "floor": 0}, 37, False),
        ({"kind": "constant", "peak": 1e-3}, 3, False),
    ],
)
def test_a_warmup_that_is_none_is_told_and_done(schedule: dict[str, Any], steps: int, is_told: bool) -> None:
    spec = TypeAdapter(AnySchedule).validate_python(schedule)
    notes = warmup_notes(spec, steps, steps * 100, 0.95)
    assert len(notes) == is_told
    if is_told:
        advice = re.findall(r"`warmup: (.*)`", notes[0])
        assert not warmup_notes(spec.model_copy(update={"warmup": advice[0]}), steps, steps * 100, 0.95)

"""The factor of a step's rate by its loss: the formula, its bounds, and what is kept of it."""

from __future__ import annotations

import json
import math

import pytest

from postgrad.optim.loss_adaptive_lr import ConstantLRScale, LossAdaptiveLRScale

LOSSES = [4.0, 4.4, 3.0, 2.0, 6.0, 1.0, 1.0, 0.5, 0.0]


def by_hand(start: float, smoothing: float) -> list[float]:
    """min(1, start sqrt(first / mean)), the mean of all losses written out as a sum."""
    out = []
    for i in range(len(LOSSES)):
        weights = [(1 - smoothing) * smoothing ** (i - j) if j else smoothing**i for j in range(i + 1)]
        mean = sum(w * loss for w, loss in zip(weights, LOSSES, strict=False))
        out.append(min(1.0, start * math.sqrt(LOSSES[0] / mean)))
    return out


@pytest.mark.parametrize(("start", "smoothing"), [(0.5, 0.9), (1.0, 0.9), (0.2, 0.5)])
def test_it_is_the_formula(start: float, smoothing: float) -> None:
    paced = LossAdaptiveLRScale(start, smoothing)
    factors = [paced(loss) for loss in LOSSES]
    assert factors == pytest.approx(by_hand(start, smoothing), rel=1e-6)
    assert factors[0] == start and max(factors) <= 1
    assert factors[1] < factors[0] <= factors[3]  # lower where the loss is high
    without_mean = [min(1.0, start * math.sqrt(LOSSES[0] / max(loss, 1e-8))) for loss in LOSSES]
    assert factors != pytest.approx(without_mean, rel=1e-2)


def test_no_loss_at_all_takes_the_whole_rate() -> None:
    paced = LossAdaptiveLRScale(0.5, 0.0)
    assert [paced(1.0), paced(0.0)] == [0.5, 1.0]


def test_what_is_kept_goes_on_to_the_bit() -> None:
    whole, part = LossAdaptiveLRScale(0.5), LossAdaptiveLRScale(0.5)
    factors = [whole(loss) for loss in LOSSES]
    for loss in LOSSES[:4]:
        part(loss)
    again = LossAdaptiveLRScale(0.5)
    again.load(json.loads(json.dumps(part.state())))
    assert [again(loss) for loss in LOSSES[4:]] == factors[4:]
    assert [LossAdaptiveLRScale(0.5)(loss) for loss in LOSSES[4:]] != factors[4:]
    fresh = LossAdaptiveLRScale(0.5)
    fresh.load(fresh.state())
    assert fresh(3.0) == 0.5


def test_steady_is_one() -> None:
    steady = ConstantLRScale()
    steady.load(steady.state())
    assert {steady(loss) for loss in LOSSES} == {1.0}

"""Is a weighted mean of the checkpoints of a constant rate the model of a decayed rate, where both make the same updates?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import pytest

from postgrad.optim.decay_weights import decay_weights
from postgrad.optim.lr_schedules import SHAPES, wsd

Weighting = Callable[[Sequence[int], str, float], Sequence[float]]
RATE, STABLE, DECAY = 0.01, 30, 12


def off(weighting: Weighting, shape: str, every: int = 1, floor: float = 0.0) -> float:
    """How far the mean is from SGD with the decay, on one sequence of gradients; checkpoints every so many steps."""
    gradients = np.random.default_rng(0).standard_normal((STABLE + DECAY * every, 5))
    constant = np.cumsum(np.vstack([np.zeros(5), -RATE * gradients]), axis=0)
    saved = range(STABLE, STABLE + DECAY * every, every)
    mean = sum(w * constant[step] for w, step in zip(weighting(saved, shape, floor), saved, strict=True))
    schedule = wsd(steps=STABLE + DECAY, peak=RATE, floor=floor * RATE, warmup=0, decay=DECAY, shape=shape)
    decayed = constant[STABLE].copy()
    for number, (first, last) in enumerate(pairwise(saved), start=1):
        decayed -= schedule(STABLE + number) * gradients[first:last].sum(0)
    return float(np.abs(mean - decayed).max())


@pytest.mark.parametrize("shape", sorted(SHAPES))
def test_with_the_same_updates_the_mean_is_the_decayed_model(shape: str) -> None:
    floor = 0.1 if shape in ("exponential", "inverse-linear") else 0.0
    assert off(decay_weights, shape, floor=floor) < 1e-15 and off(decay_weights, shape, 5, floor) < 1e-15
    assert off(decay_weights, "cosine", 5, 0.25) < 1e-15


def plain_mean(steps: Sequence[int], shape: str, floor: float) -> Sequence[float]:
    return [1 / len(steps)] * len(steps)


def reversed_order(steps: Sequence[int], shape: str, floor: float) -> Sequence[float]:
    return decay_weights(steps, shape, floor)[::-1]


def one_interval_late(steps: Sequence[int], shape: str, floor: float) -> Sequence[float]:
    decayed = [SHAPES[shape](1.0, floor)(i / len(steps)) for i in range(len(steps))]
    return [1 - decayed[0], *(a - b for a, b in pairwise([*decayed, 0.0]))][: len(steps)]


def rates_as_weights(steps: Sequence[int], shape: str, floor: float) -> Sequence[float]:
    decayed = [SHAPES[shape](1.0, floor)(i / len(steps)) for i in range(1, len(steps) + 1)]
    return [rate / sum(decayed) for rate in decayed]


@pytest.mark.parametrize("mutant", [plain_mean, reversed_order, one_interval_late, rates_as_weights])
def test_other_weights_are_another_decay(mutant: Weighting) -> None:
    assert off(mutant, "1-sqrt") > 1e-3


def test_a_linear_decay_is_the_plain_mean_and_all_weights_sum_to_one() -> None:
    assert decay_weights(range(10, 90, 10)) == pytest.approx([1 / 8] * 8)
    for shape in SHAPES:
        for steps in ([7], [1, 2], [10, 20, 30, 33]):
            weights = decay_weights(steps, shape, 0.1)
            assert sum(weights) == pytest.approx(1) and min(weights) >= 0 and len(weights) == len(steps)

"""Learning rate schedules: pure functions `step -> learning rate`, without state to restore.

Steps count from 1 (the first update of the stage) to the stage's last step; `schedule(0)` is where the warm-up starts.
Pieces are curves over the share of the piece that is done. `chain` joins pieces, so every named schedule is an expression:

    rewarm = chain((linear(0, peak), warmup), (cosine(peak, floor), rest))

Sources of the formulas: Ibrahim et al. 2024 (arXiv 2403.08763, sections 4 and 7.4) for warm-up, cosine and the infinite
schedules, Hu et al. 2024 (arXiv 2404.06395) and Hägele et al. 2024 (arXiv 2405.18392) for WSD and 1-sqrt.
"""

from __future__ import annotations

import math
from collections.abc import Callable

MIN_WARMUP_STEPS = 5
"""A warm-up of fewer steps is none: its first step is already large."""

Schedule = Callable[[float], float]
Piece = Callable[[float], float]
"""Learning rate over `x` in [0, 1], the share of the piece that is done."""


def constant(rate: float) -> Piece:
    """The same rate throughout."""
    return lambda x: rate


def linear(start: float, end: float) -> Piece:
    """`start + (end - start) x`."""
    return lambda x: start + (end - start) * x


def cosine(start: float, end: float) -> Piece:
    """Half a cosine: `end + (start - end)/2 (1 + cos(pi x))`."""
    return lambda x: end + (start - end) / 2 * (1 + math.cos(math.pi * x))


def inverse_sqrt(start: float, end: float, timescale: float = 10.0) -> Piece:
    """`start + (end - start) h(x)/h(1)` with `h(x) = 1/sqrt(1 + timescale x) - 1` (Ibrahim et al. 2024, their code)."""

    def h(x: float) -> float:
        return 1 / math.sqrt(1 + timescale * x) - 1

    return lambda x: start + (end - start) * h(x) / h(1)


def exponential(start: float, end: float) -> Piece:
    """`start (end/start)^x`; both ends must be above zero."""
    return lambda x: start * (end / start) ** x


def one_minus_sqrt(start: float, end: float) -> Piece:
    """`end + (start - end)(1 - sqrt(x))` (Hägele et al. 2024)."""
    return lambda x: end + (start - end) * (1 - math.sqrt(x))


def inverse_linear(start: float, end: float) -> Piece:
    """`1/(x/end + (1 - x)/start)`: the anneal of WSD-S; both ends must be above zero."""
    return lambda x: 1 / (x / end + (1 - x) / start)


SHAPES: dict[str, Callable[[float, float], Piece]] = {
    "linear": linear,
    "cosine": cosine,
    "inverse-sqrt": inverse_sqrt,
    "exponential": exponential,
    "1-sqrt": one_minus_sqrt,
    "inverse-linear": inverse_linear,
}


def chain(*pieces: tuple[Piece, float]) -> Schedule:
    """Join pieces, each with its length in steps; after the last piece its end value holds.

    At the border of two pieces the earlier one counts (its `x` is exactly 1); a piece of length 0 is skipped.
    """

    def schedule(step: float) -> float:
        begin = 0.0
        for piece, length in pieces:
            if length > 0 and step <= begin + length:
                return piece((step - begin) / length)
            begin += length
        return pieces[-1][0](1.0)

    return schedule


def rewarm(
    *, steps: float, peak: float, floor: float, warmup: float, start: float = 0.0, shape: str = "cosine"
) -> Schedule:
    """Warm up from `start` to `peak`, then decay to `floor` over the rest of `steps`.

    With a cosine this is what Ibrahim et al. 2024 (section 4) repeat for every stage.
    """
    return chain((linear(start, peak), warmup), (SHAPES[shape](peak, floor), steps - warmup))


def shortest_warmup(steps: int, beta2: float) -> int:
    """Steps that a warm-up should have at least: 2 / (1 - beta2), but a tenth of the stage is enough, and five are the least.

    Adam's second moments are the mean of few gradients at first, so its first updates are too large. 2 / (1 - beta2) steps make
    up for that (Ma & Yarats 2021, arXiv 1910.04209): 40 for a beta2 of .95.
    """
    return min(max(MIN_WARMUP_STEPS, math.ceil(min(2 / (1 - beta2), steps / 10))), steps)


def infinite(
    *,
    steps: float,
    peak: float,
    constant_rate: float,
    floor: float,
    warmup: float,
    cooldown: float,
    constant_until: float,
    cooldown_shape: str = "cosine",
    timescale: float = 10.0,
) -> Schedule:
    """Warm-up, cooldown to `constant_rate`, constant, exponential anneal to `floor` (Ibrahim et al. 2024, section 7.4).

    `constant_until` is the step at which the constant phase *ends*, counted from the first step of the stage, and
    `cooldown` is a length counted from the end of the warm-up.
    """
    cool = (
        inverse_sqrt(peak, constant_rate, timescale)
        if cooldown_shape == "inverse-sqrt"
        else SHAPES[cooldown_shape](peak, constant_rate)
    )
    return chain(
        (linear(0.0, peak), warmup),
        (cool, cooldown),
        (constant(constant_rate), constant_until - warmup - cooldown),
        (exponential(constant_rate, floor), steps - constant_until),
    )


def wsd(*, steps: float, peak: float, floor: float, warmup: float, decay: float, shape: str = "1-sqrt") -> Schedule:
    """Warm-up, stable, decay over the last `decay` steps (Hu et al. 2024)."""
    return chain(
        (linear(0.0, peak), warmup),
        (constant(peak), steps - warmup - decay),
        (SHAPES[shape](peak, floor), decay),
    )


def peak_step(schedule: Schedule, steps: int) -> int:
    """The first step with the highest rate: the end of the warm-up."""
    return max(range(1, steps + 1), key=schedule)


def first_step_at_or_below(schedule: Schedule, share: float, steps: int) -> int:
    """The first step after the peak whose rate is at most `share` of the peak, or `steps` when there is none.

    This is the trigger of a data switch such as "change the blend when the learning rate has fallen to one fifth"
    (Parmar et al. 2024, arXiv 2407.07263).
    """
    first = peak_step(schedule, steps)
    limit = share * schedule(first)
    return next((step for step in range(first, steps + 1) if schedule(step) <= limit), steps)


def sample_schedule(schedule: Schedule, steps: int, points: int = 400) -> list[tuple[int, float]]:
    """`(step, rate)` at no more than `points` steps, including the first and the last, for a chart."""
    stride = max(1, math.ceil(steps / points))
    return [(step, schedule(step)) for step in sorted({1, *range(stride, steps + 1, stride), steps})]

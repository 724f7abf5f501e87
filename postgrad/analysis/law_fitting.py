"""Fitting of laws to measured losses, with parametric bootstrap intervals.

Legend: N measured points, P parameters, S draws of an interval.

A law is a formula with parameters (`Law`). It is fitted as scaling laws are in the literature: Huber's loss on the residuals of
the logarithms, from many starts (Hoffmann et al. 2022, arXiv 2203.15556, section 3.3). L-BFGS finds the valley, a trust region
its minimum. Intervals are a parametric bootstrap: data are sampled around the fit, with noise whose variance is itself
estimated from the residuals, and fitted again, so few degrees of freedom make wide intervals. A draw is a fit, so there are
fewer of them than `postgrad.stats.bootstrap` has.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from postgrad.errors import DataError

Inputs = Mapping[str, np.ndarray]
"""The inputs of the law by name, each of shape (N,)."""

HUBER = 1e-3
"""Residuals of log losses up to this weigh by their square, larger ones by their size (Hoffmann et al. 2022)."""
_MAX_STARTS = 2000
_STARTS = 24
"""Starts of L-BFGS: those that fit best of up to `_MAX_STARTS`."""
_POLISH_COUNT = 4
"""... and the best of them that the trust region refines."""
_DRAWS = 100
_TINY = 1e-12


@dataclass(frozen=True)
class Parameter:
    """A parameter's name, the starts of its search, and its bounds."""

    name: str
    starts: tuple[float, ...]
    low: float = -np.inf
    high: float = np.inf


@dataclass(frozen=True)
class Law:
    """A formula for losses, with its inputs and source."""

    name: str
    parameters: tuple[Parameter, ...]
    inputs: tuple[str, ...]
    formula: Callable[..., np.ndarray]
    """Called with inputs of shape (N,) and parameters, all by name; gives losses of shape (N,)."""
    source: str

    def __call__(self, inputs: Inputs, values: Mapping[str, float]) -> np.ndarray:
        """The losses at `inputs` for these parameters, of shape (N,)."""
        return np.asarray(self.formula(**{name: np.asarray(inputs[name], float) for name in self.inputs}, **values))


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % interval."""

    value: float
    low: float
    high: float

    def as_dict(self) -> dict[str, float]:
        """As plain data."""
        return {"value": self.value, "low": self.low, "high": self.high}


@dataclass(frozen=True)
class Fit:
    """A law with its best parameters, and bootstrap draws of them."""

    law: Law
    best_P: np.ndarray
    draws_SP: np.ndarray
    spread: float
    """Standard deviation of the log residuals, with N - P degrees of freedom."""
    points: int

    @property
    def values(self) -> dict[str, float]:
        """The parameters by name."""
        return _values_by_name(self.law, self.best_P)

    def parameter(self, name: str) -> Estimate:
        """A parameter with its interval."""
        place = [p.name for p in self.law.parameters].index(name)
        return make_estimate(float(self.best_P[place]), self.draws_SP[:, place])

    def predict(self, **inputs: float) -> Estimate:
        """The predicted loss at these inputs, with the interval of a measurement."""
        at = {name: np.array([value]) for name, value in inputs.items()}
        value = float(self.law(at, self.values)[0])
        noise = np.random.default_rng(1).normal(0.0, self.spread, len(self.draws_SP))
        drawn = np.array([self.law(at, _values_by_name(self.law, p))[0] for p in self.draws_SP])
        return make_estimate(value, drawn * np.exp(noise))

    def solve(self, find: Callable[[Mapping[str, float]], float]) -> Estimate:
        """A function of the parameters (by name), such as a best share, with its interval."""
        drawn = np.array([find(_values_by_name(self.law, p)) for p in self.draws_SP])
        return make_estimate(find(self.values), drawn[np.isfinite(drawn)])


def make_estimate(value: float, samples: np.ndarray) -> Estimate:
    """A value with the middle 95 % of samples, widened to include the value."""
    low, high = np.quantile(samples, [0.025, 0.975]) if len(samples) else (value, value)
    return Estimate(value, min(value, float(low)), max(value, float(high)))


def fit_law(
    law: Law, inputs: Inputs, losses: Sequence[float] | np.ndarray, *, seed: int = 0, draws: int = _DRAWS
) -> Fit:
    """Fit a law to losses in nats per token (or any positive numbers), measured at `inputs`.

    Raises `DataError` when there are too few points for the law's parameters, or impossible ones.
    """
    from threadpoolctl import threadpool_limits

    table, losses_N = _check_points(law, inputs, losses)
    with threadpool_limits(1):  # arrays are small: with several threads on a busy machine this takes five times as long
        return _fit_points(law, table, losses_N, seed, draws)


def _fit_points(law: Law, table: Inputs, losses_N: np.ndarray, seed: int, draws: int) -> Fit:
    rng = np.random.default_rng(seed)
    best_P = _search(law, table, losses_N, rng)
    fitted_N = law(table, _values_by_name(law, best_P))
    spare = len(losses_N) - len(law.parameters)
    residual_N = np.log(losses_N) - np.log(np.maximum(fitted_N, _TINY))
    spread = float(np.sqrt((residual_N**2).sum() / spare))
    drawn = []
    for _ in range(draws):
        noise = spread * np.sqrt(spare / rng.chisquare(spare))
        again_N = fitted_N * np.exp(rng.normal(0.0, noise, len(losses_N)))
        drawn.append(_descend(law, table, again_N, best_P, max_evaluations=40))
    return Fit(law, best_P, np.array(drawn).reshape(-1, len(law.parameters)), spread, len(losses_N))


def _check_points(
    law: Law, inputs: Inputs, losses: Sequence[float] | np.ndarray
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    losses_N = np.asarray(losses, float)
    for name in law.inputs:
        shape = np.shape(inputs[name]) if name in inputs else (0,)
        if shape not in ((), losses_N.shape):
            raise DataError(
                f"{np.prod(shape)} values of {name}",
                where=law.name,
                expected=f"a number for each of {len(losses_N)} losses, or one for all",
            )
    table = {name: np.broadcast_to(np.asarray(inputs[name], float), losses_N.shape) for name in law.inputs}
    for name, values_N in (*table.items(), ("loss", losses_N)):
        strange = np.flatnonzero(~np.isfinite(values_N) | (values_N < 0) | ((name == "loss") & (values_N == 0)))
        if len(strange):
            raise DataError(
                f"a point has {name} {values_N[strange[0]]:g}",
                where=f"{law.name}: point {strange[0] + 1}",
                expected="finite numbers, none below zero, and losses above it",
            )
    distinct = len({tuple(values) for values in zip(*table.values(), strict=True)})
    needed = len(law.parameters) + 1
    if distinct < needed:
        names = ", ".join(p.name for p in law.parameters)
        raise DataError(
            f"{distinct} different points are too few to fit {len(law.parameters)} parameters ({names})",
            where=law.name,
            expected=f"losses at {needed} or more different points ({', '.join(law.inputs)})",
            hint=f"measure {needed - distinct} more",
        )
    return table, losses_N


def _search(law: Law, inputs: Inputs, losses_N: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The best parameters from the most promising of all combinations of starts, or of a sample of them."""
    from scipy.optimize import minimize

    grid = [np.array(start) for start in itertools.product(*(p.starts for p in law.parameters))]
    if len(grid) > _MAX_STARTS:
        grid = [grid[i] for i in rng.permutation(len(grid))[:_MAX_STARTS]]
    bounds = [(p.low, p.high) for p in law.parameters]

    def cost(values_P: np.ndarray) -> float:
        size_N = np.abs(_residuals(law, inputs, losses_N, values_P))
        return float(np.where(size_N <= HUBER, size_N**2 / 2, HUBER * (size_N - HUBER / 2)).sum())

    with np.errstate(all="ignore"):
        grid = sorted(grid, key=cost)[:_STARTS]
        found = [minimize(cost, s, method="L-BFGS-B", bounds=bounds, options={"maxiter": 40}).x for s in grid]
        found.sort(key=cost)
        polished = [_descend(law, inputs, losses_N, p) for p in found[:_POLISH_COUNT]]
    return min(polished, key=cost)


def _descend(
    law: Law, inputs: Inputs, losses_N: np.ndarray, start_P: np.ndarray, max_evaluations: int = 300
) -> np.ndarray:
    """The local minimum of the same Huber loss from `start_P`."""
    from scipy.optimize import least_squares

    low, high = np.array([p.low for p in law.parameters]), np.array([p.high for p in law.parameters])
    room = np.where(np.isfinite(high - low), (high - low) * 1e-9, 1e-12)
    with np.errstate(all="ignore"):
        return least_squares(
            lambda p: _residuals(law, inputs, losses_N, p),
            np.clip(start_P, low + room, high - room),
            bounds=(low, high),
            loss="huber",
            f_scale=HUBER,
            x_scale=np.maximum(np.abs(start_P), 1e-3),
            max_nfev=max_evaluations,
        ).x


def _residuals(law: Law, inputs: Inputs, losses_N: np.ndarray, values_P: np.ndarray) -> np.ndarray:
    """Log residuals; large ones where the formula is not a positive number."""
    fitted_N = np.broadcast_to(law(inputs, _values_by_name(law, values_P)), losses_N.shape)
    sound_N = np.nan_to_num(fitted_N, nan=_TINY, posinf=1e12, neginf=_TINY)
    return np.log(np.maximum(sound_N, _TINY)) - np.log(losses_N)


def _values_by_name(law: Law, values_P: np.ndarray) -> dict[str, float]:
    return {p.name: float(value) for p, value in zip(law.parameters, values_P, strict=True)}

"""What of a run can be drawn? Its metric rows as columns, and its changes with their intervals."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from postgrad.reports.html import tables
from postgrad.reports.html.figures import Estimate, Series
from postgrad.reports.html.notation import mapping, number, plain, rows
from postgrad.reports.html.tables import VERDICTS

MOST_SERIES = 12
EARLY, EARLY_WORDS = 0.02, "2 %"
"""Forgetting starts in the first steps: this part of a run has a panel of its own."""


@dataclass
class Curves:
    """The metric rows of one run as columns; x is the trained tokens so far (or the step, see `unit`)."""

    unit: str = "tokens trained"
    loss: list[tuple[float, float]] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    by_source: dict[str, list[tuple[float, float, float]]] = field(default_factory=dict)
    rate: list[tuple[float, float]] = field(default_factory=list)
    grad_norm: list[tuple[float, float]] = field(default_factory=list)
    penalties: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    sets: dict[str, list[tuple[float, float, float, float, float]]] = field(default_factory=dict)
    roles: dict[str, str] = field(default_factory=dict)
    choice: list[tuple[float, float]] = field(default_factory=list)
    last_step: int = 0
    steps: int = 0
    not_finite: int = 0
    x_of_step: list[tuple[float, float]] = field(default_factory=list)
    tasks: dict[str, dict[str, list[tuple[float, float]]]] = field(default_factory=dict)
    """By metric and task: what was reached at each look."""


def read_curves(metrics: Iterable[Mapping[str, object]]) -> Curves:
    """Metric rows to columns in one pass; what is no number becomes a gap."""
    curves = Curves()
    metric_rows = [row for row in metrics if isinstance(row, Mapping)]
    if any(number(row.get("trained")) is None for row in metric_rows):
        curves.unit = "step"
    previous = 0.0
    first: dict[str, float] = {}
    for row in metric_rows:
        step = number(row.get("step"))
        x = number(row.get("trained")) if curves.unit != "step" else step
        if x is None:
            continue
        curves.last_step = max(curves.last_step, int(step or 0))
        if step is not None:
            curves.x_of_step.append((step, x))
        if row.get("kind") == "evaluation":
            for name, entry in mapping(row.get("tasks")).items():
                value = number(mapping(entry).get("value"))
                if value is not None:
                    metric = plain(mapping(entry).get("metric"))
                    curves.tasks.setdefault(metric, {}).setdefault(name, []).append((x, value))
            value = number(mapping(row.get("choice")).get("value"))
            if value is not None:
                curves.choice.append((x, value))
            for name, entry in mapping(row.get("sets")).items():
                entry = mapping(entry)
                nats, change = number(entry.get("nats")), number(entry.get("change"))
                if nats is not None:
                    first.setdefault(name, nats)
                    change = nats - first[name] if change is None else change
                low, high = number(entry.get("low")), number(entry.get("high"))
                gap = math.nan  # a value that is not known
                point = (
                    x,
                    gap if nats is None else nats,
                    gap if change is None else change,
                    gap if low is None else low,
                    gap if high is None else high,
                )
                curves.sets.setdefault(name, []).append(point)
                if isinstance(entry.get("role"), str):
                    curves.roles.setdefault(name, str(entry["role"]))
            continue
        if row.get("kind") not in (None, "step"):
            continue
        curves.steps += 1
        loss = number(row.get("loss"))
        if loss is None and "loss" in row:
            curves.not_finite += 1
        curves.loss.append((x, math.nan if loss is None else loss))
        curves.weights.append(max(x - previous, 0.0) or 1.0)
        previous = x
        for name, pair in mapping(row.get("by_source")).items():
            total, tokens = (number(v) for v in (*rows(pair), None, None)[:2])
            if total is not None and tokens:
                curves.by_source.setdefault(name, []).append((x, total / tokens, tokens))
        for name, value in mapping(row.get("penalties")).items():
            pull = number(value)
            curves.penalties.setdefault(plain(name, 60), []).append((x, math.nan if pull is None else pull))
        rate, norm = number(row.get("rate")), number(row.get("grad_norm"))
        if rate is not None:
            curves.rate.append((x, rate))
        if norm is not None:
            curves.grad_norm.append((x, norm))
    for points in curves.sets.values():
        points.sort(key=lambda p: p[0])
    return curves


def change_series(
    name: str, points: Sequence[tuple[float, float, float, float, float]], colour: int | None = None
) -> Series:
    return Series(
        name,
        [(x, change) for x, _, change, _, _ in points],
        [(x, low, high) for x, _, _, low, high in points if math.isfinite(low) and math.isfinite(high)],
        markers=True,
        colour=colour,
    )


def estimates(entries: Mapping[str, Mapping[str, object]]) -> list[Estimate]:
    found = []
    for name, entry in entries.items():
        value = number(entry.get("difference"))
        if value is not None:
            said = tables.verdict(entry)
            low, high = number(entry.get("low")), number(entry.get("high"))
            found.append(Estimate(name, value, low, high, VERDICTS.get(said, ("open",))[0], said))
    return found

"""What of a run can be drawn? Its metric rows as columns, and its changes with their intervals."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from postgrad.reports.html import tables
from postgrad.reports.html.figures import ForestRow, Series
from postgrad.reports.html.notation import as_list, as_mapping, as_number, plain_text
from postgrad.reports.html.tables import VERDICTS

MAX_SERIES = 12
EARLY_SHARE, EARLY_TEXT = 0.02, "2 %"
"""Forgetting starts in the first steps: this part of a run has a panel of its own."""


@dataclass
class Curves:
    """The metric rows of one run as columns; x is the trained tokens so far (or the step, see `unit`)."""

    unit: str = "tokens trained"
    loss: list[tuple[float, float]] = field(default_factory=list)
    loss_weights: list[float] = field(default_factory=list)
    source_losses: dict[str, list[tuple[float, float, float]]] = field(default_factory=dict)
    learning_rates: list[tuple[float, float]] = field(default_factory=list)
    grad_norm: list[tuple[float, float]] = field(default_factory=list)
    penalties: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    set_losses: dict[str, list[tuple[float, float, float, float, float]]] = field(default_factory=dict)
    set_roles: dict[str, str] = field(default_factory=dict)
    selection_values: list[tuple[float, float]] = field(default_factory=list)
    last_step: int = 0
    step_count: int = 0
    non_finite_count: int = 0
    step_positions: list[tuple[float, float]] = field(default_factory=list)
    task_values: dict[str, dict[str, list[tuple[float, float]]]] = field(default_factory=dict)
    """By metric and task: what was reached at each look."""


def read_curves(metrics: Iterable[Mapping[str, object]]) -> Curves:
    """Metric rows to columns in one pass; what is no number becomes a gap."""
    curves = Curves()
    metric_rows = [row for row in metrics if isinstance(row, Mapping)]
    if any(as_number(row.get("trained")) is None for row in metric_rows):
        curves.unit = "step"
    previous = 0.0
    first: dict[str, float] = {}
    for row in metric_rows:
        step = as_number(row.get("step"))
        x = as_number(row.get("trained")) if curves.unit != "step" else step
        if x is None:
            continue
        curves.last_step = max(curves.last_step, int(step or 0))
        if step is not None:
            curves.step_positions.append((step, x))
        if row.get("kind") == "evaluation":
            for name, entry in as_mapping(row.get("tasks")).items():
                value = as_number(as_mapping(entry).get("value"))
                if value is not None:
                    metric = plain_text(as_mapping(entry).get("metric"))
                    curves.task_values.setdefault(metric, {}).setdefault(name, []).append((x, value))
            value = as_number(as_mapping(row.get("choice")).get("value"))
            if value is not None:
                curves.selection_values.append((x, value))
            for name, entry in as_mapping(row.get("sets")).items():
                entry = as_mapping(entry)
                nats, change = as_number(entry.get("nats")), as_number(entry.get("change"))
                if nats is not None:
                    first.setdefault(name, nats)
                    change = nats - first[name] if change is None else change
                low, high = as_number(entry.get("low")), as_number(entry.get("high"))
                gap = math.nan  # a value that is not known
                point = (
                    x,
                    gap if nats is None else nats,
                    gap if change is None else change,
                    gap if low is None else low,
                    gap if high is None else high,
                )
                curves.set_losses.setdefault(name, []).append(point)
                if isinstance(entry.get("role"), str):
                    curves.set_roles.setdefault(name, str(entry["role"]))
            continue
        if row.get("kind") not in (None, "step"):
            continue
        curves.step_count += 1
        loss = as_number(row.get("loss"))
        if loss is None and "loss" in row:
            curves.non_finite_count += 1
        curves.loss.append((x, math.nan if loss is None else loss))
        curves.loss_weights.append(max(x - previous, 0.0) or 1.0)
        previous = x
        for name, pair in as_mapping(row.get("by_source")).items():
            total, tokens = (as_number(v) for v in (*as_list(pair), None, None)[:2])
            if total is not None and tokens:
                curves.source_losses.setdefault(name, []).append((x, total / tokens, tokens))
        for name, value in as_mapping(row.get("penalties")).items():
            pull = as_number(value)
            curves.penalties.setdefault(plain_text(name, 60), []).append((x, math.nan if pull is None else pull))
        rate, norm = as_number(row.get("rate")), as_number(row.get("grad_norm"))
        if rate is not None:
            curves.learning_rates.append((x, rate))
        if norm is not None:
            curves.grad_norm.append((x, norm))
    for points in curves.set_losses.values():
        points.sort(key=lambda p: p[0])
    return curves


def change_series(
    name: str, points: Sequence[tuple[float, float, float, float, float]], colour: int | None = None
) -> Series:
    return Series(
        name,
        [(x, change) for x, _, change, _, _ in points],
        [(x, low, high) for x, _, _, low, high in points if math.isfinite(low) and math.isfinite(high)],
        has_markers=True,
        colour=colour,
    )


def change_estimates(entries: Mapping[str, Mapping[str, object]]) -> list[ForestRow]:
    found = []
    for name, entry in entries.items():
        value = as_number(entry.get("difference"))
        if value is not None:
            said = tables.verdict(entry)
            low, high = as_number(entry.get("low")), as_number(entry.get("high"))
            found.append(ForestRow(name, value, low, high, VERDICTS.get(said, ("open",))[0], said))
    return found

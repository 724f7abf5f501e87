"""The metrics rows of a run as columns, ready to draw."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from postgrad.foreign_text import plain_text
from postgrad.lineage.metrics import EvaluationRow, MetricsRow, SkippedStepRow, StepRow
from postgrad.lineage.record import SetChange
from postgrad.reports.html.charts import ForestRow, Point, Series
from postgrad.reports.html.notation import HasEnds, finite
from postgrad.reports.html.verdicts import tone_of, verdict_of

MAX_SERIES = 12
EARLY_SHARE, EARLY_TEXT = 0.02, "2 %"
"""Forgetting starts in the first steps: this part of a run has a panel of its own."""

X_LABEL = "trained tokens"


class SetPoint(NamedTuple):
    """A held-out set at one evaluation; `low` to `high` is the interval of `change`."""

    x: float
    nats: float
    change: float
    low: float
    high: float


@dataclass
class Curves:
    """The metrics rows of one run as columns; x is the trained tokens so far."""

    loss: list[Point] = field(default_factory=list)
    loss_weights: list[float] = field(default_factory=list)
    """Trained tokens of each step."""
    source_losses: dict[str, list[tuple[float, float, float]]] = field(default_factory=dict)
    """By source: x, loss, trained tokens."""
    learning_rates: list[Point] = field(default_factory=list)
    """By step, not by tokens."""
    grad_norm: list[Point] = field(default_factory=list)
    penalties: dict[str, list[Point]] = field(default_factory=dict)
    set_losses: dict[str, list[SetPoint]] = field(default_factory=dict)
    set_roles: dict[str, str] = field(default_factory=dict)
    selection_values: list[Point] = field(default_factory=list)
    task_values: dict[str, dict[str, list[Point]]] = field(default_factory=dict)
    """By metric and task."""
    skipped_steps: list[SkippedStepRow] = field(default_factory=list)
    last_step: int = 0
    non_finite_count: int = 0

    def _add_step(self, row: StepRow) -> None:
        x = row.trained_tokens
        loss = finite(row.loss)
        self.non_finite_count += loss is None
        self.loss_weights.append(max(x - (self.loss[-1][0] if self.loss else 0), 0.0) or 1.0)
        self.loss.append((x, math.nan if loss is None else loss))
        for name, (total, tokens) in row.loss_sums_by_source.items():
            if tokens:
                self.source_losses.setdefault(name, []).append((x, total / tokens, tokens))
        for name, value in row.penalties.items():
            self.penalties.setdefault(plain_text(name, 60), []).append((x, value))
        self.learning_rates.append((row.step, row.learning_rate))
        if row.grad_norm is not None:
            self.grad_norm.append((x, row.grad_norm))

    def _add_evaluation(self, row: EvaluationRow) -> None:
        x = row.trained_tokens
        for name, task in row.tasks.items():
            self.task_values.setdefault(plain_text(task.metric), {}).setdefault(name, []).append((x, task.value))
        if row.checkpoint_selection:
            self.selection_values.append((x, row.checkpoint_selection.value))
        for name, entry in row.sets.items():
            point = SetPoint(x, entry.nats, entry.change, *drawn_ends(entry))
            self.set_losses.setdefault(name, []).append(point)
            self.set_roles.setdefault(name, entry.role)


def read_curves(metrics: Iterable[MetricsRow]) -> Curves:
    """Metrics rows to columns in one pass; values that are not finite become gaps."""
    curves = Curves()
    for row in metrics:
        curves.last_step = max(curves.last_step, row.step)
        if isinstance(row, EvaluationRow):
            curves._add_evaluation(row)
        elif isinstance(row, SkippedStepRow):
            curves.skipped_steps.append(row)
        else:
            curves._add_step(row)
    return curves


def change_series(name: str, points: Iterable[SetPoint], colour: int | None = None) -> Series:
    points = list(points)
    return Series(
        name,
        [(p.x, p.change) for p in points],
        [(p.x, p.low, p.high) for p in points if math.isfinite(p.low) and math.isfinite(p.high)],
        has_markers=True,
        colour=colour,
    )


def drawn_ends(entry: HasEnds) -> tuple[float, float]:
    """The ends of an interval as a chart takes them; NaN, which is not drawn, without one."""
    return (math.nan if entry.low is None else entry.low), (math.nan if entry.high is None else entry.high)


def change_estimates(changes: Mapping[str, SetChange]) -> list[ForestRow]:
    return [
        ForestRow(name, c.difference, finite(c.low), finite(c.high), tone_of(c, "open"), verdict_of(c))
        for name, c in changes.items()
        if c.difference is not None
    ]

"""Checkpoint selection: the step that is published, and early stopping.

The best checkpoint by a held-out set is published, among those that forget little. An evaluation scores the whole set. The
selection is a pure function of the evaluations so far, which are in `metrics.jsonl`; so a resumed run selects what an
uninterrupted one would have.

    candidates    the evaluations from `first_step` on: after the warm-up, after `burn_in`, and after the first 2 % of the
                  steps, where every loss fluctuates (the stability gap)
    selected      the best candidate; the earliest of several equally good ones
    stop          after `patience` candidates in a row that do not improve on the best before them by more than `min_delta`,
                  or after one that reaches `stop_at`
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from postgrad.config import stage as s
from postgrad.config.quantities import length_in_steps
from postgrad.errors import StageError, suggest_nearest
from postgrad.evaluation.classification_metrics import metric_names
from postgrad.evaluation.held_out import HeldOutSet
from postgrad.evaluation.perplexity import Scores
from postgrad.lineage.metrics import EvaluationRow, SelectionRow
from postgrad.lineage.record import PublishedCheckpoint
from postgrad.optim import lr_schedules
from postgrad.stats.forgetting import MIN_LOSS

_STABILITY_GAP_SHARE = 0.02
"""The first share of a stage, in which the stability gap is; see `evaluation_steps`."""
_LOSSES = ("loss", "MSE")
"""Metrics that are better when lower."""


@dataclass(frozen=True)
class CheckpointEvaluation:
    """The selecting value at a step, and the upper bound on the largest relative rise of a retained set's loss."""

    step: int
    trained: int
    value: float
    rise: float | None = None


@dataclass(frozen=True)
class SelectionRule:
    """The metric that selects a checkpoint, and when training stops early."""

    set: str
    metric: str
    patience: int | None
    min_delta: float
    first_step: int
    """The first step that can be selected."""
    max_forgetting: float | None = None
    stop_at: float | None = None

    @property
    def less_is_better(self) -> bool:
        """Whether the metric is a loss."""
        return self.metric in _LOSSES

    def is_watched(self, held_out: HeldOutSet) -> bool:
        """Whether the rule depends on a set, so that each evaluation scores all of it."""
        return held_out.name == self.set or (self.max_forgetting is not None and held_out.role == "retained")

    def is_within_limit(self, evaluation: CheckpointEvaluation) -> bool:
        """Whether no retained set has been forgotten more than allowed."""
        return self._excess_forgetting(evaluation) == 0

    def has_reached_target(self, evaluation: CheckpointEvaluation) -> bool:
        """Whether training may stop at this value."""
        if self.stop_at is None or not self.is_within_limit(evaluation):
            return False
        return evaluation.value <= self.stop_at if self.less_is_better else evaluation.value >= self.stop_at

    def is_better(self, evaluation: CheckpointEvaluation, other: CheckpointEvaluation, min_delta: float = 0.0) -> bool:
        """Whether `evaluation` is better than `other` by more than `min_delta`; less excess forgetting is always better."""
        excess, other_excess = self._excess_forgetting(evaluation), self._excess_forgetting(other)
        if excess != other_excess:
            return excess < other_excess
        return self._value_as_loss(evaluation) < self._value_as_loss(other) - min_delta

    def _excess_forgetting(self, evaluation: CheckpointEvaluation) -> float:
        if self.max_forgetting is None or evaluation.rise is None:
            return 0.0
        return max(0.0, evaluation.rise - self.max_forgetting)

    def _value_as_loss(self, evaluation: CheckpointEvaluation) -> float:
        if math.isnan(evaluation.value):
            return math.inf
        return evaluation.value if self.less_is_better else -evaluation.value


@dataclass(frozen=True)
class SelectionState:
    """The selection after some evaluations."""

    best: CheckpointEvaluation | None
    candidates: int
    candidates_since_gain: int
    """Candidates in a row without an improvement."""
    should_stop: bool


def compute_selection_state(evaluations: Iterable[CheckpointEvaluation], rule: SelectionRule) -> SelectionState:
    """The selection after these evaluations, in the order of their steps."""
    best: CheckpointEvaluation | None = None
    # Unlike the best, the reference only moves by more than the minimum delta, so slow progress adds up.
    reference: CheckpointEvaluation | None = None
    candidates = since = 0
    has_reached_target = False
    for evaluation in evaluations:
        if evaluation.step < rule.first_step:
            continue
        candidates += 1
        has_reached_target |= rule.has_reached_target(evaluation)
        if best is None or rule.is_better(evaluation, best):
            best = evaluation
        if reference is None or rule.is_better(evaluation, reference, rule.min_delta):
            reference, since = evaluation, 0
        else:
            since += 1
    is_patience_over = rule.patience is not None and since >= rule.patience
    return SelectionState(best, candidates, since, is_patience_over or has_reached_target)


def make_selection_rule(
    config: s.CheckpointSelectionConfig | None,
    held_out: Sequence[HeldOutSet],
    steps: int,
    tokens: int,
    schedule: lr_schedules.Schedule,
) -> SelectionRule | None:
    """The selection rule of a stage. Raises `StageError` for an unknown set or metric."""
    if config is None:
        return None
    by_name = {h.name: h for h in held_out}
    selectable = [h.name for h in held_out if h.role != "test"]
    selecting_set = by_name.get(config.set)
    if selecting_set is None or selecting_set.role == "test":
        raise StageError(
            f"unknown held-out set {config.set!r}"
            if selecting_set is None
            else f"'{config.set}' is a test set, which is scored once, after training",
            where="save.choose.set",
            expected=f"one of {', '.join(selectable)}" if selectable else "a held-out set that is not a test set",
            hint=suggest_nearest(config.set, selectable),
        )
    problem = selecting_set.problem
    metrics = ["loss", *(metric_names(problem, selecting_set.labels) if problem else ())]
    if config.metric not in metrics:
        raise StageError(
            f"'{config.set}' has no metric {config.metric!r}",
            where="save.choose.metric",
            expected=" | ".join(metrics),
            hint=suggest_nearest(config.metric, metrics),
        )
    if config.max_forgetting is not None and not any(h.role == "retained" for h in held_out):
        raise StageError(
            "a limit on forgetting needs a retained set",
            where="save.choose.max_forgetting",
            hint="name old text under evaluation.retained, or give a source with role: replay a `held_out` share",
        )
    burn_in = math.ceil(length_in_steps(config.burn_in, steps, tokens) - 1e-9)
    if burn_in > steps:
        raise StageError(
            f"no step before {burn_in:,} can be selected, and the stage has {steps:,} steps",
            where="save.choose.burn_in",
        )
    first_step = max(1, burn_in, math.ceil(_STABILITY_GAP_SHARE * steps), lr_schedules.peak_step(schedule, steps))
    return SelectionRule(
        config.set, config.metric, config.patience, config.min_delta, first_step, config.max_forgetting, config.stop_at
    )


def summarize_evaluation(
    rule: SelectionRule, row: EvaluationRow, scores: Mapping[str, Scores], start_scores: Mapping[str, Scores]
) -> CheckpointEvaluation:
    """The evaluation of a step: `row` is its line of metrics, `scores` are those of the sets that the rule watches."""
    set_scores = scores[rule.set]
    value = set_scores.nats if rule.metric == "loss" else set_scores.compute_metrics()[rule.metric]["value"]
    rises = [
        (entry.change if entry.high is None else entry.high) / max(start_scores[name].nats, MIN_LOSS)
        for name, entry in row.sets.items()
        if entry.role == "retained"
    ]
    relative_high = max(rises) if rule.max_forgetting is not None else None
    return CheckpointEvaluation(row.step, row.trained_tokens, value, relative_high)


class CheckpointSelector:
    """The evaluations of a run so far, and the selection that follows from them."""

    def __init__(self, rule: SelectionRule, rows: Iterable[EvaluationRow]) -> None:
        """`rows`: the lines of metrics so far."""
        self.rule = rule
        self.evaluations = [
            CheckpointEvaluation(row.step, row.trained_tokens, selection.value, selection.relative_high)
            for row in rows
            if (selection := row.checkpoint_selection)
        ]

    def add(self, evaluation: CheckpointEvaluation) -> SelectionRow:
        """Add an evaluation; returns the entry for its line of metrics."""
        self.evaluations.append(evaluation)
        best = self.state.best
        return SelectionRow(
            set=self.rule.set,
            metric=self.rule.metric,
            value=evaluation.value,
            relative_high=evaluation.rise,
            best_step=best.step if best else None,
        )

    @property
    def state(self) -> SelectionState:
        """The selection after the evaluations so far."""
        return compute_selection_state(self.evaluations, self.rule)

    def as_record(self, last_step: int) -> PublishedCheckpoint:
        """The selection, for the record."""
        rule, state = self.rule, self.state
        best = state.best
        assert best is not None
        return PublishedCheckpoint(
            set=rule.set,
            metric=rule.metric,
            patience=rule.patience,
            min_delta=rule.min_delta,
            stop_at=rule.stop_at,
            first_step=rule.first_step,
            max_forgetting=rule.max_forgetting,
            step=best.step,
            trained_tokens=best.trained,
            value=best.value,
            relative_high=best.rise,
            last_step=last_step,
            evaluations=state.candidates,
            evaluations_since_best=state.candidates_since_gain,
            stopped_early=state.should_stop,
            within_max_forgetting=rule.is_within_limit(best),
        )


def selection_rule_line(rule: SelectionRule) -> str:
    """A rule in words, for a plan."""
    parts = [f"publishes the best checkpoint by {rule.metric} on all of {rule.set}, from step {rule.first_step:,} on"]
    if rule.max_forgetting is not None:
        parts.append(f"if no retained set's loss has risen by more than {rule.max_forgetting:.2%}")
    if rule.patience is not None:
        delta = f" of more than {rule.min_delta:g}" if rule.min_delta else ""
        parts.append(f"stops after {rule.patience} evaluations without an improvement{delta}")
    if rule.stop_at is not None:
        parts.append(
            f"stops when {rule.metric} is {'at most' if rule.less_is_better else 'at least'} {rule.stop_at:.4g}"
        )
    return "; ".join(parts)

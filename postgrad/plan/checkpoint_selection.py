"""Which step's model is published, and when is it time to stop? The best by a held-out set, among those that forget little.

A look is one scoring of the whole set. What follows from the looks so far is a pure function of them, and they stand in
`metrics.jsonl`; so a run that was killed and resumed chooses what it would have chosen.

    candidates    the looks from `first` on: behind the warm-up and the first 2 % of the steps, where the loss of anything
                  swings (the stability gap), and behind `burn_in`
    chosen        the best candidate; the earliest of several that are as good
    the end       `patience` candidates in a row, none of which surpasses the best before them by more than `min_delta`; or one
                  that is `stop_at`
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

_STABILITY_GAP_SHARE = 0.02
"""The share of a stage in which the stability gap is looked for; see `look_steps`."""
_LOSSES = ("loss", "MSE")
"""Those of which less is better."""


@dataclass(frozen=True)
class CheckpointEvaluation:
    """What a look saw: the value that decides, and the largest share by which a retained set's loss may have risen."""

    step: int
    trained: int
    value: float
    rise: float | None = None


@dataclass(frozen=True)
class SelectionRule:
    """What is chosen by. `first`: the first step that can be chosen."""

    set: str
    by: str
    patience: int | None
    gain: float
    first: int
    max_forgetting: float | None = None
    enough: float | None = None

    @property
    def less_is_better(self) -> bool:
        """Whether the value is a loss."""
        return self.by in _LOSSES

    def is_watched(self, held_out: HeldOutSet) -> bool:
        """Whether a set decides, so that each look scores all of it."""
        return held_out.name == self.set or (self.max_forgetting is not None and held_out.role == "retained")

    def is_within_limit(self, evaluation: CheckpointEvaluation) -> bool:
        """Whether a look forgot no more than is allowed."""
        return self._excess_forgetting(evaluation) == 0

    def has_reached_target(self, evaluation: CheckpointEvaluation) -> bool:
        """Whether a look is good enough to end with."""
        if self.enough is None or not self.is_within_limit(evaluation):
            return False
        return evaluation.value <= self.enough if self.less_is_better else evaluation.value >= self.enough

    def is_better(self, evaluation: CheckpointEvaluation, other: CheckpointEvaluation, gain: float = 0.0) -> bool:
        """Whether `look` is better than `other` by more than `min_delta`; one that forgot too much is worse than any other."""
        over, others = self._excess_forgetting(evaluation), self._excess_forgetting(other)
        if over != others:
            return over < others
        return self._value_as_loss(evaluation) < self._value_as_loss(other) - gain

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
    """What follows from the looks so far."""

    best: CheckpointEvaluation | None
    candidates: int
    candidates_since_gain: int
    """Candidates in a row without a gain."""
    should_stop: bool


def compute_selection_state(evaluations: Iterable[CheckpointEvaluation], rule: SelectionRule) -> SelectionState:
    """Where a choice stands after these looks, in the order of their steps."""
    best: CheckpointEvaluation | None = None
    mark: CheckpointEvaluation | None = None  # what has to be surpassed by more than the gain
    candidates = since = 0
    reached = False
    for look in evaluations:
        if look.step < rule.first:
            continue
        candidates += 1
        reached |= rule.has_reached_target(look)
        if best is None or rule.is_better(look, best):
            best = look
        if mark is None or rule.is_better(look, mark, rule.gain):
            mark, since = look, 0
        else:
            since += 1
    tired = rule.patience is not None and since >= rule.patience
    return SelectionState(best, candidates, since, tired or reached)


def make_selection_rule(
    config: s.CheckpointSelectionConfig | None,
    held_out: Sequence[HeldOutSet],
    steps: int,
    tokens: int,
    schedule: lr_schedules.Schedule,
) -> SelectionRule | None:
    """What a stage asks to choose by. Raises `StageError` for a set or a metric that there is not."""
    if config is None:
        return None
    by_name = {h.name: h for h in held_out}
    open_ = [h.name for h in held_out if h.role != "test"]
    found = by_name.get(config.set)
    if found is None or found.role == "test":
        raise StageError(
            f"there is no held-out set {config.set!r}"
            if found is None
            else f"'{config.set}' is a test set, which is looked at once, when everything is chosen",
            where="save.choose.set",
            expected=f"one of {', '.join(open_)}" if open_ else "a held-out set that is no test set",
            hint=suggest_nearest(config.set, open_),
        )
    known = ["loss", *(metric_names(found.problem, found.labels) if found.problem else ())]
    if config.metric not in known:
        raise StageError(
            f"'{config.set}' has no {config.metric!r}",
            where="save.choose.metric",
            expected=" | ".join(known),
            hint=suggest_nearest(config.metric, known),
        )
    if config.max_forgetting is not None and not any(h.role == "retained" for h in held_out):
        raise StageError(
            "there is no retained set that could be forgotten",
            where="save.choose.max_forgetting",
            hint="name old text under evaluation.retained, or give a source with role: replay a `held_out` share",
        )
    least = math.ceil(length_in_steps(config.burn_in, steps, tokens) - 1e-9)
    if least > steps:
        raise StageError(
            f"nothing could be chosen before step {least:,}, and the stage has {steps:,}", where="save.choose.burn_in"
        )
    first = max(1, least, math.ceil(_STABILITY_GAP_SHARE * steps), lr_schedules.peak_step(schedule, steps))
    return SelectionRule(
        config.set, config.metric, config.patience, config.min_delta, first, config.max_forgetting, config.stop_at
    )


def summarize_evaluation(
    rule: SelectionRule, row: EvaluationRow, scores: Mapping[str, Scores], start_scores: Mapping[str, Scores]
) -> CheckpointEvaluation:
    """What an evaluation saw: `row` is its line of metrics, `scores` are of the sets that the rule watches, as a whole."""
    own = scores[rule.set]
    value = own.nats if rule.by == "loss" else own.compute_metrics()[rule.by]["value"]
    rises = [
        entry.high / max(start_scores[name].nats, 1e-12) for name, entry in row.sets.items() if entry.role == "retained"
    ]
    relative_high = max(rises) if rule.max_forgetting is not None else None
    return CheckpointEvaluation(row.step, row.trained_tokens, value, relative_high)


class CheckpointSelector:
    """The looks of a run so far, and what follows from them."""

    def __init__(self, rule: SelectionRule, rows: Iterable[EvaluationRow]) -> None:
        """`rows`: the lines of metrics that are there already."""
        self.rule = rule
        self.evaluations = [
            CheckpointEvaluation(row.step, row.trained_tokens, selection.value, selection.relative_high)
            for row in rows
            if (selection := row.checkpoint_selection)
        ]

    def add(self, evaluation: CheckpointEvaluation) -> SelectionRow:
        """Take in a look; returns what its line of metrics says of it."""
        self.evaluations.append(evaluation)
        best = self.state.best
        return SelectionRow(
            set=self.rule.set,
            metric=self.rule.by,
            value=evaluation.value,
            relative_high=evaluation.rise,
            best_step=best.step if best else None,
        )

    @property
    def state(self) -> SelectionState:
        """Where the choice stands."""
        return compute_selection_state(self.evaluations, self.rule)

    def as_record(self, last_step: int) -> PublishedCheckpoint:
        """What a record says of the choice, when `last` was the last step."""
        rule, state = self.rule, self.state
        best = state.best
        assert best is not None
        return PublishedCheckpoint(
            set=rule.set,
            metric=rule.by,
            patience=rule.patience,
            min_delta=rule.gain,
            stop_at=rule.enough,
            first_step=rule.first,
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
    parts = [
        f"the published model is the best by {rule.by} on {rule.set}, looked at as a whole from step {rule.first:,} on"
    ]
    if rule.max_forgetting is not None:
        parts.append(f"where no retained set's loss has risen by more than {rule.max_forgetting:.2%}")
    if rule.patience is not None:
        gain = f" of more than {rule.gain:g}" if rule.gain else ""
        parts.append(f"training ends after {rule.patience} looks without a gain{gain}")
    if rule.enough is not None:
        parts.append(f"training ends when that is {'at most' if rule.less_is_better else 'at least'} {rule.enough:.4g}")
    return "; ".join(parts)

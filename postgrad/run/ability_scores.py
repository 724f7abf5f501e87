"""Scores of generated probes: of one model, or before and after a stage, with the mean over the abilities and the gate."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from postgrad.config.abilities import AbilitiesConfig
from postgrad.data.read.row_kinds import RowKind
from postgrad.evaluation.generation_metrics import TaskPredictions, joint_change, metric_summary
from postgrad.evaluation.retention_gate import ability_gate
from postgrad.lineage.record import AbilitiesRecord, Difference
from postgrad.plan.prompted_task import PromptedTask
from postgrad.run.task_scores import AllAnswers, task_rows


def mean_score(tasks: Sequence[PromptedTask], answers: AllAnswers) -> float:
    """The mean over abilities of the first metric of each."""
    return float(np.mean([metric_summary(task.metrics[0], answers[task.name])["value"] for task in tasks]))


def mean_change(tasks: Sequence[PromptedTask], pairs: Sequence[tuple[TaskPredictions, TaskPredictions]]) -> Difference:
    """The change of the mean, from the answers of two models to the same probes of each ability."""
    return Difference(**joint_change([(task.metrics[0], *pair) for task, pair in zip(tasks, pairs, strict=True)]))


def abilities_record(
    config: AbilitiesConfig | None,
    tasks: Sequence[PromptedTask],
    before: AllAnswers,
    after: AllAnswers,
    max_drop: float | None = None,
) -> AbilitiesRecord | None:
    """Abilities before and after, as a record holds them; `after` is empty for a stopped run. None without probes."""
    if config is None or not tasks:
        return None
    change = mean_change(tasks, [(before[task.name], after[task.name]) for task in tasks]) if after else None
    rows = task_rows(tasks, before, after)
    return AbilitiesRecord(
        form="chat" if any(task.kind == RowKind.INSTRUCTION for task in tasks) else "plain",
        seed=config.seed,
        before=mean_score(tasks, before),
        after=mean_score(tasks, after) if after else None,
        change=change,
        tasks=rows,
        gate=ability_gate(change, rows, max_drop),
    )

"""The retention gate: whether losses on retained sets, and scores of abilities, stayed within the bounds of a stage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from postgrad.evaluation.before_after import AllScores
from postgrad.lineage.record import AbilityGate, Difference, RetentionGate, SetChange, TaskRecord, WorstSet


def retention_gate(
    changes: Mapping[str, SetChange], before: AllScores, max_forgetting: float | None
) -> RetentionGate | None:
    """Whether the loss of every retained set rose by at most `max_forgetting`, at the upper end of its interval."""
    if max_forgetting is None:
        return None
    retained = {name: c for name, c in changes.items() if c.role == "retained"}
    name = max(retained, key=lambda n: retained[n].relative_high or 0.0)
    difference, high = retained[name].relative_difference or 0.0, retained[name].relative_high or 0.0
    return RetentionGate(
        max_forgetting=max_forgetting,
        loss_rise_limit=max_forgetting * min(before[n].nats for n in retained),
        worst=WorstSet(set=name, relative_difference=difference, relative_high=high),
        passed=high <= max_forgetting,
    )


def ability_gate(mean: Difference | None, tasks: Sequence[TaskRecord], max_drop: float | None) -> AbilityGate | None:
    """Whether abilities were kept: the mean may not have dropped by more than `max_drop` at the upper end of its interval, and
    none alone by more at the lower end, so that seven that are kept do not hide one that is lost."""
    if max_drop is None or mean is None:
        return None
    drop = 0.0 - (mean.difference or 0.0)  # which is no -0.0
    high = drop if mean.low is None else 0.0 - mean.low
    lost = [
        task.name
        for task in tasks
        if (change := task.changes.get(task.metrics[0])) and change.high is not None and -change.high > max_drop
    ]
    return AbilityGate(max_drop=max_drop, drop=drop, drop_high=high, lost=lost, passed=high <= max_drop and not lost)

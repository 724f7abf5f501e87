"""The retention gate: whether the loss on every retained set stayed within a stage's `max_forgetting`."""

from __future__ import annotations

from collections.abc import Mapping

from postgrad.evaluation.before_after import AllScores
from postgrad.lineage.record import RetentionGate, SetChange, WorstSet


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

"""The retention gate: whether the loss on every retained set stayed within a stage's `max_forgetting`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from postgrad.evaluation.before_after import AllScores


def retention_gate(
    changes: Mapping[str, dict[str, Any]], before: AllScores, limit: float | None
) -> dict[str, Any] | None:
    """Whether the loss of every retained set rose by at most the share `limit`, at the upper end of its interval.

    `level` is the strictest of the limits in nats per token, for drawing.
    """
    if limit is None:
        return None
    retained = {name: c for name, c in changes.items() if c["role"] == "retained"}
    name = max(retained, key=lambda n: retained[n]["relative_high"])
    worst = retained[name]
    return {
        "max_forgetting": limit,
        "level": limit * min(before[n].nats for n in retained),
        "worst": {"set": name, "rise": worst["relative"], "high": worst["relative_high"]},
        "passed": worst["relative_high"] <= limit,
    }

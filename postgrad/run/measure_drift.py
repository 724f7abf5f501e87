"""Drift of the trained model from the start model: KL divergence of its predictions, and weight changes by layer."""

from __future__ import annotations

import math
from typing import Any

from postgrad.distributed.world import World
from postgrad.evaluation.drift import compute_drift, weight_drift
from postgrad.models.model import Model, wrap_model
from postgrad.plan.plan import Plan
from postgrad.tuning.open_model import open_model


def measure_drift(plan: Plan, after: Model, world: World) -> dict[str, Any] | None:
    """Drift by held-out set and by layer; None where the stage adds a task layer, whose initial predictions mean nothing."""
    opened = open_model(plan.model.start, plan.model.task, layer=plan.model.task_layer)
    if opened.new_weights:
        return None
    before = wrap_model(opened.model, plan.model.task).to(world.device)
    tokens = plan.stage.evaluation.drift_tokens
    sets: dict[str, Any] = {}
    for old, new in zip(plan.evaluation.scored_sets_before, plan.evaluation.scored_sets, strict=True):
        if new.has_distribution:
            both = old.take_tokens(tokens), new.take_tokens(tokens)
            drift = compute_drift(before, after, both, context=plan.model.context_length)
            sets[new.name] = {"role": new.role, **drift.summary()}
    weights = weight_drift(before.pretrained, after.pretrained)
    return {
        "sets": sets,
        "weights": {
            name: drift.relative_change for name, drift in weights.items() if math.isfinite(drift.relative_change)
        },
        "changed": {
            "numbers": sum(drift.changed_count for drift in weights.values()),
            "of": sum(drift.total_count for drift in weights.values()),
        },
    }

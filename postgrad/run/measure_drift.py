"""The drift of the trained model from the start model: predictions by held-out set, and weights by part."""

from __future__ import annotations

import math

from postgrad.distributed.fsdp import reshard
from postgrad.distributed.world import World
from postgrad.evaluation.drift import compute_drift, weight_drift
from postgrad.lineage.record import ChangedWeights, DriftRecord
from postgrad.models.model import Model
from postgrad.plan.plan import Plan
from postgrad.run.tuned_model import load_start_model


def measure_drift(plan: Plan, after: Model, world: World) -> DriftRecord | None:
    """Compare the trained model with the start model; None when the start model lacks the task layer."""
    before, new_weights = load_start_model(plan, world)
    if new_weights:
        return None
    tokens = plan.stage.evaluation.drift_tokens
    sets = {
        new.name: compute_drift(
            before, after, (old.take_tokens(tokens), new.take_tokens(tokens)), context=plan.model.context_length
        ).summary(new.role)
        for old, new in zip(plan.evaluation.scored_sets_before, plan.evaluation.scored_sets, strict=True)
        if new.has_distribution
    }
    for model in (before, after):
        reshard(model)
    weights = weight_drift(before.pretrained, after.pretrained)
    changes = {name: part.relative_change for name, part in weights.items()}
    return DriftRecord(
        sets=sets,
        relative_weight_change={name: change for name, change in changes.items() if math.isfinite(change)},
        changed_weights=ChangedWeights(
            count=sum(part.changed_count for part in weights.values()),
            total=sum(part.total_count for part in weights.values()),
        ),
    )

"""How far has a stage moved its model, by what it says and by its layers?"""

from __future__ import annotations

import math
from typing import Any

from postgrad.distributed.world import World
from postgrad.evaluation.drift import compute_drift, weight_drift
from postgrad.models.model import Model, wrap_model
from postgrad.plan.plan import Plan
from postgrad.tuning.open_model import open_model


def measure_drift(plan: Plan, after: Model, world: World) -> dict[str, Any] | None:
    """The trained model held against the start model, set by set; None where there is nothing to be compared.

    A task layer that the start model did not have said nothing that could be kept.
    """
    opened = open_model(plan.model.start, plan.model.task, layer=plan.model.task_layer)
    if opened.new_weights:
        return None
    before = wrap_model(opened.model, plan.model.task).to(world.device)
    tokens = plan.stage.evaluation.drift_tokens
    sets: dict[str, Any] = {}
    for old, new in zip(plan.evaluation.scored_sets_before, plan.evaluation.scored_sets, strict=True):
        if new.has_distribution:
            both = old.take_tokens(tokens), new.take_tokens(tokens)
            found = compute_drift(before, after, both, context=plan.model.context_length).summary()
            sets[new.name] = {"role": new.role, **found}
    weights = weight_drift(before.pretrained, after.pretrained)
    return {
        "sets": sets,
        "weights": {
            name: found.relative_change for name, found in weights.items() if math.isfinite(found.relative_change)
        },
        "changed": {
            "numbers": sum(found.changed_count for found in weights.values()),
            "of": sum(found.total_count for found in weights.values()),
        },
    }

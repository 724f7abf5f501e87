"""How far has a stage moved its model, by what it says and by its layers?"""

from __future__ import annotations

import math
from typing import Any

from postgrad.distributed.world import World
from postgrad.evaluation.drift import SAYS_IN_SHARES, drift, weight_drift
from postgrad.models.model import Model, model_for
from postgrad.plan.plan import Plan
from postgrad.tuning.open_model import open_model


def drift_of(plan: Plan, after: Model, world: World) -> dict[str, Any] | None:
    """The trained model held against the start model, set by set; None where there is nothing to be compared.

    A task layer that the start model did not have said nothing that could be kept.
    """
    opened = open_model(plan.start, plan.task, layer=plan.layer)
    if opened.new:
        return None
    before = model_for(opened.model, plan.task).to(world.device)
    tokens = plan.stage.evaluation.drift_tokens
    sets: dict[str, Any] = {}
    for old, new in zip(plan.looked_at_before, plan.looked_at, strict=True):
        if new.task in SAYS_IN_SHARES:
            both = old.first(tokens), new.first(tokens)
            found = drift(before, after, both, context=plan.context).summary()
            sets[new.name] = {"role": new.role, **found}
    weights = weight_drift(before.pretrained, after.pretrained)
    return {
        "sets": sets,
        "weights": {name: found.moved for name, found in weights.items() if math.isfinite(found.moved)},
        "changed": {
            "numbers": sum(found.changed for found in weights.values()),
            "of": sum(found.numbers for found in weights.values()),
        },
    }

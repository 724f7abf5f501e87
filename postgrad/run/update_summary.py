"""How much of a model does an update move, and what does that take? Told by `check` and in the record."""

from __future__ import annotations

from typing import Any

import torch

from postgrad.hardware.memory import readable
from postgrad.optim.optimizer import Weights
from postgrad.optim.sparse_update import Fewer, Moving
from postgrad.plan.plan import Plan
from postgrad.run.build import Subject, make_moving

_BY = {
    "momentum": "the numbers of each matrix with the largest momentum",
    "magnitude": "the rows with the largest outputs",
}


def about_update(plan: Plan, moving: Moving) -> dict[str, Any] | None:
    """Which share of what moves at an update, as plain data; None where all does."""
    spec = plan.stage.optimizer.update
    if spec is None or not isinstance(moving, Fewer):
        return None
    chosen, others = (sum(m.numel() for m in masters) for masters in (moving.chosen, moving.others))
    return {
        "kind": spec.kind,
        "share": spec.share,
        "moved": moving.count,
        "of": chosen + others,
        "whole": others,
        "bytes": 4 * chosen,
    }


def check_update(plan: Plan, subject: Subject) -> dict[str, Any] | None:
    """The same before there is a run. Raises what is wrong with it."""
    weights = Weights(subject.model, subject.tuning, torch.float32, split=False)
    return about_update(plan, make_moving(plan, subject, weights))


def update_lines(plan: Plan, about: dict[str, Any] | None) -> list[str]:
    """What is said of the stage's updates; nothing of plain ones."""
    lines = []
    if about:
        share, part = f"{100 * about['share']:.3g} %", f"{about['moved'] / about['of']:.1%}"
        lines.append(
            f"update: {about['kind']}, {share} of {_BY[about['kind']]}: {about['moved']:,} of {about['of']:,} weights at a "
            f"time ({part}; {about['whole']:,} always move, as they are in no such part); a copy of "
            f"{readable(about['bytes'])} while it lasts"
        )
    paced = plan.stage.optimizer.loss_adaptive
    if paced:
        lines.append(
            f"rate: that of the schedule times min(1, {paced.start:.3g} sqrt(first loss / mean loss)); all of it where the "
            f"mean loss is at most {100 * paced.start**2:.3g} % of the first"
        )
    return lines

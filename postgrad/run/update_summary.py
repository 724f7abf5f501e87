"""How much of a model does an update move, and what does that take? Told by `check` and in the record."""

from __future__ import annotations

import torch

from postgrad.hardware.memory import format_bytes
from postgrad.lineage.record import SparseUpdate
from postgrad.optim.optimizer import Weights
from postgrad.optim.sparse_update import SparseMask, UpdateMask
from postgrad.plan.plan import Plan
from postgrad.run.build import TunedModel, make_update_mask

_SELECTION_TEXTS = {
    "momentum": "the numbers of each matrix with the largest momentum",
    "magnitude": "the rows with the largest outputs",
}


def describe_update(plan: Plan, update_mask: UpdateMask) -> SparseUpdate | None:
    """Which share of what moves at an update, as plain data; None where all does."""
    spec = plan.stage.optimizer.update
    if spec is None or not isinstance(update_mask, SparseMask):
        return None
    chosen, others = (
        sum(m.numel() for m in masters) for masters in (update_mask.sparse_masters, update_mask.dense_masters)
    )
    return SparseUpdate(
        kind=spec.kind,
        share=spec.share,
        updated_weights=update_mask.num_updated,
        total_weights=chosen + others,
        always_updated_weights=others,
        bytes=4 * chosen,
    )


def check_update(plan: Plan, tuned_model: TunedModel) -> SparseUpdate | None:
    """The same before there is a run. Raises what is wrong with it."""
    weights = Weights(tuned_model.model, tuned_model.tuning, torch.float32, master_copies=False)
    return describe_update(plan, make_update_mask(plan, tuned_model, weights))


def update_lines(plan: Plan, summary: SparseUpdate | None) -> list[str]:
    """What is said of the stage's updates; nothing of plain ones."""
    lines = []
    if summary:
        share, part = f"{100 * summary.share:.3g} %", f"{summary.updated_weights / summary.total_weights:.1%}"
        lines.append(
            f"update: {summary.kind}, {share} of {_SELECTION_TEXTS[summary.kind]}: {summary.updated_weights:,} of {summary.total_weights:,} weights at a "
            f"time ({part}; {summary.always_updated_weights:,} always move, as they are in no such part); a copy of "
            f"{format_bytes(summary.bytes)} while it lasts"
        )
    paced = plan.stage.optimizer.loss_adaptive
    if paced:
        lines.append(
            f"rate: that of the schedule times min(1, {paced.start:.3g} sqrt(first loss / mean loss)); all of it where the "
            f"mean loss is at most {100 * paced.start**2:.3g} % of the first"
        )
    return lines

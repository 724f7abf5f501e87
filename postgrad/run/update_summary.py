"""Summary of the sparse update and the loss-adaptive rate, for `check` and the record."""

from __future__ import annotations

import torch

from postgrad.hardware.memory import format_bytes
from postgrad.lineage.record import SparseUpdateRecord
from postgrad.optim.optimizer import Weights
from postgrad.optim.sparse_update import SparseMask, UpdateMask
from postgrad.plan.plan import Plan
from postgrad.run.tuned_model import TunedModel
from postgrad.run.update_masks import make_update_mask


def describe_update(plan: Plan, update_mask: UpdateMask) -> SparseUpdateRecord | None:
    """Counts of a sparse update; None for a dense one."""
    spec = plan.stage.optimizer.sparse_update
    if spec is None or not isinstance(update_mask, SparseMask):
        return None
    sparse, dense = (
        sum(m.numel() for m in masters) for masters in (update_mask.sparse_masters, update_mask.dense_masters)
    )
    return SparseUpdateRecord(
        kind=spec.kind,
        share=spec.share,
        updated_weights=update_mask.num_updated,
        total_weights=sparse + dense,
        always_updated_weights=dense,
        bytes=4 * sparse,
    )


def check_update(plan: Plan, tuned_model: TunedModel) -> SparseUpdateRecord | None:
    """The same without a run, for `check`. Raises `StageError` for an update that is impossible."""
    weights = Weights(tuned_model.model, tuned_model.tuning, torch.float32, master_copies=False)
    return describe_update(plan, make_update_mask(plan, tuned_model, weights))


def update_lines(plan: Plan, summary: SparseUpdateRecord | None) -> list[str]:
    """Lines on the stage's updates; none for dense ones at the scheduled rate."""
    lines = []
    spec = plan.stage.optimizer.sparse_update
    if summary and spec:
        share = summary.updated_weights / summary.total_weights
        lines.append(
            f"update: {summary.kind}, {100 * summary.share:.3g} % of {spec.selection}: {summary.updated_weights:,} of "
            f"{summary.total_weights:,} weights per step ({share:.1%}; {summary.always_updated_weights:,} of them are always "
            f"updated); a temporary copy of {format_bytes(summary.bytes)}"
        )
    adaptive = plan.stage.optimizer.loss_adaptive
    if adaptive:
        share = adaptive.initial_share
        lines.append(
            f"learning rate: the schedule times min(1, {share:.3g} sqrt(first loss / mean loss)), reduced until "
            f"the mean loss is {100 * share**2:.3g} % of the first"
        )
    return lines

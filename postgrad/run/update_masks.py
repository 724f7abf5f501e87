"""The update mask of a stage: which weight entries an optimizer step changes. Each kind of sparse update has its function."""

from __future__ import annotations

from typing import TYPE_CHECKING

from postgrad.config.sparse_updates import MagnitudeUpdate, MomentumUpdate
from postgrad.config.tunings import LoraTuning
from postgrad.errors import StageError
from postgrad.optim.migu import MiguMask
from postgrad.optim.mofo import MofoMask
from postgrad.optim.optimizer import Weights
from postgrad.optim.sparse_update import FullMask, UpdateMask
from postgrad.plan.plan import Plan

if TYPE_CHECKING:
    from postgrad.run.tuned_model import TunedModel


def make_update_mask(plan: Plan, tuned_model: TunedModel, weights: Weights) -> UpdateMask:
    """The stage's update mask. Raises `StageError` where the update is impossible."""
    spec = plan.stage.optimizer.sparse_update
    return FullMask() if spec is None else spec.load()(spec, plan, tuned_model, weights)


def make_mofo(spec: MomentumUpdate, plan: Plan, tuned_model: TunedModel, weights: Weights) -> MofoMask:
    """The entries of each matrix with the largest momentum."""
    return MofoMask(spec.share, weights.masters)


def make_migu(spec: MagnitudeUpdate, plan: Plan, tuned_model: TunedModel, weights: Weights) -> MiguMask:
    """The rows of each linear layer with the largest outputs."""
    tuning = plan.stage.tuning
    if isinstance(tuning, LoraTuning) and tuning.variant == "dora":
        raise StageError(
            "the outputs of dora's parts include the base weights, so they do not measure the step's text",
            where="optimizer.sparse_update",
            expected="another variant of `lora`, or kind: mofo",
        )
    mask = MiguMask(spec.share, tuned_model.model, weights.entries)
    if not mask.layers:
        raise StageError(
            f"`{tuning.kind}` trains no linear layer of the model's blocks",
            where="optimizer.sparse_update",
            expected="a tuning that trains some, such as full, blocks or lora; or kind: mofo",
        )
    return mask

"""A stage on a mixture of experts: its balancing loss, and its routers, which are trained or frozen."""

from __future__ import annotations

from typing import NamedTuple

from transformers import PreTrainedModel

from postgrad.config.experts_config import ExpertsConfig
from postgrad.errors import StageError
from postgrad.models.experts import find_balancing, router_parameters
from postgrad.models.model import CausalModel, Model
from postgrad.objectives.balancing import BalancingLoss


class BalancingChoice(NamedTuple):
    """The balancing loss of a stage, None without one, and what there is to say of it."""

    loss: BalancingLoss | None
    notes: tuple[str, ...]


def choose_balancing(spec: ExpertsConfig | None, model: Model) -> BalancingChoice:
    """The balancing loss that a stage adds; the model then records its routers. Raises `StageError` where it has none."""
    wanted = spec.balancing_loss if spec else "auto"
    found = find_balancing(model.pretrained) if isinstance(model, CausalModel) else None
    if found is None:
        if wanted in ("auto", 0):
            return BalancingChoice(None, ())
        raise StageError(
            f"this model ({model.pretrained.config.model_type}) has no balancing loss in transformers",
            where="experts.balancing_loss",
            expected="a mixture of experts with router_aux_loss_coef in its configuration",
            hint="leave experts.balancing_loss out: some families balance their experts without a loss, by a bias",
        )
    if wanted == "auto" and not found.is_requested:
        note = (
            f"no balancing loss of the experts: output_router_logits is false in the model's configuration "
            f"(router_aux_loss_coef: {found.coefficient:g} is used with experts.balancing_loss: config)"
        )
        return BalancingChoice(None, (note,) if found.coefficient else ())
    coefficient = found.coefficient if isinstance(wanted, str) else wanted
    if not coefficient:
        return BalancingChoice(None, ())
    assert isinstance(model, CausalModel)
    model.records_routers = True
    note = f"the balancing loss of the experts is added with a coefficient of {coefficient:g} (balancing_loss in the metrics)"
    return BalancingChoice(BalancingLoss(coefficient, found.top_k), (note,))


def router_names(spec: ExpertsConfig | None, pretrained: PreTrainedModel) -> list[str]:
    """The weights of the routers where a stage says what becomes of them. Raises `StageError` for a model without any."""
    if spec is None or spec.router is None:
        return []
    names = router_parameters(pretrained)
    if not names:
        raise StageError(
            f"this model ({pretrained.config.model_type}) has no routers that transformers names",
            where="experts.router",
            expected="a mixture of experts",
            hint="leave experts.router out",
        )
    return names

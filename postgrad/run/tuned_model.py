"""The model that a stage trains: its start model with the tunings of its lineage, and the stage's own tuning attached."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import nn

from postgrad.config.tunings import FullTuning
from postgrad.distributed import fsdp
from postgrad.distributed.world import World
from postgrad.errors import PostgradError, TuningError
from postgrad.models.model import Model, wrap_model
from postgrad.models.prefix_lm_attention import mark_prefix_lm
from postgrad.models.unread_weights import UnreadWeights, load_unread
from postgrad.objectives.balancing import BalancingLoss
from postgrad.plan.plan import Plan
from postgrad.run.routers import choose_balancing, router_names
from postgrad.tuning.attach import attach
from postgrad.tuning.extra_trainable import base_parameter_name
from postgrad.tuning.open_model import LoadedModel, open_model
from postgrad.tuning.tuning import Tuning


class ParameterCounts(NamedTuple):
    """Parameters of a model, tied ones counted once; of these, the trainable ones."""

    parameters: int
    trainable: int


@dataclass(frozen=True)
class TunedModel:
    """A model with the tunings of its lineage, and the stage's tuning."""

    model: Model
    loaded_model: LoadedModel
    tuning: Tuning
    options: dict[str, Any]
    """Options of the stage's tuning."""
    base_names: dict[str, str]
    """Current names of the start model's parameters to their original names."""
    balancing: BalancingLoss | None
    """Of a mixture of experts; None without one."""
    unread: UnreadWeights | None = None
    """The weights of the start model, where `shard` reads them."""

    @property
    def attention(self) -> str | None:
        """The attention implementation that a tuning requires, if any."""
        return next((t.attention for t in (self.tuning, *self.loaded_model.tunings) if t.attention), None)

    def counts(self) -> ParameterCounts:
        """The numbers of parameters."""
        sizes = [(p.numel(), p.requires_grad) for p in self.model.parameters()]
        return ParameterCounts(sum(n for n, _ in sizes), sum(n for n, is_trainable in sizes if is_trainable))

    def shard(self, world: World, compute: torch.dtype = torch.float32) -> None:
        """Shard the model over the ranks, with computation in `compute`; nothing without a process group."""
        if world.mesh:
            fsdp.shard(self.model, world.mesh, compute, self.unread)


class StartModel(NamedTuple):
    """The exact start model, and those of its weights that are new."""

    model: Model
    new_weights: tuple[str, ...]


def load_start_model(plan: Plan, world: World, *, is_whole: bool = False) -> StartModel:
    """The exact start model, in fp32, without the stage's tuning; sharded where there is a process group.

    `is_whole`: on every rank, as tasks need it.
    """
    start, task, layer = plan.model.start, plan.model.task, plan.model.task_layer
    mesh = None if is_whole else world.mesh
    unread = load_unread(start, task, layer=layer) if mesh else None
    if unread:
        model, new_weights = wrap_model(unread.loaded.model, task), unread.loaded.new_weights
    else:
        opened = open_model(start, task, layer=layer)
        model, new_weights = wrap_model(opened.model, task).to(world.device), opened.new_weights
    if mesh:
        fsdp.shard(model, mesh, torch.float32, unread.weights if unread else None)
    return StartModel(model, new_weights)


def make_tuned_model(plan: Plan, world: World, *, attention: str | None = None) -> TunedModel:
    """Load the start model, and attach the stage's tuning; on this rank's device.

    Where there is a process group the model is still to be sharded, and its weights are read then, if possible.
    """
    if world.mesh and (tuned_model := _make_unread_model(plan, world, attention)):
        return tuned_model
    loaded = open_model(plan.model.start, plan.model.task, layer=plan.model.task_layer, attention=attention)
    if world.mesh:
        note = "each process reads the whole model before it is divided: its tuning or its files need that"
        loaded = replace(loaded, notes=(*loaded.notes, note))
    return tune(plan, loaded, world)


def _make_unread_model(plan: Plan, world: World, attention: str | None) -> TunedModel | None:
    """The tuned model with weights that are not read yet; None where its tuning computes from them."""
    model = plan.model
    unread = load_unread(model.start, model.task, layer=model.task_layer, attention=attention)
    if unread is None:
        return None
    pretrained, new_weights, _ = unread.loaded
    try:
        loaded = LoadedModel(pretrained, model.task, model.task_layer, new_weights)
        tuned_model = replace(tune(plan, loaded, world, has_values=False), unread=unread.weights)
    except (PostgradError, RuntimeError, ValueError):
        return None  # the same with the whole model says what is wrong
    options = tuned_model.options
    reads_weights = options.get("quantization") or set(options.get("also_train", ())) - set(new_weights)
    return None if reads_weights or unread.weights.find_computed(pretrained) else tuned_model


def tune(plan: Plan, loaded: LoadedModel, world: World, *, has_values: bool = True) -> TunedModel:
    """Attach the stage's tuning to its start model; `has_values`: False for one of placeholders, which stays where it is."""
    loaded = replace(loaded, notes=(*loaded.notes, *plan.model.inputs.notes()))
    routers = router_names(plan.stage.experts, loaded.model)
    options = tuning_options(plan, loaded, routers)
    mark_prefix_lm(loaded.model.config, bool(plan.prefix_length))
    start_parameters = dict(loaded.model.named_parameters(remove_duplicate=False))
    tuning = attach(loaded.model, options, seed=plan.stage.seed, tokenizer=plan.model.tokenizer)
    if plan.stage.experts and plan.stage.experts.router == "frozen":
        tuning.freeze_weights(routers)
    base_names = _match_base_names(loaded.model, start_parameters)
    if tuning.is_full or tuning.is_merged_on_export:
        _check_plain_base(plan, loaded)
    elif plan.model.start.scratch_recipe:
        raise TuningError(
            f"`{plan.stage.tuning.kind}` publishes a small folder that refers to its start model, and a new model exists only "
            "in the cache",
            where="tuning.kind",
            expected="full, or another kind that publishes a complete model",
            hint=f"train the new model with `full` first; `{plan.stage.tuning.kind}` can continue from that run",
        )
    model = wrap_model(loaded.model, loaded.task)
    model = model.to(world.device) if has_values else model
    # Which of a model's routers the loss is of is found by trying it.
    balancing, notes = choose_balancing(plan.stage.experts, model) if has_values else (None, ())
    loaded = replace(loaded, notes=(*loaded.notes, *notes))
    return TunedModel(model, loaded, tuning, {**options, "seed": plan.stage.seed}, base_names, balancing)


def _check_plain_base(plan: Plan, loaded_model: LoadedModel) -> None:
    """Raise `TuningError` for a tuning that publishes a plain model on a start model that is none."""
    if loaded_model.tunings:
        raise TuningError(
            f"`{plan.stage.tuning.kind}` publishes a plain model, and {plan.model.start.name} has a "
            f"`{loaded_model.tunings[-1].kind}` tuning that cannot be merged",
            where="tuning.kind",
            expected="a kind with weights of its own, such as lora, adapter or prompt",
        )


def _match_base_names(model: nn.Module, start_parameters: dict[str, nn.Parameter]) -> dict[str, str]:
    """The original names of the start model's parameters, by current name.

    Parameters are matched by identity, since new blocks shift the names of the old ones. A copy that unties two names has no
    identity in the start model, so it is matched by name.
    """
    original = {id(parameter): name for name, parameter in reversed(list(start_parameters.items()))}
    tied = start_parameters.keys() - original.values()
    return {
        name: original.get(id(parameter), base_parameter_name(name))
        for name, parameter in model.named_parameters()
        if id(parameter) in original or base_parameter_name(name) in tied
    }


def tuning_options(plan: Plan, loaded_model: LoadedModel, routers: Sequence[str] = ()) -> dict[str, Any]:
    """Keyword arguments of the stage's tuning, with lengths in steps; a new task layer is trained too, as are `routers` that
    the stage trains."""
    spec = plan.stage.tuning
    options = spec.options(plan.steps, plan.tokens)
    trained_routers = routers if plan.stage.experts and plan.stage.experts.router == "trained" else ()
    also_train = [*loaded_model.new_weights, *trained_routers]
    if also_train and not isinstance(spec, FullTuning):
        options["also_train"] = [*options.get("also_train", ()), *also_train]
    return options

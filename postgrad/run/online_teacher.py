"""Online teachers: the model with its tuning disabled, where that gives the start model; else a second model.

A second model is frozen, in the dtype of the computation, and sharded as the first.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

import torch

from postgrad.config.objectives import DistillObjective, WeightSchedule
from postgrad.config.quantities import length_in_steps
from postgrad.data.render.frame import EMPTY_FRAME
from postgrad.distributed import fsdp
from postgrad.distributed.world import World
from postgrad.errors import StageError
from postgrad.hardware.execution import Execution
from postgrad.models.auto_classes import load_config
from postgrad.models.cpu_attention import CAUSAL_BLOCKS, is_supported
from postgrad.models.location import ModelLocation
from postgrad.models.model import CausalModel, Model, find_model_leak, wrap_model
from postgrad.models.unread_weights import load_unread
from postgrad.objectives.distillation import LossWeight
from postgrad.objectives.teacher import OnlineTeacher
from postgrad.optim import lr_schedules
from postgrad.plan.plan import Plan
from postgrad.plan.teacher_contexts import get_context
from postgrad.plan.teachers import get_teacher_identity
from postgrad.tuning.open_model import BaseReference, LoadedModel, open_model
from postgrad.tuning.parameter_location import task_layer_parameters
from postgrad.tuning.tuning import Tuning, freeze


def make_weight_schedule(weight: float | WeightSchedule, steps: int, tokens: int) -> LossWeight:
    """The weight of a loss per step: `start` at the first step of the stage, `end` from the last step of `over` on."""
    if not isinstance(weight, WeightSchedule):
        return lambda step: weight
    curve = lr_schedules.SHAPES[weight.shape](weight.start, weight.end)
    last = max(length_in_steps(weight.over, steps, tokens), 1.0)
    return lambda step: curve(min((step - 1) / (last - 1), 1.0)) if last > 1 else weight.end


def make_online_teachers(
    plan: Plan, model: Model, tuning: Tuning, base_names: Collection[str], execution: Execution, world: World
) -> dict[int, OnlineTeacher]:
    """The teachers without a cache, by objective number; equal teachers share one model.

    `model`: the student, not yet sharded. `base_names`: the parameters that its start model has. Raises `StageError` for a
    teacher that cannot predict its rows.
    """
    teachers: dict[int, OnlineTeacher] = {}
    loaded: dict[str, OnlineTeacher] = {}
    for number, start in plan.teachers.items():
        spec = plan.objectives[number]
        if isinstance(spec, DistillObjective) and spec.cache != "none":
            continue
        identity = get_teacher_identity(start)
        if identity not in loaded:
            loaded[identity] = (
                _make_base_teacher(plan, model, tuning)
                if _is_base_model(plan, start, tuning, base_names)
                else load_teacher(plan, start, number, execution, world)
            )
        teachers[number] = replace(loaded[identity], reads_contexts=get_context(spec) is not None)
    return teachers


def _is_base_model(plan: Plan, teacher: ModelLocation, tuning: Tuning, base_names: Collection[str]) -> bool:
    """Whether disabling the tuning gives the teacher; not with a trained task layer, which stays changed."""
    trained = {name for name, p in tuning.model.named_parameters() if p.requires_grad and name in base_names}
    return teacher == plan.model.start and tuning.additive and not trained & set(task_layer_parameters(tuning.model))


def _make_base_teacher(plan: Plan, model: Model, tuning: Tuning) -> OnlineTeacher:
    first_virtual_id = plan.model.inputs.first_virtual_id
    return OnlineTeacher(model, tuning.disable, _vocabulary_limit(plan, first_virtual_id))


def load_teacher(plan: Plan, teacher: ModelLocation, number: int, execution: Execution, world: World) -> OnlineTeacher:
    """Load a second model as teacher. Raises `StageError` when it has other labels, or another soft prompt."""
    where = f"objectives[{number}].teacher"
    unread = load_unread(teacher, plan.model.task, layer=plan.model.task_layer) if world.mesh else None
    if unread:
        opened = LoadedModel(unread.loaded.model, plan.model.task, plan.model.task_layer, unread.loaded.new_weights)
    else:
        opened = open_model(teacher, plan.model.task, layer=plan.model.task_layer)
    if plan.model.task_layer and (opened.new_weights or _teacher_labels(teacher) != plan.model.task_layer.labels):
        raise StageError(
            f"{teacher.name} has no task layer for the labels {', '.join(plan.model.task_layer.labels)}; its labels are "
            f"{', '.join(_teacher_labels(teacher))}",
            where=where,
            expected="a teacher with the same labels",
            hint="train one with these labels first",
        )
    vocabulary_size = _first_unknown_id(plan, opened, teacher, where)
    freeze(opened.model)
    model = wrap_model(opened.model, opened.task)
    if world.mesh and unread:
        # In the dtype of the computation, whose rounding may pass for a leak: then each document is in a row of its own.
        fsdp.shard(model, world.mesh, torch.float32, unread.weights, execution.compute)
        packed = _probe(model, opened, plan, execution)
    else:
        model = model.to(world.device)
        packed = _probe(model, opened, plan, execution)
        for parameter in model.parameters():  # buffers such as rotary frequencies keep their precision
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(execution.compute)
        if world.mesh:
            fsdp.shard(model, world.mesh, torch.float32)  # already in the dtype of the computation
    if execution.compile:
        fsdp.compile_layers(model)
    return OnlineTeacher(model, vocabulary_size=vocabulary_size, packed=packed, is_sharded=world.is_distributed)


def _probe(model: Model, loaded_model: LoadedModel, plan: Plan, execution: Execution) -> bool:
    """Set the attention of a teacher; whether the documents of a row may go through it together."""
    _set_attention(model, loaded_model, execution.attention)
    return not isinstance(model, CausalModel) or not find_model_leak(model, plan.model.context_length)


def _teacher_labels(teacher: ModelLocation) -> tuple[str, ...]:
    """The labels of a teacher's task layer."""
    reference = BaseReference.read_folder(teacher)
    if reference and reference.layer:
        return reference.layer.labels
    labels = load_config(teacher.name_or_path).id2label or {}
    return tuple(map(str, labels.values()))


def _first_unknown_id(plan: Plan, loaded_model: LoadedModel, teacher: ModelLocation, where: str) -> int | None:
    """The first virtual id in the rows that the teacher has no embedding for; None without such ids."""
    inputs = plan.model.inputs
    if loaded_model.frame == inputs.lineage_frame:
        return _vocabulary_limit(plan, inputs.first_virtual_id)
    if loaded_model.frame == EMPTY_FRAME:
        return _vocabulary_limit(plan, inputs.encoder.vocabulary)
    raise StageError(
        f"{teacher.name} has a soft prompt of its own, which these rows do not contain",
        where=where,
        expected="a teacher without a soft prompt, or the start model itself",
        hint="export the teacher to a plain model, or train on text that it generates",
    )


def _vocabulary_limit(plan: Plan, first: int) -> int | None:
    """`first`, if the rows contain ids from there on."""
    return first if any(token >= first for token in plan.model.inputs.frame.all_ids) else None


def _set_attention(model: Model, loaded_model: LoadedModel, attention: str) -> None:
    """Set the teacher's attention: what its tunings require, else the student's where it is supported."""
    required = next((t.attention for t in loaded_model.tunings if t.attention), None)
    pretrained = model.pretrained
    if required or (attention == CAUSAL_BLOCKS and not is_supported(pretrained)):
        return
    try:
        pretrained.set_attn_implementation(attention)
    except ValueError:  # not available for this architecture, whose default computes the same
        return

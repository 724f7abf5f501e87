"""How does a teacher come to answer? By switching the tuning off, where that brings the start model back; else a second model.

A second model is frozen, held in the dtype of the computation, and sharded like the first.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from transformers import AutoConfig

from postgrad.config.objectives import DistillObjective, WeightSchedule
from postgrad.config.quantities import length_in_steps
from postgrad.data.render.frame import EMPTY_FRAME
from postgrad.distributed import fsdp
from postgrad.distributed.world import World
from postgrad.errors import StageError
from postgrad.hardware.execution import Execution
from postgrad.models.cpu_attention import CAUSAL_BLOCKS, is_supported
from postgrad.models.model import Model, wrap_model
from postgrad.models.pretrained import ModelLocation
from postgrad.objectives.distillation import LossWeight
from postgrad.objectives.teacher import OnlineTeacher
from postgrad.optim import lr_schedules
from postgrad.plan.plan import Plan
from postgrad.plan.teachers import get_teacher_identity
from postgrad.tuning.open_model import BaseReference, LoadedModel, open_model
from postgrad.tuning.parameter_location import task_layer_parameters
from postgrad.tuning.tuning import Tuning, freeze


def make_weight_schedule(weight: float | WeightSchedule, steps: int, tokens: int) -> LossWeight:
    """The factor of a loss at each step; at a stage's first step the start, from the last step of `over` on the end."""
    if not isinstance(weight, WeightSchedule):
        return lambda step: weight
    curve = lr_schedules.SHAPES[weight.shape](weight.start, weight.end)
    last = max(length_in_steps(weight.over, steps, tokens), 1.0)
    return lambda step: curve(min((step - 1) / (last - 1), 1.0)) if last > 1 else weight.end


def make_online_teachers(
    plan: Plan, model: Model, tuning: Tuning, base_names: Collection[str], execution: Execution, world: World
) -> dict[int, OnlineTeacher]:
    """The teachers that are asked at every step, by the number of their objective; one model for all that name the same.

    `model` is the one to be trained, before it is laid out, and `base_names` those of its parameters that the start has.
    Raises `StageError` for a teacher that cannot answer its rows.
    """
    found: dict[int, OnlineTeacher] = {}
    known: dict[str, OnlineTeacher] = {}
    for number, start in plan.teachers.items():
        spec = plan.objectives[number]
        if isinstance(spec, DistillObjective) and spec.cache != "none":
            continue
        name = get_teacher_identity(start)
        if name not in known:
            known[name] = (
                _make_base_teacher(plan, model, tuning)
                if _is_base_model(plan, start, tuning, base_names)
                else load_teacher(plan, start, number, execution, world)
            )
        found[number] = known[name]
    return found


def _is_base_model(plan: Plan, teacher: ModelLocation, tuning: Tuning, base_names: Collection[str]) -> bool:
    """Whether the model with its tuning switched off is the teacher: a task layer that moves would not come back."""
    moving = {name for name, p in tuning.model.named_parameters() if p.requires_grad and name in base_names}
    return teacher == plan.model.start and tuning.additive and not moving & set(task_layer_parameters(tuning.model))


def _make_base_teacher(plan: Plan, model: Model, tuning: Tuning) -> OnlineTeacher:
    added = plan.model.inputs.first_virtual_id
    return OnlineTeacher(
        model, tuning.disable, added if any(token >= added for token in plan.model.inputs.frame.all_ids) else None
    )


def load_teacher(plan: Plan, teacher: ModelLocation, number: int, execution: Execution, world: World) -> OnlineTeacher:
    """A second model as a teacher. Raises `StageError` when it has no task layer for these labels, or a prompt of its own."""
    where = f"objectives[{number}].teacher"
    opened = open_model(teacher, plan.model.task, layer=plan.model.task_layer)
    if plan.model.task_layer and (opened.new_weights or _teacher_labels(teacher) != plan.model.task_layer.labels):
        raise StageError(
            f"{teacher.name} has no layer for this task and these labels: {', '.join(plan.model.task_layer.labels)}; its own are "
            f"{', '.join(_teacher_labels(teacher))}",
            where=where,
            expected="a teacher that decides between the same classes",
            hint="train one with the same labels first",
        )
    known = _first_unknown_id(plan, opened, teacher, where)
    freeze(opened.model)
    model = wrap_model(opened.model, opened.task).to(world.device)
    _set_attention(model, opened, execution.attention)
    for parameter in model.parameters():  # buffers such as rotary frequencies keep their precision
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(execution.compute)
    if world.is_distributed:
        fsdp.shard(model, world.size, torch.float32)  # shards are in the computation's dtype already
    if execution.compile:
        fsdp.compile_layers(model)
    return OnlineTeacher(model, vocabulary_size=known)


def _teacher_labels(teacher: ModelLocation) -> tuple[str, ...]:
    """The classes that a teacher's task layer decides between, as it names them."""
    said = BaseReference.read_folder(teacher)
    if said and said.layer:
        return said.layer.labels
    named = AutoConfig.from_pretrained(teacher.name_or_path).id2label or {}
    return tuple(map(str, named.values()))


def _first_unknown_id(plan: Plan, loaded_model: LoadedModel, teacher: ModelLocation, where: str) -> int | None:
    """The first id of the rows that stands for a vector which the teacher does not have; None when there is none."""
    reading = plan.model.inputs
    if loaded_model.frame == reading.lineage_frame:
        first = reading.first_virtual_id
    elif loaded_model.frame == EMPTY_FRAME:
        first = reading.encoder.vocabulary
    else:
        raise StageError(
            f"{teacher.name} reads its texts behind a soft prompt of its own, which these rows do not have",
            where=where,
            expected="a teacher without a prompt, or the start model itself",
            hint="export the teacher to a plain model, or let it write text and train on that",
        )
    return first if any(token >= first for token in reading.frame.all_ids) else None


def _set_attention(model: Model, loaded_model: LoadedModel, attention: str) -> None:
    """Let a teacher attend as its tunings need it, or as the student does where it can."""
    needed = next((t.attention for t in loaded_model.tunings if t.attention), None)
    pretrained = model.pretrained
    if needed or (attention == CAUSAL_BLOCKS and not is_supported(pretrained)):
        return
    try:
        pretrained.set_attn_implementation(attention)
    except ValueError:  # this architecture has not that one: its own answers are the same
        return

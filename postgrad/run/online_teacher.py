"""How does a teacher come to answer? By switching the tuning off, where that brings the start model back; else a second model.

A second model is frozen, held in the dtype of the computation, and sharded like the first.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from transformers import AutoConfig

from postgrad.config.objectives import DistillObjective, Weighing
from postgrad.config.quantities import in_steps
from postgrad.data.render.frame import BARE
from postgrad.distributed import fsdp
from postgrad.distributed.world import World
from postgrad.errors import StageError
from postgrad.hardware.execution import Execution
from postgrad.models.cpu_attention import NAME, usable
from postgrad.models.model import Model, model_for
from postgrad.models.pretrained import Start
from postgrad.objectives.distillation import Weight
from postgrad.objectives.teacher import Online
from postgrad.optim import lr_schedules
from postgrad.plan.plan import Plan
from postgrad.plan.teachers import name_of
from postgrad.tuning.open_model import Opened, Sitting, open_model
from postgrad.tuning.parameter_location import task_layers
from postgrad.tuning.tuning import Tuning, freeze


def weight_of(weight: float | Weighing, steps: int, tokens: int) -> Weight:
    """The factor of a loss at each step; at a stage's first step the start, from the last step of `over` on the end."""
    if not isinstance(weight, Weighing):
        return lambda step: weight
    curve = lr_schedules.SHAPES[weight.shape](weight.start, weight.end)
    last = max(in_steps(weight.over, steps, tokens), 1.0)
    return lambda step: curve(min((step - 1) / (last - 1), 1.0)) if last > 1 else weight.end


def online_teachers(
    plan: Plan, model: Model, tuning: Tuning, base_names: Collection[str], execution: Execution, world: World
) -> dict[int, Online]:
    """The teachers that are asked at every step, by the number of their objective; one model for all that name the same.

    `model` is the one to be trained, before it is laid out, and `base_names` those of its parameters that the start has.
    Raises `StageError` for a teacher that cannot answer its rows.
    """
    found: dict[int, Online] = {}
    known: dict[str, Online] = {}
    for number, start in plan.teachers.items():
        spec = plan.objectives[number]
        if isinstance(spec, DistillObjective) and spec.cache != "none":
            continue
        name = name_of(start)
        if name not in known:
            known[name] = (
                _same(plan, model, tuning)
                if _is_base(plan, start, tuning, base_names)
                else other(plan, start, number, execution, world)
            )
        found[number] = known[name]
    return found


def _is_base(plan: Plan, teacher: Start, tuning: Tuning, base_names: Collection[str]) -> bool:
    """Whether the model with its tuning switched off is the teacher: a task layer that moves would not come back."""
    moving = {name for name, p in tuning.model.named_parameters() if p.requires_grad and name in base_names}
    return teacher == plan.start and tuning.additive and not moving & set(task_layers(tuning.model))


def _same(plan: Plan, model: Model, tuning: Tuning) -> Online:
    added = plan.reading.first_added
    return Online(model, tuning.off, added if any(token >= added for token in plan.reading.frame.all) else None)


def other(plan: Plan, teacher: Start, number: int, execution: Execution, world: World) -> Online:
    """A second model as a teacher. Raises `StageError` when it has no task layer for these labels, or a prompt of its own."""
    where = f"objectives[{number}].teacher"
    opened = open_model(teacher, plan.task, layer=plan.layer)
    if plan.layer and (opened.new or _decides(teacher) != plan.layer.labels):
        raise StageError(
            f"{teacher.name} has no layer for this task and these labels: {', '.join(plan.layer.labels)}; its own are "
            f"{', '.join(_decides(teacher))}",
            where=where,
            expected="a teacher that decides between the same classes",
            way_out="train one with the same labels first",
        )
    known = _known(plan, opened, teacher, where)
    freeze(opened.model)
    model = model_for(opened.model, opened.task).to(world.device)
    _attend(model, opened, execution.attention)
    for parameter in model.parameters():  # buffers such as rotary frequencies keep their precision
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(execution.compute)
    if world.sharded:
        fsdp.shard(model, world.size, torch.float32)  # shards are in the computation's dtype already
    if execution.compile:
        fsdp.compile_layers(model)
    return Online(model, known=known)


def _decides(teacher: Start) -> tuple[str, ...]:
    """The classes that a teacher's task layer decides between, as it names them."""
    said = Sitting.of(teacher)
    if said and said.layer:
        return said.layer.labels
    named = AutoConfig.from_pretrained(teacher.source).id2label or {}
    return tuple(map(str, named.values()))


def _known(plan: Plan, opened: Opened, teacher: Start, where: str) -> int | None:
    """The first id of the rows that stands for a vector which the teacher does not have; None when there is none."""
    reading = plan.reading
    if opened.frame == reading.left:
        first = reading.first_added
    elif opened.frame == BARE:
        first = reading.encoder.vocabulary
    else:
        raise StageError(
            f"{teacher.name} reads its texts behind a soft prompt of its own, which these rows do not have",
            where=where,
            expected="a teacher without a prompt, or the start model itself",
            way_out="export the teacher to a plain model, or let it write text and train on that",
        )
    return first if any(token >= first for token in reading.frame.all) else None


def _attend(model: Model, opened: Opened, attention: str) -> None:
    """Let a teacher attend as its tunings need it, or as the student does where it can."""
    needed = next((t.attention for t in opened.tunings if t.attention), None)
    pretrained = model.pretrained
    if needed or (attention == NAME and not usable(pretrained)):
        return
    try:
        pretrained.set_attn_implementation(attention)
    except ValueError:  # this architecture has not that one: its own answers are the same
        return

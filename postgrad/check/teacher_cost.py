"""What will the teachers of a stage cost? They are made and asked about some rows, so that what is wrong is told by `check`."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from postgrad.config.objectives import OnPolicyObjective, get_objective_names
from postgrad.data.loading.batch import Batch, collate
from postgrad.distributed.fsdp import reshard
from postgrad.distributed.world import World
from postgrad.hardware.execution import Execution
from postgrad.hardware.memory import format_bytes
from postgrad.models.model import CausalModel
from postgrad.objectives.teacher import OnlineTeacher
from postgrad.plan.plan import Plan
from postgrad.plan.teachers import get_teacher_identity
from postgrad.reports.html.notation import format_duration
from postgrad.run.cached_teacher import estimate_cache_cost, find_cache_jobs
from postgrad.run.online_teacher import load_teacher, make_online_teachers
from postgrad.run.tuned_model import TunedModel
from postgrad.training.on_policy import OnPolicySampler


@dataclass(frozen=True)
class TeacherCost:
    """What is said of a teacher beforehand; `bytes` are held during the training."""

    record: dict[str, Any]
    lines: list[str]
    bytes: int


def check_teachers(plan: Plan, subject: TunedModel, execution: Execution, world: World) -> list[TeacherCost]:
    """Make a stage's teachers and ask each about some rows. Raises what is wrong with them."""
    if not plan.teachers:
        return []
    names = get_objective_names(plan.objectives)
    online = make_online_teachers(plan, subject.model, subject.tuning, subject.base_names, execution, world)
    counted: set[int] = set()
    costs = []
    for number, teacher in online.items():
        costs.append(_online_teacher_cost(plan, subject, execution, number, teacher, names[number], counted))
    beforehand: dict[str, OnlineTeacher] = {}
    for asked in find_cache_jobs(plan):
        start = plan.teachers[asked.objective_number]
        if get_teacher_identity(start) not in beforehand:
            beforehand[get_teacher_identity(start)] = load_teacher(
                plan, start, asked.objective_number, execution, world
            )
        cost = estimate_cache_cost(plan, asked, beforehand[get_teacher_identity(start)], execution.micro)
        size = cost.labels * cost.bytes_per_label
        source = plan.data.sources[asked.source_number].name
        when = (
            "asked already"
            if cost.is_filled
            else f"asked once before the training, about {format_duration(cost.seconds)}"
        )
        line = (
            f"{names[asked.objective_number]}: {start.name} on {source}, {when}; {cost.labels:,} labels of about "
            f"{cost.bytes_per_label:.0f} bytes, {format_bytes(size)} in the cache"
        )
        record = {"name": names[asked.objective_number], "teacher": start.name, "source": source, **cost.as_dict()}
        costs.append(TeacherCost(record, [line], 0))
    return costs


def _online_teacher_cost(
    plan: Plan,
    subject: TunedModel,
    execution: Execution,
    number: int,
    teacher: OnlineTeacher,
    name: str,
    counted: set[int],
) -> TeacherCost:
    start = plan.teachers[number]
    taken = [k for k, numbers in enumerate(plan.objective_indices) if number in numbers]
    share = sum(plan.row_counts()[k] for k in taken) / max(sum(plan.row_counts()), 1)
    rows = plan.data.rows[taken[0]]
    count = min(execution.micro, len(rows))
    batch = collate(
        [rows.get_row(i, i) for i in range(count)], [taken[0]] * count, pad_token_id=plan.model.inputs.pad_id
    )
    batch = batch.to(next(subject.model.parameters()).device)
    times = []
    for _ in range(3):
        begin = time.perf_counter()
        teacher(batch)
        times.append(time.perf_counter() - begin)
    reshard(teacher.model)
    in_all = plan.steps * plan.data.mixture.block_size / count
    part = min(times[1:]) * in_all * share / max(execution.seconds, 1e-9)
    second = teacher.model is not subject.model
    size = 0
    if second and id(teacher.model) not in counted:
        size = sum(p.numel() * p.element_size() for p in teacher.model.parameters())
        counted.add(id(teacher.model))
    how = (
        f"a second model, {format_bytes(size)} of memory"
        if second
        else f"`{subject.tuning.kind}` switched off, no second copy"
    )
    written = _time_generation(plan, subject, number, batch) * in_all * share / max(execution.seconds, 1e-9)
    line = (
        f"{name}: {start.name} on {share:.0%} of the rows, asked at every step; {how}; its reading takes about "
        f"{part:.0%} of a step" + (f", and the model's own writing {written:.0%}" if written else "")
    )
    record = {
        "name": name,
        "teacher": start.name,
        "second_model": second,
        "bytes": size,
        "share_of_step": part,
        "writing_share_of_step": written,
    }
    return TeacherCost(record, [line], size)


def _time_generation(plan: Plan, subject: TunedModel, number: int, batch: Batch) -> float:
    """Seconds in which the model writes a batch's places; 0 for an objective that is taken on what others wrote."""
    spec = plan.objectives[number]
    if not isinstance(spec, OnPolicyObjective) or not isinstance(subject.model, CausalModel):
        return 0.0
    writer = OnPolicySampler(subject.model, spec.temperature, plan.model.inputs.encoder.eos, plan.stage.seed)
    begin = time.perf_counter()
    writer(replace(batch.to(torch.device("cpu")), position_B=np.arange(len(batch.labels))))
    return time.perf_counter() - begin

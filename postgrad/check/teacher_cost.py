"""What will the teachers of a stage cost? They are made and asked about some rows, so that what is wrong is told by `check`."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from postgrad.config.objectives import OnPolicyObjective, names_of
from postgrad.data.loading.batch import Batch, collate
from postgrad.distributed.fsdp import reshard
from postgrad.distributed.world import World
from postgrad.hardware.execution import Execution
from postgrad.hardware.memory import readable
from postgrad.models.model import CausalModel
from postgrad.objectives.teacher import Online
from postgrad.plan.plan import Plan
from postgrad.plan.teachers import name_of
from postgrad.reports.html.notation import duration
from postgrad.run.build import Subject
from postgrad.run.cached_teacher import asked_once, cost_of
from postgrad.run.online_teacher import online_teachers, other
from postgrad.training.on_policy import Writer


@dataclass(frozen=True)
class TeachingCost:
    """What is said of a teacher beforehand; `bytes` are held during the training."""

    record: dict[str, Any]
    lines: list[str]
    bytes: int


def check_teaching(plan: Plan, subject: Subject, execution: Execution, world: World) -> list[TeachingCost]:
    """Make a stage's teachers and ask each about some rows. Raises what is wrong with them."""
    if not plan.teachers:
        return []
    names = names_of(plan.objectives)
    online = online_teachers(plan, subject.model, subject.tuning, subject.base_names, execution, world)
    counted: set[int] = set()
    costs = []
    for number, teacher in online.items():
        costs.append(_at_every_step(plan, subject, execution, number, teacher, names[number], counted))
    beforehand: dict[str, Online] = {}
    for asked in asked_once(plan):
        start = plan.teachers[asked.number]
        if name_of(start) not in beforehand:
            beforehand[name_of(start)] = other(plan, start, asked.number, execution, world)
        cost = cost_of(plan, asked, beforehand[name_of(start)], execution.micro)
        size = cost.labels * cost.bytes_per_label
        source = plan.leaves[asked.leaf].name
        when = "asked already" if cost.there else f"asked once before the training, about {duration(cost.seconds)}"
        line = (
            f"{names[asked.number]}: {start.name} on {source}, {when}; {cost.labels:,} labels of about "
            f"{cost.bytes_per_label:.0f} bytes, {readable(size)} in the cache"
        )
        record = {"name": names[asked.number], "teacher": start.name, "source": source, **cost.as_dict()}
        costs.append(TeachingCost(record, [line], 0))
    return costs


def _at_every_step(
    plan: Plan, subject: Subject, execution: Execution, number: int, teacher: Online, name: str, counted: set[int]
) -> TeachingCost:
    start = plan.teachers[number]
    taken = [k for k, numbers in enumerate(plan.weighed) if number in numbers]
    share = sum(plan.counts()[k] for k in taken) / max(sum(plan.counts()), 1)
    rows = plan.rows[taken[0]]
    count = min(execution.micro, len(rows))
    batch = collate([rows.at(i, i) for i in range(count)], [taken[0]] * count, pad=plan.reading.pad)
    batch = batch.to(next(subject.model.parameters()).device)
    times = []
    for _ in range(3):
        begin = time.perf_counter()
        teacher(batch)
        times.append(time.perf_counter() - begin)
    reshard(teacher.model)
    in_all = plan.steps * plan.mixture.block / count
    part = min(times[1:]) * in_all * share / max(execution.seconds, 1e-9)
    second = teacher.model is not subject.model
    size = 0
    if second and id(teacher.model) not in counted:
        size = sum(p.numel() * p.element_size() for p in teacher.model.parameters())
        counted.add(id(teacher.model))
    how = (
        f"a second model, {readable(size)} of memory"
        if second
        else f"`{subject.tuning.kind}` switched off, no second copy"
    )
    written = _writing(plan, subject, number, batch) * in_all * share / max(execution.seconds, 1e-9)
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
    return TeachingCost(record, [line], size)


def _writing(plan: Plan, subject: Subject, number: int, batch: Batch) -> float:
    """Seconds in which the model writes a batch's places; 0 for an objective that is taken on what others wrote."""
    spec = plan.objectives[number]
    if not isinstance(spec, OnPolicyObjective) or not isinstance(subject.model, CausalModel):
        return 0.0
    writer = Writer(subject.model, spec.temperature, plan.reading.encoder.eos, plan.stage.seed)
    begin = time.perf_counter()
    writer(replace(batch.to(torch.device("cpu")), position_B=np.arange(len(batch.labels))))
    return time.perf_counter() - begin

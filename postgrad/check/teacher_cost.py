"""Cost of a stage's teachers: memory, time per step, and the size of prediction caches."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from postgrad.config.objectives import AnyObjective, OnPolicyObjective, get_objective_names
from postgrad.data.loading.batch import Batch, collate
from postgrad.distributed.fsdp import reshard
from postgrad.distributed.world import World
from postgrad.hardware.execution import Execution
from postgrad.hardware.memory import format_bytes
from postgrad.models.model import CausalModel, Model
from postgrad.objectives.teacher import OnlineTeacher
from postgrad.plan.plan import Plan
from postgrad.plan.teachers import get_teacher_identity
from postgrad.reports.html.notation import format_duration
from postgrad.run.cached_teacher import estimate_cache_cost, find_cache_jobs
from postgrad.run.online_teacher import load_teacher, make_online_teachers
from postgrad.run.tuned_model import TunedModel
from postgrad.training.on_policy import OnPolicySampler

_TIMED_ROUNDS = 2


@dataclass(frozen=True)
class TeacherCost:
    """The cost of a teacher as plain data and as text; `bytes` of memory are held during training."""

    record: dict[str, Any]
    lines: list[str]
    bytes: int


def check_teachers(plan: Plan, subject: TunedModel, execution: Execution, world: World) -> list[TeacherCost]:
    """Load a stage's teachers and time each on some rows. Raises the errors of the teachers."""
    if not plan.teachers:
        return []
    names = get_objective_names(plan.objectives)
    online = make_online_teachers(plan, subject.model, subject.tuning, subject.base_names, execution, world)
    counted_models: set[int] = set()
    costs = [
        _online_teacher_cost(plan, subject, execution, number, teacher, names[number], counted_models)
        for number, teacher in online.items()
    ]
    return [*costs, *_cached_teacher_costs(plan, execution, world, names)]


def _cached_teacher_costs(plan: Plan, execution: Execution, world: World, names: list[str]) -> list[TeacherCost]:
    costs = []
    teachers: dict[str, OnlineTeacher] = {}
    for job in find_cache_jobs(plan):
        location, name = plan.teachers[job.objective_number], names[job.objective_number]
        identity = get_teacher_identity(location)
        if identity not in teachers:
            teachers[identity] = load_teacher(plan, location, job.objective_number, execution, world)
        cost = estimate_cache_cost(plan, job, teachers[identity], execution.micro)
        source = plan.data.sources[job.source_number].name
        when = "already cached" if cost.is_filled else f"cached before training, about {format_duration(cost.seconds)}"
        line = (
            f"{name}: predictions of {location.name} on {source}, {when}; {cost.labels:,} labels of about "
            f"{cost.bytes_per_label:.0f} bytes, {format_bytes(cost.labels * cost.bytes_per_label)} in the cache"
        )
        record = {"name": name, "teacher": location.name, "source": source, **cost.as_dict()}
        costs.append(TeacherCost(record, [line], 0))
    return costs


def _online_teacher_cost(
    plan: Plan,
    subject: TunedModel,
    execution: Execution,
    number: int,
    teacher: OnlineTeacher,
    name: str,
    counted_models: set[int],
) -> TeacherCost:
    """Cost of a teacher that runs at each step; `counted_models` have had their memory counted."""
    data, location = plan.data, plan.teachers[number]
    distilled = [k for k, numbers in enumerate(data.objective_indices) if number in numbers]
    row_counts = data.row_counts()
    share_of_rows = sum(row_counts[k] for k in distilled) / max(sum(row_counts), 1)
    rows = data.rows[distilled[0]]
    batch_size = min(execution.micro, len(rows))
    batch = collate(
        [rows.get_row(i, i) for i in range(batch_size)],
        [distilled[0]] * batch_size,
        pad_token_id=plan.model.inputs.pad_id,
    ).to(next(subject.model.parameters()).device)
    # A batch's seconds times this are a share of the whole run.
    scale = plan.steps * data.mixture.block_size / batch_size * share_of_rows / max(execution.seconds, 1e-9)
    share_of_step = _time_teacher(teacher, batch) * scale
    is_second_model = teacher.model is not subject.model
    memory = 0
    if is_second_model and id(teacher.model) not in counted_models:
        memory = sum(p.numel() * p.element_size() for p in teacher.model.parameters())
        counted_models.add(id(teacher.model))
    eos = plan.model.inputs.encoder.eos
    generation_share = _time_generation(subject.model, plan.objectives[number], eos, plan.stage.seed, batch) * scale
    model_text = (
        f"a second model, {format_bytes(memory)} of memory"
        if is_second_model
        else f"this model with `{subject.tuning.kind}` disabled, no second copy"
    )
    context_tokens = sum(len(context.ids) for contexts in batch.contexts for context in contexts)
    context_share = context_tokens / batch.labels.numel() if teacher.reads_contexts else 0.0
    line = (
        f"{name}: {location.name} runs at each step on {share_of_rows:.0%} of the rows; {model_text}; its forward pass takes "
        f"about {share_of_step:.0%} of a step" + (f", generation {generation_share:.0%}" if generation_share else "")
    ) + (f"; contexts add {context_share:.0%} to what it reads" if context_share else "")
    record = {
        "name": name,
        "teacher": location.name,
        "second_model": is_second_model,
        "bytes": memory,
        "share_of_step": share_of_step,
        "writing_share_of_step": generation_share,
        **({"context_share": context_share} if context_share else {}),
    }
    return TeacherCost(record, [line], memory)


def _time_teacher(teacher: OnlineTeacher, batch: Batch) -> float:
    """Seconds of a teacher's forward pass: the shortest of several, after a first one as a warm-up."""
    times = []
    for _ in range(_TIMED_ROUNDS + 1):
        begin = time.perf_counter()
        teacher(batch)
        times.append(time.perf_counter() - begin)
    reshard(teacher.model)
    return min(times[1:])


def _time_generation(model: Model, objective: AnyObjective, eos: int, seed: int, batch: Batch) -> float:
    """Seconds in which the model generates a batch; 0 for objectives on given text."""
    if not isinstance(objective, OnPolicyObjective) or not isinstance(model, CausalModel):
        return 0.0
    sampler = OnPolicySampler(model, objective.temperature, eos, seed)
    begin = time.perf_counter()
    sampler(replace(batch.to(torch.device("cpu")), position_B=np.arange(len(batch.labels))))
    return time.perf_counter() - begin

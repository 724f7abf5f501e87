"""Will this stage work here, and what will it cost? Probes the model and times a micro-batch; trains nothing."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from postgrad.check.penalty_cost import check_penalties
from postgrad.check.plan_text import plan_lines
from postgrad.check.preview_rows import preview_rows
from postgrad.check.source_text import source_lines
from postgrad.check.teacher_cost import check_teachers
from postgrad.distributed.world import World
from postgrad.hardware import machine
from postgrad.hardware.execution import get_model_dimensions
from postgrad.hardware.memory import estimate_memory, format_bytes
from postgrad.models.model import verify_model
from postgrad.models.task import Task
from postgrad.optim import lr_schedules
from postgrad.plan.plan import Plan
from postgrad.reports.html.notation import format_duration
from postgrad.run.build import ParameterCounts, choose_execution, make_loader, make_tuned_model
from postgrad.run.relearning import relearning_notes
from postgrad.run.task_scores import sharding_notes
from postgrad.run.update_summary import check_update, update_lines


def check_stage(plan: Plan, *, cache: Path, show: int = 0) -> dict[str, Any]:
    """The plan with what only the model can tell: whether documents stay apart, memory, time. Raises what is wrong.

    `show`: how many rows of each source to show as the model sees them; they are under `shown`.
    """
    machine.tune_allocator()
    world = World(machine.default_device())
    subject = make_tuned_model(plan, world)
    counts = subject.counts()
    execution = choose_execution(plan, subject, world)
    subject.model.pretrained.set_attn_implementation(execution.attention)
    verify_model(subject.model, prefix_tokens=plan.prefix_length)
    memory = estimate_memory(
        get_model_dimensions(subject.model),
        rows=execution.micro,
        length=plan.model.context_length,
        bf16=execution.dtype == "bfloat16",
        checkpointing=execution.activation_checkpointing,
        sdpa=execution.attention != "eager",
    )
    teaching = check_teachers(plan, subject, execution, world)
    memory = dataclasses.replace(memory, teachers=sum(cost.bytes for cost in teaching))
    update = check_update(plan, subject)
    penalties = check_penalties(plan, subject, execution, world)
    found = source_lines(plan, cache)
    beside = (
        *subject.loaded_model.notes,
        *subject.tuning.notes,
        *sharding_notes(plan.evaluation.tasks),
        *relearning_notes(plan),
    )
    notes = (*plan.notes, *beside)
    record = {
        **plan.as_record().as_json(),
        "parameters": counts.parameters,
        "trainable": counts.trainable,
        "tuning": plan.stage.tuning.kind,
        "task": plan.model.task,
        "execution": execution.as_dict(),
        "memory": dataclasses.asdict(memory),
        "seconds": execution.seconds,
        "teachers": [cost.record for cost in teaching],
        "penalties": [penalty.record for penalty in penalties],
        "sparse_update": update.as_json() if update else None,
        "found": found,
        "notes": list(notes),
        "contamination": {name: found.as_json() for name, found in plan.data.overlaps.items()},
        "schedule_curve": lr_schedules.sample_schedule(plan.schedule, plan.steps, 60),
    }
    free = machine.available_memory()
    apart = "; packed documents do not see each other (probed)" if plan.model.task == Task.CAUSAL else ""
    apart += "; prefixes are read in both directions (probed)" if plan.prefix_length else ""
    lines = [
        *plan_lines(plan, found),
        *(f"note: {note}" for note in beside),
        "",
        f"model: {counts.parameters:,} weights, {plan.model.vocab_size:,} tokens{apart}",
        *(
            [f"task layer: reads {plan.model.task_layer.form.describe()}"]
            if plan.model.task_layer and plan.model.task_layer.form
            else []
        ),
        tuning_line(plan.stage.tuning.kind, counts),
        *update_lines(plan, update),
        f"compute: {execution.dtype}, {execution.attention} attention, {execution.micro} rows at once, "
        f"{'compiled' if execution.compile else 'not compiled'}, {execution.threads} thread{'s' * (execution.threads > 1)}",
        *(f"  {key}: {reason}" for key, reason in execution.reasons.items()),
        f"memory: about {format_bytes(memory.total)} (weights {format_bytes(memory.weights)}, gradients {format_bytes(memory.gradients)}, "
        f"moments {format_bytes(memory.moments)}, activations {format_bytes(memory.activations)}"
        + (f", teachers {format_bytes(memory.teachers)})" if memory.teachers else ")")
        + (f" of {format_bytes(free)} free" if free else ""),
        *(line for cost in teaching for line in cost.lines),
        *(line for penalty in penalties for line in penalty.lines),
        f"time: about {format_duration(execution.seconds)}, from timed micro-batches"
        + (" without compiling; compiled it will be less" if execution.compile else "")
        + "; evaluation comes on top",
    ]
    if show:
        record["shown"] = preview_rows(plan, make_loader(plan, execution, world), show)
    return {"text": "\n".join(lines), **record}


def tuning_line(kind: str, counts: ParameterCounts) -> str:
    """Which weights move, and how many of all that is."""
    return f"tuning: {kind}, {counts.trainable:,} of {counts.parameters:,} weights move ({_percent(counts)})"


def _percent(counts: ParameterCounts) -> str:
    """A share with two digits that say something, however small it is."""
    share = 100 * counts.trainable / counts.parameters
    return f"{share:.0f} %" if share >= 10 else f"{share:.2g} %"

"""The check of a stage: its plan, model probes, memory and time. It times micro-batches and trains nothing."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from postgrad.check.memory_probe import measure_memory
from postgrad.check.penalty_cost import check_penalties
from postgrad.check.plan_text import plan_lines
from postgrad.check.preview_rows import preview_rows
from postgrad.check.replay_cost import check_replay
from postgrad.check.source_text import source_lines
from postgrad.check.teacher_cost import check_teachers
from postgrad.distributed.world import World
from postgrad.hardware import machine
from postgrad.hardware.execution import Execution, get_model_dimensions
from postgrad.hardware.memory import MemoryEstimate, estimate_memory, format_bytes, memory_errors
from postgrad.models.model import verify_model
from postgrad.models.task import Task
from postgrad.optim import lr_schedules
from postgrad.plan.plan import Plan
from postgrad.reports.html.notation import format_duration
from postgrad.run.build import choose_execution, make_loader, state_dtypes
from postgrad.run.memory_hints import training_hint
from postgrad.run.relearning import relearning_notes
from postgrad.run.task_scores import sharding_notes
from postgrad.run.tuned_model import ParameterCounts, TunedModel, make_tuned_model
from postgrad.run.update_summary import check_update, update_lines


def check_stage(plan: Plan, *, cache: Path, show: int = 0) -> dict[str, Any]:
    """The plan with memory and time, after probes of the model. Raises the error of whatever is impossible.

    `show`: number of rows of each source under `shown`, as the model sees them.
    """
    with memory_errors("check", training_hint(plan)):
        return _check_stage(plan, cache, show)


def _check_stage(plan: Plan, cache: Path, show: int) -> dict[str, Any]:
    machine.tune_allocator()
    world = World(machine.default_device())
    process = machine.process_memory(world.device)
    subject = make_tuned_model(plan, world)
    execution = choose_execution(plan, subject, world)
    subject.model.pretrained.set_attn_implementation(execution.attention)
    verify_model(
        subject.model,
        packed=execution.packed,
        row_length=plan.model.context_length,
        prefix_tokens=plan.prefix_length,
    )
    counts = subject.counts()
    teachers = check_teachers(plan, subject, execution, world)
    memory = _estimate_memory(plan, subject, execution, sum(cost.bytes for cost in teachers))
    update = check_update(plan, subject)
    replays = check_replay(plan, subject, execution)
    penalties = check_penalties(plan, subject, execution, world)
    notes, tuning_notes = subject.loaded_model.notes, subject.tuning.notes
    del subject  # the measured run loads a model of its own
    memory = measure_memory(plan, execution, world, memory, process)
    sources = source_lines(plan.data.sources, cache)
    model_notes = (
        *notes,
        *tuning_notes,
        *sharding_notes(plan.evaluation.tasks),
        *relearning_notes(plan),
    )
    padding = make_loader(plan, execution, world).measure_padding(plan.steps)
    padding_lines = [] if execution.packed else [f"  padding: {padding:.1%} of the positions of unpacked rows"]
    execution = replace(execution, seconds=execution.seconds * (1 + plan.sharp_steps / plan.steps))
    lines = [
        *plan_lines(plan, sources),
        *(f"note: {note}" for note in model_notes),
        "",
        *_model_lines(plan, counts, execution),
        *update_lines(plan, update),
        *_execution_lines(execution),
        *padding_lines,
        _memory_line(memory),
        *(line for cost in (*teachers, *penalties) for line in cost.lines),
        *(cost.line for cost in replays),
        *_sharpness_lines(plan.sharp_steps, plan.steps, counts),
        f"time: about {format_duration(execution.seconds)} without evaluation, from timed micro-batches"
        + (" (not compiled; a compiled model is faster)" if execution.compile else ""),
    ]
    record = {
        **plan.as_record().as_json(),
        "parameters": counts.parameters,
        "trainable": counts.trainable,
        "tuning": plan.stage.tuning.kind,
        "task": plan.model.task,
        "execution": execution.as_dict(),
        "padding_share": padding,
        "memory": {**asdict(memory), "total": memory.total},
        "seconds": execution.seconds,
        "on_policy_replay": [cost.record for cost in replays],
        "sharpness_aware_steps": plan.sharp_steps,
        "teachers": [cost.record for cost in teachers],
        "penalties": [penalty.record for penalty in penalties],
        "sparse_update": update.as_json() if update else None,
        "found": sources,
        "notes": [*plan.notes, *model_notes],
        "contamination": {name: overlap.as_json() for name, overlap in plan.data.overlaps.items()},
        "schedule_curve": lr_schedules.sample_schedule(plan.schedule, plan.steps, 60),
    }
    if show:
        record["shown"] = preview_rows(plan, make_loader(plan, execution, world), show)
    return {"text": "\n".join(lines), **record}


def _estimate_memory(plan: Plan, subject: TunedModel, execution: Execution, teachers: int) -> MemoryEstimate:
    memory = estimate_memory(
        get_model_dimensions(subject.model),
        rows=execution.micro,
        length=plan.model.context_length,
        bf16=execution.dtype == "bfloat16",
        checkpointing=execution.activation_checkpointing,
        sdpa=execution.attention != "eager",
        state=state_dtypes(plan),
    )
    return replace(memory, teachers=teachers)


def _model_lines(plan: Plan, counts: ParameterCounts, execution: Execution) -> list[str]:
    """The model with its task layer and tuning, and what the probe of its attention has verified."""
    model = plan.model
    is_probed = model.task == Task.CAUSAL and execution.packed
    probes = "; packed documents do not attend to each other (verified)" if is_probed else ""
    probes += "; attention to prefixes is bidirectional (verified)" if plan.prefix_length else ""
    lines = [f"model: {counts.parameters:,} weights, vocabulary of {model.vocab_size:,} tokens{probes}"]
    if model.task_layer and model.task_layer.form:
        lines.append(f"task layer: reads {model.task_layer.form.describe()}")
    share = 100 * counts.trainable / counts.parameters
    percent = f"{share:.0f} %" if share >= 10 else f"{share:.2g} %"
    lines.append(
        f"tuning: {plan.stage.tuning.kind}, {counts.trainable:,} of {counts.parameters:,} weights are trained ({percent})"
    )
    return lines


def _execution_lines(execution: Execution) -> list[str]:
    return [
        f"compute: {execution.dtype}, {execution.attention} attention, micro-batches of {execution.micro} rows, "
        f"{'compiled' if execution.compile else 'not compiled'}, "
        f"{execution.threads} thread{'s' * (execution.threads > 1)}",
        *(f"  {key}: {reason}" for key, reason in execution.reasons.items()),
    ]


def _sharpness_lines(sharp_steps: int, steps: int, counts: ParameterCounts) -> list[str]:
    if not sharp_steps:
        return []
    return [
        f"sharpness-aware: the last {sharp_steps:,} of {steps:,} steps compute their gradient twice, {sharp_steps / steps:.0%} "
        f"more computation in all, and hold a copy of the trained weights, {format_bytes(4 * counts.trainable)}"
    ]


def _memory_line(memory: MemoryEstimate) -> str:
    parts = {
        **({"process": memory.process} if memory.process else {}),
        "weights": memory.weights,
        "gradients": memory.gradients,
        "optimizer states": memory.moments,
        "activations and buffers": memory.activations,
        **({"teachers": memory.teachers} if memory.teachers else {}),
    }
    free = machine.available_memory()
    return (
        f"memory: about {format_bytes(memory.total)} at the peak, {'measured' if memory.is_measured else 'estimated'} "
        f"({', '.join(f'{name} {format_bytes(size)}' for name, size in parts.items())})"
        + (f" of {format_bytes(free)} free" if free else "")
    )

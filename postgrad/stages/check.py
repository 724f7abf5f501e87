"""Will this stage work here, and what will it cost? Probes the model and times a micro-batch; trains nothing."""

from __future__ import annotations

import dataclasses
from typing import Any

from postgrad import schedules
from postgrad.models import machine
from postgrad.models.model import CausalModel, probe
from postgrad.models.pretrained import load_model, parameters_of
from postgrad.planning.execution import shape_of
from postgrad.planning.memory import estimate, readable
from postgrad.reports.notation import duration
from postgrad.stages.build import choose_execution
from postgrad.stages.plan import Plan
from postgrad.stages.plan_text import plan_lines
from postgrad.training.world import World


def check_stage(plan: Plan) -> dict[str, Any]:
    """The plan with what only the model can tell: whether documents stay apart, memory, time. Raises what is wrong."""
    machine.tune_allocator()
    world = World(machine.device())
    model = CausalModel(load_model(plan.start)).to(world.device)
    parameters = parameters_of(model)
    execution = choose_execution(plan, model.pretrained, world)
    model.pretrained.set_attn_implementation(execution.attention)
    probe(model)
    memory = estimate(
        shape_of(model.pretrained.config, parameters),
        rows=execution.micro,
        length=plan.context,
        bf16=execution.dtype == "bfloat16",
        checkpointing=execution.activation_checkpointing,
        sdpa=execution.attention != "eager",
    )
    record = {
        **plan.as_record(),
        "parameters": parameters,
        "execution": execution.as_dict(),
        "memory": dataclasses.asdict(memory),
        "seconds": execution.seconds,
        "notes": list(plan.notes),
        "overlap": plan.overlap,
        "schedule_curve": schedules.sampled(plan.schedule, plan.steps, 60),
    }
    free = machine.memory_bytes()
    lines = [
        *plan_lines(plan),
        "",
        f"model: {parameters:,} weights, {plan.vocabulary:,} tokens; packed documents do not see each other (probed)",
        f"compute: {execution.dtype}, {execution.attention} attention, {execution.micro} rows at once, "
        f"{'compiled' if execution.compile else 'not compiled'}, {execution.threads} thread{'s' * (execution.threads > 1)}",
        *(f"  {key}: {reason}" for key, reason in execution.reasons.items()),
        f"memory: about {readable(memory.total)} (weights {readable(memory.weights)}, gradients {readable(memory.gradients)}, "
        f"moments {readable(memory.moments)}, activations {readable(memory.activations)})"
        + (f" of {readable(free)} free" if free else ""),
        f"time: about {duration(execution.seconds)}, from timed micro-batches"
        + (" without compiling; compiled it will be less" if execution.compile else "")
        + "; evaluation comes on top",
    ]
    return {"text": "\n".join(lines), **record}

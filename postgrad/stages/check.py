"""Will this stage work here, and what will it cost? Probes the model and times a micro-batch; trains nothing."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

from postgrad import schedules
from postgrad.models import machine
from postgrad.models.pretrained import CausalModel, load_model, parameters_of, probe
from postgrad.planning.execution import Execution, shape_of
from postgrad.planning.memory import estimate, readable
from postgrad.reports.notation import duration
from postgrad.stages.build import build, choose_execution, make_loader
from postgrad.stages.plan import Plan
from postgrad.stages.plan_text import plan_lines
from postgrad.training.world import World


def check_stage(plan: Plan) -> dict[str, Any]:
    """The plan with what only the model can tell: whether documents stay apart, memory, time. Raises what is wrong."""
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
    seconds = _seconds_of_a_step(plan, model, execution, world) * plan.steps
    record = {
        **plan.as_record(),
        "parameters": parameters,
        "execution": execution.as_dict(),
        "memory": dataclasses.asdict(memory),
        "seconds": seconds,
        "notes": list(plan.notes),
        "overlap": plan.overlap,
        "schedule_curve": schedules.sampled(plan.schedule, plan.steps, 60),
    }
    free = machine.memory_bytes()
    lines = [
        *plan_lines(plan),
        "",
        f"model: {parameters:,} weights, {plan.vocabulary:,} tokens; packed documents do not see each other (probed)",
        f"compute: {execution.dtype}, {execution.attention} attention, "
        f"{'compiled' if execution.compile else 'not compiled'}, {execution.threads} threads, {execution.micro} rows at once",
        *(f"  {key}: {reason}" for key, reason in execution.reasons.items()),
        f"memory: about {readable(memory.total)} (weights {readable(memory.weights)}, gradients {readable(memory.gradients)}, "
        f"moments {readable(memory.moments)}, activations {readable(memory.activations)})"
        + (f" of {readable(free)} free" if free else ""),
        f"time: about {duration(seconds)}, measured on one micro-batch"
        + (" without compiling; compiled it will be less" if execution.compile else "")
        + "; evaluation comes on top",
    ]
    return {"text": "\n".join(lines), **record}


def _seconds_of_a_step(plan: Plan, model: CausalModel, execution: Execution, world: World) -> float:
    """Seconds of one step, from the second of two timed micro-batches; the model is thrown away afterwards."""
    run = build(_without_moments(plan), model, dataclasses.replace(execution, compile=False), world)
    batch = make_loader(plan, execution, world).read(1)[0].to(world.device)
    run.model.train()
    seconds = 0.0
    for _ in range(2):
        begin = time.perf_counter()
        loss, _ = run.objectives[0](run.model(batch.ids_BT, batch.positions_BT), batch)
        (loss / max(batch.counted, 1)).backward()
        run.weights.clear()
        seconds = time.perf_counter() - begin
    return seconds * plan.mixture.block / execution.micro


def _without_moments(plan: Plan) -> Plan:
    optimizer = plan.stage.optimizer.model_copy(update={"moments": "reset"})
    return dataclasses.replace(plan, stage=plan.stage.model_copy(update={"optimizer": optimizer}))

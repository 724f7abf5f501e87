"""What will the penalties of a stage cost? They are made and timed, so that what is wrong with them is told by `check`."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from postgrad.distributed.world import World
from postgrad.hardware.execution import Execution
from postgrad.hardware.memory import format_bytes
from postgrad.optim.optimizer import Weights
from postgrad.penalties.penalty import StagePenalty
from postgrad.plan.plan import Plan
from postgrad.run.anchors import describe_penalty
from postgrad.run.build import TunedModel, make_penalties
from postgrad.run.penalty_strength import PROBE_STEPS

_ROUNDS = 3


@dataclass(frozen=True)
class PenaltyCost:
    """What is said of a penalty beforehand."""

    record: dict[str, Any]
    lines: list[str]


def check_penalties(plan: Plan, subject: TunedModel, execution: Execution, world: World) -> list[PenaltyCost]:
    """Make a stage's penalties on its start model and time them. The model is changed in place, as by a run.

    Raises what is wrong with them.
    """
    if not plan.stage.penalties:
        return []
    weights = Weights(subject.model, subject.tuning, execution.compute, master_copies=True)
    step = execution.seconds / max(plan.steps, 1)
    anchors = [p for p in make_penalties(plan, subject, weights) if isinstance(p, StagePenalty)]
    costs = []
    for spec, anchor in zip(plan.stage.penalties, anchors, strict=True):
        seconds = _time_penalty(anchor)
        share = seconds / step if step else None  # a stage that takes no time worth the name
        record = {**describe_penalty(anchor).as_json(), "strength": spec.strength, "seconds": seconds, "share": share}
        costs.append(PenaltyCost(record, _penalty_lines(record, world)))
    weights.zero_gradients()
    return costs


def _time_penalty(penalty: StagePenalty) -> float:
    """Seconds of one pull, the shortest of some after a first one that makes the gradients."""
    times = []
    for _ in range(_ROUNDS + 1):
        begin = time.perf_counter()
        float(penalty())
        times.append(time.perf_counter() - begin)
    return min(times[1:])


def _penalty_lines(record: dict[str, Any], world: World) -> list[str]:
    strength = record["strength"]
    told = (
        f"strength auto, found by {PROBE_STEPS} steps before the training"
        if strength == "auto"
        else f"strength {strength:g}"
    )
    parts = [f"{what} {format_bytes(size)}" for what, size in record["bytes"].items() if what != "mmap" and size]
    where = [f"{' and '.join(parts)} beside the weights on {world.device.type}"] if parts else []
    if record["bytes"]["mmap"]:
        where.append(f"{format_bytes(record['bytes']['mmap'])} mapped from files, nothing copied")
    if not where:
        where.append("no copies, it follows from the tuning's own tensors")
    lines = [
        f"penalty {record['name']}: {record['weights']:,} weights held to {record['reference']['model']}, {told}; "
        f"{', '.join(where)}; {1e3 * record['seconds']:.2g} ms a step"
        + ("" if record["share"] is None else f", about {record['share']:.1%} of it")
    ]
    measured = record.get("importance")
    if measured:
        lines.append(
            f"  importance: {measured['kind']} of {measured['tokens']:,} {measured['unit']}s, mean {measured['mean']:.3g}"
        )
    left_out = record["skipped"]
    if left_out:
        more = f" and {len(left_out) - 3} more" if len(left_out) > 3 else ""
        lines.append(f"  not held: {', '.join(left_out[:3])}{more}")
    return [*lines, *(f"  note: {note}" for note in record["notes"])]

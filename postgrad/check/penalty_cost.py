"""Cost of a stage's penalties: memory, and time per step."""

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
from postgrad.run.build import make_penalties
from postgrad.run.penalty_strength import PROBE_STEPS
from postgrad.run.tuned_model import TunedModel

_TIMED_ROUNDS = 3
_MAX_NAMES = 3


@dataclass(frozen=True)
class PenaltyCost:
    """The cost of a penalty as plain data and as text."""

    record: dict[str, Any]
    lines: list[str]


def check_penalties(plan: Plan, subject: TunedModel, execution: Execution, world: World) -> list[PenaltyCost]:
    """Build a stage's penalties on its start model and time them. Changes the model in place, as a run does.

    Raises the errors of the penalties.
    """
    if not plan.stage.penalties:
        return []
    weights = Weights(subject.model, subject.tuning, execution.compute, master_copies=True)
    step_seconds = execution.seconds / max(plan.steps, 1)
    anchors = [p for p in make_penalties(plan, subject, weights) if isinstance(p, StagePenalty)]
    costs = []
    for spec, anchor in zip(plan.stage.penalties, anchors, strict=True):
        seconds = _time_penalty(anchor)
        share = seconds / step_seconds if step_seconds else None
        record = {**describe_penalty(anchor).as_json(), "strength": spec.strength, "seconds": seconds, "share": share}
        costs.append(PenaltyCost(record, _penalty_lines(record, world)))
    weights.zero_gradients()
    return costs


def _time_penalty(penalty: StagePenalty) -> float:
    """Seconds of one pull, the shortest of some after a first one that makes the gradients."""
    times = []
    for _ in range(_TIMED_ROUNDS + 1):
        begin = time.perf_counter()
        float(penalty())
        times.append(time.perf_counter() - begin)
    return min(times[1:])


def _penalty_lines(record: dict[str, Any], world: World) -> list[str]:
    strength = record["strength"]
    if strength == "auto":
        strength_text = f"strength auto, from {PROBE_STEPS} probe steps before training"
    else:
        strength_text = f"strength {strength:g}"
    mapped = record["bytes"]["mmap"]
    copies = [f"{name} {format_bytes(size)}" for name, size in record["bytes"].items() if name != "mmap" and size]
    storage = [f"{' and '.join(copies)} on {world.device.type}"] if copies else []
    if mapped:
        storage.append(f"{format_bytes(mapped)} memory-mapped from files")
    share = "" if record["share"] is None else f", about {record['share']:.1%} of a step"
    lines = [
        f"penalty {record['name']}: pulls {record['weights']:,} weights to {record['reference']['model']}, {strength_text}; "
        f"{', '.join(storage) or 'no copies: it needs only the tensors of the tuning'}; "
        f"{1e3 * record['seconds']:.2g} ms per step{share}"
    ]
    importance = record.get("importance")
    if importance:
        lines.append(
            f"  importance: {importance['kind']} of {importance['tokens']:,} {importance['unit']}s, "
            f"mean {importance['mean']:.3g}"
        )
    excluded = record["skipped"]
    if excluded:
        more = f" and {len(excluded) - _MAX_NAMES} more" if len(excluded) > _MAX_NAMES else ""
        lines.append(f"  not penalized: {', '.join(excluded[:_MAX_NAMES])}{more}")
    return [*lines, *(f"  note: {note}" for note in record["notes"])]

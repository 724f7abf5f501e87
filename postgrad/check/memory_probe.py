"""Peak memory of a run, measured: part of a step, some scores and some drift, with the settings that will run.

What a formula leaves out decides small runs: the libraries themselves, scores on more tokens than a micro-batch, chunks of
logits, and memory that an allocator keeps. Nothing is trained: the learning rate is 0, and the model is thrown away.
"""

from __future__ import annotations

from dataclasses import replace

from postgrad.distributed.world import World
from postgrad.evaluation import before_after
from postgrad.hardware import machine
from postgrad.hardware.execution import Execution
from postgrad.hardware.memory import MemoryEstimate
from postgrad.plan.plan import Plan
from postgrad.run.build import build_run, make_loader, make_step
from postgrad.run.cached_teacher import find_cache_jobs
from postgrad.run.context import prepare_model
from postgrad.run.measure_drift import measure_drift
from postgrad.run.tuned_model import make_tuned_model

_MICRO_BATCHES = 2
"""The second one adds to gradients that exist."""
_SCORED_TOKENS, _DRIFT_TOKENS = 8192, 4096
"""As many as are scored at once."""
_MAX_SHARE = 0.8
"""Largest estimate, as a share of the free memory, that is tried out."""


def measure_memory(
    plan: Plan, execution: Execution, world: World, estimate: MemoryEstimate, process: int | None
) -> MemoryEstimate:
    """The estimate with what was measured: `activations` is all that is neither state nor `process`, the memory before it.

    The estimate with `process` alone where nothing can be measured: it is more than the memory that is free, predictions of
    teachers are not cached yet, or the system does not tell the peak.
    """
    if process is None:
        return estimate
    estimate, free = replace(estimate, process=process), machine.available_memory()
    is_too_large = free is not None and estimate.total > _MAX_SHARE * free
    if is_too_large or find_cache_jobs(plan):
        return estimate
    _train_part(plan, replace(execution, compile=False), world)
    _measure_drift_part(plan, world)
    peak = machine.peak_memory(world.device)
    state = estimate.weights + estimate.gradients + estimate.moments + estimate.teachers
    if peak is None:
        return estimate
    return replace(estimate, activations=max(0, peak - process - state), is_measured=True)


def _train_part(plan: Plan, execution: Execution, world: World) -> None:
    """Two micro-batches without an update that changes anything, and the scores of a batch of held-out text."""
    tuned_model = make_tuned_model(plan, world)
    prepare_model(plan, tuned_model.model, execution)
    built = build_run(plan, tuned_model, execution, world)
    run = replace(built, penalties=[], schedule=lambda step: 0.0)  # `built` holds the penalties' tensors
    run.model.train()
    make_step(plan, run)(run, make_loader(plan, execution, world).read_batches(1)[:_MICRO_BATCHES])
    sets = [held_out.take_tokens(_SCORED_TOKENS) for held_out in plan.evaluation.scored_sets[:1]]
    with run.weights.full_precision():
        before_after.score_sets(run.model, sets, context=plan.model.context_length, world=world)


def _measure_drift_part(plan: Plan, world: World) -> None:
    """The drift between two models on a batch of held-out text, as a run measures it at its end."""
    evaluation = plan.stage.evaluation
    if not evaluation.drift_tokens or not plan.evaluation.scored_sets:
        return
    part = evaluation.model_copy(update={"drift_tokens": min(evaluation.drift_tokens, _DRIFT_TOKENS)})
    stage = plan.stage.model_copy(update={"evaluation": part})
    first = replace(
        plan.evaluation, sets=plan.evaluation.scored_sets[:1], sets_before=plan.evaluation.scored_sets_before[:1]
    )
    measure_drift(replace(plan, stage=stage, evaluation=first), make_tuned_model(plan, world).model, world)

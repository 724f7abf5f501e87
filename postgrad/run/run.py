"""One run of a stage: claim -> baseline -> cache teachers -> train -> publish -> measure -> record.

`run_stage` is a generator of events (`postgrad.run.events`); the caller displays them, there are no callbacks. A run that is
killed at any moment continues from its newest complete checkpoint when the same command is repeated, and ends with the same
bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

from postgrad.distributed.world import InputFile, MeshShape, World, ranks_of_environment
from postgrad.hardware import machine
from postgrad.hardware.memory import memory_errors
from postgrad.plan.plan import Plan
from postgrad.run.baseline import score_baseline
from postgrad.run.cached_teacher import fill_teacher_caches, find_cache_jobs
from postgrad.run.context import RunContext
from postgrad.run.events import Phase, PhaseStarted, RunEvent, RunStopped, StepCompleted
from postgrad.run.measure import measure
from postgrad.run.memory_hints import scoring_hint, teacher_hint, training_hint
from postgrad.run.publish_model import publish
from postgrad.run.record_results import record_finished, record_stopped
from postgrad.run.resume import claim_run
from postgrad.run.run_folder import Interrupt, lock_run_folder
from postgrad.run.run_trackers import RunTrackers
from postgrad.run.train import train
from postgrad.run.training_session import prepare_training


def run_stage(plan: Plan, *, command: str, cache: Path) -> Iterator[RunEvent]:
    """Run a stage, or resume it; `command` is recorded, `cache` holds what runs share.

    Raises the `PostgradError` of whatever fails; training up to the last checkpoint is kept.
    """
    machine.tune_allocator(returns_blocks=ranks_of_environment() > 1)
    timeout = timedelta(seconds=plan.stage.compute.collective_timeout_seconds)
    parallel = plan.stage.parallel
    mesh_shape = MeshShape(parallel.replicate, parallel.shard) if parallel else MeshShape()
    with (
        World.init_process_group(machine.default_device(), timeout, mesh_shape) as world,
        lock_run_folder(plan.output, world),
        Interrupt() as interrupt,
        RunTrackers(plan, world.is_main) as trackers,
    ):
        # A generator of its own: its frame, and the sharded model in it, must be gone before the process group is.
        for event in _run_phases(plan, world, interrupt, command=command, cache=cache):
            match event:
                case PhaseStarted():
                    world.note(event.message)
                case StepCompleted():
                    world.note(f"the step after step {event.report.step:,}")
            yield from trackers.observe(event)
            yield event


def _run_phases(plan: Plan, world: World, interrupt: Interrupt, *, command: str, cache: Path) -> Iterator[RunEvent]:
    with memory_errors("loading the model", training_hint(plan)):
        context = yield from claim_run(plan, world, interrupt, command=command, cache=cache)
    if context is None:  # the run was complete already
        return
    execution = context.execution
    with memory_errors("scoring the start model", scoring_hint(plan)):
        baseline = yield from score_baseline(context)
    with memory_errors("caching predictions of the teacher", teacher_hint(plan, execution)):
        has_teachers = not context.is_stop_requested() and (yield from _cache_teachers(context))
    if not has_teachers:
        yield RunStopped(0, plan.steps)
        return
    with memory_errors("training", training_hint(plan, execution)):
        session = yield from prepare_training(context)
        is_stopped = yield from train(context, session, baseline)
    outcome = session.outcome()
    if is_stopped:
        record_stopped(context, baseline, outcome)
        yield RunStopped(outcome.step, plan.steps)
        return
    with memory_errors("scoring the trained model", scoring_hint(plan)):
        published_tokens = yield from publish(context, session)
        del session  # its weights and moments make room for the published model
        measurements = yield from measure(context, baseline)
    yield from record_finished(context, baseline, outcome, published_tokens, measurements)


def _cache_teachers(context: RunContext) -> Phase[bool]:
    """Query the teachers whose predictions are cached; False when the user stopped it. Filled parts are kept."""
    is_missing = any(job.teacher_cache.missing_parts() for job in find_cache_jobs(context.plan))
    if not context.world.any_rank(is_missing):
        return True
    context.release_tuned_model()
    for message in fill_teacher_caches(context.plan, context.execution, context.world):
        yield PhaseStarted(message)
        if context.is_stop_requested():
            return False
    context.world.require_same(
        lambda: {
            f"teacher predictions {i}": InputFile(str(job.teacher_cache.folder), str(job.teacher_cache.missing_parts()))
            for i, job in enumerate(find_cache_jobs(context.plan))
        }
    )
    return True

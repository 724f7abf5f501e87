"""Phase 4, first half: build the run, or restore it from its newest complete checkpoint."""

from __future__ import annotations

from dataclasses import dataclass

from postgrad.data.loading.loader import Loader
from postgrad.lineage.metrics import METRICS, read_metrics
from postgrad.lineage.record import PenaltyRecord, SparseUpdateRecord
from postgrad.lineage.saved_plan import write_plan
from postgrad.plan.checkpoint_selection import CheckpointSelector
from postgrad.run import task_scores
from postgrad.run.anchors import describe_penalty
from postgrad.run.build import build_run, make_loader, make_optimizer
from postgrad.run.cached_teacher import caches_by_source
from postgrad.run.context import RunContext
from postgrad.run.events import InfoMessage, Phase, PhaseStarted, RunStarted, WarningMessage
from postgrad.run.penalty_strength import (
    find_strengths,
    get_stage_penalties,
    penalties_without_strength,
    set_strengths,
    strength_lines,
)
from postgrad.run.update_summary import describe_update
from postgrad.training.checkpoint_state import CheckpointMetadata, restore_run
from postgrad.training.checkpoints import Checkpoints
from postgrad.training.metrics_log import MetricsLog
from postgrad.training.step import Run

_BYTES_PER_TRAINABLE = 16
"""Disk space of a checkpoint: an fp32 weight and its two moments are 12 bytes, the rest is reserve."""


@dataclass(frozen=True)
class TrainingSession:
    """A run that can step, with its checkpoints and its metrics."""

    run: Run
    loader: Loader
    checkpoints: Checkpoints
    checkpoint_metadata: CheckpointMetadata
    metrics: MetricsLog
    selector: CheckpointSelector | None
    """Selects the step to publish; None publishes the last one."""
    update: SparseUpdateRecord | None
    """The sparse update, for the record."""

    def outcome(self) -> TrainingOutcome:
        """What the record needs of the training. Call it before the selected checkpoint is restored."""
        return TrainingOutcome(
            self.run.step,
            self.run.trained_tokens,
            self.tokens_by_source,
            [describe_penalty(penalty) for penalty in get_stage_penalties(self.run)],
            self.update,
            self.selector,
        )

    @property
    def tokens_by_source(self) -> list[int]:
        """Trained tokens of each source so far."""
        return [int(count) for count in self.run.trained_tokens_by_source]


@dataclass(frozen=True)
class TrainingOutcome:
    """A training at its last step, without the model. Tokens are trained tokens."""

    step: int
    tokens: int
    tokens_by_source: list[int]
    penalties: list[PenaltyRecord]
    update: SparseUpdateRecord | None
    selector: CheckpointSelector | None


def prepare_training(context: RunContext) -> Phase[TrainingSession]:
    """Build the run and restore its newest checkpoint, if there is one."""
    plan, world = context.plan, context.world
    tuned_model = context.load_tuned_model()
    run = build_run(plan, tuned_model, context.execution, world)
    loader = make_loader(plan, context.execution, world, teacher_caches=caches_by_source(plan))
    for note in task_scores.sharding_notes(plan.evaluation.tasks) if world.is_distributed else ():
        yield WarningMessage(note)
    if penalties_without_strength(run):
        yield from _apply_strengths(context, run, loader)

    keep = None if plan.stage.save.keep == "all" else plan.stage.save.keep
    pinned = 0 if plan.evaluation.selection_rule is None else 1
    checkpoints = Checkpoints(context.folder / "checkpoints", keep, max_pinned=pinned)
    warnings: list[str] = []
    checkpoint = checkpoints.find_newest(warnings.append)
    for warning in warnings:
        yield WarningMessage(warning)
    metrics = MetricsLog(context.folder / METRICS, context.saved_plan.id)
    if checkpoint:
        restore_run(run, checkpoint)
    elif world.is_main:
        checkpoints.require_room(_BYTES_PER_TRAINABLE * context.counts.trainable)
    if world.is_main:  # steps after the checkpoint are trained and logged again; a new run drops step 0 too
        metrics.rewind(run.step if checkpoint else -1)
    yield RunStarted(plan, context.execution, run.step, context.counts)
    base = context.base_reference(checkpoints.step_folder(0))
    metadata = CheckpointMetadata(context.fingerprints["stage"], tuned_model.options, base)
    update = describe_update(plan, run.optimizer.update_mask)
    return TrainingSession(run, loader, checkpoints, metadata, metrics, _make_selector(context), update)


def _apply_strengths(context: RunContext, run: Run, loader: Loader) -> Phase[None]:
    """Set the strengths of penalties with `strength: auto`: saved ones, or found now and saved."""
    saved_plan = context.saved_plan
    if not saved_plan.penalty_strengths:
        yield PhaseStarted("finding the strengths of the penalties")
        rates = [context.plan.schedule(step) for step in range(1, context.plan.steps + 1)]
        optimizer = make_optimizer(context.plan, run.weights, run.optimizer.update_mask)
        saved_plan.penalty_strengths = find_strengths(run, loader, rates, optimizer)
        if run.world.is_main:
            write_plan(context.folder, saved_plan)
        run.world.barrier()
        for line in strength_lines(saved_plan.penalty_strengths):
            yield InfoMessage(line)
    set_strengths(run, saved_plan.penalty_strengths)


def _make_selector(context: RunContext) -> CheckpointSelector | None:
    """The selector with the evaluations so far, which the first rank reads for all."""
    rule, world = context.plan.evaluation.selection_rule, context.world
    if rule is None:
        return None
    evaluations = read_metrics(context.folder / METRICS).evaluations if world.is_main else []
    return CheckpointSelector(rule, world.all_gather(evaluations)[0])  # type: ignore[arg-type]

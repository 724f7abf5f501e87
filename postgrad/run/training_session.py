"""Phase 4, first half: build the run, or restore it from its newest complete checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from postgrad.data.loading.loader import Loader
from postgrad.distributed.fsdp import reshard
from postgrad.distributed.world import InputFile, World
from postgrad.errors import ResumeError
from postgrad.evaluation import before_after
from postgrad.evaluation.before_after import AllScores
from postgrad.evaluation.held_out import HeldOutSet
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
from postgrad.run.milestones import checkpoint_steps, evaluation_steps
from postgrad.run.penalty_strength import (
    find_strengths,
    get_stage_penalties,
    penalties_without_strength,
    set_strengths,
    strength_lines,
)
from postgrad.run.update_summary import describe_update
from postgrad.storage.atomic import MANIFEST
from postgrad.storage.fingerprint import file_fingerprint
from postgrad.training.checkpoint_state import CheckpointMetadata, CheckpointOwner, checkpoint_bytes, restore_run
from postgrad.training.checkpoints import Checkpoints
from postgrad.training.metrics_log import MetricsLog
from postgrad.training.step import Run


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
    start_scores: AllScores
    """The start model's scores on the sets of evaluations during training."""
    warnings: list[str]
    """What `checkpoints` warns of."""

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

    warnings: list[str] = []
    owner = CheckpointOwner(
        context.fingerprints["stage"], context.saved_plan.id, plan.stage.seed, plan.stage.tuning.kind
    )
    checkpoints = _make_checkpoints(context, owner, warnings)
    checkpoint = _find_checkpoint(checkpoints, world)
    yield from take_warnings(warnings)
    start_scores = _read_start_scores(context, run)  # before any weight moves
    metrics = MetricsLog(context.folder / METRICS, context.saved_plan.id)
    if checkpoint:
        restore_run(run, checkpoint)
        for warning in world.from_first(lambda: _check_metrics(context, run.step)):
            yield WarningMessage(warning)
    elif world.is_main:
        saves = len(checkpoint_steps(plan.stage.save.every, plan.steps, plan.tokens))
        checkpoints.require_room(checkpoint_bytes(run), saves + 1)  # one more when the user stops the run
    if world.is_main:  # steps after the checkpoint are trained and logged again; a new run drops step 0 too
        metrics.rewind(run.step if checkpoint else -1)
    yield RunStarted(plan, context.execution, run.step, context.counts)
    metadata = CheckpointMetadata(owner, tuned_model.options, context.base_reference(checkpoints.step_folder(0)))
    update = describe_update(plan, run.optimizer.update_mask)
    selector = _make_selector(context)
    return TrainingSession(run, loader, checkpoints, metadata, metrics, selector, update, start_scores, warnings)


def take_warnings(warnings: list[str]) -> Phase[None]:
    """Yield the collected warnings, and forget them."""
    while warnings:
        yield WarningMessage(warnings.pop(0))


def _make_checkpoints(context: RunContext, owner: CheckpointOwner, warnings: list[str]) -> Checkpoints:
    """The run's checkpoints, with what the stage keeps of them."""
    spec = context.plan.stage.save
    return Checkpoints(
        context.folder / "checkpoints",
        owner,
        keep=None if spec.keep == "all" else spec.keep,
        max_pinned=0 if context.plan.evaluation.selection_rule is None else 1,
        warn=warnings.append,
    )


def _find_checkpoint(checkpoints: Checkpoints, world: World) -> Path | None:
    """The checkpoint to resume from, which the first rank finds and all ranks verify."""
    newest = world.from_first(checkpoints.find_newest)
    if newest is None:
        return None
    folder = checkpoints.folder / newest.name

    def verify_here() -> dict[str, InputFile]:
        checkpoints.check(folder)
        return {folder.name: InputFile(str(folder), file_fingerprint(folder / MANIFEST))}

    world.require_same(verify_here)
    return folder


def _check_metrics(context: RunContext, step: int) -> list[str]:
    """Warnings of steps that the log lacks up to the checkpoint of `step`.

    Raises `ResumeError` when it lacks an evaluation that decides which step is published.
    """
    plan, path = context.plan, context.folder / METRICS
    rows = list(read_metrics(path))
    logged = {row.step for row in rows if row.kind == "evaluation"}
    evaluation_at = evaluation_steps(plan.stage.evaluation.every, plan.steps, plan.tokens)
    lost = sorted(number for number in evaluation_at if number <= step and number not in logged)
    if lost and plan.evaluation.selection_rule is not None:
        raise ResumeError(
            f"the log lacks the evaluation at step {lost[0]:,}, which checkpoint selection needs",
            where=str(path),
            expected=f"all lines up to step {step:,}",
            hint="restore the file, or remove it and the checkpoints folder to train this stage from its start",
        )
    count = step - len({row.step for row in rows if row.kind == "step" and row.step <= step})
    return [f"{path} lacks {count:,} of {step:,} steps; the record and the page will lack them"] if count else []


def _read_start_scores(context: RunContext, run: Run) -> AllScores:
    """The start model's scores on the subsets: from their file, or measured now, with the weights of the start model."""
    path, world, evaluation = context.score_path("start.npz"), context.world, context.plan.evaluation
    if not world.from_first(path.exists):
        tuning = run.weights.tuning
        with tuning.disable() if tuning.additive else nullcontext():
            scores = score_subsets(context, run, [evaluation.subset(h) for h in evaluation.scored_sets_before])
        if world.is_main:
            context.write_scores(path.name, scores)
    return world.from_first(lambda: context.read_scores(path.name))


def score_subsets(context: RunContext, run: Run, sets: Sequence[HeldOutSet]) -> AllScores:
    """Score the current weights. Collective."""
    with run.weights.full_precision():
        scores = before_after.score_sets(
            run.model, sets, context=context.plan.model.context_length, world=context.world
        )
        # FSDP keeps weights gathered after a forward pass; the next update must reach the shards.
        reshard(run.model)
        return scores


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
    rule = context.plan.evaluation.selection_rule
    if rule is None:
        return None
    return CheckpointSelector(
        rule, context.world.from_first(lambda: read_metrics(context.folder / METRICS).evaluations)
    )

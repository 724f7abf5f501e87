"""Phase 4, second half: train to the last step, with evaluations and checkpoints on the way."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from postgrad.evaluation import before_after
from postgrad.evaluation.before_after import AllScores
from postgrad.lineage.metrics import EvaluationRow, SkippedStepRow, StepRow
from postgrad.plan.checkpoint_selection import summarize_evaluation
from postgrad.run import task_scores
from postgrad.run.baseline import Baseline
from postgrad.run.build import make_step
from postgrad.run.context import RunContext
from postgrad.run.events import (
    CheckpointSaved,
    EvaluationCompleted,
    Phase,
    StepCompleted,
    StepSkipped,
    WarningMessage,
)
from postgrad.run.milestones import checkpoint_steps, evaluation_steps
from postgrad.run.penalty_strength import penalty_warning
from postgrad.run.task_scores import AllAnswers
from postgrad.run.training_session import TrainingSession, score_subsets, take_warnings
from postgrad.training.checkpoint_state import write_checkpoint
from postgrad.training.loop import train_steps
from postgrad.training.metrics_log import Throughput
from postgrad.training.step import Run, StepReport


def train(context: RunContext, session: TrainingSession, baseline: Baseline) -> Phase[bool]:
    """Train, evaluate and save; True when the user stopped it.

    A run that resumes at a step where the selector had already ended it trains no further.
    """
    plan, run, world = context.plan, session.run, context.world
    evaluation_at = evaluation_steps(plan.stage.evaluation.every, plan.steps, plan.tokens)
    checkpoint_at = checkpoint_steps(plan.stage.save.every, plan.steps, plan.tokens)
    evaluator = _Evaluator(context, session, baseline)
    throughput, saved_step, has_warned = Throughput(), run.step, False
    is_done = _selector_ended(session)
    for report in train_steps(run, session.loader, run.step if is_done else plan.steps, make_step(plan, run)):
        seconds = throughput.step(report.tokens)
        if world.is_main:
            session.metrics.write(_step_row(report, seconds))
        if isinstance(report, SkippedStepRow):
            yield StepSkipped(_skip_text(report, run), report)
        else:
            if not has_warned and (warning := penalty_warning(report)):
                has_warned = True
                yield WarningMessage(warning)
            left = throughput.remaining_seconds((plan.steps - report.step) * report.tokens)
            yield StepCompleted(report, seconds, throughput.tokens_per_second, left)
        is_best = False
        if report.step in evaluation_at:
            row = evaluator.evaluate(report.step, report.trained_tokens)
            yield EvaluationCompleted(row)
            selection = row.checkpoint_selection
            is_best = selection is not None and selection.best_step == report.step
            is_done = _selector_ended(session)
            run.model.train()
        is_stopped = context.is_stop_requested() and report.step < plan.steps
        if report.step in checkpoint_at or is_stopped or is_best:
            yield from _save_checkpoint(context, session)
            saved_step = report.step
        if is_stopped and not is_done:
            return True
        if is_done:
            break
        throughput.pause()
    if saved_step < run.step:
        yield from _save_checkpoint(context, session)
    return False


def _selector_ended(session: TrainingSession) -> bool:
    return session.selector is not None and session.selector.state.should_stop


class _Evaluator:
    """Evaluations during training: subsets of the held-out sets, compared with the start model on the same documents."""

    def __init__(self, context: RunContext, session: TrainingSession, baseline: Baseline) -> None:
        """Logs step 0, unless the run did so already."""
        self.context, self.session, self.run = context, session, session.run
        evaluation = context.plan.evaluation
        self.sets = [evaluation.subset(held_out) for held_out in evaluation.scored_sets]
        # A sharded model cannot generate: its tasks are evaluated before and after training only.
        self.tasks = [
            task for task in evaluation.tasks if task.task.during_training and not context.world.is_distributed
        ]
        self.start_scores = session.start_scores
        if self.run.step == 0 and context.world.is_main:
            session.metrics.write(self._with_tasks(self._row(0, 0, self.start_scores), baseline.answers))

    def evaluate(self, step: int, trained_tokens: int) -> EvaluationRow:
        """Score the current weights, tell the selector, and log the row."""
        selector = self.session.selector
        scores = score_subsets(self.context, self.run, self.sets)
        row = self._row(step, trained_tokens, scores)
        if selector:
            row.checkpoint_selection = selector.add(summarize_evaluation(selector.rule, row, scores, self.start_scores))
        row = self._with_tasks(row)
        if self.context.world.is_main:
            self.session.metrics.write(row)
        return row

    def _row(self, step: int, trained_tokens: int, scores: AllScores) -> EvaluationRow:
        vocabulary = self.context.plan.model.vocab_size
        return before_after.evaluation_row(step, trained_tokens, self.sets, self.start_scores, scores, vocabulary)

    def _with_tasks(self, row: EvaluationRow, answers: AllAnswers | None = None) -> EvaluationRow:
        """A row with the headline metric of each task evaluated during training; `answers`: known ones."""
        if not self.tasks:
            return row
        if answers is None:
            with self.run.weights.full_precision():
                answers = task_scores.answer_tasks(
                    self.run.model, self.tasks, self.context.plan.model.inputs, world=self.context.world
                )
        return row.model_copy(update={"tasks": task_scores.task_headlines(self.tasks, answers)})


def _skip_text(row: SkippedStepRow, run: Run) -> str:
    reason = "its loss or gradient is not finite" if row.tokens else "the filter rejects all of its answers"
    return (
        f"step {row.step} is skipped, since {reason} ({row.list_rows()}): it changes no weight; "
        f"{run.skipped_steps} of at most {run.max_skipped_steps} skipped steps (optimizer.max_skipped_steps)"
    )


def _step_row(report: StepReport | SkippedStepRow, seconds: float) -> StepRow | SkippedStepRow:
    """The line of metrics.jsonl for a step."""
    if isinstance(report, SkippedStepRow):
        return report.model_copy(update={"seconds": round(seconds, 4)})
    return StepRow(
        step=report.step,
        tokens=report.tokens,
        trained_tokens=report.trained_tokens,
        loss=report.loss,
        losses_by_objective=report.losses,
        penalties=report.penalties,
        loss_sums_by_source=report.losses_by_source,
        learning_rate=report.rate,
        grad_norm=report.gradient_norm,
        loss_grad_norm=report.loss_gradient_norm,
        updated_weights=report.num_updated,
        balancing_loss=report.balancing_loss,
        positions=report.positions,
        padding=report.padding,
        sampled_prompts=report.sampled_prompts,
        accepted_answers=report.accepted_answers,
        seconds=round(seconds, 4),
    )


def _save_checkpoint(context: RunContext, session: TrainingSession) -> Phase[None]:
    """Publish a checkpoint of this step; the selected step's checkpoint is never removed.

    The metrics are synced first: a checkpoint must not be newer than the log that a resume continues. Collective.
    """
    run, checkpoints = session.run, session.checkpoints
    session.metrics.sync()
    best = session.selector.state.best if session.selector else None

    def write(folder: Path) -> Collection[str]:
        return write_checkpoint(folder, run, context.plan.model.tokenizer, session.checkpoint_metadata)

    folder = checkpoints.save(run.step, write, best.step if best else None, context.world)
    yield from take_warnings(session.warnings)
    yield CheckpointSaved(run.step, folder)

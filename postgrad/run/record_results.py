"""Phase 7: write the scores, the record and the report of a run that is finished or was stopped."""

from __future__ import annotations

from collections.abc import Mapping

from postgrad.config.stage import ExpectedLoss
from postgrad.evaluation import before_after
from postgrad.evaluation.retention_gate import retention_gate
from postgrad.lineage.metrics import read_run_metrics
from postgrad.lineage.record import ExpectedLossRecord, Record, ScoresRecord, SetScore, read_record, write_record
from postgrad.reports.pages import run_page
from postgrad.reports.pages.model_card import write_model_card
from postgrad.run import task_scores
from postgrad.run.ability_scores import abilities_record
from postgrad.run.baseline import Baseline
from postgrad.run.context import RunContext
from postgrad.run.events import Phase, PhaseStarted, RunFinished
from postgrad.run.measure import Measurements
from postgrad.run.run_folder import MODEL, REPORT
from postgrad.run.training_session import TrainingOutcome
from postgrad.run.write_record import make_record
from postgrad.storage.atomic import write_without_secrets
from postgrad.storage.fingerprint import model_fingerprint


def record_finished(
    context: RunContext,
    baseline: Baseline,
    outcome: TrainingOutcome,
    published_tokens: list[int],
    measurements: Measurements,
) -> Phase[None]:
    """Write all results of a finished run. `published_tokens`: trained tokens of each source in the published model."""
    is_main = context.world.is_main
    yield PhaseStarted("writing the record" if is_main else "the first rank writes the record")
    if not is_main:
        return
    _write_scores(context, measurements)
    plan, evaluation = context.plan, context.plan.evaluation
    before, vocabulary = baseline.scores | measurements.test_scores_before, plan.model.vocab_size
    losses = before_after.summarize_before_after(evaluation.sets, before, measurements.scores, vocabulary)
    pseudo_perplexity = before_after.summarize_before_after(
        evaluation.pseudo_perplexity_sets, baseline.pseudo_scores, measurements.pseudo_scores, vocabulary
    )
    gate = retention_gate(losses.changes, before, plan.stage.max_forgetting)
    abilities = abilities_record(
        plan.stage.evaluation.abilities,
        evaluation.abilities,
        baseline.ability_answers,
        measurements.ability_answers,
        plan.stage.max_ability_drop,
    )
    gates = [each for each in (gate, abilities.gate if abilities else None) if each]
    record = make_record(
        context,
        outcome,
        "finished" if all(each.passed for each in gates) else "gate-failed",
        published_tokens,
        published_checkpoint=outcome.selector.as_record(outcome.step) if outcome.selector else None,
        scores=losses.scores,
        changes=losses.changes,
        expected_losses=_compare_expected(plan.stage.evaluation.expected_losses, losses.scores.after),
        pseudo_perplexity=pseudo_perplexity if measurements.pseudo_scores else None,
        retention_gate=gate,
        drift=measurements.drift,
        relearning=measurements.relearning,
        tasks=task_scores.task_rows(evaluation.tasks, baseline.answers, measurements.answers),
        task_clusters=task_scores.cluster_rows(
            evaluation.tasks, baseline.answers, measurements.answers, plan.data.seen_clusters
        ),
        abilities=abilities,
        samples=measurements.samples,
    )
    record.fingerprints.model = model_fingerprint(context.folder / MODEL)
    _write(context, record)
    write_model_card(context.folder / MODEL, context.folder, record)
    yield RunFinished(read_record(context.folder), context.folder)


def _compare_expected(
    expected: Mapping[str, ExpectedLoss], measured: Mapping[str, SetScore]
) -> dict[str, ExpectedLossRecord]:
    """Each predicted loss with the measured one."""
    return {
        name: ExpectedLossRecord(
            **each.model_dump(), measured=measured[name].nats, inside=each.low <= measured[name].nats <= each.high
        )
        for name, each in expected.items()
    }


def record_stopped(context: RunContext, baseline: Baseline, outcome: TrainingOutcome) -> None:
    """Write a record of a run that the user stopped, so that it has a report."""
    if not context.world.is_main:
        return
    evaluation = context.plan.evaluation
    record = make_record(
        context,
        outcome,
        "stopped",
        outcome.tokens_by_source,
        scores=ScoresRecord(before=before_after.summarize_scores(baseline.scores)),
        tasks=task_scores.task_rows(evaluation.tasks, baseline.answers, {}),
        abilities=abilities_record(
            context.plan.stage.evaluation.abilities, evaluation.abilities, baseline.ability_answers, {}
        ),
    )
    _write(context, record)


def _write_scores(context: RunContext, measurements: Measurements) -> None:
    """Write the scores of all documents and the answers to all items beside the record."""
    context.write_scores("after.npz", measurements.scores)
    if measurements.pseudo_scores:
        context.write_scores("pseudo-after.npz", measurements.pseudo_scores)
    for name, answers in (
        ("tasks-after.json", measurements.answers),
        ("abilities-after.json", measurements.ability_answers),
    ):
        if answers:
            task_scores.write_answers(context.score_path(name), answers, context.saved_plan.id)
    if measurements.test_scores_before:
        context.write_scores("test-before.npz", measurements.test_scores_before)


def _write(context: RunContext, record: Record) -> None:
    """Write the record and its report. Last of all: a record marks the run as complete, or as stopped."""
    write_record(context.folder, record)
    metrics = read_run_metrics(context.folder, record)
    page = run_page.run_page(record, metrics, metrics.damage)
    write_without_secrets(context.folder / REPORT, page)

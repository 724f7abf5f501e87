"""The record of a run: inputs, parents, totals of the training, and where it ran."""

from __future__ import annotations

import datetime as dt
import os
import platform
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

from postgrad.config.stage_file import dump_stage
from postgrad.hardware import machine
from postgrad.lineage.metrics import METRICS, Metrics, read_metrics
from postgrad.lineage.record import (
    PLAN,
    ConsumedSource,
    ExecutionSummary,
    Fingerprints,
    HeldOutSummary,
    ModelSummary,
    NewModel,
    Parent,
    Record,
    SourceLoss,
    Status,
    TokenLedger,
    TrainedSource,
    TrainingTotals,
    add_consumed,
)
from postgrad.lineage.saved_plan import read_plan
from postgrad.optim import lr_schedules
from postgrad.plan.plan import Plan
from postgrad.plan.seen_sources import count_consumed_tokens, make_source_records
from postgrad.run.context import RunContext
from postgrad.run.training_session import TrainingOutcome
from postgrad.run.tuned_model import ParameterCounts
from postgrad.stats.source_losses import losses_by_source
from postgrad.storage.fingerprint import model_fingerprint
from postgrad.training.checkpoint_state import read_progress
from postgrad.version import __version__


def make_record(
    context: RunContext, outcome: TrainingOutcome, status: Status, published_tokens: list[int], **results: Any
) -> Record:
    """The record of a run; `published_tokens`: trained tokens of each source in the published model."""
    plan = context.plan
    metrics = read_metrics(context.folder / METRICS, context.saved_plan.id)
    return Record(
        id=context.saved_plan.id,
        name=plan.stage.name,
        status=status,
        created=context.saved_plan.created,
        finished=utc_timestamp(),
        command=context.command,
        stage_yaml=dump_stage(plan.stage.model_dump(mode="json")),
        stage=plan.stage.model_dump(mode="json"),
        stage_folder=str(plan.root),
        model=_summarize_model(plan, context.counts),
        fingerprints=Fingerprints.model_validate(context.fingerprints),
        parents=find_parents(context.folder, plan),
        versions={
            "postgrad": __version__,
            **{name: metadata.version(name) for name in ("torch", "transformers", "tokenizers", "numpy")},
            "python": platform.python_version(),
        },
        machine={
            "cpu": machine.processor_name(),
            "cores": machine.core_count(),
            "device": machine.default_device().type,
            "system": platform.system(),
        },
        execution=ExecutionSummary.model_validate(context.execution.as_dict()),
        plan=plan.as_record(),
        token_ledger={
            source.name: TokenLedger.model_validate(rows.ledger.as_dict())
            for source, rows in zip(plan.data.sources, plan.data.rows, strict=True)
        },
        notes=[*plan.notes, *context.notes, *metrics.damage],
        contamination=plan.data.overlaps,
        schedule_curve=lr_schedules.sample_schedule(plan.schedule, plan.steps),
        held_out=[
            HeldOutSummary(name=h.name, role=h.role, documents=len(h), fingerprint=h.fingerprint)
            for h in plan.evaluation.sets
        ],
        totals=summarize_training(metrics, plan, outcome),
        consumed=_consumed_sources(plan, published_tokens),
        penalties=outcome.penalties,
        sparse_update=outcome.update,
        **results,
    )


def _summarize_model(plan: Plan, counts: ParameterCounts) -> ModelSummary:
    start = plan.model.start
    return ModelSummary(
        start_model=start.name,
        source=str(start.name_or_path),
        parameters=counts.parameters,
        trainable=counts.trainable,
        task=plan.model.task,
        vocab_size=plan.model.vocab_size,
        context_length=plan.model.context_length,
        new_model=NewModel.model_validate(start.scratch_recipe) if start.scratch_recipe else None,
    )


def find_parents(run_folder: Path, plan: Plan) -> list[Parent]:
    """The run that the stage started from, if it started from one."""
    run, folder = plan.model.start.run, plan.model.start.folder
    if run is None or not (run / PLAN).exists():
        return []
    progress = read_progress(folder) if folder and (folder / "state.json").exists() else None
    return [
        Parent(
            path=str(run),
            relative=os.path.relpath(run, run_folder),
            name=run.name,
            id=read_plan(run).id,
            step=progress.step if progress else None,
            trained_tokens=progress.trained if progress else None,
            fingerprint=model_fingerprint(folder) if folder else "",
        )
    ]


def summarize_training(metrics: Metrics, plan: Plan, outcome: TrainingOutcome) -> TrainingTotals:
    """Tokens, time and the training loss of each source up to the last step."""
    mixture, skipped = plan.data.mixture, plan.stage.data.skip_steps
    ends = (mixture.counts(step * mixture.block_size) for step in (skipped, skipped + outcome.step))
    row_counts = [end - start for start, end in zip(*ends, strict=True)]
    seconds = sum(row.seconds for row in metrics.steps)
    losses = losses_by_source(row.loss_sums_by_source for row in metrics.steps)
    columns = zip(plan.data.sources, outcome.tokens_by_source, row_counts, plan.data.rows, strict=True)
    return TrainingTotals(
        steps=outcome.step,
        tokens=outcome.tokens,
        seconds=seconds,
        tokens_per_second=outcome.tokens / max(seconds, 1e-9),
        metrics_lines=len(metrics.rows) + len(metrics.damage),
        sources=[
            TrainedSource(
                name=source.name,
                role=source.role,
                share=tokens / max(outcome.tokens, 1),
                trained_tokens=tokens,
                rows=row_count,
                passes=row_count / len(rows),
                loss=SourceLoss.model_validate(losses[source.name]) if source.name in losses else None,
            )
            for source, tokens, row_count, rows in columns
        ],
        skipped_steps=metrics.skipped_steps,
        padding_share=_padding_share(metrics),
        sampled_prompts=_sum_known(row.sampled_prompts for row in metrics.steps),
        accepted_answers=_sum_known(row.accepted_answers for row in metrics.steps),
    )


def _sum_known(counts: Iterable[int | None]) -> int | None:
    """The sum of the counts of those steps that have one; None without any."""
    known = [count for count in counts if count is not None]
    return sum(known) if known else None


def _padding_share(metrics: Metrics) -> float | None:
    """Padding among the positions of unpacked rows."""
    positions = sum(row.positions or 0 for row in metrics.steps)
    return sum(row.padding or 0 for row in metrics.steps) / positions if positions else None


def _consumed_sources(plan: Plan, tokens_by_source: list[int]) -> dict[str, ConsumedSource]:
    sources = make_source_records(plan.data.sources, plan.model.start, plan.stage.seed)
    tokens = dict(zip(plan.data.source_names, tokens_by_source, strict=True))
    return add_consumed(plan.data.seen_sources, count_consumed_tokens(sources, tokens))


def utc_timestamp() -> str:
    """Now, in ISO format."""
    return dt.datetime.now(dt.UTC).isoformat(timespec="seconds")

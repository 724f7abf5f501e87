"""The plan of a stage: everything that follows from the stage, its texts and the tokenizer before a weight is trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from postgrad.config import stage as s
from postgrad.config.objectives import AnyObjective, PrefixLMObjective
from postgrad.data.read.files import matches_path
from postgrad.data.render.chat import plain_template
from postgrad.errors import StageError
from postgrad.lineage.metrics import METRICS
from postgrad.lineage.record import RECORD, PlannedSource, PlanSummary
from postgrad.models.location import ModelLocation
from postgrad.optim import lr_schedules
from postgrad.plan.ability_tasks import form_note, has_chat_form, make_ability_tasks
from postgrad.plan.data_plan import DataPlan, plan_data
from postgrad.plan.demonstration_pool import make_demonstration_wrapper
from postgrad.plan.evaluation_plan import EvaluationPlan, plan_evaluation
from postgrad.plan.held_out_documents import HeldOutDocuments, check_labels, select_held_out_documents
from postgrad.plan.held_out_files import resolve_held_out_files
from postgrad.plan.lr_schedule import find_sharpness_start, make_schedule, warmup_notes
from postgrad.plan.model_inputs import unknown_notes
from postgrad.plan.model_plan import ModelPlan, plan_model
from postgrad.plan.objective_matching import (
    get_start_objectives,
    refuse_unused_objectives,
    resolve_objectives,
    resolve_task,
)
from postgrad.plan.prompted_task import PromptedTask
from postgrad.plan.row_renderers import uses_plain_chat_template
from postgrad.plan.seen_sources import get_seen_sources
from postgrad.plan.source_labels import resolve_labels
from postgrad.plan.sources import ProgressCallback, resolve_source_specs, resolve_sources
from postgrad.plan.start_model import new_model_note, resolve_start_model
from postgrad.plan.task_prompts import make_prompted_task
from postgrad.plan.teacher_contexts import make_context_options
from postgrad.plan.teachers import get_teacher_identity, resolve_teachers
from postgrad.reports.notebook import plan_html


@dataclass(frozen=True)
class Plan:
    """Everything that follows from a stage, its texts and the tokenizer before a weight is trained."""

    stage: s.Stage
    root: Path
    output: Path
    model: ModelPlan
    data: DataPlan
    evaluation: EvaluationPlan
    objectives: tuple[AnyObjective, ...]
    teachers: dict[int, ModelLocation]
    """The teacher of each distillation, by the objective's index."""
    schedule: lr_schedules.Schedule
    notes: tuple[str, ...]
    cache: Path
    sharpness_start: int | None = None
    """The first sharpness-aware step; None without any."""

    @property
    def steps(self) -> int:
        """Steps of the stage."""
        return self.data.steps

    @property
    def tokens(self) -> int:
        """Trained tokens of the whole stage."""
        return self.data.tokens

    @property
    def sharp_steps(self) -> int:
        """Steps at the end that compute their gradient twice."""
        return 0 if self.sharpness_start is None else self.steps - self.sharpness_start + 1

    @property
    def start_model_name(self) -> str:
        """The start model, as another stage with the same root would name it."""
        return self.stage.model if isinstance(self.stage.model, str) else str(self.model.start.folder)

    @property
    def prefix_length(self) -> int:
        """Length of rows with a bidirectional prefix; 0 when there are none."""
        has_prefixes = any(isinstance(source.spec.objective, PrefixLMObjective) for source in self.data.sources)
        return self.model.context_length if has_prefixes else 0

    def as_record(self) -> PlanSummary:
        """The plan in numbers, for the record."""
        data = self.data
        counts = data.row_counts()
        trained = [round(c * t) for c, t in zip(counts, data.trained_tokens_per_row(), strict=True)]
        columns = zip(data.sources, data.target_shares, counts, trained, data.rows, strict=True)
        return PlanSummary(
            steps=self.steps,
            rows=self.steps * data.mixture.block_size,
            sequence_length=self.model.context_length,
            tokens=sum(trained),
            sources=[
                PlannedSource(
                    name=source.name,
                    role=source.role,
                    requested_share=target_share,
                    share=tokens / max(sum(trained), 1),
                    rows=count,
                    trained_tokens=tokens,
                    passes=count / len(rows),
                    available_tokens=rows.ledger.trained,
                    documents=len(source.store),
                    kind=source.store.kind,
                    generated_by=source.generated_by,
                    selection=list(source.selection),
                )
                for source, target_share, count, tokens, rows in columns
            ],
        )

    def _repr_html_(self) -> str:
        return plan_html(self.stage.name, self.as_record())

    def fingerprints(self) -> dict[str, Any]:
        """Of everything that goes into the run except the start model."""
        tasks, abilities = self.evaluation.tasks, self.evaluation.abilities
        return {
            "stage": self.stage.fingerprint(),
            "data": {source.name: source.store.fingerprint for source in self.data.sources},
            "sets": {h.name: h.fingerprint for h in self.evaluation.sets},
            **({"tasks": {t.name: t.fingerprint for t in tasks}} if tasks else {}),
            **({"abilities": {t.name: t.fingerprint for t in abilities}} if abilities else {}),
            # Omitted without teachers: a run from before there were any can still be resumed.
            **({"teachers": [get_teacher_identity(t) for t in self.teachers.values()]} if self.teachers else {}),
        }


def make_plan(stage: s.Stage, root: Path, cache: Path, progress: ProgressCallback | None = None) -> Plan:
    """Read and tokenise the texts (or take them from the cache) and plan the stage.

    Paths in the stage are relative to `root`, the stage file's folder. Raises the error of whatever is impossible.
    """
    output = (root / (stage.output or f"runs/{stage.name}")).resolve()
    _refuse_output_in_data(output, stage, root)
    start = resolve_start_model(stage, root, cache, progress)
    _require_retained_set(stage)
    notes = [new_model_note(start, stage)] if start.scratch_recipe else []
    seen = get_seen_sources(start)
    # What can be wrong with stage and rows is checked before anything is tokenised.
    objectives = resolve_objectives(stage.objectives, start)
    task = resolve_task(objectives, start)
    specs = resolve_source_specs(stage, objectives, get_start_objectives(start), root, seen)
    refuse_unused_objectives(objectives, [spec.objective_indices for spec in specs])
    labels = resolve_labels(specs, cache)
    model = plan_model(stage, start, task, specs, labels)
    is_chat = has_chat_form(
        model.inputs
    )  # by the start model's own template, which a stage on conversations may replace
    demonstrations = make_demonstration_wrapper(stage, specs, model.inputs)
    files = resolve_held_out_files(stage, root, specs, objectives, labels, demonstrations, model.inputs, cache)

    sources = resolve_sources(stage, specs, labels, demonstrations, model.inputs, cache, progress)
    if any(uses_plain_chat_template(source.renderer) for source in sources):
        # The trained model is published with the chat template that it was trained with.
        model.tokenizer.chat_template = plain_template(_prefix_text(model))
    notes += unknown_notes(model.tokenizer, model.inputs.encoder, {each.name: each.store for each in sources})
    held_out, tables = select_held_out_documents(stage, sources, files, seen, model.inputs, cache, progress, notes)
    _require_retained_documents(stage, held_out)
    tasks = [
        make_prompted_task(task_config, model.inputs, root, f"evaluation.tasks[{i}]")
        for i, task_config in enumerate(stage.evaluation.tasks)
    ]
    notes += [note for prompted in tasks for note in prompted.notes]
    abilities = []
    if config := stage.evaluation.abilities:
        abilities = make_ability_tasks(config, model.inputs, is_chat)
        notes += [form_note(config, is_chat), *(note for prompted in abilities for note in prompted.notes)]
    excluded = _excluded_digests(tables, tasks)
    check_labels(held_out, sources, excluded, cache, notes)

    teachers = resolve_teachers(objectives, start, model.task, model.tokenizer, model.vocab_size, root)
    contexts = [
        make_context_options(spec.context, spec.objective_indices, objectives, teachers, model.inputs) for spec in specs
    ]
    data = plan_data(stage, root, model, sources, excluded, seen, cache, notes, contexts)
    schedule = make_schedule(stage.schedule, data.steps, data.tokens, start)
    notes += warmup_notes(stage.schedule, data.steps, data.tokens, stage.optimizer.betas[1])
    return Plan(
        stage=stage,
        root=root,
        output=output,
        model=model,
        data=data,
        evaluation=plan_evaluation(stage, model, data, held_out, tasks, abilities, schedule, notes),
        objectives=objectives,
        teachers=teachers,
        schedule=schedule,
        notes=tuple(notes),
        cache=cache,
        sharpness_start=find_sharpness_start(stage.optimizer.sharpness_aware, schedule, data.steps, data.tokens),
    )


def _prefix_text(model: ModelPlan) -> str:
    """The special tokens that the tokenizer adds before a text, as text."""
    return "".join(model.tokenizer.convert_ids_to_tokens(list(model.inputs.encoder.prefix_ids)))


def _excluded_digests(tables: Sequence[np.ndarray], tasks: Sequence[PromptedTask]) -> np.ndarray | None:
    """Digests of held-out documents and test rows, which are not trained on."""
    digests = [table["digest"] for table in tables] + [task.test_digests_N for task in tasks]
    return np.unique(np.concatenate(digests)) if digests else None


def _refuse_output_in_data(output: Path, stage: s.Stage, root: Path) -> None:
    """Raise `StageError` if files of the run would be read as data: a resumed run would find other data than it began with."""
    paths = [
        (f"data.sources[{i}]", source.path) for i, source in enumerate(stage.data.sources) if source.path is not None
    ]
    paths += [(f"evaluation.{role}", item.path) for role, item in stage.evaluation.held_out_files()]
    paths += [(f"evaluation.tasks[{i}]", task.path) for i, task in enumerate(stage.evaluation.tasks)]
    for where, path in paths:
        if any(matches_path(output / name, path, root) for name in (METRICS, RECORD)):
            raise StageError(
                f"the run folder {output} is inside of the data {path}: its own files would be read as data",
                where=where,
                expected="a folder or pattern without the run folder",
                hint="name another folder under `output`, or a narrower `path`",
            )


def _require_retained_set(stage: s.Stage) -> None:
    """Raise `StageError` if the retention gate has no retained set: neither files nor a share of a replay source."""
    has_retained = bool(stage.evaluation.retained) or any(
        # What the origins of a replay of everything hold out is known only later.
        source.seen_so_far or (source.role == "replay" and source.held_out != 0)
        for source in stage.data.sources
    )
    if stage.max_forgetting is not None and not has_retained:
        raise _no_retained_set_error()


def _require_retained_documents(stage: s.Stage, held_out: Sequence[HeldOutDocuments]) -> None:
    """Raise `StageError` if a replay source is so small that its held-out share is empty."""
    if stage.max_forgetting is not None and not any(h.role == "retained" for h in held_out):
        raise _no_retained_set_error()


def _no_retained_set_error() -> StageError:
    return StageError(
        "the retention gate needs a retained set",
        where="max_forgetting",
        hint="name old text under evaluation.retained, or give a source with role: replay a `held_out` share",
    )

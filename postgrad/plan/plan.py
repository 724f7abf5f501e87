"""What will a stage do? Everything that follows from the stage, the texts and the tokenizer, before a weight is touched."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoConfig, PreTrainedTokenizerBase

from postgrad.config import stage as s
from postgrad.config.mixing import describe_shares
from postgrad.config.objectives import AnyObjective, PrefixLMObjective
from postgrad.data.layouts.rows import Rows
from postgrad.data.loading.mixture import Mixture
from postgrad.data.problem_type import ProblemType
from postgrad.data.read.examples import RUNNING_TEXT_KINDS
from postgrad.data.read.labels import Labels
from postgrad.data.render.chat import plain_template
from postgrad.data.tokens.held_out_split import select_documents
from postgrad.errors import DataError, StageError
from postgrad.evaluation.held_out import HeldOutSet
from postgrad.evaluation.pseudo_perplexity import MaskedHeldOutText
from postgrad.lineage.record import ConsumedSource, Contamination, PlannedSource, PlanSummary
from postgrad.models.pretrained import ClassifierSpec, ModelLocation, load_tokenizer
from postgrad.models.task import Task
from postgrad.models.task_head import TaskHeadConfig
from postgrad.optim import lr_schedules
from postgrad.plan.checkpoint_selection import SelectionRule, make_selection_rule
from postgrad.plan.data_order import make_data_order
from postgrad.plan.filter_documents import describe_selection
from postgrad.plan.held_out_sets import (
    HeldOutDocuments,
    check_labels,
    make_held_out_set,
    make_masked_held_out_text,
    measure_overlaps,
    resolve_held_out_files,
    select_held_out_documents,
)
from postgrad.plan.lr_schedule import make_schedule
from postgrad.plan.model_inputs import ModelInputs, make_encoder, make_model_inputs
from postgrad.plan.objective_rows import (
    describe_dropped,
    describe_skipped,
    get_start_objectives,
    make_rows,
    refuse_unused_objectives,
    resolve_objectives,
    resolve_task,
    uses_plain_chat_template,
)
from postgrad.plan.sources import (
    ProgressCallback,
    ResolvedSource,
    get_seen_sources,
    make_demonstration_wrapper,
    resolve_labels,
    resolve_source_specs,
    resolve_sources,
)
from postgrad.plan.start_model import new_model_note, resolve_start_model
from postgrad.plan.task_layer import resolve_representation
from postgrad.plan.task_prompts import PromptedTask, add_soft_prompts, make_prompted_task
from postgrad.plan.teachers import get_teacher_identity, resolve_teachers


@dataclass(frozen=True)
class ModelPlan:
    """The model a stage trains: where it starts, and how it reads text."""

    start: ModelLocation
    tokenizer: PreTrainedTokenizerBase
    vocab_size: int
    context_length: int
    task: Task
    problem: ProblemType
    """What a classifier predicts."""
    task_layer: ClassifierSpec | None
    inputs: ModelInputs
    """How text becomes inputs under the stage's tuning."""


@dataclass(frozen=True)
class DataPlan:
    """The sources of a stage, the rows made of them, and the order in which they are read."""

    sources: tuple[ResolvedSource, ...]
    rows: tuple[Rows, ...]
    mixture: Mixture
    target_shares: tuple[float, ...]
    """The share of trained tokens that each source should have."""
    seen_sources: dict[str, ConsumedSource]
    """What the start model's lineage has trained on, by fingerprint."""
    overlaps: dict[str, Contamination]

    @property
    def source_names(self) -> list[str]:
        """Names of the sources, in the order of the mixture."""
        return [source.name for source in self.sources]

    def trained_tokens_per_row(self) -> list[float]:
        """Mean trained tokens in a row of each source."""
        return [r.ledger.trained / len(r) for r in self.rows]


@dataclass(frozen=True)
class EvaluationPlan:
    """What is scored before, during and after training."""

    sets: tuple[HeldOutSet, ...]
    """Held-out sets as the model reads them under the stage's tuning."""
    sets_before: tuple[HeldOutSet, ...]
    """The same documents as the start model reads them."""
    pseudo_perplexity_sets: tuple[MaskedHeldOutText, ...]
    """For masked language models: held-out text with every token masked in turn."""
    pseudo_perplexity_sets_before: tuple[MaskedHeldOutText, ...]
    """The same texts as the start model reads them."""
    tasks: tuple[PromptedTask, ...]
    """Tasks in prompts, under the stage's tuning."""
    tasks_before: tuple[PromptedTask, ...]
    """The same, as the start model reads them."""
    selection_rule: SelectionRule | None
    """Selects the checkpoint that is published; None: the last one."""
    eval_tokens: int
    """Tokens of each set that are scored during training."""

    @property
    def scored_sets(self) -> tuple[HeldOutSet, ...]:
        """The sets that are scored before and during training: all but the test sets."""
        return tuple(h for h in self.sets if h.role != "test")

    @property
    def scored_sets_before(self) -> tuple[HeldOutSet, ...]:
        """The same as the start model reads them."""
        return tuple(h for h in self.sets_before if h.role != "test")

    def subset(self, held_out: HeldOutSet) -> HeldOutSet:
        """The part of a set that is scored during training: its first tokens, or all of it where it selects checkpoints."""
        is_watched = self.selection_rule is not None and self.selection_rule.is_watched(held_out)
        return held_out if is_watched else held_out.take_tokens(self.eval_tokens)


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
    objective_indices: tuple[tuple[int, ...], ...]
    """For each source, the indices of the objectives that train on its rows."""
    teachers: dict[int, ModelLocation]
    """The teacher of each distillation, by the objective's index."""
    steps: int
    tokens: int
    """Trained tokens of the whole stage."""
    schedule: lr_schedules.Schedule
    notes: tuple[str, ...]
    cache: Path

    @property
    def start_model_name(self) -> str:
        """The start model, as another stage with the same root would name it."""
        return self.stage.model if isinstance(self.stage.model, str) else str(self.model.start.folder)

    @property
    def prefix_length(self) -> int:
        """Length of rows with a bidirectional prefix; 0 when there are none."""
        has_prefixes = any(isinstance(source.spec.objective, PrefixLMObjective) for source in self.data.sources)
        return self.model.context_length if has_prefixes else 0

    def row_counts(self) -> tuple[int, ...]:
        """Rows of each source that the stage reads."""
        mixture = self.data.mixture
        first = self.stage.data.skip_steps * mixture.block_size
        before, after = mixture.counts(first), mixture.counts(first + self.steps * mixture.block_size)
        return tuple(b - a for a, b in zip(before, after, strict=True))

    def as_record(self) -> PlanSummary:
        """The plan in numbers, for the record."""
        counts, per_row = self.row_counts(), self.data.trained_tokens_per_row()
        trained = [round(c * t) for c, t in zip(counts, per_row, strict=True)]
        columns = zip(self.data.sources, self.data.target_shares, counts, trained, self.data.rows, strict=True)
        return PlanSummary(
            steps=self.steps,
            rows=self.steps * self.data.mixture.block_size,
            sequence_length=self.stage.data.sequence_length,
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

    def fingerprints(self) -> dict[str, Any]:
        """Of everything that goes into the run besides the start model."""
        return {
            "stage": self.stage.fingerprint(),
            "data": {leaf.name: leaf.store.fingerprint for leaf in self.data.sources},
            "sets": {h.name: h.fingerprint for h in self.evaluation.sets},
            **({"tasks": {t.name: t.fingerprint for t in self.evaluation.tasks}} if self.evaluation.tasks else {}),
            # Left out where there are none: a run from before there were teachers can still be resumed.
            **({"teachers": [get_teacher_identity(t) for t in self.teachers.values()]} if self.teachers else {}),
        }

    @property
    def seen_clusters(self) -> set[str]:
        """The sorts of tasks that this stage or an earlier one trains on."""
        earlier = (source.origin.get("cluster") for source in self.data.seen_sources.values())
        return {c for c in (*earlier, *(leaf.spec.cluster for leaf in self.data.sources)) if c is not None}


def make_plan(stage: s.Stage, root: Path, cache: Path, progress: ProgressCallback | None = None) -> Plan:
    """Read and tokenise the texts (or find them in the cache) and work out the stage.

    Paths in the stage are relative to `root`, the stage file's folder. Raises the error of whatever is impossible.
    """
    start = resolve_start_model(stage, root, cache, progress)
    tokenizer = load_tokenizer(start)
    config = AutoConfig.from_pretrained(start.name_or_path)
    vocabulary = int(config.vocab_size)
    encoder = make_encoder(tokenizer, vocabulary, stage.data.eos)
    limit = getattr(config, "max_position_embeddings", None)
    length = stage.data.sequence_length
    if limit and length > limit:
        raise StageError(
            f"rows of {length:,} tokens do not fit the model, which has {limit:,} positions",
            where="data.sequence_length",
            expected=f"at most {limit:,}",
        )
    if stage.max_forgetting is not None and not _has_retained(stage):
        raise _no_retained_set_error()
    objectives = resolve_objectives(stage.objectives, start)
    seen = get_seen_sources(start)
    notes: list[str] = [new_model_note(start, stage)] if start.scratch_recipe else []
    task = resolve_task(objectives, start)
    wanted = resolve_source_specs(stage, objectives, get_start_objectives(start), root, seen)
    refuse_unused_objectives(objectives, [item.objective_indices for item in wanted])
    labels = resolve_labels(wanted, cache)
    if labels and labels.problem == ProblemType.TAGS and task == Task.CLASSIFY:
        task = Task.TAG
    form = resolve_representation([item.objective for item in wanted], start, task)
    reading = make_model_inputs(task, start, tokenizer, encoder, length=length, seed=stage.seed, tuning=stage.tuning)
    problem: ProblemType = labels.problem if labels else ProblemType.CLASS
    demonstrated = make_demonstration_wrapper(stage, wanted, reading)
    listed = resolve_held_out_files(stage, root, wanted, objectives, labels, demonstrated, reading, cache)
    leaves = resolve_sources(stage, wanted, labels, demonstrated, reading, cache, progress)
    if any(
        uses_plain_chat_template(leaf.renderer) for leaf in leaves
    ):  # the model leaves with what it was trained with
        tokenizer.chat_template = plain_template(encoder.bos is not None)
    chosen, tables = select_held_out_documents(stage, leaves, listed, seen, reading, cache, progress, notes)
    if stage.max_forgetting is not None and not any(h.role == "retained" for h in chosen):
        raise _no_retained_set_error()  # a replay source so small that nothing of it fell into the held-out share
    most, spare = stage.evaluation.max_tokens, len(reading.virtual_tokens) - len(reading.without_tuning.virtual_tokens)
    held_out = [make_held_out_set(c, reading, most, notes, problem=problem) for c in chosen]
    before = [
        make_held_out_set(c, reading.without_tuning, most, [], reserved_positions=spare, problem=problem)
        for c in chosen
    ]
    tasks = [
        make_prompted_task(task, reading, root, f"evaluation.tasks[{i}]")
        for i, task in enumerate(stage.evaluation.tasks)
    ]
    notes += [note for asked in tasks for note in asked.notes]
    kept_out = [t["digest"] for t in tables] + [asked.test_digests_N for asked in tasks]
    excluded = np.unique(np.concatenate(kept_out)) if kept_out else None
    check_labels(chosen, leaves, excluded, cache, notes)
    rows = tuple(
        make_rows(
            leaf.spec.objective,
            leaf.store,
            reading,
            held_out=leaf.held_out,
            excluded=excluded,
            max_document_tokens=stage.data.max_document_tokens,
            problem=problem,
            words=leaf.spec.template.words,
        )
        for leaf in leaves
    )
    for leaf, packed in zip(leaves, rows, strict=True):
        if not packed.ledger.trained:
            raise DataError(
                f"nothing of '{leaf.name}' is left to train on: {packed.ledger.read:,} tokens read, "
                f"{packed.ledger.held_out:,} held out, {packed.ledger.dropped:,} dropped",
                where=leaf.files.where,
                expected="documents of at least two tokens that are not in a held-out set",
            )
        if packed.ledger.dropped:
            notes.append(
                f"{leaf.name}: {packed.ledger.dropped:,} tokens are dropped "
                "(copies of held-out documents, or documents of one token)"
            )
        if leaf.selection:
            notes.append(f"{leaf.name}: {describe_selection(leaf.selection)}")
        if leaf.generated_by:
            notes.append(
                f"{leaf.name}: self-made text, written by {leaf.generated_by}; not what that model was trained on"
            )
        notes += [f"{leaf.name}: {said}" for said in (*describe_skipped(leaf.store.skipped), *describe_dropped(packed))]
    if (
        reading.tuning_frame.suffix_ids
        and task == Task.CAUSAL
        and all(leaf.store.kind in RUNNING_TEXT_KINDS for leaf in leaves)
    ):
        raise StageError(
            "vectors behind running text would never be trained: nothing that a decoder predicts stands behind them",
            where="tuning.template",
            expected="vectors before {x}, or rows with answers",
        )
    shares = _resolve_shares(stage, leaves, excluded, notes)
    order = make_data_order(stage, leaves, rows, shares, notes, start)
    steps, tokens = order.steps, order.tokens
    schedule = make_schedule(stage.schedule, steps, tokens, start)
    looked_at = [c for c in chosen if c.role != "test"]
    choice = make_selection_rule(stage.save.choose, held_out, steps, tokens, schedule)
    return Plan(
        stage=stage,
        root=root,
        output=(root / (stage.output or f"runs/{stage.name}")).resolve(),
        model=ModelPlan(
            start=start,
            tokenizer=tokenizer,
            vocab_size=vocabulary,
            context_length=length,
            task=task,
            problem=problem,
            task_layer=_make_task_layer(labels, reading.pad_id, stage.seed, form) if task.is_classifier else None,
            inputs=reading,
        ),
        data=DataPlan(
            sources=tuple(leaves),
            rows=rows,
            mixture=order.mixture,
            target_shares=order.target_shares,
            seen_sources=seen,
            overlaps=measure_overlaps(stage, root, leaves, held_out, cache, notes),
        ),
        evaluation=EvaluationPlan(
            sets=tuple(held_out),
            sets_before=tuple(before),
            pseudo_perplexity_sets=_make_pseudo_perplexity_sets(stage, task, looked_at, reading),
            pseudo_perplexity_sets_before=_make_pseudo_perplexity_sets(stage, task, looked_at, reading.without_tuning),
            tasks=tuple(add_soft_prompts(asked, reading) for asked in tasks),
            tasks_before=tuple(add_soft_prompts(asked, reading.without_tuning) for asked in tasks),
            selection_rule=choice,
            eval_tokens=stage.evaluation.eval_tokens,
        ),
        objectives=objectives,
        objective_indices=tuple(leaf.spec.objective_indices for leaf in leaves),
        teachers=resolve_teachers(objectives, start, task, tokenizer, vocabulary, root),
        steps=steps,
        tokens=tokens,
        schedule=schedule,
        notes=tuple(notes),
        cache=cache,
    )


def _resolve_shares(
    stage: s.Stage, sources: Sequence[ResolvedSource], excluded: np.ndarray | None, notes: list[str]
) -> tuple[float, ...]:
    """The share of each source; where `data.mixing` parts what is left, by the documents that may be trained on."""
    if stage.data.mixing is None:
        return stage.resolve_shares()
    examples = {source.name: 0 for source in stage.data.sources}
    for leaf in sources:
        examples[leaf.spec.source] += len(
            select_documents(leaf.store, held_out=leaf.held_out, excluded=excluded).documents
        )
    shares = stage.resolve_shares(examples)
    left_out = [source.name for source in stage.data.sources if source.share is None]
    notes.append(describe_shares(stage.data.mixing, dict(zip(examples, shares, strict=True)), examples, left_out))
    return shares


def _make_pseudo_perplexity_sets(
    stage: s.Stage, task: Task, held_out_documents: Sequence[HeldOutDocuments], model_inputs: ModelInputs
) -> tuple[MaskedHeldOutText, ...]:
    """Every set of running text, to be masked token by token. Raises `StageError` for a model that fills in no masks."""
    limit = stage.evaluation.pseudo_perplexity
    if limit and task != Task.MASKED:
        raise StageError(
            f"pseudo-perplexity is of masked language models, and {model_inputs.start_model.name} is none",
            where="evaluation.pseudo_perplexity",
            expected="0, or an encoder under the objective masked",
        )
    return (
        tuple(
            make_masked_held_out_text(c, model_inputs, limit)
            for c in held_out_documents
            if c.store.kind in RUNNING_TEXT_KINDS
        )
        if limit
        else ()
    )


def _make_task_layer(
    labels: Labels | None, pad: int, seed: int, representation: TaskHeadConfig | None
) -> ClassifierSpec | None:
    """The task layer of a classifier; a number is what its only output says."""
    if labels is None:
        return None
    names = tuple(str(name) for name in labels.names) or ("number",)
    return ClassifierSpec(names, labels.problem.transformers_name, pad, seed, representation)


def _has_retained(stage: s.Stage) -> bool:
    """Whether a retained set can be had: named, or held out of a replay source."""
    return bool(stage.evaluation.retained) or any(
        # What the origins of a replay of everything hold out is known later.
        source.seen_so_far or (source.role == "replay" and source.held_out != 0)
        for source in stage.data.sources
    )


def _no_retained_set_error() -> StageError:
    return StageError(
        "there is no retained set to hold the gate against",
        where="max_forgetting",
        hint="name old text under evaluation.retained, or give a source with role: replay a `held_out` share",
    )

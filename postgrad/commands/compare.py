"""Compare models on text, finished runs on their held-out sets, and models on tasks, with paired intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from postgrad.commands.evaluate_abilities import AbilityEvaluation, ability_config, answer_probes
from postgrad.commands.evaluate_tasks import answer_tasks, pair_answers, summarize_tasks
from postgrad.commands.results import Result, TextScore, summarize_scores
from postgrad.commands.score_files import context_length, load_file_sets, score_model
from postgrad.errors import StageError
from postgrad.evaluation import before_after
from postgrad.evaluation.generation_metrics import TaskPredictions, metric_change
from postgrad.evaluation.held_out import HeldOutSet
from postgrad.evaluation.perplexity import Scores
from postgrad.hardware import machine
from postgrad.lineage.record import Difference, Record, read_record
from postgrad.models.location import locate_model
from postgrad.plan.prompted_task import PromptedTask
from postgrad.reports.html.table import Column, Table, difference_cell, text_cell, value_cell
from postgrad.reports.notebook import tables_html
from postgrad.reports.result_models import TaskScore
from postgrad.reports.sections.ability_section import comparison_ability_table
from postgrad.reports.sections.comparison_table import arm_names, comparison_table
from postgrad.reports.sections.task_section import comparison_task_table
from postgrad.run import task_scores
from postgrad.run.ability_scores import mean_change, mean_score
from postgrad.stats.forgetting import LossChange, paired_change
from postgrad.storage.cache_folder import cache_folder
from postgrad.tuning.open_model import starts_as_prefix_lm


@dataclass(frozen=True)
class BitsPerByteChange(Result):
    """A paired difference in bits per byte, for models of different tokenizers."""

    bits_per_byte: tuple[float, float | None, float | None]
    """The difference and its 95 % interval."""


@dataclass(frozen=True)
class ModelOnText(Result):
    """One model's score on one text, and its paired change from the first model."""

    model: str
    set: str
    score: TextScore
    change: LossChange | BitsPerByteChange | None
    """None for the first model; in bits per byte where the tokenizers differ."""

    def as_dict(self) -> dict[str, object]:
        """The result as plain data, the score's fields beside the model's name."""
        data = super().as_dict()
        score = data.pop("score")
        assert isinstance(score, dict)
        return {**data, **score}


@dataclass(frozen=True)
class ModelComparison(Result):
    """Models compared on the same texts."""

    models: tuple[str, ...]
    context: int
    """Tokens that each model reads at once."""
    rows: tuple[ModelOnText, ...]
    """Text by text, model by model."""

    def as_dict(self) -> dict[str, object]:
        """The result as plain data."""
        return {"context": self.context, "rows": [row.as_dict() for row in self.rows]}

    def _repr_html_(self) -> str:
        columns = (
            Column("text", is_text=True), Column("model", is_text=True), Column("nats per token"), Column("bits per byte"),
            Column(f"change from {self.models[0]} (95 %)", "nats per token"),
        )  # fmt: skip
        rows = tuple(
            (
                text_cell(row.set),
                text_cell(row.model),
                value_cell(row.score.nats, 4),
                value_cell(row.score.bits_per_byte, 4),
                difference_cell(row.change if isinstance(row.change, LossChange) else None, 4),
            )
            for row in self.rows
        )
        return tables_html(Table("Models on the same texts", columns, rows))


def compare_models(models: Sequence[str], files: Sequence[str], *, cache: Path | None = None) -> ModelComparison:
    """Score models on the same files; each is paired with the first one, document by document.

    Raises `StageError` for fewer than two models, or models of which only some read a prefix in both directions.
    """
    _require_two(models)
    machine.tune_allocator()
    cache = cache or cache_folder()
    starts = [locate_model(str(model), Path.cwd()) for model in models]
    if len({starts_as_prefix_lm(start) for start in starts}) > 1:
        raise StageError(
            "only some of these models are prefix language models, which score other tokens than the rest",
            where="compare",
            expected="only prefix language models, or none",
            hint="compare runs of one start model by their own held-out sets",
        )
    context = min(context_length(start, None) for start in starts)
    texts = [load_file_sets(start, list(map(str, files)), "auto", None, context, cache) for start in starts]
    scores = [score_model(start, t.sets, context, cache) for start, t in zip(starts, texts, strict=True)]
    first_sets = texts[0].sets
    rows: list[ModelOnText] = []
    for first_set in first_sets:
        name = first_set.name
        for number, (model, own_scores, text) in enumerate(zip(models, scores, texts, strict=True)):
            before, after = scores[0][name], own_scores[name]
            change: LossChange | BitsPerByteChange | None = None
            if number and [h.fingerprint for h in text.sets] == [h.fingerprint for h in first_sets]:
                change = before_after.loss_change(before, after, text.model_inputs.encoder.vocabulary)
            elif number:
                own_set = next(h for h in text.sets if h.name == name)
                change = BitsPerByteChange(_bits_per_byte_change(before, after, (first_set, own_set)))
            rows.append(ModelOnText(str(model), name, summarize_scores(after), change))
    return ModelComparison(tuple(map(str, models)), context, tuple(rows))


def _require_two(models: Sequence[str]) -> None:
    if len(models) < 2:
        raise StageError("a comparison needs a second model", where="compare", expected="two or more models")


def _bits_per_byte_change(
    before: Scores, after: Scores, sets: tuple[HeldOutSet, HeldOutSet]
) -> tuple[float, float | None, float | None]:
    """Difference in bits per byte with its interval, for models of different tokenizers.

    Documents are paired by content, because a document that is a single token to one tokenizer is not scored there.
    """
    nats = [
        dict(zip(h.digests.tolist(), np.bincount(s.document_W, s.nats_W, len(s.bytes_N)).tolist(), strict=True))
        for h, s in zip(sets, (before, after), strict=True)
    ]
    sizes = dict(zip(sets[0].digests.tolist(), sets[0].bytes.tolist(), strict=True))
    shared = [digest for digest in nats[0] if digest in nats[1]]
    a, b = (np.array([n[digest] for digest in shared]) / np.log(2) for n in nats)
    change = paired_change(a, b, np.array([sizes[digest] for digest in shared]), total_bytes=1, vocabulary=2)
    return change.difference, change.low, change.high


@dataclass(frozen=True)
class PairedDifference(Result):
    """A run's loss minus the first run's on the same held-out documents, in nats per token."""

    set: str
    arm: str
    against: str
    """The arm that is subtracted."""
    difference: float
    low: float | None
    """Lower end of the 95 % interval; None for a single document or item, which has none."""
    high: float | None
    """Upper end of the 95 % interval."""


@dataclass(frozen=True)
class PairedTaskDifference(Result):
    """A run's metric minus the first run's on the same items of a task."""

    task: str
    metric: str
    arm: str
    against: str
    """The arm that is subtracted."""
    difference: float
    low: float | None
    """Lower end of the 95 % interval; None for a single document or item, which has none."""
    high: float | None
    """Upper end of the 95 % interval."""
    verdict: str


@dataclass(frozen=True)
class RunComparison(Result):
    """Finished runs of one start model, compared on their held-out sets and tasks."""

    runs: tuple[Path, ...]
    records: tuple[Record, ...]
    names: tuple[str, ...]
    """The name of each run in tables: its own, made distinct."""
    paired: tuple[PairedDifference, ...]
    paired_tasks: tuple[PairedTaskDifference, ...]

    def as_dict(self) -> dict[str, object]:
        """The result as plain data; of each record only what is compared."""
        return {
            "arms": [
                {"run": str(run), **{key: r.as_json()[key] for key in ("changes", "totals", "tasks")}}
                for run, r in zip(self.runs, self.records, strict=True)
            ],
            "paired": [item.as_dict() for item in self.paired],
            "paired_tasks": [item.as_dict() for item in self.paired_tasks],
        }

    def _repr_html_(self) -> str:
        records = list(self.records)
        tasks, abilities = comparison_task_table(records), comparison_ability_table(records)
        return tables_html(comparison_table(records, self.names[0]), tasks, abilities)


def compare_runs(runs: Sequence[Path | str]) -> RunComparison:
    """Compare finished runs of one start model on their held-out sets.

    Raises `StageError` for runs that are not finished, or differ in start model, context or held-out sets.
    """
    paths = [Path(run) for run in runs]
    records = [read_record(run) for run in paths]
    for run, record in zip(paths, records, strict=True):
        _check_comparable(run, record, paths[0], records[0])
    names = arm_names(records)
    return RunComparison(
        tuple(paths),
        tuple(records),
        tuple(names),
        tuple(_paired_differences(paths, records, names)),
        tuple(PairedTaskDifference(**item) for item in task_scores.paired_task_changes(paths, records, names)),
    )


def _check_comparable(run: Path, record: Record, first_run: Path, first: Record) -> None:
    on_text = "compare their models on text: postgrad compare ... --text FILE"
    if not record.changes:
        raise StageError(f"{run} has not finished", where="compare", hint="finish it with the same train command")
    if record.fingerprints.start_model != first.fingerprints.start_model:
        raise StageError(f"{run} and {first_run} start from different models", where="compare", hint=on_text)
    if record.model.context_length != first.model.context_length:
        raise StageError(
            f"{run} was scored with {record.model.context_length} tokens of context and {first_run} with "
            f"{first.model.context_length}",
            where="compare",
            hint=on_text,
        )
    for name in record.changes.keys() & first.changes.keys():
        if record.set_fingerprint(name) != first.set_fingerprint(name):
            raise StageError(f"the held-out set '{name}' of {run} differs from that of {first_run}", where="compare")


def _paired_differences(
    runs: Sequence[Path], records: Sequence[Record], names: Sequence[str]
) -> list[PairedDifference]:
    """Paired differences between each later run's model and the first one's, on the same documents."""
    differences: list[PairedDifference] = []
    first = before_after.read_scores(runs[0] / "scores" / "after.npz", records[0].id)
    for run, record, name in zip(runs[1:], records[1:], names[1:], strict=True):
        scores = before_after.read_scores(run / "scores" / "after.npz", record.id)
        for held_out in [n for n in first if n in scores]:
            change = before_after.loss_change(first[held_out], scores[held_out], record.model.vocab_size or 0)
            differences.append(PairedDifference(held_out, name, names[0], change.difference, change.low, change.high))
    return differences


@dataclass(frozen=True)
class ModelOnTasks(Result):
    """One model's scores on tasks, and their paired changes from the first model."""

    model: str
    tasks: tuple[TaskScore, ...]
    changes: Mapping[str, Mapping[str, Difference]] = field(default_factory=dict)
    """By task and metric; empty for the first model, and for tasks without shared items."""
    shared_items: Mapping[str, int] = field(default_factory=dict)
    """By task: items that both models answered."""

    def as_dict(self) -> dict[str, object]:
        """The result as plain data, the changes with their tasks."""
        tasks: list[dict[str, object]] = []
        for task in self.tasks:
            changes = {name: change.as_json() for name, change in self.changes.get(task.name, {}).items()}
            tasks.append({**task.as_json(), **({"changes": changes} if task.name in self.shared_items else {})})
        return {"model": self.model, "tasks": tasks}


@dataclass(frozen=True)
class TaskComparison(Result):
    """Models compared on the same tasks, item by item."""

    models: tuple[ModelOnTasks, ...]

    def as_dict(self) -> dict[str, object]:
        """The result as plain data."""
        return {"models": [model.as_dict() for model in self.models]}


def compare_tasks(models: Sequence[str], file: Path | str, *, cache: Path | None = None) -> TaskComparison:
    """Evaluate models on the tasks of a file; each is paired with the first one, item by item."""
    _require_two(models)
    machine.tune_allocator()
    cache = cache or cache_folder()
    answered = [answer_tasks(locate_model(str(m), Path.cwd()), Path(file), None, cache) for m in models]
    (first_tasks, first_answers), *others = answered
    results = [ModelOnTasks(str(models[0]), summarize_tasks(first_tasks, first_answers))]
    for model, (tasks, answers) in zip(models[1:], others, strict=True):
        pairs = _pair_tasks(first_tasks, first_answers, tasks, answers)
        results.append(ModelOnTasks(str(model), summarize_tasks(tasks, answers), *_changes(first_tasks, pairs)))
    return TaskComparison(tuple(results))


_Pairs = list[tuple[TaskPredictions, TaskPredictions]]


def _pair_tasks(
    first_tasks: Sequence[PromptedTask],
    first_answers: task_scores.AllAnswers,
    tasks: Sequence[PromptedTask],
    answers: task_scores.AllAnswers,
) -> _Pairs:
    """The answers of two models to their shared items, task by task."""
    return [
        pair_answers(one, first_answers[one.name], other, answers[other.name])
        for one, other in zip(first_tasks, tasks, strict=True)
    ]


def _changes(tasks: Sequence[PromptedTask], pairs: _Pairs) -> tuple[dict[str, dict[str, Difference]], dict[str, int]]:
    """The change of each metric of each task, and its shared items."""
    changes: dict[str, dict[str, Difference]] = {}
    shared_items: dict[str, int] = {}
    for task, pair in zip(tasks, pairs, strict=True):
        shared_items[task.name] = len(pair[0])
        changes[task.name] = {n: Difference(**metric_change(n, *pair)) for n in task.metrics} if len(pair[0]) else {}
    return changes, shared_items


@dataclass(frozen=True)
class ModelOnAbilities(Result):
    """One model's scores on generated probes, and their paired changes from the first model."""

    evaluation: AbilityEvaluation
    changes: Mapping[str, Mapping[str, Difference]] = field(default_factory=dict)
    """By ability and metric; empty for the first model."""
    mean_change: Difference | None = None
    """Of the mean over the abilities; none for the first model."""


@dataclass(frozen=True)
class AbilityComparison(Result):
    """Models compared on the same generated probes, item by item."""

    models: tuple[ModelOnAbilities, ...]


def compare_abilities(
    models: Sequence[str],
    abilities: str | Sequence[str] = "all",
    *,
    items: int = 100,
    seed: int = 0,
    cache: Path | None = None,
) -> AbilityComparison:
    """Evaluate models on generated probes of abilities; each is paired with the first one, probe by probe.

    A model with a chat template reads probes as its turns, and one without as plain text. The other arguments are those of
    `evaluate_abilities`.
    """
    _require_two(models)
    machine.tune_allocator()
    config = ability_config(abilities, items=items, seed=seed)
    cache = cache or cache_folder()
    answered = [answer_probes(locate_model(str(model), Path.cwd()), config, cache) for model in models]
    first_tasks, first_answers, _ = answered[0]
    results = []
    for number, (model, (tasks, answers, notes)) in enumerate(zip(models, answered, strict=True)):
        scores = AbilityEvaluation(str(model), mean_score(tasks, answers), summarize_tasks(tasks, answers), notes)
        if not number:
            results.append(ModelOnAbilities(scores))
            continue
        pairs = _pair_tasks(first_tasks, first_answers, tasks, answers)
        changes, shared_items = _changes(first_tasks, pairs)
        mean = mean_change(first_tasks, pairs) if all(shared_items.values()) else None
        results.append(ModelOnAbilities(scores, changes, mean))
    return AbilityComparison(tuple(results))

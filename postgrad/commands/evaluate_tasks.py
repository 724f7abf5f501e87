"""How do models answer a list of tasks outside of any stage? One by itself, or several beside each other."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from postgrad.commands.evaluate import load_model_inputs
from postgrad.config.stage_file import load_tasks
from postgrad.distributed.world import World
from postgrad.errors import StageError
from postgrad.evaluation.generation_metrics import TaskPredictions, metric_change
from postgrad.hardware import machine
from postgrad.models.model import wrap_model
from postgrad.models.pretrained import ModelLocation, locate_model
from postgrad.plan.task_prompts import PromptedTask, add_soft_prompts, make_prompted_task
from postgrad.reports.results import TaskScore
from postgrad.reports.sections.task_section import task_score_table
from postgrad.run import task_scores
from postgrad.tuning.open_model import open_model, start_fingerprint

_DEFAULT_CONTEXT = 1024
"""Positions of a question to a model without a limit."""


def evaluate_tasks(
    model: str, file: Path, *, shots: int | None, cache: Path, base: str | None = None
) -> dict[str, Any]:
    """Ask a model the tasks of a file. Raises `ModelError`, `StageError` or `DataError`."""
    machine.tune_allocator()
    asked, answers = _load_and_answer(locate_model(model, Path.cwd(), base), file, shots, cache)
    entries = _task_entries(asked, answers)
    lines = [
        task_score_table(list(map(TaskScore.model_validate, entries)), f"{model}, asked the tasks of {file}").text(
            max_characters=100
        )
    ]
    lines += [note for task in asked for note in task.notes]
    lines.append(f"next: {shlex.join(['postgrad', 'compare', model, 'another-model', '--tasks', str(file)])}")
    return {"text": "\n".join(lines), "model": model, "tasks": entries}


def compare_tasks(models: list[str], file: Path, *, cache: Path) -> dict[str, Any]:
    """Ask several models the same tasks; each is held against the first, item by item."""
    if len(models) < 2:
        raise StageError("one model has nothing to be compared with", where="compare", expected="two or more models")
    machine.tune_allocator()
    found = [_load_and_answer(locate_model(model, Path.cwd()), file, None, cache) for model in models]
    parts: list[str] = []
    out: list[dict[str, Any]] = []
    (first, answers), *others = found
    entries = [_task_entries(*each) for each in found]
    for model, mine in zip(models, entries, strict=True):
        parts.append(task_score_table(list(map(TaskScore.model_validate, mine)), model).text(max_characters=100))
    lines = [f"each model held against {models[0]}, item by item (metric: change, 95 % interval)"]
    for model, (theirs, said), mine in zip(models[1:], others, entries[1:], strict=True):
        for one, other, entry in zip(first, theirs, mine, strict=True):
            pair = pair_answers(one, answers[one.name], other, said[other.name])
            entry["against"] = models[0]
            entry["changes"] = {name: metric_change(name, *pair) for name in one.metrics} if len(pair[0]) else {}
            lines += _change_lines(f"{model}, {one.name}", entry["changes"], len(pair[0]))
    for model, mine in zip(models, entries, strict=True):
        out.append({"model": model, "tasks": mine})
    lines.append(f"next: {shlex.join(['postgrad', 'generate', models[0], '--beside', models[1]])}")
    return {"text": "\n\n".join([*parts, "\n".join(lines)]), "models": out}


def _change_lines(title: str, changes: Mapping[Any, dict[str, Any]], items: int) -> list[str]:
    if not changes:
        return [f"  {title}: no item was asked of both"]
    return [
        f"  {title}: {metric} {found['difference']:+.3f} ({found['low']:+.3f} to {found['high']:+.3f}), {items:,} items"
        for metric, found in changes.items()
    ]


def pair_answers(
    first: PromptedTask, first_answers: TaskPredictions, second: PromptedTask, second_answers: TaskPredictions
) -> tuple[TaskPredictions, TaskPredictions]:
    """The answers of two models to the items that both were asked: what does not fit one context may fit another."""
    if first.digests_I == second.digests_I:
        return first_answers, second_answers
    at = {mark: i for i, mark in enumerate(first.digests_I)}
    both = [(at[mark], j) for j, mark in enumerate(second.digests_I) if mark in at]
    return _select_items(first_answers, [i for i, _ in both]), _select_items(second_answers, [j for _, j in both])


def _select_items(answers: TaskPredictions, items: Sequence[int]) -> TaskPredictions:
    said_KI = tuple(tuple(said[i] for i in items) for said in answers.predictions_KI)
    return TaskPredictions(said_KI, tuple(answers.references_I[i] for i in items))


def _load_and_answer(
    start: ModelLocation, file: Path, shots: int | None, cache: Path
) -> tuple[list[PromptedTask], task_scores.AllAnswers]:
    """The tasks as the model of a start is asked them, and its answers."""
    reading = load_model_inputs(start, _DEFAULT_CONTEXT)
    root = file.resolve().parent
    tasks = [
        add_soft_prompts(make_prompted_task(task, reading, root, f"{file}: {task.name}"), reading)
        for task in load_tasks(file, shots)
    ]
    device = machine.default_device()
    opened = open_model(start)
    model = wrap_model(opened.model, opened.task).to(device)
    identity = start_fingerprint(start)
    return tasks, task_scores.answer_tasks(model, tasks, reading, world=World(device), identity=identity, cache=cache)


def _task_entries(tasks: Sequence[PromptedTask], answers: task_scores.AllAnswers) -> list[dict[str, Any]]:
    return [
        TaskScore(
            **task_scores.describe_task(task).model_dump(),
            scores=task_scores.summarize_metrics(task, answers[task.name]),
        ).as_json()
        for task in tasks
    ]

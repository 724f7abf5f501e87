"""Evaluate a model on a list of tasks (multiple choice or generated answers), outside of any stage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from postgrad.commands.results import Result
from postgrad.commands.score_files import DEFAULT_CONTEXT, load_model_inputs
from postgrad.config.stage_file import load_tasks
from postgrad.distributed.world import World
from postgrad.evaluation.generation_metrics import TaskPredictions
from postgrad.hardware import machine
from postgrad.models.location import ModelLocation, locate_model
from postgrad.models.model import wrap_model
from postgrad.plan.model_inputs import ModelInputs
from postgrad.plan.prompted_task import PromptedTask, add_soft_prompts
from postgrad.plan.task_prompts import make_prompted_task
from postgrad.reports.notebook import tables_html
from postgrad.reports.result_models import TaskScore
from postgrad.reports.sections.task_section import task_score_table
from postgrad.run import task_scores
from postgrad.storage.cache_folder import cache_folder
from postgrad.tuning.open_model import open_model, start_fingerprint


@dataclass(frozen=True)
class TaskEvaluation(Result):
    """A model's scores on the tasks of a file."""

    model: str
    file: Path
    tasks: tuple[TaskScore, ...]
    notes: tuple[str, ...]

    def as_dict(self) -> dict[str, object]:
        """The result as plain data."""
        return {"model": self.model, "tasks": [task.as_json() for task in self.tasks]}

    def _repr_html_(self) -> str:
        return tables_html(task_score_table(self.tasks, f"{self.model} on the tasks of {self.file}"))


def evaluate_tasks(
    model: str, file: Path | str, *, shots: int | None = None, base: str | None = None, cache: Path | None = None
) -> TaskEvaluation:
    """Evaluate a model on the tasks of a YAML file, a list as under `evaluation.tasks` of a stage.

    `shots`: demonstrations before each question, instead of each task's own number. Raises `ModelError`, `StageError` or
    `DataError`.
    """
    machine.tune_allocator()
    start = locate_model(str(model), Path.cwd(), base)
    tasks, answers = answer_tasks(start, Path(file), shots, cache or cache_folder())
    notes = tuple(note for task in tasks for note in task.notes)
    return TaskEvaluation(str(model), Path(file), summarize_tasks(tasks, answers), notes)


def answer_tasks(
    start: ModelLocation, file: Path, shots: int | None, cache: Path
) -> tuple[list[PromptedTask], task_scores.AllAnswers]:
    """The tasks of a file as prompts for the model of a start, and its answers."""
    model_inputs = load_model_inputs(start, DEFAULT_CONTEXT)
    root = file.resolve().parent
    tasks = [
        add_soft_prompts(make_prompted_task(task, model_inputs, root, f"{file}: {task.name}"), model_inputs)
        for task in load_tasks(file, shots)
    ]
    return tasks, answer_prompted_tasks(start, tasks, model_inputs, cache)


def answer_prompted_tasks(
    start: ModelLocation, tasks: Sequence[PromptedTask], model_inputs: ModelInputs, cache: Path
) -> task_scores.AllAnswers:
    """The answers of the model of a start, from the cache where they are there."""
    device = machine.default_device()
    opened = open_model(start)
    model = wrap_model(opened.model, opened.task).to(device)
    return task_scores.answer_tasks(
        model, tasks, model_inputs, world=World(device), identity=start_fingerprint(start), cache=cache
    )


def summarize_tasks(tasks: Sequence[PromptedTask], answers: task_scores.AllAnswers) -> tuple[TaskScore, ...]:
    """The metrics of each task."""
    return tuple(
        TaskScore(
            **task_scores.describe_task(task).model_dump(),
            scores=task_scores.summarize_metrics(task, answers[task.name]),
        )
        for task in tasks
    )


def pair_answers(
    first: PromptedTask, first_answers: TaskPredictions, second: PromptedTask, second_answers: TaskPredictions
) -> tuple[TaskPredictions, TaskPredictions]:
    """Two models' answers to their shared items; an item may exceed the context of one of them."""
    if first.digests_I == second.digests_I:
        return first_answers, second_answers
    positions = {digest: i for i, digest in enumerate(first.digests_I)}
    shared = [(positions[digest], j) for j, digest in enumerate(second.digests_I) if digest in positions]
    return _select_items(first_answers, [i for i, _ in shared]), _select_items(second_answers, [j for _, j in shared])


def _select_items(answers: TaskPredictions, items: Sequence[int]) -> TaskPredictions:
    predictions_KI = tuple(tuple(predictions[i] for i in items) for predictions in answers.predictions_KI)
    return TaskPredictions(predictions_KI, tuple(answers.references_I[i] for i in items))

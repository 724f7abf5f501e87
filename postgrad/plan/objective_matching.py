"""The objectives of a stage: the task they need, and which sources each trains on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, get_args

from postgrad.config.objectives import (
    AnyObjective,
    ClassifyObjective,
    DistillObjective,
    GeneratingObjective,
    MaskedObjective,
    NextTokenObjective,
    OnPolicyReplayObjective,
    PrefixLMObjective,
    RowsObjective,
    SpanCorruptionObjective,
    TeacherObjective,
    TextToTextObjective,
)
from postgrad.config.quantities import get_kinds
from postgrad.data.problem_type import ProblemType
from postgrad.data.read.row_kinds import RUNNING_TEXT_KINDS
from postgrad.errors import StageError
from postgrad.models.location import ModelLocation
from postgrad.models.task import Task
from postgrad.tuning.open_model import get_task, starts_as_prefix_lm

SUPPORTED_ROW_KINDS: Mapping[str, tuple[str, ...]] = {
    kind: objective.row_kinds for objective in get_args(RowsObjective) for kind in get_kinds(objective)
}
"""Row kinds that each objective supports."""

_TASK_OBJECTIVES: dict[Task, tuple[RowsObjective, ...]] = {
    Task.CAUSAL: (NextTokenObjective(kind="next-token"),),
    Task.MASKED: (MaskedObjective(kind="masked"),),
    Task.TEXT_TO_TEXT: (SpanCorruptionObjective(kind="span-corruption"), TextToTextObjective(kind="text-to-text")),
    Task.CLASSIFY: (ClassifyObjective(kind="classify"),),
    Task.TAG: (ClassifyObjective(kind="classify", problem="tags"),),
}
"""Default objectives of each task; the first that supports a row kind also determines the rows of a teacher's source."""


def resolve_objectives(
    objectives: Sequence[AnyObjective] | None, start_model: ModelLocation
) -> tuple[AnyObjective, ...]:
    """The objectives of a stage: those it names, or the first default one of the start model."""
    return tuple(objectives) if objectives else get_start_objectives(start_model)[:1]


def get_start_objectives(start_model: ModelLocation) -> tuple[RowsObjective, ...]:
    """The default objectives of a start model: the one that it was trained with, and alternatives."""
    return (
        (PrefixLMObjective(kind="prefix-lm"),)
        if starts_as_prefix_lm(start_model)
        else _TASK_OBJECTIVES[get_task(start_model)]
    )


def resolve_task(objectives: Sequence[AnyObjective], start_model: ModelLocation) -> Task:
    """The task that the objectives need. Raises `StageError` for objectives of several tasks, or a model of another."""
    tasks = {o.task: o for o in objectives if not isinstance(o, DistillObjective)}
    start_task = get_task(start_model)
    if not tasks:  # distillation alone works for any task
        return start_task
    if len(tasks) > 1:
        kinds = " and ".join(o.kind for o in tasks.values())
        raise StageError(
            f"{kinds} need different models: {' and '.join(t.architecture for t in tasks)}",
            where="objectives",
            expected="objectives for one model",
            hint="write the labelled rows as text (text-to-text, or next-token on examples)",
        )
    (task,) = tasks
    if task == Task.CLASSIFY:
        tags = any(isinstance(o, ClassifyObjective) and o.problem == ProblemType.TAGS for o in objectives)
        return Task.TAG if tags else Task.CLASSIFY
    if start_task != task and not (task == Task.MASKED and start_task.is_classifier):
        raise StageError(
            f"{tasks[task].kind} needs {task.architecture}, and {start_model.name} is {start_task.architecture}",
            where="objectives",
            expected=f"an objective for {start_task.architecture}, such as {_TASK_OBJECTIVES[start_task][0].kind}",
        )
    return task


class SourceObjectives(NamedTuple):
    """The objective that determines the layout of a source's rows, and the indices of all that train on them."""

    row_objective: RowsObjective
    objective_indices: tuple[int, ...]


def match_objectives(
    name: str, kind: str, objectives: Sequence[AnyObjective], start_objectives: Sequence[RowsObjective], where: str
) -> SourceObjectives:
    """The objectives of a source: the one that names it, or the first that supports its row kind, and distillations.

    Distillation uses the rows of another objective. Next to a distillation or a generating objective, rows without another
    objective are laid out for the first of the `start_objectives` that supports them.
    """
    laying_out = [(i, o) for i, o in enumerate(objectives) if not isinstance(o, DistillObjective)]
    named = [(i, o) for i, o in laying_out if name in o.on]
    candidates = named or [(i, o) for i, o in laying_out if not o.on]
    if not candidates and any(isinstance(o, TeacherObjective | GeneratingObjective) for o in objectives):
        candidates = [(-1, o) for o in start_objectives]
    supporting = [(i, o) for i, o in candidates if kind in o.row_kinds]
    if not supporting:
        supported_by = ", ".join(k for k, kinds in SUPPORTED_ROW_KINDS.items() if kind in kinds)
        raise StageError(
            f"'{name}' has rows of kind {kind}, which "
            + (f"{candidates[0][1].kind} does not support" if candidates else "no objective names"),
            where=where,
            expected=f"an objective that supports them: {supported_by}",
        )
    if len(named) > 1:
        raise StageError(
            f"two objectives name '{name}': {' and '.join(o.kind for _, o in named)}",
            where="objectives",
            expected="one for each source",
        )
    number, row_objective = supporting[0]
    is_generated = isinstance(row_objective, GeneratingObjective)
    distilling = [(i, o) for i, o in enumerate(objectives) if isinstance(o, DistillObjective)]
    # An on-policy source has a teacher of its own; a distillation joins in only if it names the source.
    distilled = [i for i, o in distilling if name in o.on or (not o.on and not is_generated)]
    has_answers = kind not in RUNNING_TEXT_KINDS
    if isinstance(row_objective, OnPolicyReplayObjective) and not has_answers and row_objective.score != "variety":
        raise StageError(
            f"'{name}' has rows of kind {kind}, without an answer to compare with",
            where=f"objectives[{number}].score",
            expected="variety, or rows with answers",
        )
    if is_generated and any(o.cache != "none" for i, o in distilling if i in distilled):
        raise StageError(
            f"teacher predictions on '{name}' cannot be cached, because its text is generated during training",
            where="objectives",
            expected="cache: none",
        )
    return SourceObjectives(row_objective, (*((number,) if number >= 0 else ()), *distilled))


def refuse_unused_objectives(objectives: Sequence[AnyObjective], objective_indices: Sequence[Sequence[int]]) -> None:
    """Raise `StageError` for an objective that trains on no source. `objective_indices`: for each source."""
    used = {number for numbers in objective_indices for number in numbers}
    for number, spec in enumerate(objectives):
        if number not in used:
            raise StageError(
                f"{spec.kind} trains on no source: other objectives take all of them",
                where=f"objectives[{number}]",
                expected="sources with rows that it supports and that no other objective names",
                hint="name its sources: `on: [NAME]`, or remove it",
            )


def get_evaluation_objective(objective: RowsObjective, start_objectives: Sequence[RowsObjective]) -> RowsObjective:
    """The objective that held-out rows are scored with: on-policy sources are scored on the given text."""
    return start_objectives[0] if isinstance(objective, GeneratingObjective) else objective

"""The losses of a stage: what each objective computes on its rows. Each kind of objective has its function here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

from postgrad.config.objectives import (
    AnyObjective,
    ClassifyObjective,
    DistillObjective,
    ObjectiveConfig,
    OnPolicyObjective,
    TokenObjectiveConfig,
    get_objective_names,
)
from postgrad.data.problem_type import ProblemType
from postgrad.models.task import Task
from postgrad.objectives.classification_loss import ClassificationLoss
from postgrad.objectives.distillation import CachedDistillationLoss, DistillationLoss, TaskDistillationLoss
from postgrad.objectives.next_token import TokenLoss
from postgrad.objectives.objective import Objective
from postgrad.objectives.teacher import Teacher
from postgrad.run.online_teacher import make_weight_schedule


class LossContext(NamedTuple):
    """What a loss is made from: its name, the model's problem and task, its online teacher, and the length of the stage."""

    name: str
    problem: ProblemType
    task: Task
    teacher: Teacher | None
    """None without a teacher, or with cached predictions."""
    steps: int
    tokens: int


def make_objectives(
    specs: Sequence[AnyObjective],
    problem: ProblemType,
    task: Task = Task.CAUSAL,
    *,
    teachers: Mapping[int, Teacher] = MappingProxyType({}),
    steps: int = 1,
    tokens: int = 1,
) -> list[Objective]:
    """The losses of a stage's objectives.

    `problem` and `task` are those of the model, `teachers` the online ones by the number of their objective; `steps` and
    `tokens` of the stage are for weights that change over it.
    """
    return [
        spec.load()(spec, LossContext(name, problem, task, teachers.get(number), steps, tokens))
        for number, (spec, name) in enumerate(zip(specs, get_objective_names(specs), strict=True))
    ]


def make_token_loss(spec: ObjectiveConfig, context: LossContext) -> Objective:
    """Cross-entropy over the labels of the rows."""
    weights = spec.token_weights if isinstance(spec, TokenObjectiveConfig) else None
    token_weights = None if weights is None else weights.load()(**weights.model_dump(exclude={"kind"}))
    return TokenLoss(context.name, spec.weight, token_weights)


def make_classification_loss(spec: ClassifyObjective, context: LossContext) -> Objective:
    """The loss of a task layer."""
    return ClassificationLoss(context.problem, context.name, spec.weight)


def make_distillation_loss(spec: DistillObjective, context: LossContext) -> Objective:
    """The divergence from a teacher: cached or online, over the vocabulary or the labels of a task layer."""
    weight = make_weight_schedule(spec.weight, context.steps, context.tokens)
    if context.teacher is None:
        return CachedDistillationLoss(weight, spec.temperature, context.name)
    options = weight, spec.direction, spec.temperature, context.name
    if context.task.is_classifier:
        return TaskDistillationLoss(context.problem, context.teacher, *options)
    return DistillationLoss(context.teacher, *options, exclude_labels=spec.vocabulary == "without-labels")


def make_on_policy_loss(spec: OnPolicyObjective, context: LossContext) -> Objective:
    """The reverse divergence from a teacher, on continuations of the model's own."""
    assert context.teacher is not None
    weight = make_weight_schedule(spec.weight, context.steps, context.tokens)
    return DistillationLoss(context.teacher, weight, "reverse", 1.0, context.name)

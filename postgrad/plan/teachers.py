"""Teachers of distillation: located, and checked for the student's vocabulary, before any training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from postgrad.config.objectives import AnyObjective, DistillObjective, TeacherObjective
from postgrad.errors import StageError
from postgrad.models.location import ModelLocation, locate_model
from postgrad.models.model_sizes import load_model_sizes
from postgrad.models.pretrained import load_tokenizer
from postgrad.models.task import Task
from postgrad.tuning.open_model import start_fingerprint

START = "start"
"""The name of the stage's start model as a teacher."""


def get_teacher_identity(teacher: ModelLocation) -> str:
    """Identity of a teacher: its fingerprint, or its name on the Hub."""
    return start_fingerprint(teacher) or teacher.name


def resolve_teachers(
    objectives: Sequence[AnyObjective],
    start_model: ModelLocation,
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    vocab_size: int,
    root: Path,
) -> dict[int, ModelLocation]:
    """The teacher of each objective with one. Raises `StageError` for a teacher with another vocabulary."""
    for i, spec in enumerate(objectives):
        if isinstance(spec, DistillObjective) and spec.cache != "none" and task.is_classifier:
            raise StageError(
                "caching a classifier's predictions saves nothing, because it has few per row",
                where=f"objectives[{i}].cache",
                expected="none",
            )
        if isinstance(spec, DistillObjective) and spec.vocabulary is not None and task.is_classifier:
            raise StageError(
                "a classifier predicts classes, not tokens of a vocabulary",
                where=f"objectives[{i}].vocabulary",
                expected="no such key",
            )
    return {
        i: start_model
        if spec.teacher == START
        else _resolve_teacher(spec.teacher, root, start_model, tokenizer, vocab_size, f"objectives[{i}].teacher")
        for i, spec in enumerate(objectives)
        if isinstance(spec, TeacherObjective)
    }


def _resolve_teacher(
    name: str, root: Path, start_model: ModelLocation, tokenizer: PreTrainedTokenizerBase, vocab_size: int, where: str
) -> ModelLocation:
    teacher = locate_model(name, root, where=where)
    if teacher.name_or_path == start_model.name_or_path:
        return teacher
    teacher_vocab_size = load_model_sizes(teacher).vocab_size
    student_tokens, teacher_tokens = (
        {i: token for token, i in t.get_vocab().items()} for t in (tokenizer, load_tokenizer(teacher.full_model))
    )
    if vocab_size != teacher_vocab_size or student_tokens != teacher_tokens:
        differing = (i for i in student_tokens | teacher_tokens if student_tokens.get(i) != teacher_tokens.get(i))
        first = min(differing, default=None)
        example = (
            "" if first is None else f"; id {first} is {student_tokens.get(first)!r} and {teacher_tokens.get(first)!r}"
        )
        raise StageError(
            f"{start_model.name} and its teacher {teacher.name} have different vocabularies: {len(student_tokens):,} tokens on "
            f"{vocab_size:,} embeddings and {len(teacher_tokens):,} on {teacher_vocab_size:,}{example}",
            where=where,
            expected="a teacher with the start model's own tokenizer and vocabulary",
            hint="train on text that the teacher generates",
        )
    return teacher

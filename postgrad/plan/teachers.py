"""Whom is a stage taught by? Teachers are found, and held against the student's tokenizer, before a weight is touched."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from transformers import AutoConfig, PreTrainedTokenizerBase

from postgrad.config.objectives import AnyObjective, DistillObjective, TeacherObjective
from postgrad.errors import StageError
from postgrad.models.location import ModelLocation, locate_model
from postgrad.models.pretrained import load_tokenizer
from postgrad.models.task import Task
from postgrad.tuning.open_model import start_fingerprint

START = "start"
"""The word for the stage's own start model."""


def get_teacher_identity(teacher: ModelLocation) -> str:
    """What tells one teacher from another: its fingerprint, or its name on the Hub."""
    return start_fingerprint(teacher) or teacher.name


def resolve_teachers(
    objectives: Sequence[AnyObjective],
    start_model: ModelLocation,
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    vocabulary: int,
    root: Path,
) -> dict[int, ModelLocation]:
    """The teacher of each objective that has one. Raises `StageError` for one that reads other tokens than the start model."""
    for i, spec in enumerate(objectives):
        if isinstance(spec, DistillObjective) and spec.cache != "none" and task.is_classifier:
            raise StageError(
                "a classifier says so little of a row that nothing is saved by asking it beforehand",
                where=f"objectives[{i}].cache",
                expected="none",
            )
    return {
        i: start_model
        if spec.teacher == START
        else _resolve_teacher(spec.teacher, root, start_model, tokenizer, vocabulary, f"objectives[{i}].teacher")
        for i, spec in enumerate(objectives)
        if isinstance(spec, TeacherObjective)
    }


def _resolve_teacher(
    name: str, root: Path, start_model: ModelLocation, tokenizer: PreTrainedTokenizerBase, vocabulary: int, where: str
) -> ModelLocation:
    teacher = locate_model(name, root, where=where)
    if teacher.name_or_path == start_model.name_or_path:
        return teacher
    theirs = int(AutoConfig.from_pretrained(teacher.name_or_path).vocab_size)
    mine_by_id, theirs_by_id = (
        {i: token for token, i in t.get_vocab().items()} for t in (tokenizer, load_tokenizer(teacher.full_model))
    )
    if vocabulary != theirs or mine_by_id != theirs_by_id:
        other = min((i for i in mine_by_id | theirs_by_id if mine_by_id.get(i) != theirs_by_id.get(i)), default=None)
        apart = "" if other is None else f"; id {other} is {mine_by_id.get(other)!r} and {theirs_by_id.get(other)!r}"
        raise StageError(
            f"{start_model.name} and its teacher {teacher.name} do not read the same tokens: {len(mine_by_id):,} tokens on "
            f"{vocabulary:,} embeddings and {len(theirs_by_id):,} on {theirs:,}{apart}",
            where=where,
            expected="a teacher with the start model's own tokenizer and vocabulary",
            hint="let the teacher write text, and train on that",
        )
    return teacher

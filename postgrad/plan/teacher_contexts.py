"""Teacher contexts of a stage: what its teachers read of each source that the model in training does not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from postgrad.config.objectives import (
    AnyObjective,
    AnyTeacherContext,
    BeginningTeacherContext,
    FieldTeacherContext,
    NextTokenObjective,
    OnPolicyObjective,
    RowsObjective,
    TeacherObjective,
)
from postgrad.data.layouts.rows import BeginningContext, ContextOptions
from postgrad.data.read.files import ContextColumn
from postgrad.data.read.row_kinds import RUNNING_TEXT_KINDS
from postgrad.errors import StageError
from postgrad.models.location import ModelLocation
from postgrad.models.model_sizes import load_model_sizes
from postgrad.plan.model_inputs import ModelInputs


def get_context(spec: AnyObjective) -> AnyTeacherContext | None:
    """The context of an objective's teacher."""
    return spec.context if isinstance(spec, TeacherObjective) else None


def find_source_context(
    name: str, kind: str, row_objective: RowsObjective, objectives: Sequence[AnyObjective], numbers: Sequence[int]
) -> AnyTeacherContext | None:
    """The context of the teachers of a source. Raises `StageError` for two, and for one that its rows do not have."""
    contexts = {i: context for i in numbers if (context := get_context(objectives[i])) is not None}
    if not contexts:
        return None
    number, context = next(iter(contexts.items()))
    where = f"objectives[{number}].context"
    if any(other != context for other in contexts.values()):
        raise StageError(
            f"the teachers of '{name}' read different contexts",
            where=where,
            expected="one context for all teachers of a source",
            hint="name other sources under `on`",
        )
    if not isinstance(row_objective, NextTokenObjective | OnPolicyObjective):
        raise StageError(
            f"{row_objective.kind} has no place for a teacher's context",
            where=where,
            expected="rows of next-token or on-policy, on a decoder",
        )
    is_running_text = kind in RUNNING_TEXT_KINDS
    if is_running_text != isinstance(context, BeginningTeacherContext):
        raise StageError(
            f"'{name}' has rows of kind {kind}, without "
            + ("fields" if is_running_text else "a beginning to set apart"),
            where=f"{where}.kind",
            expected="beginning" if is_running_text else "field",
        )
    return context


def get_context_column(context: AnyTeacherContext | None) -> ContextColumn | None:
    """The column of a context that is a field."""
    return ContextColumn(context.field, context.template) if isinstance(context, FieldTeacherContext) else None


def make_context_options(
    context: AnyTeacherContext | None,
    numbers: Sequence[int],
    objectives: Sequence[AnyObjective],
    teachers: Mapping[int, ModelLocation],
    model_inputs: ModelInputs,
) -> ContextOptions | None:
    """The contexts of a source's rows, for the teachers among the objectives `numbers`.

    Raises `StageError` when the beginning of a document and a row do not fit a teacher.
    """
    if context is None:
        return None
    limits = {i: load_model_sizes(teachers[i]).positions for i in numbers if get_context(objectives[i]) is not None}
    number, limit = min(limits.items(), key=lambda item: item[1] or float("inf"))
    if not isinstance(context, BeginningTeacherContext):
        return ContextOptions(limit)
    needed = context.tokens + model_inputs.length
    if limit and needed > limit:
        raise StageError(
            f"a context of {context.tokens:,} tokens and a row of {model_inputs.length:,} do not fit the teacher "
            f"{teachers[number].name}, which reads {limit:,}",
            where=f"objectives[{number}].context.tokens",
            expected=f"at most {limit - model_inputs.length:,}",
            hint="lower data.sequence_length",
        )
    return ContextOptions(limit, BeginningContext(context.tokens, context.share, model_inputs.ends_sentence_V))

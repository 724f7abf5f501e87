"""Renderers of a source's rows: templates, chat templates and class labels, as its objective needs them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from postgrad.config.objectives import ClassifyObjective, MaskedObjective, NextTokenObjective, RowsObjective
from postgrad.data.read.labels import Labels
from postgrad.data.read.row_kinds import RUNNING_TEXT_KINDS
from postgrad.data.render.chat import ChatRenderer, custom_template
from postgrad.data.render.demonstrations import Demonstrations
from postgrad.data.render.renderer import Renderer
from postgrad.data.render.renderers import ClassRenderer, PlainRenderer, TagRenderer
from postgrad.errors import StageError
from postgrad.models.task import Task
from postgrad.plan.model_inputs import ModelInputs


@dataclass(frozen=True)
class RowTemplate:
    """A source's row template, as the stage gives it."""

    prompt: str | None = None
    answer: str | None = None
    words: Mapping[str, str] = field(default_factory=dict)


def make_row_template(config: Mapping[str, Any]) -> RowTemplate:
    """The row template of a source or its origin, given as plain data."""
    return RowTemplate(config.get("prompt"), config.get("answer"), config.get("label_words") or {})


DemonstrationWrapper = Callable[[Renderer, str], Renderer]
"""Wraps a renderer of rows of a kind so that it puts demonstrations before each example."""


def make_renderer(
    objective: RowsObjective,
    kind: str,
    model_inputs: ModelInputs,
    template: RowTemplate,
    labels: Labels | None,
    add_demonstrations: DemonstrationWrapper | None = None,
) -> Renderer | None:
    """The renderer of rows of a kind for an objective; None for running text.

    Raises `StageError` for demonstrations before rows without written answers.
    """
    if kind in RUNNING_TEXT_KINDS:
        return None
    renderer = _make_base_renderer(objective, kind, model_inputs, template, labels)
    if add_demonstrations is None:
        return renderer
    if isinstance(objective, ClassifyObjective | MaskedObjective):
        raise StageError(
            f"demonstrations need written answers, and {objective.kind} has none",
            where="tuning.demonstrations",
            expected="an objective with written answers: next-token or text-to-text",
        )
    return add_demonstrations(renderer, kind)


def _make_base_renderer(
    objective: RowsObjective, kind: str, model_inputs: ModelInputs, template: RowTemplate, labels: Labels | None
) -> Renderer:
    if isinstance(objective, ClassifyObjective | MaskedObjective):
        assert labels is not None
        if kind == "tagged":
            return TagRenderer(labels)
        has_separator = bool(model_inputs.tokenizer_frame.separator_ids)
        return ClassRenderer(labels, separator="" if has_separator else "\n", is_joint=not has_separator)
    answers = objective.answers if isinstance(objective, NextTokenObjective) else "last"
    return make_text_renderer(kind, model_inputs, template, answers)


def make_text_renderer(
    kind: str, model_inputs: ModelInputs, row_template: RowTemplate, answers: Literal["all", "last"]
) -> PlainRenderer | ChatRenderer:
    """The renderer of rows with written answers: a template, or conversations in the chat template."""
    plain = PlainRenderer(
        prompt=row_template.prompt,
        answer=row_template.answer,
        label_words=row_template.words,
        is_separate=model_inputs.task.is_encoder_decoder,
    )
    tokenizer = model_inputs.tokenizer
    template = custom_template(tokenizer.chat_template)
    as_turns = kind == "instruction" or (kind == "completion" and template)
    if row_template.prompt is None and (kind == "chat" or (as_turns and model_inputs.task == Task.CAUSAL)):
        special = {name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
        return ChatRenderer(template, special, answers, plain)
    return plain


def uses_plain_chat_template(renderer: Renderer | None) -> bool:
    """Whether rows are rendered with the plain chat template."""
    if isinstance(renderer, Demonstrations):
        return uses_plain_chat_template(renderer.renderer)
    return isinstance(renderer, ChatRenderer) and renderer.template is None

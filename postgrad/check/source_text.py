"""A line on each source: its rows and labels, how they are rendered, and what the model is trained on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from postgrad.config.objectives import (
    ClassifyObjective,
    MaskedObjective,
    NextTokenObjective,
    OnPolicyObjective,
    OnPolicyReplayObjective,
    PrefixLMObjective,
    RowsObjective,
    SpanCorruptionObjective,
    TextToTextObjective,
)
from postgrad.data.problem_type import ProblemType
from postgrad.data.read.documents import detect_source_columns
from postgrad.data.read.labels import Labels
from postgrad.data.read.row_kinds import RUNNING_TEXT_KINDS
from postgrad.data.render.chat import ChatRenderer
from postgrad.data.render.demonstrations import Demonstrations
from postgrad.data.render.renderer import Renderer
from postgrad.data.render.renderers import ClassRenderer, PlainRenderer, TagRenderer
from postgrad.data.tokens.source_files import read_all_labels
from postgrad.errors import DataError, format_names
from postgrad.foreign_text import plain_text
from postgrad.plan.sources import ResolvedSource

_MAX_LABEL_NAMES = 6


def source_lines(sources: Sequence[ResolvedSource], cache: Path) -> list[str]:
    """A line for each source."""
    return [_source_line(source, cache) for source in sources]


def _source_line(source: ResolvedSource, cache: Path) -> str:
    hub = source.files.hub
    origin = source.files.path if hub is None else f"{hub.name} on the Hub"
    parts = [*_describe_template(source), _describe_training(source.spec.objective, source.store.kind)]
    return f"{source.name}: {origin}: {_describe_rows(source, cache)}, {'; '.join(parts)}"


def _describe_rows(source: ResolvedSource, cache: Path) -> str:
    """The number and kind of rows, the columns that identify the kind, and the labels."""
    count, kind = len(source.store), source.store.kind
    columns = detect_source_columns(source.files)
    if columns is None:
        return f"{count:,} documents in text files"
    details = [
        f"column{'s' * (len(columns.required) > 1)} {', '.join(columns.required)}",
        *_describe_labels(source, kind, cache),
        *_describe_unused(source),
    ]
    return f"{count:,} rows of kind {kind} ({'; '.join(details)})"


def _describe_unused(source: ResolvedSource) -> list[str]:
    """The columns that nothing reads, each with its rows."""
    unused = source.store.unused
    listed = [f"{plain_text(name, 40)} ({count:,} rows)" for name, count in unused.items()]
    return [f"not read: {format_names(listed, 12)}"] if listed else []


def _describe_labels(source: ResolvedSource, kind: str, cache: Path) -> list[str]:
    if kind not in ("labelled", "tagged"):
        return []
    try:
        labels = (source.renderer.labels if source.renderer else None) or read_all_labels([source.files], cache)
    except DataError:  # labels of mixed types are no error where they are only text
        return []
    if labels.problem == ProblemType.NUMBER:
        return ["numeric labels"]
    noun = {ProblemType.TAGS: "tags", ProblemType.MULTI_LABEL: "labels, multi-label"}.get(labels.problem, "labels")
    return [f"{len(labels.names):,} {noun}: {_format_label_names(labels)}"]


def _format_label_names(labels: Labels) -> str:
    names = ", ".join(plain_text(name, 40) for name in labels.names[:_MAX_LABEL_NAMES])
    return names + (" ..." if len(labels.names) > _MAX_LABEL_NAMES else "")


def _describe_template(source: ResolvedSource) -> list[str]:
    """How rows are rendered; nothing for running text."""
    kind = source.store.kind
    if kind in RUNNING_TEXT_KINDS or source.renderer is None:
        return []
    return [_describe_renderer(source.renderer, kind)]


def _describe_renderer(renderer: Renderer, kind: str) -> str:
    match renderer:
        case Demonstrations():
            return f"{_describe_renderer(renderer.renderer, kind)}, after up to {renderer.count} demonstrations"
        case ChatRenderer():
            template = "the tokenizer's chat template"
            if not renderer.template:
                template = "a plain chat template (the tokenizer has none)"
            if kind in ("chat", "instruction"):
                return f"rendered with {template}"
            return f"rendered with {template}, as {_quote_template(*renderer.turn_renderer.templates(kind))}"
        case PlainRenderer():
            return f"rendered as {_quote_template(*renderer.templates(kind), renderer.is_separate)}"
        case ClassRenderer() | TagRenderer():
            return "without a template"
    return "rendered"


def _quote_template(prompt: str, separator: str, answer: str, separate: bool = True) -> str:
    if separate:
        return f'"{plain_text(prompt)}" with the answer "{plain_text(answer)}"'
    return f'"{plain_text(prompt + separator + answer)}"'


def _describe_training(objective: RowsObjective, kind: str) -> str:
    """What the model is trained on."""
    running = kind in RUNNING_TEXT_KINDS
    match objective:
        case NextTokenObjective():
            return "all tokens are trained" if running or objective.train_on == "all" else "only answers are trained"
        case PrefixLMObjective():
            return "the text after a random prefix is trained" if running else "only the last answer is trained"
        case MaskedObjective():
            return (
                f"{objective.share:.0%} of the tokens are masked" if running else "the label is predicted at the mask"
            )
        case SpanCorruptionObjective():
            return f"{objective.density:.0%} of the tokens are corrupted in spans"
        case TextToTextObjective():
            return "the rest of each text is the target" if running else "the answer is the target"
        case OnPolicyObjective():
            return "the model continues it, and the teacher scores the continuation"
        case OnPolicyReplayObjective():
            return f"the model is trained on answers of its own with a {objective.score} of at least {objective.min_score:g}"
        case ClassifyObjective():
            return (
                "a task layer predicts a tag for each word" if kind == "tagged" else "a task layer predicts the label"
            )

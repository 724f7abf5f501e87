"""What was found in each source: which rows, with which labels, how they become text, and what of it is trained?"""

from __future__ import annotations

from pathlib import Path

from postgrad.config.objectives import (
    ClassifyObjective,
    MaskedObjective,
    NextTokenObjective,
    OnPolicyObjective,
    PrefixLMObjective,
    RowsObjective,
    SpanCorruptionObjective,
    TextToTextObjective,
)
from postgrad.data.problem_type import ProblemType
from postgrad.data.read.documents import detect_source_columns
from postgrad.data.read.examples import RUNNING_TEXT_KINDS
from postgrad.data.read.labels import Labels
from postgrad.data.render.chat import ChatRenderer
from postgrad.data.render.demonstrations import Demonstrations
from postgrad.data.render.renderer import Renderer
from postgrad.data.render.renderers import ClassRenderer, PlainRenderer, TagRenderer
from postgrad.data.tokens.tokenize import read_all_labels
from postgrad.errors import DataError
from postgrad.plan.plan import Plan
from postgrad.plan.sources import ResolvedSource
from postgrad.reports.html.notation import plain_text

_MAX_LABEL_NAMES = 6
"""Labels that are told by name."""


def source_lines(plan: Plan, cache: Path) -> list[str]:
    """A line for each source."""
    return [_source_line(leaf, leaf.spec.objective, cache) for leaf in plan.data.sources]


def _source_line(source: ResolvedSource, objective: RowsObjective, cache: Path) -> str:
    hub = source.files.hub
    origin = source.files.path if hub is None else f"{hub.name} on the Hub"
    parts = [*_describe_template(source), _describe_training(source, objective)]
    return f"{source.name}: {origin}: {_describe_rows(source, cache)}, {'; '.join(parts)}"


def _describe_rows(source: ResolvedSource, cache: Path) -> str:
    """How many rows of which kind, the columns by which they are known, and their labels."""
    count, kind = len(source.store), source.store.kind
    columns = detect_source_columns(source.files)
    if columns is None:
        return f"{count:,} documents of text files"
    named = [
        f"column{'s' * (len(columns.required) > 1)} {', '.join(columns.required)}",
        *_describe_labels(source, kind, cache),
    ]
    return f"{count:,} rows are {kind} ({'; '.join(named)})"


def _describe_labels(source: ResolvedSource, kind: str, cache: Path) -> list[str]:
    if kind not in ("labelled", "tagged"):
        return []
    try:
        labels = (source.renderer.labels if source.renderer else None) or read_all_labels([source.files], cache)
    except DataError:  # of several sorts: all the same where they are only written
        return []
    if labels.problem == ProblemType.NUMBER:
        return ["the label is a number"]
    what = {ProblemType.TAGS: "tags", ProblemType.MULTI_LABEL: "labels, any of them"}.get(labels.problem, "labels")
    return [f"{len(labels.names):,} {what}: {_format_label_names(labels)}"]


def _format_label_names(labels: Labels) -> str:
    names = ", ".join(plain_text(name, 40) for name in labels.names[:_MAX_LABEL_NAMES])
    return names + (" ..." if len(labels.names) > _MAX_LABEL_NAMES else "")


def _describe_template(source: ResolvedSource) -> list[str]:
    """How rows with parts become text."""
    kind = source.store.kind
    if kind in RUNNING_TEXT_KINDS or source.renderer is None:
        return []
    return [_describe_renderer(source.renderer, kind)]


def _describe_renderer(renderer: Renderer, kind: str) -> str:
    match renderer:
        case Demonstrations():
            return f"{_describe_renderer(renderer.renderer, kind)}, behind up to {renderer.count} others with their answers"
        case ChatRenderer():
            its = (
                "the tokenizer's chat template"
                if renderer.template
                else "a plain chat template (the tokenizer has no other)"
            )
            turn = (
                ""
                if kind in ("chat", "instruction")
                else f", as a question {_quote_template(*renderer.turn_renderer.templates(kind))}"
            )
            return f"put into words by {its}{turn}"
        case PlainRenderer():
            return f"put into words as {_quote_template(*renderer.templates(kind), renderer.is_separate)}"
        case ClassRenderer() | TagRenderer():
            return "read as they are"
    return "put into words"


def _quote_template(prompt: str, separator: str, answer: str, separate: bool = True) -> str:
    if separate:
        return f'"{plain_text(prompt)}" and an answer "{plain_text(answer)}"'
    return f'"{plain_text(prompt + separator + answer)}"'


def _describe_training(source: ResolvedSource, objective: RowsObjective) -> str:
    """What a model learns of a row."""
    running = source.store.kind in RUNNING_TEXT_KINDS
    match objective:
        case NextTokenObjective():
            return "every token is trained" if running or objective.train_on == "all" else "only answers are trained"
        case PrefixLMObjective():
            return "a beginning is read and the rest is trained" if running else "only the last answer is trained"
        case MaskedObjective():
            return f"{objective.share:.0%} of the tokens are masked" if running else "the label is said at the mask"
        case SpanCorruptionObjective():
            return f"{objective.density:.0%} of the tokens are to be restored"
        case TextToTextObjective():
            return "the rest of each text is written" if running else "the answer is written"
        case OnPolicyObjective():
            return "the model goes on from it, and what it writes is judged"
        case ClassifyObjective():
            return "a task layer tags the words" if source.store.kind == "tagged" else "a task layer decides the label"

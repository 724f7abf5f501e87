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
from postgrad.data.read.documents import source_columns
from postgrad.data.read.examples import RUNNING, Labels, Renderer
from postgrad.data.render.chat import ChatRenderer
from postgrad.data.render.demonstrations import Demonstrations
from postgrad.data.render.renderers import ClassRenderer, PlainRenderer, TagRenderer
from postgrad.data.tokens.tokenize import labels_of
from postgrad.errors import DataError
from postgrad.plan.plan import Plan
from postgrad.plan.sources import Leaf
from postgrad.reports.html.notation import plain

_NAMED = 6
"""Labels that are told by name."""


def found_lines(plan: Plan, cache: Path) -> list[str]:
    """A line for each source."""
    return [_line(leaf, leaf.wanted.objective, cache) for leaf in plan.leaves]


def _line(leaf: Leaf, objective: RowsObjective, cache: Path) -> str:
    hub = leaf.files.hub
    origin = leaf.files.path if hub is None else f"{hub.name} on the Hub"
    parts = [*_wording(leaf), _trained(leaf, objective)]
    return f"{leaf.name}: {origin}: {_rows(leaf, cache)}, {'; '.join(parts)}"


def _rows(leaf: Leaf, cache: Path) -> str:
    """How many rows of which kind, the columns by which they are known, and their labels."""
    count, kind = len(leaf.store), leaf.store.kind
    columns = source_columns(leaf.files)
    if columns is None:
        return f"{count:,} documents of text files"
    named = [f"column{'s' * (len(columns.required) > 1)} {', '.join(columns.required)}", *_labels(leaf, kind, cache)]
    return f"{count:,} rows are {kind} ({'; '.join(named)})"


def _labels(leaf: Leaf, kind: str, cache: Path) -> list[str]:
    if kind not in ("labelled", "tagged"):
        return []
    try:
        labels = (leaf.renderer.labels if leaf.renderer else None) or labels_of([leaf.files], cache)
    except DataError:  # of several sorts: all the same where they are only written
        return []
    if labels.problem == "number":
        return ["the label is a number"]
    what = {"tags": "tags", "multi": "labels, any of them"}.get(labels.problem, "labels")
    return [f"{len(labels.names):,} {what}: {_names(labels)}"]


def _names(labels: Labels) -> str:
    names = ", ".join(plain(name, 40) for name in labels.names[:_NAMED])
    return names + (" ..." if len(labels.names) > _NAMED else "")


def _wording(leaf: Leaf) -> list[str]:
    """How rows with parts become text."""
    kind = leaf.store.kind
    if kind in RUNNING or leaf.renderer is None:
        return []
    return [_worded(leaf.renderer, kind)]


def _worded(renderer: Renderer, kind: str) -> str:
    match renderer:
        case Demonstrations():
            return f"{_worded(renderer.inner, kind)}, behind up to {renderer.count} others with their answers"
        case ChatRenderer():
            its = (
                "the tokenizer's chat template"
                if renderer.template
                else "a plain chat template (the tokenizer has no other)"
            )
            turn = (
                "" if kind in ("chat", "instruction") else f", as a question {_quoted(*renderer.turn.templates(kind))}"
            )
            return f"put into words by {its}{turn}"
        case PlainRenderer():
            return f"put into words as {_quoted(*renderer.templates(kind), renderer.separate)}"
        case ClassRenderer() | TagRenderer():
            return "read as they are"
    return "put into words"


def _quoted(prompt: str, between: str, answer: str, separate: bool = True) -> str:
    if separate:
        return f'"{plain(prompt)}" and an answer "{plain(answer)}"'
    return f'"{plain(prompt + between + answer)}"'


def _trained(leaf: Leaf, objective: RowsObjective) -> str:
    """What a model learns of a row."""
    running = leaf.store.kind in RUNNING
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
            return "a task layer tags the words" if leaf.store.kind == "tagged" else "a task layer decides the label"

"""Column detection: the kind of rows and the role of each column, from the column names."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

from postgrad.data.read.row_kinds import RowKind
from postgrad.errors import DataError, suggest_nearest


class ColumnLayout(NamedTuple):
    """Columns that identify a kind of rows: all of `required`, and what else the kind may have."""

    kind: RowKind
    required: tuple[str, ...]
    optional: tuple[str, ...] = ()

    @property
    def roles(self) -> tuple[str, ...]:
        return self.required + self.optional


_TEXT_PAIR_COLUMNS = (
    ("text_a", "text_b"),
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
)
_SUMMARY_COLUMNS = (("document", "summary"), ("article", "highlights"), ("dialogue", "summary"), ("text", "summary"))

COLUMN_LAYOUTS = (
    ColumnLayout(RowKind.TEXT, ("text",)),
    ColumnLayout(RowKind.INPUT_IDS, ("input_ids",)),
    ColumnLayout(RowKind.CHAT, ("messages",), ("system", "tools")),
    ColumnLayout(RowKind.CHAT, ("conversations",), ("system", "tools")),
    ColumnLayout(RowKind.INSTRUCTION, ("instruction", "output"), ("input", "system", "history", "references")),
    ColumnLayout(RowKind.COMPLETION, ("prompt", "completion"), ("references",)),
    ColumnLayout(RowKind.PAIR, ("source", "target"), ("references",)),
    *(ColumnLayout(RowKind.PAIR, names, ("references",)) for names in _SUMMARY_COLUMNS),
    ColumnLayout(RowKind.PAIR, ("translation",)),
    *(ColumnLayout(RowKind.CHOICES, ("question", "choices", answer)) for answer in ("answer", "answerKey")),
    *(ColumnLayout(RowKind.QUESTION, ("question", "context", answers)) for answers in ("answers", "answer")),
    *(ColumnLayout(RowKind.TAGGED, ("tokens", tags)) for tags in ("tags", "ner_tags", "labels")),
    *(
        ColumnLayout(RowKind.LABELLED, (*texts, label))
        for texts in (*_TEXT_PAIR_COLUMNS, ("text",), ("sentence",))
        for label in ("label", "labels")
    ),
)
"""The first match decides, so rows with `text` and `label` are running text unless the stage asks for the label."""

COLUMN_ROLES = tuple(dict.fromkeys(chain.from_iterable(layout.roles for layout in COLUMN_LAYOUTS)))


@dataclass(frozen=True)
class Columns:
    """The kind of some rows, the column of each role, and the columns that every row must have."""

    kind: RowKind
    by_role: Mapping[str, str]
    required: tuple[str, ...]


TEXT_FILE_COLUMNS = Columns(RowKind.TEXT, {"text": "text"}, ("text",))


def detect_columns(names: Collection[str], renames: Mapping[str, str], kind: str = "auto") -> Columns | None:
    """The kind of rows with columns `names`, where `renames` maps roles to columns; None for no known kind."""
    for layout in COLUMN_LAYOUTS:
        if kind not in ("auto", layout.kind) or not renames.keys() <= set(layout.roles):
            continue
        by_role = {role: renames.get(role, role) for role in layout.roles}
        if all(has_column(names, by_role[role]) for role in {*layout.required, *renames}):
            return Columns(layout.kind, by_role, tuple(by_role[role] for role in layout.required))
    return None


def has_column(names: Collection[str], column: str) -> bool:
    """Whether a column exists; `translation.en` is the key `en` of the objects in the column `translation`."""
    return column in names or ("." in column and column.partition(".")[0] in names)


def get_column(values: Mapping[str, Any], column: str, location: str) -> Any:
    """A row's value in a column, or in a key of a column; None where there is none.

    Raises `DataError` when the value of a column is no object or lacks the key.
    """
    head, dot, rest = column.partition(".")
    if column in values or not dot:
        return values.get(column)
    inner = values.get(head)
    if inner is None:
        return None
    if not isinstance(inner, Mapping):
        raise DataError(f"`{head}` is {describe_value(inner)}", where=location, expected=f"an object that has `{rest}`")
    if not has_column(inner.keys(), rest):
        names = list(map(str, inner))
        raise DataError(
            f"there is no `{rest}` in `{head}`",
            where=location,
            expected=" or ".join(f"`{name}`" for name in names[:12]) or "a non-empty object",
            hint=suggest_nearest(rest, names),
        )
    return get_column(inner, rest, location)


def describe_value(value: Any) -> str:
    """The JSON type of a value, for an error message."""
    match value:
        case None:
            return "null"
        case bool():
            return "true or false"
        case int() | float():
            return f"the number {value!r}"[:40]
        case str():
            return "text"
        case list():
            return "a list"
        case Mapping():
            return "an object"
    return f"a {type(value).__name__}"

"""Column detection: the kind of rows and the role of each column, from the column names."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

from postgrad.data.read.files import RawSource
from postgrad.data.read.row_kinds import KINDS, RowKind
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
    ColumnLayout(RowKind.CHAT, ("prompt", "completion"), ("system", "tools")),
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


def unknown_kind_error(names: list[str], source: RawSource, location: str) -> DataError:
    """Why rows with columns `names` are not of the source's kind, or of no known kind."""
    for column in source.columns.values():
        if not has_column(names, column):
            return DataError(
                f"no column `{column}` among {format_columns(names)}",
                where=location,
                expected="a column `text` or `input_ids`, or columns: {text: <column>}",
                hint=suggest_nearest(column, names),
            )
    layouts = [layout for layout in COLUMN_LAYOUTS if source.kind in ("auto", layout.kind)]
    if source.columns:
        layouts = [layout for layout in layouts if source.columns.keys() <= set(layout.roles)]
        if not layouts:
            return DataError(
                f"columns: {format_columns(list(source.columns))} do not go together"
                + ("" if source.kind == "auto" else f" in rows of kind `{source.kind}`"),
                where=f"{source.where}.columns",
                expected="columns of one kind of rows",
            )
    if source.kind == "auto" and not source.columns:
        return DataError(
            f"no column `text` among {format_columns(names)}",
            where=location,
            expected=f"columns of one of the kinds {', '.join(KINDS)}, or columns: {{text: <column>}}",
            hint=suggest_nearest("text", names),
        )
    # Report the layout that most of the columns fit.
    candidates = [[source.columns.get(role, role) for role in layout.required] for layout in layouts]
    best = max(candidates, key=lambda columns: sum(has_column(names, column) for column in columns))
    column = next(column for column in best if not has_column(names, column))
    alternatives = " or ".join(format_columns(columns) for columns in candidates[:3])
    return DataError(
        f"no column `{column}` among {format_columns(names)}",
        where=location,
        expected=f"rows of kind `{layouts[0].kind}`: {alternatives}",
        hint=suggest_nearest(column, names) or f"name the column with columns: {{{column}: <column>}}",
    )


def format_columns(columns: list[str], limit: int = 12) -> str:
    """Column names for a message."""
    listed = ", ".join(f"`{str(column)[:60]}`" for column in columns[:limit])
    return (listed or "no columns") + (" ..." if len(columns) > limit else "")

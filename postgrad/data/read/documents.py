"""How do rows become documents?

A row of text is a document; a row of token ids is one already tokenised; a text file is cut into documents
as `documents` says; a row that has parts (a conversation, a pair, a text with its label ...) is a document
that carries an `Example`. Empty documents, and rows that teach nothing, are handed on, so that whoever counts
can account for each of them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from postgrad.data.read.examples import (
    KINDS,
    LAYOUTS,
    ROLES,
    RUNNING,
    Columns,
    Example,
    Labels,
    Skipped,
    columns_of,
    has_column,
    in_column,
    labels_in,
    make_example,
    named,
)
from postgrad.data.read.files import TEXT_KINDS, Line, Row, Source, find_files, kind_of, read_hub, read_lines, read_rows
from postgrad.data.tokens.store import digest
from postgrad.errors import DataError, nearest

CUTS = ("auto", "file", "passages", "paragraphs", "lines")
"""The ways to cut a text file: by its size, one document a file, passages, paragraphs, lines."""

WHOLE_FILE = 256 * 2**10
"""Bytes up to which `auto` takes a text file for one document."""
PASSAGE = 4_000
"""Characters that a passage is filled up to."""
PARAGRAPH_CAP = 16_000
"""Characters above which a paragraph may be cut at its lines: it is rather a list than a paragraph."""
FILE_CAP = 256 * 2**20
"""Characters above which a text file cannot be one document."""

_PEEKED = 16
_LINES = Columns("text", {"text": "text"}, ("text",))
"""What a text file has."""


class Document(NamedTuple):
    """A text, or its token ids, and the place it came from (`file:line`).

    With an `example`, `text` is the example's own. A row that teaches nothing has no text, and says why in `skipped`.
    """

    text: str | None
    ids: np.ndarray | None
    place: str
    example: Example | None = None
    skipped: str = ""

    @property
    def empty(self) -> bool:
        """Nothing to learn from: no ids, or nothing but white space."""
        if self.text is not None:
            return not self.text or self.text.isspace()
        return self.ids is None or not len(self.ids)

    @property
    def digest(self) -> int:
        """Of its content, as the document table of a token store has it."""
        if self.text is not None:
            return digest(self.text.encode())
        return digest(np.ascontiguousarray([] if self.ids is None else self.ids, "<u4").data)


def read_documents(source: Source, seen: Callable[[int], None] = lambda _: None) -> Iterator[Document]:
    """All documents of a source in its files' sorted order, the empty ones included.

    Raises `DataError` for rows of no known kind or of several, for a broken row or file, and, at the end, for a
    source in which every document is empty.
    """
    if source.documents not in CUTS:
        raise DataError(
            f"'{source.documents}' is no way to cut a text file",
            where=f"{source.where}.documents",
            expected=" | ".join(CUTS),
            way_out=nearest(source.documents, CUTS),
        )
    if source.kind not in ("auto", *KINDS):
        raise DataError(
            f"'{source.kind}' is no kind of rows",
            where=f"{source.where}.kind",
            expected=" | ".join(("auto", *KINDS)),
            way_out=nearest(source.kind, KINDS),
        )
    for role in source.columns:
        if role not in ROLES:
            raise DataError(
                f"'{role}' is nothing a column can be",
                where=f"{source.where}.columns",
                expected="columns: {text: <column>}, {input_ids: <column>}, {messages: <column>} ...",
                way_out=nearest(role, ROLES),
            )
    return _not_all_empty(source, chain.from_iterable(_streams(source, seen)))


def read_examples(source: Source) -> Iterator[tuple[Example, str]]:
    """The examples of a source and their places; rows that teach nothing are left out.

    Raises `DataError` as `read_documents` does, and for a source of running text.
    """
    for document in read_documents(source):
        if document.example is not None:
            yield document.example, document.place
        elif not document.skipped:
            raise DataError("running text", where=document.place, expected="rows that have parts")


def read_labels(source: Source) -> Labels:
    """The labels or tags that a source has. Raises `DataError` when it has none, or such as do not go together."""
    return labels_in(((_with_labels(*each), each[1]) for each in read_examples(source)), source.where)


def _with_labels(example: Example, place: str) -> Example:
    if example.kind not in ("labelled", "tagged"):
        raise DataError(
            f"rows of `{example.kind}` have no labels",
            where=place,
            expected="rows of `labelled` or `tagged`",
            way_out="say `kind: labelled`, or name the column with columns: {label: <column>}",
        )
    return example


def source_kind(source: Source) -> str:
    """What kind the rows of a source are, by the first of them. Raises `DataError` when they are of none."""
    if source.kind != "auto":
        return source.kind
    columns = source_columns(source)
    return columns.kind if columns else "text"


def source_columns(source: Source) -> Columns | None:
    """The columns by which the first rows of a source are known; None for text files, and where there is no row.

    Raises `DataError` when they are of no kind.
    """
    if source.hub is not None:
        return _columns(list(islice(read_hub(source.hub, source.root, source.where), _PEEKED)), source)
    assert source.path is not None
    for file in find_files(source.path, source.root, source.where):
        if kind_of(file) in TEXT_KINDS:
            return None
        if first := list(islice(read_rows(file), _PEEKED)):
            return _columns(first, source)
    return None


def _streams(source: Source, seen: Callable[[int], None]) -> Iterator[Iterator[Document]]:
    if source.hub is not None:
        rows = read_hub(source.hub, source.root, source.where)
        first = list(islice(rows, _PEEKED))
        yield _from_rows(_chosen(chain(first, rows), source), _columns(first, source))
        return
    assert source.path is not None
    files = find_files(source.path, source.root, source.where)
    kind = ""
    for file in files:
        text_file = kind_of(file) in TEXT_KINDS
        first = [] if text_file else list(islice(read_rows(file), _PEEKED))
        if not first and not text_file:
            continue
        columns = _LINES if text_file else _columns(first, source)
        if text_file and (source.only or source.kind not in ("auto", "text")):
            met = "columns to choose rows by" if source.only else f"rows of kind `{source.kind}`"
            raise DataError(
                f"a text file has no {met}",
                where=str(file),
                expected="files of .jsonl, .json, .csv or .parquet",
            )
        if columns.kind != (kind := kind or columns.kind):
            raise _mixed(columns.kind, kind, first[0].place if first else f"{file}:1")
        if text_file:
            yield _from_text(file, source.documents, seen)
        else:
            wanted = {name for column in columns.by_role.values() for name in (column, column.partition(".")[0])}
            rows = read_rows(file, wanted | source.only.keys(), seen)
            yield _from_rows(_chosen(rows, source), columns, typed=kind_of(file) != ".csv")


def _chosen(rows: Iterator[Row], source: Source) -> Iterator[Row]:
    """The rows that have one of the values that are asked for in each of the columns of `source.only`."""
    if not source.only:
        return rows
    return (row for row in rows if all(_has(row, column, values) for column, values in source.only.items()))


def _has(row: Row, column: str, values: Collection[str]) -> bool:
    if column not in row.values:
        raise DataError(
            f"no column `{column}` among {_listed(list(row.values))}",
            where=row.place,
            expected="every column that `only` names",
            way_out=nearest(column, row.values),
        )
    return str(row.values[column]) in values


def _not_all_empty(source: Source, documents: Iterator[Document]) -> Iterator[Document]:
    met = empty = 0
    document = None
    for document in documents:
        met += 1
        empty += document.empty
        yield document
    if met > empty:
        return
    given = source.path if source.hub is None else source.hub.name
    if document is not None and document.skipped:
        raise DataError(
            f"nothing can be learnt from any row of {given}; from this one: {document.skipped}",
            where=document.place,
            expected="at least one row with an answer or a label",
        )
    asked = " and ".join(f"{column} {' or '.join(values)}" for column, values in source.only.items())
    such = f" with {asked}" if asked else ""
    raise DataError(
        f"{given} holds {f'{empty:,} documents, all empty' if met else f'no document{such}'}",
        where=source.where,
        expected="at least one document with text",
    )


# --- rows ---------------------------------------------------------------------------------------------


def _columns(rows: list[Row], source: Source) -> Columns:
    """The kind and columns that the first rows have, or the error that says what they have instead."""
    if not rows:
        return _LINES
    names = list(dict.fromkeys(chain.from_iterable(row.values for row in rows)))
    found = columns_of(names, source.columns, source.kind)
    if found is None:
        raise _no_kind(names, source, rows[0].place)
    first = rows[0]
    own = columns_of(list(first.values), source.columns, source.kind)
    if own and own.kind != found.kind:  # all of them together have the columns of a kind that the first is not of
        other = next(row for row in rows if not all(has_column(row.values.keys(), column) for column in own.required))
        raise _other_row(other, own)
    return found


def _no_kind(names: list[str], source: Source, place: str) -> DataError:
    """Why rows with columns `names` are not of the kind that is asked for, or of none."""
    for column in source.columns.values():
        if not has_column(names, column):
            return _no_column(column, names, place)
    sought = [layout for layout in LAYOUTS if source.kind in ("auto", layout.kind)]
    if source.columns:
        sought = [layout for layout in sought if source.columns.keys() <= set(layout.roles)]
        if not sought:
            return DataError(
                f"columns: {_listed(list(source.columns))} do not go together"
                + ("" if source.kind == "auto" else f" in rows of kind `{source.kind}`"),
                where=f"{source.where}.columns",
                expected="columns of one kind of rows",
            )
    if source.kind == "auto" and not source.columns:
        return DataError(
            f"no column `text` among {_listed(names)}",
            where=place,
            expected=f"columns of one of the kinds {', '.join(KINDS)}, or columns: {{text: <column>}}",
            way_out=nearest("text", names),
        )
    missing = [[source.columns.get(role, role) for role in layout.required] for layout in sought]
    best = max(missing, key=lambda columns: sum(has_column(names, column) for column in columns))
    column = next(column for column in best if not has_column(names, column))
    expected = f"rows of kind `{sought[0].kind}`: " + " or ".join(_listed(columns) for columns in missing[:3])
    return DataError(
        f"no column `{column}` among {_listed(names)}",
        where=place,
        expected=expected,
        way_out=nearest(column, names) or f"name the column with columns: {{{column}: <column>}}",
    )


def _no_column(column: str, columns: list[str], place: str) -> DataError:
    hint = nearest(column, columns)
    return DataError(
        f"no column `{column}` among {_listed(columns)}",
        where=place,
        expected="a column `text` or `input_ids`, or columns: {text: <column>}",
        way_out=hint,
    )


def _mixed(kind: str, before: str, place: str) -> DataError:
    return DataError(
        f"`{kind}` after rows of `{before}`",
        where=place,
        expected="one kind of rows in a source",
        way_out="make two sources of it",
    )


def _listed(columns: list[str], most: int = 12) -> str:
    shown = ", ".join(f"`{str(column)[:60]}`" for column in columns[:most])
    return (shown or "no columns") + (" ..." if len(columns) > most else "")


def _from_rows(rows: Iterator[Row], columns: Columns, *, typed: bool = True) -> Iterator[Document]:
    return _running(rows, columns) if columns.kind in RUNNING else _examples(rows, columns, typed)


def _running(rows: Iterator[Row], columns: Columns) -> Iterator[Document]:
    column = columns.by_role[columns.kind]
    convert = _text if columns.kind == "text" else _ids
    for row in rows:
        if not has_column(row.values.keys(), column):
            raise _other_row(row, columns)
        yield convert(in_column(row.values, column, row.place), row.place, column)


def _other_row(row: Row, columns: Columns) -> DataError:
    """A row without a column that its source has: it is of another kind, or of none."""
    names = list(row.values)
    other = columns_of(names, {})
    if other and other.kind != columns.kind:
        return _mixed(other.kind, columns.kind, row.place)
    column = next(column for column in columns.required if not has_column(row.values.keys(), column))
    return DataError(
        f"no column `{column}` among {_listed(names)}",
        where=row.place,
        expected=f"rows of `{columns.kind}` as before it: {_listed(list(columns.required))}",
        way_out=nearest(column, names),
    )


def _examples(rows: Iterable[Row], columns: Columns, typed: bool) -> Iterator[Document]:
    for row in rows:
        for column in columns.required:
            if not has_column(row.values.keys(), column):
                raise _other_row(row, columns)
        values = {role: in_column(row.values, column, row.place) for role, column in columns.by_role.items()}
        if not typed and "label" in values:
            values["label"] = _typed(values["label"])
        try:
            example = make_example(columns.kind, values, row.place)
        except Skipped as reason:
            yield Document("", None, row.place, None, str(reason))
        else:
            yield Document(example.text, None, row.place, example)


_WHOLE, _POINT = re.compile(r"[+-]?\d+"), re.compile(r"[+-]?(\d+\.\d*|\.\d+)([eE][+-]?\d+)?")


def _typed(label: Any) -> str | int | float:
    """A label of a CSV file, where everything is text: as the number that it looks like."""
    if _WHOLE.fullmatch(label):
        return int(label)
    return float(label) if _POINT.fullmatch(label) else label


def _text(value: Any, place: str, column: str) -> Document:
    if value is None:  # what Parquet and JSON write for "no text": empty, and counted as such
        return Document("", None, place)
    if not isinstance(value, str):
        raise DataError(f"`{column}` is {named(value)}", where=place, expected="text")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"`{column}` holds half a surrogate pair at character {error.start + 1}",
                where=place,
                expected="text that can be written as UTF-8",
            ) from None
    return Document(value, None, place)


def _ids(value: Any, place: str, column: str) -> Document:
    if value is None:
        value = []
    if not isinstance(value, list):
        raise DataError(f"`{column}` is {named(value)}", where=place, expected="a list of token ids")
    for kind in set(map(type, value)) - {int}:
        met = named(next(item for item in value if type(item) is kind))
        raise DataError(f"`{column}` holds {met}", where=place, expected="a list of whole numbers")
    if value and (min(value) < 0 or max(value) >= 2**32):
        wrong = next(item for item in value if not 0 <= item < 2**32)
        raise DataError(f"`{column}` holds {str(wrong)[:24]}", where=place, expected="token ids, from 0 to 2^32 - 1")
    return Document(None, np.array(value, dtype=np.uint32), place)


# --- text files ---------------------------------------------------------------------------------------


def _from_text(file: Path, cut: str, seen: Callable[[int], None]) -> Iterator[Document]:
    lines = read_lines(file, seen)
    if cut == "auto":
        head, size = [], 0
        for line in lines:
            head.append(line)
            size += len(line.text.encode())
            if size > WHOLE_FILE:
                break
        cut = "passages" if size > WHOLE_FILE else "file"
        lines = chain(head, lines)
    cutter = {"file": _file, "passages": _passages, "paragraphs": _paragraphs, "lines": _lines}[cut]
    return cutter(lines, str(file))


def _file(lines: Iterator[Line], name: str) -> Iterator[Document]:
    parts, size = [], 0
    for line in lines:
        parts.append(line.text)
        size += len(line.text)
        if size > FILE_CAP:
            raise DataError(
                f"a document of more than {FILE_CAP:,} characters",
                where=f"{name}:{line.number}",
                expected="smaller documents",
                way_out="documents: passages, paragraphs or lines",
            )
    yield Document("".join(parts), None, f"{name}:1")


def _lines(lines: Iterator[Line], name: str) -> Iterator[Document]:
    for number, text in lines:
        text = text.rstrip("\r\n")
        if text and not text.isspace():
            yield Document(text, None, f"{name}:{number}")


def _paragraphs(lines: Iterator[Line], name: str) -> Iterator[Document]:
    held: list[Line] = []
    size = 0
    for line in lines:
        if not line.text.isspace():
            held.append(line)
            size += len(line.text)
            if size > FILE_CAP:
                raise DataError(
                    f"a paragraph of more than {FILE_CAP:,} characters",
                    where=f"{name}:{held[0].number}",
                    expected="blank lines between paragraphs",
                    way_out="documents: passages or lines",
                )
        elif held:
            yield _joined(held, name)
            held, size = [], 0
    if held:
        yield _joined(held, name)


def _joined(lines: list[Line], name: str) -> Document:
    return Document("".join(line.text for line in lines).rstrip("\r\n"), None, f"{name}:{lines[0].number}")


def _passages(lines: Iterator[Line], name: str) -> Iterator[Document]:
    """Units filled up to `PASSAGE` characters; what lies between two units of one passage stays as it is."""
    held: list[Line] = []
    size = 0
    for unit in _units(lines):
        length = sum(len(line.text) for line in unit)
        blank = unit[0].text.isspace()
        full = size + length > PASSAGE and (not blank or size > 2 * PASSAGE)  # or a sea of blank lines
        if held and full:
            while held[-1].text.isspace():
                held.pop()
            yield _joined(held, name)
            held, size = [], 0
        if held or not blank:
            held += unit
            size += length
    while held and held[-1].text.isspace():
        held.pop()
    if held:
        yield _joined(held, name)


def _units(lines: Iterator[Line]) -> Iterator[list[Line]]:
    """What a passage does not cut: paragraphs, and single lines where there are no paragraphs to speak of."""
    paragraph: list[Line] = []
    size, blank_met = 0, False
    for line in lines:
        if line.text.isspace():
            blank_met = True
            if paragraph:
                yield paragraph
            yield [line]
            paragraph, size = [], 0
            continue
        paragraph.append(line)
        size += len(line.text)
        if size > PARAGRAPH_CAP:
            yield from ([one] for one in paragraph)
            paragraph, size = [], 0
    if paragraph and blank_met:
        yield paragraph
    elif paragraph:
        yield from ([one] for one in paragraph)

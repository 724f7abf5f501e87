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
    COLUMN_LAYOUTS,
    COLUMN_ROLES,
    KINDS,
    RUNNING_TEXT_KINDS,
    Columns,
    Example,
    SkippedRow,
    describe_value,
    detect_columns,
    get_column,
    has_column,
    make_example,
)
from postgrad.data.read.files import (
    TEXT_SUFFIXES,
    Line,
    RawSource,
    Record,
    file_suffix,
    find_files,
    read_hub,
    read_lines,
    read_records,
)
from postgrad.data.read.labels import Labels, collect_labels
from postgrad.data.tokens.store import digest
from postgrad.errors import DataError, suggest_nearest

SPLIT_MODES = ("auto", "file", "passages", "paragraphs", "lines")
"""The ways to cut a text file: by its size, one document a file, passages, paragraphs, lines."""

SINGLE_FILE_BYTES = 256 * 2**10
"""Bytes up to which `auto` takes a text file for one document."""
PASSAGE_CHARACTERS = 4_000
"""Characters that a passage is filled up to."""
PARAGRAPH_CAP = 16_000
"""Characters above which a paragraph may be cut at its lines: it is rather a list than a paragraph."""
FILE_CAP = 256 * 2**20
"""Characters above which a text file cannot be one document."""

_PEEK_ROWS = 16
_TEXT_FILE_COLUMNS = Columns("text", {"text": "text"}, ("text",))
"""What a text file has."""


class Document(NamedTuple):
    """A text, or its token ids, and the place it came from (`file:line`).

    With an `example`, `text` is the example's own. A row that teaches nothing has no text, and says why in `skipped`.
    """

    text: str | None
    ids: np.ndarray | None
    location: str
    example: Example | None = None
    skip_reason: str = ""

    @property
    def is_empty(self) -> bool:
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


def read_documents(source: RawSource, on_read: Callable[[int], None] = lambda _: None) -> Iterator[Document]:
    """All documents of a source in its files' sorted order, the empty ones included.

    Raises `DataError` for rows of no known kind or of several, for a broken row or file, and, at the end, for a
    source in which every document is empty.
    """
    if source.documents not in SPLIT_MODES:
        raise DataError(
            f"'{source.documents}' is no way to cut a text file",
            where=f"{source.where}.documents",
            expected=" | ".join(SPLIT_MODES),
            hint=suggest_nearest(source.documents, SPLIT_MODES),
        )
    if source.kind not in ("auto", *KINDS):
        raise DataError(
            f"'{source.kind}' is no kind of rows",
            where=f"{source.where}.kind",
            expected=" | ".join(("auto", *KINDS)),
            hint=suggest_nearest(source.kind, KINDS),
        )
    for role in source.columns:
        if role not in COLUMN_ROLES:
            raise DataError(
                f"'{role}' is nothing a column can be",
                where=f"{source.where}.columns",
                expected="columns: {text: <column>}, {input_ids: <column>}, {messages: <column>} ...",
                hint=suggest_nearest(role, COLUMN_ROLES),
            )
    return _require_text(source, chain.from_iterable(_document_streams(source, on_read)))


def read_examples(source: RawSource) -> Iterator[tuple[Example, str]]:
    """The examples of a source and their places; rows that teach nothing are left out.

    Raises `DataError` as `read_documents` does, and for a source of running text.
    """
    for document in read_documents(source):
        if document.example is not None:
            yield document.example, document.location
        elif not document.skip_reason:
            raise DataError("running text", where=document.location, expected="rows that have parts")


def read_labels(source: RawSource) -> Labels:
    """The labels or tags that a source has. Raises `DataError` when it has none, or such as do not go together."""
    return collect_labels(((_require_labels(*each), each[1]) for each in read_examples(source)), source.where)


def _require_labels(example: Example, location: str) -> Example:
    if example.kind not in ("labelled", "tagged"):
        raise DataError(
            f"rows of `{example.kind}` have no labels",
            where=location,
            expected="rows of `labelled` or `tagged`",
            hint="say `kind: labelled`, or name the column with columns: {label: <column>}",
        )
    return example


def detect_kind(source: RawSource) -> str:
    """What kind the rows of a source are, by the first of them. Raises `DataError` when they are of none."""
    if source.kind != "auto":
        return source.kind
    columns = detect_source_columns(source)
    return columns.kind if columns else "text"


def detect_source_columns(source: RawSource) -> Columns | None:
    """The columns by which the first rows of a source are known; None for text files, and where there is no row.

    Raises `DataError` when they are of no kind.
    """
    if source.hub is not None:
        return _detect_columns(list(islice(read_hub(source.hub, source.root, source.where), _PEEK_ROWS)), source)
    assert source.path is not None
    for file in find_files(source.path, source.root, source.where):
        if file_suffix(file) in TEXT_SUFFIXES:
            return None
        if first := list(islice(read_records(file), _PEEK_ROWS)):
            return _detect_columns(first, source)
    return None


def _document_streams(source: RawSource, on_read: Callable[[int], None]) -> Iterator[Iterator[Document]]:
    if source.hub is not None:
        rows = read_hub(source.hub, source.root, source.where)
        first = list(islice(rows, _PEEK_ROWS))
        yield _record_documents(_filter_records(chain(first, rows), source), _detect_columns(first, source))
        return
    assert source.path is not None
    files = find_files(source.path, source.root, source.where)
    kind = ""
    for file in files:
        text_file = file_suffix(file) in TEXT_SUFFIXES
        first = [] if text_file else list(islice(read_records(file), _PEEK_ROWS))
        if not first and not text_file:
            continue
        columns = _TEXT_FILE_COLUMNS if text_file else _detect_columns(first, source)
        if text_file and (source.row_filter or source.kind not in ("auto", "text")):
            met = "columns to choose rows by" if source.row_filter else f"rows of kind `{source.kind}`"
            raise DataError(
                f"a text file has no {met}",
                where=str(file),
                expected="files of .jsonl, .json, .csv or .parquet",
            )
        if columns.kind != (kind := kind or columns.kind):
            raise _mixed_kinds_error(columns.kind, kind, first[0].location if first else f"{file}:1")
        if text_file:
            yield _text_file_documents(file, source.documents, on_read)
        else:
            wanted = {name for column in columns.by_role.values() for name in (column, column.partition(".")[0])}
            rows = read_records(file, wanted | source.row_filter.keys(), on_read)
            yield _record_documents(_filter_records(rows, source), columns, is_typed=file_suffix(file) != ".csv")


def _filter_records(records: Iterator[Record], source: RawSource) -> Iterator[Record]:
    """The rows that have one of the values that are asked for in each of the columns of `source.only`."""
    if not source.row_filter:
        return records
    return (
        row for row in records if all(_has_value(row, column, values) for column, values in source.row_filter.items())
    )


def _has_value(record: Record, column: str, values: Collection[str]) -> bool:
    if column not in record.values:
        raise DataError(
            f"no column `{column}` among {_format_columns(list(record.values))}",
            where=record.location,
            expected="every column that `filter` names",
            hint=suggest_nearest(column, record.values),
        )
    return str(record.values[column]) in values


def _require_text(source: RawSource, documents: Iterator[Document]) -> Iterator[Document]:
    met = empty = 0
    document = None
    for document in documents:
        met += 1
        empty += document.is_empty
        yield document
    if met > empty:
        return
    given = source.path if source.hub is None else source.hub.name
    if document is not None and document.skip_reason:
        raise DataError(
            f"nothing can be learnt from any row of {given}; from this one: {document.skip_reason}",
            where=document.location,
            expected="at least one row with an answer or a label",
        )
    asked = " and ".join(f"{column} {' or '.join(values)}" for column, values in source.row_filter.items())
    such = f" with {asked}" if asked else ""
    raise DataError(
        f"{given} holds {f'{empty:,} documents, all empty' if met else f'no document{such}'}",
        where=source.where,
        expected="at least one document with text",
    )


# --- rows ---------------------------------------------------------------------------------------------


def _detect_columns(records: list[Record], source: RawSource) -> Columns:
    """The kind and columns that the first rows have, or the error that says what they have instead."""
    if not records:
        return _TEXT_FILE_COLUMNS
    names = list(dict.fromkeys(chain.from_iterable(row.values for row in records)))
    found = detect_columns(names, source.columns, source.kind)
    if found is None:
        raise _unknown_kind_error(names, source, records[0].location)
    first = records[0]
    own = detect_columns(list(first.values), source.columns, source.kind)
    if own and own.kind != found.kind:  # all of them together have the columns of a kind that the first is not of
        other = next(
            row for row in records if not all(has_column(row.values.keys(), column) for column in own.required)
        )
        raise _deviating_record_error(other, own)
    return found


def _unknown_kind_error(names: list[str], source: RawSource, location: str) -> DataError:
    """Why rows with columns `names` are not of the kind that is asked for, or of none."""
    for column in source.columns.values():
        if not has_column(names, column):
            return _missing_column_error(column, names, location)
    sought = [layout for layout in COLUMN_LAYOUTS if source.kind in ("auto", layout.kind)]
    if source.columns:
        sought = [layout for layout in sought if source.columns.keys() <= set(layout.roles)]
        if not sought:
            return DataError(
                f"columns: {_format_columns(list(source.columns))} do not go together"
                + ("" if source.kind == "auto" else f" in rows of kind `{source.kind}`"),
                where=f"{source.where}.columns",
                expected="columns of one kind of rows",
            )
    if source.kind == "auto" and not source.columns:
        return DataError(
            f"no column `text` among {_format_columns(names)}",
            where=location,
            expected=f"columns of one of the kinds {', '.join(KINDS)}, or columns: {{text: <column>}}",
            hint=suggest_nearest("text", names),
        )
    missing = [[source.columns.get(role, role) for role in layout.required] for layout in sought]
    best = max(missing, key=lambda columns: sum(has_column(names, column) for column in columns))
    column = next(column for column in best if not has_column(names, column))
    expected = f"rows of kind `{sought[0].kind}`: " + " or ".join(_format_columns(columns) for columns in missing[:3])
    return DataError(
        f"no column `{column}` among {_format_columns(names)}",
        where=location,
        expected=expected,
        hint=suggest_nearest(column, names) or f"name the column with columns: {{{column}: <column>}}",
    )


def _missing_column_error(column: str, columns: list[str], location: str) -> DataError:
    hint = suggest_nearest(column, columns)
    return DataError(
        f"no column `{column}` among {_format_columns(columns)}",
        where=location,
        expected="a column `text` or `input_ids`, or columns: {text: <column>}",
        hint=hint,
    )


def _mixed_kinds_error(kind: str, earlier: str, location: str) -> DataError:
    return DataError(
        f"`{kind}` after rows of `{earlier}`",
        where=location,
        expected="one kind of rows in a source",
        hint="make two sources of it",
    )


def _format_columns(columns: list[str], limit: int = 12) -> str:
    shown = ", ".join(f"`{str(column)[:60]}`" for column in columns[:limit])
    return (shown or "no columns") + (" ..." if len(columns) > limit else "")


def _record_documents(records: Iterator[Record], columns: Columns, *, is_typed: bool = True) -> Iterator[Document]:
    return (
        _running_text_documents(records, columns)
        if columns.kind in RUNNING_TEXT_KINDS
        else _example_documents(records, columns, is_typed)
    )


def _running_text_documents(records: Iterator[Record], columns: Columns) -> Iterator[Document]:
    column = columns.by_role[columns.kind]
    convert = _text_document if columns.kind == "text" else _ids_document
    for row in records:
        if not has_column(row.values.keys(), column):
            raise _deviating_record_error(row, columns)
        yield convert(get_column(row.values, column, row.location), row.location, column)


def _deviating_record_error(record: Record, columns: Columns) -> DataError:
    """A row without a column that its source has: it is of another kind, or of none."""
    names = list(record.values)
    other = detect_columns(names, {})
    if other and other.kind != columns.kind:
        return _mixed_kinds_error(other.kind, columns.kind, record.location)
    column = next(column for column in columns.required if not has_column(record.values.keys(), column))
    return DataError(
        f"no column `{column}` among {_format_columns(names)}",
        where=record.location,
        expected=f"rows of `{columns.kind}` as before it: {_format_columns(list(columns.required))}",
        hint=suggest_nearest(column, names),
    )


def _example_documents(records: Iterable[Record], columns: Columns, is_typed: bool) -> Iterator[Document]:
    for row in records:
        for column in columns.required:
            if not has_column(row.values.keys(), column):
                raise _deviating_record_error(row, columns)
        values = {role: get_column(row.values, column, row.location) for role, column in columns.by_role.items()}
        if not is_typed and "label" in values:
            values["label"] = _parse_csv_label(values["label"])
        try:
            example = make_example(columns.kind, values, row.location)
        except SkippedRow as reason:
            yield Document("", None, row.location, None, str(reason))
        else:
            yield Document(example.text, None, row.location, example)


_INTEGER, _DECIMAL = re.compile(r"[+-]?\d+"), re.compile(r"[+-]?(\d+\.\d*|\.\d+)([eE][+-]?\d+)?")


def _parse_csv_label(label: Any) -> str | int | float:
    """A label of a CSV file, where everything is text: as the number that it looks like."""
    if _INTEGER.fullmatch(label):
        return int(label)
    return float(label) if _DECIMAL.fullmatch(label) else label


def _text_document(value: Any, location: str, column: str) -> Document:
    if value is None:  # what Parquet and JSON write for "no text": empty, and counted as such
        return Document("", None, location)
    if not isinstance(value, str):
        raise DataError(f"`{column}` is {describe_value(value)}", where=location, expected="text")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"`{column}` holds half a surrogate pair at character {error.start + 1}",
                where=location,
                expected="text that can be written as UTF-8",
            ) from None
    return Document(value, None, location)


def _ids_document(value: Any, location: str, column: str) -> Document:
    if value is None:
        value = []
    if not isinstance(value, list):
        raise DataError(f"`{column}` is {describe_value(value)}", where=location, expected="a list of token ids")
    for kind in set(map(type, value)) - {int}:
        met = describe_value(next(item for item in value if type(item) is kind))
        raise DataError(f"`{column}` holds {met}", where=location, expected="a list of whole numbers")
    if value and (min(value) < 0 or max(value) >= 2**32):
        wrong = next(item for item in value if not 0 <= item < 2**32)
        raise DataError(f"`{column}` holds {str(wrong)[:24]}", where=location, expected="token ids, from 0 to 2^32 - 1")
    return Document(None, np.array(value, dtype=np.uint32), location)


# --- text files ---------------------------------------------------------------------------------------


def _text_file_documents(file: Path, split_mode: str, on_read: Callable[[int], None]) -> Iterator[Document]:
    lines = read_lines(file, on_read)
    if split_mode == "auto":
        head, size = [], 0
        for line in lines:
            head.append(line)
            size += len(line.text.encode())
            if size > SINGLE_FILE_BYTES:
                break
        split_mode = "passages" if size > SINGLE_FILE_BYTES else "file"
        lines = chain(head, lines)
    cutter = {"file": _split_file, "passages": _split_passages, "paragraphs": _split_paragraphs, "lines": _split_lines}[
        split_mode
    ]
    return cutter(lines, str(file))


def _split_file(lines: Iterator[Line], name: str) -> Iterator[Document]:
    parts, size = [], 0
    for line in lines:
        parts.append(line.text)
        size += len(line.text)
        if size > FILE_CAP:
            raise DataError(
                f"a document of more than {FILE_CAP:,} characters",
                where=f"{name}:{line.number}",
                expected="smaller documents",
                hint="documents: passages, paragraphs or lines",
            )
    yield Document("".join(parts), None, f"{name}:1")


def _split_lines(lines: Iterator[Line], name: str) -> Iterator[Document]:
    for number, text in lines:
        text = text.rstrip("\r\n")
        if text and not text.isspace():
            yield Document(text, None, f"{name}:{number}")


def _split_paragraphs(lines: Iterator[Line], name: str) -> Iterator[Document]:
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
                    hint="documents: passages or lines",
                )
        elif held:
            yield _join_lines(held, name)
            held, size = [], 0
    if held:
        yield _join_lines(held, name)


def _join_lines(lines: list[Line], name: str) -> Document:
    return Document("".join(line.text for line in lines).rstrip("\r\n"), None, f"{name}:{lines[0].number}")


def _split_passages(lines: Iterator[Line], name: str) -> Iterator[Document]:
    """Units filled up to `PASSAGE` characters; what lies between two units of one passage stays as it is."""
    held: list[Line] = []
    size = 0
    for unit in _units(lines):
        length = sum(len(line.text) for line in unit)
        blank = unit[0].text.isspace()
        full = size + length > PASSAGE_CHARACTERS and (
            not blank or size > 2 * PASSAGE_CHARACTERS
        )  # or a sea of blank lines
        if held and full:
            while held[-1].text.isspace():
                held.pop()
            yield _join_lines(held, name)
            held, size = [], 0
        if held or not blank:
            held += unit
            size += length
    while held and held[-1].text.isspace():
        held.pop()
    if held:
        yield _join_lines(held, name)


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

"""Documents of a source: running text, token ids, or examples, from all its files in order.

A row of text is a document, and so is a row of token ids; a text file is split into documents; a row with parts becomes a
document that carries an `Example`. Empty documents and skipped rows are yielded too, so that the caller can count them.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from postgrad.data.read.columns import (
    COLUMN_ROLES,
    TEXT_FILE_COLUMNS,
    Columns,
    describe_value,
    detect_columns,
    format_columns,
    get_column,
    has_column,
    unknown_kind_error,
)
from postgrad.data.read.examples import Example, SkippedRow, check_encodable, make_example
from postgrad.data.read.files import TEXT_SUFFIXES, ContextColumn, RawRow, RawSource, file_suffix
from postgrad.data.read.generated_text import GENERATED_COLUMN
from postgrad.data.read.labels import Labels, collect_labels
from postgrad.data.read.records import PROJECTED_SUFFIXES, read_hub, read_records
from postgrad.data.read.row_kinds import KINDS, RowKind
from postgrad.data.read.text_files import SPLIT_MODES, split_text_file
from postgrad.data.read.text_lines import ReadCallback, ignore_progress
from postgrad.data.tokens.store import digest
from postgrad.errors import DataError, suggest_nearest

_PEEK_ROWS = 16

READING = 2
"""Version of how rows become examples; part of the key of every cache of them."""


class Document(NamedTuple):
    """A text, or its token ids, and its location (`file:line`).

    With an `example`, `text` is the example's own. A skipped row has no text, and a `skip_reason`. `unused`: columns of the
    row that nothing reads.
    """

    text: str | None
    ids: np.ndarray | None
    location: str
    example: Example | None = None
    skip_reason: str = ""
    unused: tuple[str, ...] = ()

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to learn: no ids, or only white space."""
        if self.text is not None:
            return not self.text or self.text.isspace()
        return self.ids is None or not len(self.ids)

    @property
    def digest(self) -> int:
        """The content hash in the document table of a token store."""
        if self.text is not None:
            return digest(self.text.encode())
        return digest(np.ascontiguousarray([] if self.ids is None else self.ids, "<u4").data)


def read_documents(source: RawSource, on_read: ReadCallback = ignore_progress) -> Iterator[Document]:
    """All documents of a source, empty ones included, with its files in sorted order.

    Raises `DataError` for rows of an unknown kind or of several kinds, for a broken row or file, and, at the end, for a
    source in which every document is empty.
    """
    if source.documents not in SPLIT_MODES:
        raise DataError(
            f"'{source.documents}' is no way to split a text file",
            where=f"{source.where}.document_unit",
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
                f"'{role}' is no role of a column",
                where=f"{source.where}.columns",
                expected="columns: {text: <column>}, {input_ids: <column>}, {messages: <column>} ...",
                hint=suggest_nearest(role, COLUMN_ROLES),
            )
    return _require_text(source, chain.from_iterable(_document_streams(source, on_read)))


def read_examples(source: RawSource) -> Iterator[tuple[Example, str]]:
    """The examples of a source and their locations, without skipped rows.

    Raises `DataError` as `read_documents` does, and for a source of running text.
    """
    for document in read_documents(source):
        if document.example is not None:
            yield document.example, document.location
        elif not document.skip_reason:
            raise DataError("running text", where=document.location, expected="rows with parts, such as a prompt")


def read_labels(source: RawSource) -> Labels:
    """The labels or tags of a source. Raises `DataError` when it has none, or labels of different types."""
    return collect_labels(((_require_labels(*each), each[1]) for each in read_examples(source)), source.where)


def _require_labels(example: Example, location: str) -> Example:
    if not example.kind.has_labels:
        raise DataError(
            f"rows of `{example.kind}` have no labels",
            where=location,
            expected="rows of `labelled` or `tagged`",
            hint="set `kind: labelled`, or name the column with columns: {label: <column>}",
        )
    return example


def detect_kind(source: RawSource) -> str:
    """The kind of a source's rows, from the first of them. Raises `DataError` for an unknown kind."""
    if source.kind != "auto":
        return source.kind
    columns = detect_source_columns(source)
    return columns.kind.value if columns else RowKind.TEXT.value


def detect_source_columns(source: RawSource) -> Columns | None:
    """Kind and columns of the first rows of a source; None for text files, and without rows.

    Raises `DataError` for an unknown kind.
    """
    if source.hub is not None:
        return _detect_columns(list(islice(read_hub(source.hub, source.root, source.where), _PEEK_ROWS)), source)
    for file in source.list_files().files:
        if file_suffix(file) in TEXT_SUFFIXES:
            return None
        if first := list(islice(read_records(file), _PEEK_ROWS)):
            return _detect_columns(first, source)
    return None


def _document_streams(source: RawSource, on_read: ReadCallback) -> Iterator[Iterator[Document]]:
    if source.hub is not None:
        records = read_hub(source.hub, source.root, source.where)
        first = list(islice(records, _PEEK_ROWS))
        yield _record_documents(chain(first, records), _detect_columns(first, source), source)
        return
    kind = ""
    for file in source.list_files().files:
        is_text_file = file_suffix(file) in TEXT_SUFFIXES
        first = [] if is_text_file else list(islice(read_records(file), _PEEK_ROWS))
        if not first and not is_text_file:
            continue
        columns = TEXT_FILE_COLUMNS if is_text_file else _detect_columns(first, source)
        if is_text_file and (source.row_filter or source.kind not in ("auto", RowKind.TEXT)):
            missing = "columns to filter rows by" if source.row_filter else f"rows of kind `{source.kind}`"
            raise DataError(
                f"a text file has no {missing}",
                where=str(file),
                expected="files of .jsonl, .json, .csv or .parquet",
            )
        if columns.kind != (kind := kind or columns.kind):
            raise _mixed_kinds_error(columns.kind, kind, first[0].location if first else f"{file}:1")
        if is_text_file:
            yield _text_file_documents(file, source.documents, on_read)
        else:
            used, suffix = _used_columns(columns, source), file_suffix(file)
            is_projected = suffix in PROJECTED_SUFFIXES
            unread = (
                tuple(name for name in first[0].values if name not in {*used, GENERATED_COLUMN}) if is_projected else ()
            )
            records = read_records(file, used, on_read)
            yield _record_documents(records, columns, source, unread, is_typed=suffix not in (".csv", ".tsv"))


def _text_file_documents(file: Path, split_mode: str, on_read: ReadCallback) -> Iterator[Document]:
    return (Document(text, None, f"{file}:{number}") for number, text in split_text_file(file, split_mode, on_read))


def _used_columns(columns: Columns, source: RawSource) -> set[str]:
    """The columns that are read: those of the kind, and those of the filter."""
    read = [*columns.by_role.values(), *([source.context.column] if source.context else [])]
    names = {name for column in read for name in (column, column.partition(".")[0])}
    return names | source.row_filter.keys()


def _filter_records(records: Iterable[RawRow], source: RawSource) -> Iterable[RawRow]:
    """The records that pass the source's filter."""
    if not source.row_filter:
        return records
    return (
        record
        for record in records
        if all(_has_value(record, column, values) for column, values in source.row_filter.items())
    )


def _has_value(record: RawRow, column: str, values: Collection[str]) -> bool:
    if column not in record.values:
        raise DataError(
            f"no column `{column}` among {format_columns(list(record.values))}",
            where=record.location,
            expected="every column that `filter` names",
            hint=suggest_nearest(column, record.values),
        )
    return str(record.values[column]) in values


def _require_text(source: RawSource, documents: Iterator[Document]) -> Iterator[Document]:
    """Pass documents through; raise `DataError` at the end when all were empty."""
    count = empty = 0
    document = None
    for document in documents:
        count += 1
        empty += document.is_empty
        yield document
    if count > empty:
        return
    name = source.path if source.hub is None else source.hub.name
    if document is not None and document.skip_reason:
        raise DataError(
            f"no row of {name} has anything to learn; the last one: {document.skip_reason}",
            where=document.location,
            expected="at least one row with an answer or a label",
        )
    criteria = " and ".join(f"{column} {' or '.join(values)}" for column, values in source.row_filter.items())
    with_criteria = f" with {criteria}" if criteria else ""
    raise DataError(
        f"{name} has {f'{empty:,} documents, all empty' if count else f'no document{with_criteria}'}",
        where=source.where,
        expected="at least one document with text",
    )


# --- records ------------------------------------------------------------------------------------------


def _detect_columns(records: list[RawRow], source: RawSource) -> Columns:
    """Kind and columns of the first records of a file. Raises `DataError` for an unknown kind or several."""
    if not records:
        return TEXT_FILE_COLUMNS
    names = list(dict.fromkeys(chain.from_iterable(record.values for record in records)))
    columns = detect_columns(names, source.columns, source.kind)
    if columns is None:
        raise unknown_kind_error(names, source, records[0].location)
    # All records together can have the columns of a kind that the first record is not of.
    first = detect_columns(list(records[0].values), source.columns, source.kind)
    if first and first.kind != columns.kind:
        other = next(each for each in records if not all(has_column(each.values.keys(), c) for c in first.required))
        raise _deviating_record_error(other, first)
    if columns.kind == RowKind.COMPLETION and isinstance(_first_value(records, columns.by_role["prompt"]), list):
        return detect_columns(names, source.columns, RowKind.CHAT) or columns  # a prompt of messages
    return columns


def _first_value(records: Iterable[RawRow], column: str) -> Any:
    return next((value for record in records if (value := record.values.get(column)) is not None), None)


def _mixed_kinds_error(kind: str, earlier: str, location: str) -> DataError:
    return DataError(
        f"`{kind}` after rows of `{earlier}`",
        where=location,
        expected="one kind of rows in a source",
        hint="split it into two sources",
    )


def _deviating_record_error(record: RawRow, columns: Columns) -> DataError:
    """The error for a record without a column of its source: it is of another kind, or incomplete."""
    names = list(record.values)
    other = detect_columns(names, {})
    if other and other.kind != columns.kind:
        return _mixed_kinds_error(other.kind, columns.kind, record.location)
    column = next(column for column in columns.required if not has_column(record.values.keys(), column))
    return DataError(
        f"no column `{column}` among {format_columns(names)}",
        where=record.location,
        expected=f"rows of `{columns.kind}` like those before: {format_columns(list(columns.required))}",
        hint=suggest_nearest(column, names),
    )


def _record_documents(
    records: Iterable[RawRow],
    columns: Columns,
    source: RawSource,
    unread: tuple[str, ...] = (),
    *,
    is_typed: bool = True,
) -> Iterator[Document]:
    """The documents of records; `unread`: columns that their reader has left out."""
    used = _used_columns(columns, source) | {GENERATED_COLUMN}
    unused: dict[tuple[str, ...], tuple[str, ...]] = {}
    for record in _filter_records(records, source):
        if not all(has_column(record.values.keys(), column) for column in columns.required):
            raise _deviating_record_error(record, columns)
        names = tuple(record.values)
        if names not in unused:
            unused[names] = tuple(name or "(no name)" for name in (*unread, *names) if name not in used)
        document = _make_document(record, columns, source, is_typed)
        yield document._replace(unused=unused[names]) if unused[names] else document


def _make_document(record: RawRow, columns: Columns, source: RawSource, is_typed: bool) -> Document:
    location = record.location
    if columns.kind.is_running_text:
        column = columns.by_role[columns.kind]
        convert = _text_document if columns.kind == RowKind.TEXT else _ids_document
        return convert(get_column(record.values, column, location), location, column)
    values = {role: get_column(record.values, column, location) for role, column in columns.by_role.items()}
    if not is_typed and "label" in values:
        values["label"] = _parse_csv_label(values["label"])
    try:
        example = make_example(columns.kind, values, location, no_label=source.no_label)
    except SkippedRow as reason:
        return Document("", None, location, None, str(reason))
    if source.context:
        example = replace(example, teacher_context=_read_context(record, source.context))
    return Document(example.text, None, location, example)


def _read_context(record: RawRow, context: ContextColumn) -> str:
    """What a teacher reads before a row; nothing for an empty field."""
    names = list(record.values)
    if not has_column(names, context.column):
        raise DataError(
            f"no column `{context.column}` among {format_columns(names)}",
            where=record.location,
            expected="the column that the teacher's context names in every row",
            hint=suggest_nearest(context.column, names),
        )
    value = get_column(record.values, context.column, record.location)
    if not isinstance(value, str | None):
        raise DataError(f"`{context.column}` is {describe_value(value)}", where=record.location, expected="text")
    check_encodable(value or "", f"`{context.column}` holds", record.location)
    return context.template.replace("{text}", value) if value and not value.isspace() else ""


_INTEGER, _DECIMAL = re.compile(r"[+-]?\d+"), re.compile(r"[+-]?(\d+\.\d*|\.\d+)([eE][+-]?\d+)?")


def _parse_csv_label(label: Any) -> str | int | float:
    """A label of a CSV file, where all values are text: a number if it looks like one."""
    if _INTEGER.fullmatch(label):
        return int(label)
    return float(label) if _DECIMAL.fullmatch(label) else label


def _text_document(value: Any, location: str, column: str) -> Document:
    if value is None:  # a null of Parquet or JSON is an empty document, and counted as such
        return Document("", None, location)
    if not isinstance(value, str):
        raise DataError(f"`{column}` is {describe_value(value)}", where=location, expected="text")
    if not value.isascii():
        check_encodable(value, f"`{column}` holds", location)
    return Document(value, None, location)


def _ids_document(value: Any, location: str, column: str) -> Document:
    ids = [] if value is None else value
    if not isinstance(ids, list):
        raise DataError(f"`{column}` is {describe_value(ids)}", where=location, expected="a list of token ids")
    for wrong_type in set(map(type, ids)) - {int}:
        item = describe_value(next(item for item in ids if type(item) is wrong_type))
        raise DataError(f"`{column}` holds {item}", where=location, expected="a list of whole numbers")
    if ids and (min(ids) < 0 or max(ids) >= 2**32):
        wrong = next(item for item in ids if not 0 <= item < 2**32)
        raise DataError(f"`{column}` holds {str(wrong)[:24]}", where=location, expected="token ids, from 0 to 2^32 - 1")
    return Document(None, np.array(ids, dtype=np.uint32), location)

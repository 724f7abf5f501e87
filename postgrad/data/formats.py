"""How do rows become documents?

A row of text is a document; a row of token ids is one already tokenised; a text file is cut into documents
as `documents` says. Rows of the other kinds the field knows (chat, instructions, pairs) are recognised only
to be named in the error. Empty documents are handed on, so that whoever counts can account for each of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from postgrad.data.sources import (
    TEXT_KINDS,
    Line,
    Row,
    Source,
    find_files,
    kind_of,
    read_hub,
    read_lines,
    read_rows,
)
from postgrad.errors import DataError, nearest

CUTS = ("auto", "file", "passages", "paragraphs", "lines")
"""The ways to cut a text file: by its size, one document a file, passages, paragraphs, lines."""

ROLES = ("text", "input_ids")
"""What a column can be to training; the first that a row has decides the kind of the source."""

OTHER_KINDS = (
    ("chat", ("messages",)),
    ("chat", ("conversations",)),
    ("instruction", ("instruction", "output")),
    ("prompt", ("prompt", "completion")),
    ("pair", ("source", "target")),
)

WHOLE_FILE = 256 * 2**10
"""Bytes up to which `auto` takes a text file for one document."""
PASSAGE = 4_000
"""Characters that a passage is filled up to."""
PARAGRAPH_CAP = 16_000
"""Characters above which a paragraph may be cut at its lines: it is rather a list than a paragraph."""
FILE_CAP = 256 * 2**20
"""Characters above which a text file cannot be one document."""

_PEEKED = 16


class Document(NamedTuple):
    """A text, or its token ids, and the place it came from (`file:line`)."""

    text: str | None
    ids: np.ndarray | None
    place: str

    @property
    def empty(self) -> bool:
        """Nothing to learn from: no ids, or nothing but white space."""
        if self.text is not None:
            return not self.text or self.text.isspace()
        return self.ids is None or not len(self.ids)


def read_documents(source: Source, seen: Callable[[int], None] = lambda _: None) -> Iterator[Document]:
    """All documents of a source in its files' sorted order, the empty ones included.

    Raises `DataError` for rows of another kind, for a broken file, and, at the end, for a source in which
    every document is empty.
    """
    if source.documents not in CUTS:
        raise DataError(
            f"'{source.documents}' is no way to cut a text file",
            where=f"{source.where}.documents",
            expected=" | ".join(CUTS),
            way_out=nearest(source.documents, CUTS),
        )
    for role in source.columns:
        if role not in ROLES:
            raise DataError(
                f"'{role}' is nothing a column can be",
                where=f"{source.where}.columns",
                expected="columns: {text: <column>} or {input_ids: <column>}",
                way_out=nearest(role, ROLES),
            )
    return _not_all_empty(source, chain.from_iterable(_streams(source, seen)))


def _streams(source: Source, seen: Callable[[int], None]) -> Iterator[Iterator[Document]]:
    if source.hub is not None:
        rows = read_hub(source.hub, source.root, source.where)
        first = list(islice(rows, _PEEKED))
        yield _from_rows(chain(first, rows), _kind(first, source), source)
        return
    assert source.path is not None
    files = find_files(source.path, source.root, source.where)
    kind: tuple[str, str] | None = None
    for file in files:
        text_file = kind_of(file) in TEXT_KINDS
        first = [] if text_file else list(islice(read_rows(file), _PEEKED))
        if not first and not text_file:
            continue
        here = ("text", "text") if text_file else _kind(first, source)
        if kind is not None and here[0] != kind[0]:
            raise DataError(
                f"`{here[0]}` after rows of `{kind[0]}`",
                where=str(file),
                expected="one kind of rows in a source",
                way_out="make two sources of it",
            )
        kind = here
        if text_file:
            yield _from_text(file, source.documents, seen)
        else:
            yield _from_rows(read_rows(file, {kind[1]}, seen), kind, source)


def _not_all_empty(source: Source, documents: Iterator[Document]) -> Iterator[Document]:
    met = empty = 0
    for document in documents:
        met += 1
        empty += document.empty
        yield document
    if met == empty:
        given = source.path if source.hub is None else source.hub.name
        raise DataError(
            f"{given} holds {f'{empty:,} documents, all empty' if met else 'no document'}",
            where=source.where,
            expected="at least one document with text",
        )


# --- rows ---------------------------------------------------------------------------------------------


def _kind(rows: list[Row], source: Source) -> tuple[str, str]:
    """(role, column) that the first rows have, or the error that names what they are."""
    columns = list(dict.fromkeys(chain.from_iterable(row.values for row in rows)))
    place = rows[0].place if rows else source.where
    if not rows:
        return "text", "text"
    for role in ROLES:
        if role in source.columns:
            column = source.columns[role]
            if column not in columns:
                raise _no_column(column, columns, place)
            return role, column
    for role in ROLES:
        if role in columns:
            return role, role
    for kind, marks in OTHER_KINDS:
        if all(mark in columns for mark in marks):
            raise DataError(
                f"{kind} rows ({', '.join(f'`{mark}`' for mark in marks)}) cannot be trained on yet",
                where=place,
                expected="a column `text` or `input_ids`",
                way_out=f"map a column with columns: {{text: ...}}; met {_listed(columns)}",
            )
    raise _no_column("text", columns, place)


def _no_column(column: str, columns: list[str], place: str) -> DataError:
    hint = nearest(column, columns)
    return DataError(
        f"no column `{column}` among {_listed(columns)}",
        where=place,
        expected="a column `text` or `input_ids`, or columns: {text: <column>}",
        way_out=hint,
    )


def _listed(columns: list[str], most: int = 12) -> str:
    shown = ", ".join(f"`{str(column)[:60]}`" for column in columns[:most])
    return (shown or "no columns") + (" ..." if len(columns) > most else "")


def _from_rows(rows: Iterator[Row], kind: tuple[str, str], source: Source) -> Iterator[Document]:
    role, column = kind
    convert = _text if role == "text" else _ids
    for row in rows:
        if column not in row.values:
            raise _no_column(column, list(row.values), row.place)
        yield convert(row.values[column], row.place, column)


def _text(value: Any, place: str, column: str) -> Document:
    if value is None:  # what Parquet and JSON write for "no text": empty, and counted as such
        return Document("", None, place)
    if not isinstance(value, str):
        raise DataError(f"`{column}` is {_named(value)}", where=place, expected="text")
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
        raise DataError(f"`{column}` is {_named(value)}", where=place, expected="a list of token ids")
    for kind in set(map(type, value)) - {int}:
        met = _named(next(item for item in value if type(item) is kind))
        raise DataError(f"`{column}` holds {met}", where=place, expected="a list of whole numbers")
    if value and (min(value) < 0 or max(value) >= 2**32):
        wrong = next(item for item in value if not 0 <= item < 2**32)
        raise DataError(f"`{column}` holds {str(wrong)[:24]}", where=place, expected="token ids, from 0 to 2^32 - 1")
    return Document(None, np.array(value, dtype=np.uint32), place)


def _named(value: Any) -> str:
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

"""Records of a file or a Hub data set: readers for JSON lines, JSON, CSV, Parquet, Arrow and text, all as streams.

Memory does not grow with the file. Every record knows its location: `file:line`, or `file:row` for Parquet, Arrow, JSON arrays
and the Hub. Any problem with a file is a `DataError` with that location.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Collection, Iterator
from functools import partial
from pathlib import Path

from postgrad.data.read.columnar_files import drop_filled_nulls, read_columnar_file
from postgrad.data.read.files import (
    FILE_SUFFIXES,
    TEXT_SUFFIXES,
    HubDataset,
    RawRow,
    file_suffix,
)
from postgrad.data.read.json_stream import json_error_message, make_record, read_json
from postgrad.data.read.text_lines import ReadCallback, ignore_progress, read_lines
from postgrad.errors import DataError, MissingExtra, format_names

FIELD_CAP = 16 * 2**20
"""Characters in one CSV field. The parser holds four bytes for each, and a missing quote swallows the rest of the file."""

PROJECTED_SUFFIXES = (".parquet", ".arrow")
"""Formats of which only the columns that are used are read."""


def read_records(
    file: Path, column_names: Collection[str] | None = None, on_read: ReadCallback = ignore_progress
) -> Iterator[RawRow]:
    """The records of `file`, one at a time; a text file has a record `{"text": line}` for each line.

    `column_names`: the columns that are used (Parquet and Arrow read no others). Raises `DataError` with the location of
    whatever cannot be read.
    """
    suffix = file_suffix(file)
    if suffix in TEXT_SUFFIXES:
        return (RawRow({"text": text}, str(file), number) for number, text in read_lines(file, on_read))
    if suffix in PROJECTED_SUFFIXES:
        return read_columnar_file(file, column_names, on_read)
    reader = {
        ".jsonl": _read_json_lines,
        ".ndjson": _read_json_lines,
        ".json": read_json,
        ".csv": _read_csv,
        ".tsv": partial(_read_csv, delimiter="\t"),
    }.get(suffix)
    if reader is None:
        raise DataError(f"{file.name} is of no known kind", where=str(file), expected=" ".join(FILE_SUFFIXES))
    return reader(file, on_read)


def _read_json_lines(file: Path, on_read: ReadCallback) -> Iterator[RawRow]:
    name, parse = str(file), json.JSONDecoder().decode
    for number, text in read_lines(file, on_read):
        if not text.strip():
            continue
        try:
            value = parse(text)
        except (ValueError, RecursionError) as error:
            column = f" (column {error.pos + 1})" if isinstance(error, json.JSONDecodeError) else ""
            raise DataError(
                json_error_message(error) + column, where=f"{name}:{number}", expected="one JSON object a line"
            ) from None
        yield make_record(value, name, number)


def _read_csv(file: Path, on_read: ReadCallback, delimiter: str = ",") -> Iterator[RawRow]:
    name = str(file)
    csv.field_size_limit(max(FIELD_CAP, csv.field_size_limit()))  # a global setting: the module has no other
    table = csv.reader((line.text for line in read_lines(file, on_read)), strict=True, delimiter=delimiter)
    header: list[str] | None = None
    start = 1
    while True:
        try:
            cells = next(table, None)
        except csv.Error as error:
            raise DataError(
                f"broken CSV: {error}",
                where=f"{name}:{start}",
                expected="quoted, comma-separated rows",
                hint="look for a quote that is not closed or not doubled",
            ) from None
        if cells is None:
            return
        line, start = start, table.line_num + 1
        if not cells:
            continue
        if header is None:
            header = cells  # a column without a name, such as the index that pandas writes, is in no kind of rows
            if len(set(filter(None, header))) < len(list(filter(None, header))) or not any(header):
                raise DataError(
                    f"the header names a column twice, or none: {format_names(header)}",
                    where=f"{name}:{line}",
                    expected="one name for each column",
                )
            continue
        if len(cells) != len(header):
            raise DataError(
                f"{len(cells)} fields",
                where=f"{name}:{line}",
                expected=f"{len(header)} fields, as in the header",
            )
        yield RawRow(dict(zip(header, cells, strict=True)), name, line)


def read_hub(hub: HubDataset, root: Path, where: str) -> Iterator[RawRow]:
    """The rows of a Hub data set, streamed through `datasets`; their location is `name/split:row`.

    A folder of that name under `root` takes precedence. Raises `MissingExtra` without `datasets`, and `DataError` for any
    error within it.
    """
    try:
        import datasets
    except ImportError:
        raise MissingExtra(
            "reading from the Hub needs the package datasets", where=where, hint="pip install datasets"
        ) from None
    folder = root / hub.name
    name = str(folder) if folder.is_dir() else hub.name
    number = 0
    try:
        stream = datasets.load_dataset(name, hub.subset, split=hub.split, revision=hub.revision, streaming=True)
        for number, values in enumerate(stream, 1):
            values = {column: drop_filled_nulls(value) for column, value in values.items()}
            yield make_record(values, f"{hub.name}/{hub.split}", number)
    except DataError:
        raise
    except Exception as error:  # its exceptions have no common base class
        message = next(iter(str(error).splitlines()), "")
        raise DataError(
            f"cannot read {hub.name} ({hub.split}): {type(error).__name__}: {message}",
            where=f"{where} row {number + 1}",
            expected="a data set, subset, split and revision that `datasets.load_dataset` can stream",
        ) from None

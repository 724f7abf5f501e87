"""Records of a file or a Hub data set: readers for JSON lines, JSON, CSV, Parquet, Arrow and text, all as streams.

Memory does not grow with the file. Every record knows its location: `file:line`, or `file:row` for Parquet, Arrow, JSON arrays
and the Hub. Any problem with a file is a `DataError` with that location.
"""

from __future__ import annotations

import csv
import json
import tempfile
from collections.abc import Collection, Iterator
from functools import partial
from pathlib import Path
from typing import IO, Any

from postgrad.data.read.files import (
    COMPRESSIONS,
    FILE_SUFFIXES,
    TEXT_SUFFIXES,
    HubDataset,
    RawRow,
    error_reason,
    file_suffix,
    format_names,
)
from postgrad.data.read.json_stream import json_error_message, make_record, read_json
from postgrad.data.read.text_lines import (
    BrokenStream,
    ReadCallback,
    ignore_progress,
    not_utf8_error,
    read_blocks,
    read_lines,
)
from postgrad.errors import DataError, MissingExtra

FIELD_CAP = 16 * 2**20
"""Characters in one CSV field. The parser holds four bytes for each, and a missing quote swallows the rest of the file."""

PROJECTED_SUFFIXES = (".parquet", ".arrow")
"""Formats of which only the columns that are used are read."""

_ARROW_ROWS = 256
_BOMB_RATIO, _BOMB_BYTES = 200, 2**30


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
        return _read_columns(file, column_names, on_read)
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


def _read_columns(file: Path, column_names: Collection[str] | None, on_read: ReadCallback) -> Iterator[RawRow]:
    """The rows of a Parquet or an Arrow file."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise MissingExtra(
            f"reading {file_suffix(file)} needs the package pyarrow", where=str(file), hint="pip install pyarrow"
        ) from None
    name, number = str(file), 0
    kind, read_batches = ("Parquet", _parquet_batches) if file_suffix(file) == ".parquet" else ("Arrow", _arrow_batches)
    try:
        with _open_unpacked(file) as raw:
            size = file.stat().st_size
            for batch, share in read_batches(raw, column_names):
                names = batch.schema.names
                columns = [batch.column(index) for index in range(batch.num_columns)]
                begin = number
                try:
                    rows = zip(*(column.to_pylist() for column in columns), strict=True)
                except ValueError:  # text that is not UTF-8: go row by row to find the row
                    rows = (tuple(column[index].as_py() for column in columns) for index in range(batch.num_rows))
                for cells in rows if names else [()] * batch.num_rows:
                    number += 1
                    yield RawRow(dict(zip(names, map(drop_filled_nulls, cells), strict=True)), name, number)
                on_read(int(size * share * number) - int(size * share * begin))
    except UnicodeDecodeError as error:
        raise not_utf8_error(file, number + 1, error.object[error.start], error.start + 1) from None
    except (BrokenStream, pyarrow.ArrowException, OSError, ValueError, OverflowError, RecursionError) as error:
        raise DataError(
            f"not a complete {kind} file: {error_reason(error).splitlines()[0]}", where=f"{name}:{number + 1}"
        ) from None


def _parquet_batches(raw: IO[bytes], column_names: Collection[str] | None) -> Iterator[tuple[Any, float]]:
    """Batches of about 4 MiB, each with the share of the file that a row is."""
    import pyarrow.parquet

    table = pyarrow.parquet.ParquetFile(raw, buffer_size=2**20, pre_buffer=False)
    rows = max(1, table.metadata.num_rows)
    groups = (table.metadata.row_group(index) for index in range(table.metadata.num_row_groups))
    uncompressed = sum(group.total_byte_size for group in groups)
    batch_size = min(2048, max(1, 2**22 * rows // max(1, uncompressed)))
    names = [name for name in table.schema_arrow.names if column_names is None or name in column_names]
    for batch in table.iter_batches(batch_size=batch_size, columns=names):
        yield batch, 1 / rows


def _arrow_batches(raw: IO[bytes], column_names: Collection[str] | None) -> Iterator[tuple[Any, float]]:
    """The batches of a stream (as `datasets` writes it) or of a file of Arrow; the share of a row is not known."""
    from pyarrow import ipc

    is_file = raw.read(6) == b"ARROW1"
    raw.seek(0)
    reader = ipc.open_file(raw) if is_file else ipc.open_stream(raw)
    batches = map(reader.get_batch, range(reader.num_record_batches)) if is_file else reader
    for batch in batches:
        names = [name for name in batch.schema.names if column_names is None or name in column_names]
        for start in range(0, batch.num_rows, _ARROW_ROWS):
            yield batch.select(names).slice(start, _ARROW_ROWS), 0.0


def drop_filled_nulls(value: Any, in_list: bool = False) -> Any:
    """A value of Arrow without the nulls that it fills into objects of a list for keys that only other rows have."""
    if isinstance(value, list):
        return (
            [drop_filled_nulls(item, True) for item in value] if value and isinstance(value[0], dict | list) else value
        )
    if isinstance(value, dict):
        items = ((key, drop_filled_nulls(item, in_list)) for key, item in value.items())
        return {key: item for key, item in items if not (in_list and item is None)}
    return value


def _open_unpacked(file: Path) -> IO[bytes]:
    """Open a Parquet or Arrow file; a compressed one is unpacked to a temporary file, as Parquet is read from its end."""
    if file.suffix.lower() not in COMPRESSIONS:
        return open(file, "rb")
    spool = tempfile.TemporaryFile()  # noqa: SIM115 (the caller closes it)
    try:
        written, max_bytes = 0, max(_BOMB_BYTES, _BOMB_RATIO * file.stat().st_size)
        for block in read_blocks(file, ignore_progress):
            written += len(block)
            if written > max_bytes:
                raise BrokenStream(f"it unpacks to more than {_BOMB_RATIO} times its size")
            spool.write(block)
        spool.seek(0)
    except BaseException:
        spool.close()
        raise
    return spool


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

"""Rows of a Parquet file, in bounded memory.

A dictionary or a shared prefix lets a page of a few bytes stand for gigabytes. Encoded values are therefore expanded only after
their size is known, and the whole file may not expand to more than `UnpackLimit` allows.
"""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from postgrad.data.read.files import COMPRESSIONS, RawRow, error_reason
from postgrad.data.read.text_lines import (
    BrokenStream,
    ReadCallback,
    UnpackLimit,
    ignore_progress,
    not_utf8_error,
    read_blocks,
)
from postgrad.errors import DataError, MissingExtra
from postgrad.storage.regular_file import open_regular_file

_BATCH_BYTES, _BATCH_ROWS = 2**22, 2048
_EXPANDED_BYTES = 2**26
"""Size up to which all values of a batch are expanded at once."""


def read_parquet(file: Path, column_names: Collection[str] | None, on_read: ReadCallback) -> Iterator[RawRow]:
    """The rows of a Parquet file, with the columns `column_names` only.

    Raises `DataError` with the row, and `MissingExtra` without pyarrow.
    """
    try:
        import pyarrow
    except ImportError:
        raise MissingExtra(
            "reading .parquet needs the package pyarrow", where=str(file), hint="pip install pyarrow"
        ) from None
    name, number = str(file), 0
    try:
        with _open_unpacked(file) as raw:
            size, limit = file.stat().st_size, UnpackLimit(file)
            rows = 1
            for batch, names, rows in _read_batches(raw, column_names, limit):
                start = number
                for cells in _batch_rows(batch, limit) if names else [()] * batch.num_rows:
                    number += 1
                    yield RawRow(dict(zip(names, cells, strict=True)), name, number)
                on_read(size * number // rows - size * start // rows)
    except UnicodeDecodeError as error:
        raise not_utf8_error(file, number + 1, error.object[error.start], error.start + 1) from None
    except BrokenStream as error:
        raise DataError(str(error), where=f"{name}:{number + 1}", expected="a complete, readable file") from None
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError, RecursionError) as error:
        raise DataError(
            f"not a complete Parquet file: {error_reason(error).splitlines()[0]}", where=f"{name}:{number + 1}"
        ) from None


def _read_batches(
    raw: IO[bytes], column_names: Collection[str] | None, limit: UnpackLimit
) -> Iterator[tuple[Any, list[str], int]]:
    """Batches of rows with the names of their columns, and the number of all rows; dictionaries are not expanded."""
    from pyarrow.parquet import ParquetFile

    table = ParquetFile(raw)
    metadata = table.metadata
    names = [column for column in table.schema_arrow.names if column_names is None or column in column_names]
    groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
    chunks = [group.column(index) for group in groups for index in range(group.num_columns)]
    chunks = [chunk for chunk in chunks if chunk.path_in_schema.partition(".")[0] in names]
    # A run of equal numbers takes no room in the file, but eight bytes for each value in memory.
    size = max(sum(chunk.total_uncompressed_size for chunk in chunks), 8 * sum(chunk.num_values for chunk in chunks))
    limit.check(size)
    texts = [chunk for chunk in chunks if chunk.physical_type == "BYTE_ARRAY"]
    shared = {chunk.path_in_schema for chunk in texts if "DELTA_BYTE_ARRAY" in chunk.encodings}
    coded = {chunk.path_in_schema for chunk in texts if any("DICTIONARY" in each for each in chunk.encodings)}
    table = ParquetFile(raw, buffer_size=2**20, pre_buffer=False, read_dictionary=sorted(coded - shared))
    rows = max(1, metadata.num_rows)
    batch_rows = 1 if shared else min(_BATCH_ROWS, max(1, _BATCH_BYTES * rows // max(1, size)))
    for batch in table.iter_batches(batch_size=batch_rows, columns=names):
        yield batch, names, rows


def _batch_rows(batch: Any, limit: UnpackLimit) -> Iterator[Sequence[Any]]:
    """The rows of a batch: all expanded at once, or one by one where they are large or hold text that is not UTF-8."""
    columns = [batch.column(index) for index in range(batch.num_columns)]
    size = sum(map(_expanded_bytes, columns))
    limit.add(size)
    values: list[list[Any]] | None = None
    if size <= _EXPANDED_BYTES:
        try:
            values = [_expand(column).to_pylist() for column in columns]
        except ValueError:  # text that is not UTF-8: go row by row to find the row
            values = None
    if values is not None:
        return iter(zip(*values, strict=True))
    return ([column[index].as_py() for column in columns] for index in range(batch.num_rows))


def _expanded_bytes(array: Any) -> int:
    """Bytes of an array when each index of a dictionary is replaced by its value."""
    from pyarrow import types
    from pyarrow.compute import call_function

    if types.is_dictionary(array.type):
        lengths = call_function("binary_length", [array.dictionary]).take(array.indices)
        return call_function("sum", [lengths]).as_py() or 0
    if types.is_struct(array.type):
        return sum(map(_expanded_bytes, array.flatten()))
    if types.is_nested(array.type):
        return _expanded_bytes(array.flatten())
    return array.nbytes


def _expand(array: Any) -> Any:
    """An array with the values instead of the indices of a dictionary, where it is one itself."""
    from pyarrow import types

    return array.dictionary_decode() if types.is_dictionary(array.type) else array


def _open_unpacked(file: Path) -> IO[bytes]:
    """Open a Parquet file; a compressed one is unpacked to a temporary file, as Parquet is read from its end."""
    if file.suffix.lower() not in COMPRESSIONS:
        return open_regular_file(file)
    spool = tempfile.TemporaryFile()  # noqa: SIM115 (the caller closes it)
    try:
        for block in read_blocks(file, ignore_progress):
            spool.write(block)
        spool.seek(0)
    except BaseException:
        spool.close()
        raise
    return spool

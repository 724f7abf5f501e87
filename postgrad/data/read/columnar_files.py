"""Rows of Parquet and Arrow files, in bounded memory.

A dictionary, a shared prefix or a view lets a file of a few bytes stand for gigabytes. Values are therefore expanded only after
their size is known, and no file may expand to more than `UnpackLimit` allows.
"""

from __future__ import annotations

import struct
import tempfile
from collections.abc import Collection, Iterable, Iterator, Sequence
from os import SEEK_END
from pathlib import Path
from typing import IO, Any

from postgrad.data.read.files import COMPRESSIONS, RawRow, error_reason, file_suffix
from postgrad.data.read.parquet_pages import unpacked_page_bytes
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

_BATCH_BYTES, _BATCH_ROWS, _ARROW_ROWS = 2**22, 2048, 256
_EXPANDED_BYTES = 2**26
"""Size up to which all values of a batch are expanded at once."""


def read_columnar_file(file: Path, column_names: Collection[str] | None, on_read: ReadCallback) -> Iterator[RawRow]:
    """The rows of a Parquet or an Arrow file, with the columns `column_names` only.

    Raises `DataError` with the row, and `MissingExtra` without pyarrow.
    """
    try:
        import pyarrow
    except ImportError:
        raise MissingExtra(
            f"reading {file_suffix(file)} needs the package pyarrow", where=str(file), hint="pip install pyarrow"
        ) from None
    name, number = str(file), 0
    kind, read_batches = ("Parquet", _parquet_batches) if file_suffix(file) == ".parquet" else ("Arrow", _arrow_batches)
    try:
        with _open_unpacked(file) as raw:
            size, limit = file.stat().st_size, UnpackLimit(file)
            for batch, share in read_batches(raw, column_names, limit):
                names, begin = batch.schema.names, number
                for cells in _batch_rows(batch, limit) if names else [()] * batch.num_rows:
                    number += 1
                    yield RawRow(dict(zip(names, map(drop_filled_nulls, cells), strict=True)), name, number)
                on_read(int(size * share * number) - int(size * share * begin))
    except UnicodeDecodeError as error:
        raise not_utf8_error(file, number + 1, error.object[error.start], error.start + 1) from None
    except BrokenStream as error:
        raise DataError(str(error), where=f"{name}:{number + 1}", expected="a complete, readable file") from None
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError, RecursionError, struct.error) as error:
        raise DataError(
            f"not a complete {kind} file: {error_reason(error).splitlines()[0]}", where=f"{name}:{number + 1}"
        ) from None


def _parquet_batches(
    raw: IO[bytes], column_names: Collection[str] | None, limit: UnpackLimit
) -> Iterator[tuple[Any, float]]:
    """Batches of about 4 MiB, with dictionaries that are not expanded, each with the share of the file that a row is."""
    from pyarrow.parquet import ParquetFile

    table = ParquetFile(raw)
    metadata = table.metadata
    names = [column for column in table.schema_arrow.names if column_names is None or column in column_names]
    groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
    chunks = [chunk for group in groups for chunk in _read_chunks(group, names)]
    # A run of equal numbers takes no room in the file, but eight bytes for each value in memory.
    size = max(sum(chunk.total_uncompressed_size for chunk in chunks), 8 * sum(chunk.num_values for chunk in chunks))
    limit.check(size)
    if sum(chunk.total_compressed_size for chunk in chunks) > raw.seek(0, SEEK_END):
        raise ValueError("its columns have more bytes than the file")
    texts = [chunk for chunk in chunks if chunk.physical_type == "BYTE_ARRAY"]
    shared = {chunk.path_in_schema for chunk in texts if "DELTA_BYTE_ARRAY" in chunk.encodings}
    coded = {chunk.path_in_schema for chunk in texts if any("DICTIONARY" in each for each in chunk.encodings)}
    table = ParquetFile(raw, buffer_size=2**20, pre_buffer=False, read_dictionary=sorted(coded - shared))
    rows, unpacked = max(1, metadata.num_rows), 0
    batch_rows = 1 if shared else min(_BATCH_ROWS, max(1, _BATCH_BYTES * rows // max(1, size)))
    for index, group in enumerate(groups):
        # A page may say more than the footer does.
        unpacked += sum(unpacked_page_bytes(raw, chunk) for chunk in _read_chunks(group, names))
        limit.check(unpacked)
        for batch in table.iter_batches(batch_size=batch_rows, row_groups=[index], columns=names):
            yield batch, 1 / rows


def _read_chunks(group: Any, names: Collection[str]) -> list[Any]:
    """The column chunks of a row group that hold the columns `names`."""
    chunks = [group.column(index) for index in range(group.num_columns)]
    return [chunk for chunk in chunks if chunk.path_in_schema.partition(".")[0] in names]


def _arrow_batches(
    raw: IO[bytes], column_names: Collection[str] | None, limit: UnpackLimit
) -> Iterator[tuple[Any, float]]:
    """The batches of a stream (as `datasets` writes it) or of a file of Arrow; the share of a row is not known."""
    from pyarrow import ipc

    is_file = raw.read(8) == b"ARROW1\0\0"
    raw.seek(8 if is_file else 0)  # a file is a stream with a head and a table of contents
    for message in ipc.MessageReader.open_stream(raw):
        limit.check(_unpacked_bytes(message))
    raw.seek(0)
    reader = ipc.open_file(raw) if is_file else ipc.open_stream(raw)
    batches = map(reader.get_batch, range(reader.num_record_batches)) if is_file else reader
    for batch in batches:
        names = [name for name in batch.schema.names if column_names is None or name in column_names]
        for start in range(0, batch.num_rows, _ARROW_ROWS):
            yield batch.select(names).slice(start, _ARROW_ROWS), 0.0


def _unpacked_bytes(message: Any) -> int:
    """The bytes that the buffers of a message of Arrow unpack to; each compressed one begins with its size."""
    table = _FlatTable.read_root(message.metadata.to_pybytes())
    header = table.follow(2)  # the header of a message
    if header is not None and message.type == "dictionary":
        header = header.follow(1)
    if header is None or message.type not in ("record batch", "dictionary") or header.follow(3) is None:
        return 0  # no buffers, or none that is compressed
    body = memoryview(message.body)
    buffers = [(start, size) for start, size in header.read_pairs(2) if size >= 8]
    return sum(max(size, struct.unpack_from("<q", body, start)[0]) for start, size in buffers)


class _FlatTable:
    """A table of FlatBuffers, the encoding of Arrow's metadata."""

    def __init__(self, data: bytes, position: int) -> None:
        self.data, self.position = data, position

    @classmethod
    def read_root(cls, data: bytes) -> _FlatTable:
        return cls(data, struct.unpack_from("<I", data)[0])

    def follow(self, field: int) -> _FlatTable | None:
        """The table of a field; None for an absent one."""
        start = self._field_start(field)
        return None if start is None else _FlatTable(self.data, start + struct.unpack_from("<I", self.data, start)[0])

    def read_pairs(self, field: int) -> list[tuple[int, int]]:
        """A vector of pairs of numbers."""
        vector = self.follow(field)
        if vector is None:
            return []
        count = struct.unpack_from("<I", self.data, vector.position)[0]
        return list(struct.iter_unpack("<qq", self.data[vector.position + 4 : vector.position + 4 + 16 * count]))

    def _field_start(self, field: int) -> int | None:
        offsets = self.position - struct.unpack_from("<i", self.data, self.position)[0]
        if 4 + 2 * field >= struct.unpack_from("<H", self.data, offsets)[0]:
            return None
        offset = struct.unpack_from("<H", self.data, offsets + 4 + 2 * field)[0]
        return self.position + offset if offset else None


def _batch_rows(batch: Any, limit: UnpackLimit) -> Iterator[Sequence[Any]]:
    """The rows of a batch: all expanded at once, or one by one where they are large or hold text that is not UTF-8."""
    columns = [batch.column(index) for index in range(batch.num_columns)]
    size = _sum_known(map(_expanded_bytes, columns))
    if size is not None:
        limit.add(size)
        if size <= _EXPANDED_BYTES:
            try:
                return iter(zip(*(_expand(column).to_pylist() for column in columns), strict=True))
            except ValueError:  # text that is not UTF-8: go row by row to find the row
                pass
    return _read_rows(columns, batch.num_rows, limit if size is None else None)


def _read_rows(columns: Sequence[Any], count: int, limit: UnpackLimit | None) -> Iterator[Sequence[Any]]:
    """One row after the other, counted in `limit`."""
    for index in range(count):
        cells = [column[index].as_py() for column in columns]
        if limit:
            limit.add(sum(map(_value_bytes, cells)))
        yield cells


def _value_bytes(value: Any) -> int:
    if isinstance(value, dict):
        return sum(map(_value_bytes, value.values()))
    return sum(map(_value_bytes, value)) if isinstance(value, list) else len(value) if isinstance(value, str) else 8


def _expanded_bytes(array: Any) -> int | None:
    """Bytes of an array when each index of a dictionary is replaced by its value; None where only its values tell."""
    from pyarrow import types
    from pyarrow.compute import call_function

    if types.is_dictionary(array.type):
        if not types.is_binary(array.type.value_type) and not types.is_string(array.type.value_type):
            return None
        lengths = call_function("binary_length", [array.dictionary]).take(array.indices)
        return call_function("sum", [lengths]).as_py() or 0
    if types.is_struct(array.type):
        return _sum_known(map(_expanded_bytes, array.flatten()))
    if types.is_list(array.type) or types.is_large_list(array.type) or types.is_fixed_size_list(array.type):
        return _expanded_bytes(array.flatten())
    is_plain = types.is_primitive(array.type) or types.is_null(array.type) or types.is_boolean(array.type)
    is_text = any(check(array.type) for check in (types.is_string, types.is_large_string, types.is_binary))
    return array.nbytes if is_plain or is_text else None


def _sum_known(sizes: Iterable[int | None]) -> int | None:
    """The sum; None when one is not known."""
    total = 0
    for size in sizes:
        if size is None:
            return None
        total += size
    return total


def _expand(array: Any) -> Any:
    """An array with the values instead of the indices of a dictionary, where it is one itself."""
    from pyarrow import types

    return array.dictionary_decode() if types.is_dictionary(array.type) else array


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

"""What the pages of a Parquet file unpack to, from the headers of the pages.

The footer of a file may say less than its pages do, and a reader allocates what a page says. A header is a struct of Thrift's
compact protocol: type (1), bytes unpacked (2), bytes in the file (3), and more.
"""

from __future__ import annotations

from typing import IO, Any

_UNPACKED, _PACKED = 2, 3
_BOOLEANS, _BYTE, _I64, _DOUBLE, _BINARY, _LIST, _SET, _STRUCT = (1, 2), 3, 6, 7, 8, 9, 10, 12
_WIDTHS = {**dict.fromkeys(_BOOLEANS, 0), _BYTE: 1, _DOUBLE: 8}
"""Bytes of the kinds of fixed size; the type of a field says whether a boolean is true."""
_MAX_DEPTH = 8


def unpacked_page_bytes(raw: IO[bytes], chunk: Any) -> int:
    """The sum over the pages of a column chunk (a `ColumnChunkMetaData` of pyarrow).

    Raises `ValueError` for a broken header.
    """
    first = chunk.dictionary_page_offset
    start = min(first, chunk.data_page_offset) if first else chunk.data_page_offset
    end, total = start + chunk.total_compressed_size, 0
    while start < end:
        raw.seek(start)
        sizes = _read_struct(raw, _MAX_DEPTH)
        unpacked, packed = (sizes.get(field, -1) for field in (_UNPACKED, _PACKED))
        if unpacked < 0 or packed < 0:
            raise ValueError("a page without its size")
        total += unpacked
        start = raw.tell() + packed
    return total


def _read_struct(raw: IO[bytes], depth: int) -> dict[int, int]:
    """The whole numbers among the fields of a struct."""
    numbers, field = dict[int, int](), 0
    while head := _read_byte(raw):
        kind, step = head & 15, head >> 4
        field = field + step if step else _read_integer(raw)
        value = _read_value(raw, kind, depth)
        if value is not None:
            numbers[field] = value
    return numbers


def _read_value(raw: IO[bytes], kind: int, depth: int) -> int | None:
    """A value; None unless it is a whole number. `depth`: so many structs and lists may be in one another."""
    if not depth:
        raise ValueError("the header of a page is nested too deeply")
    if _BYTE < kind <= _I64:
        return _read_integer(raw)
    if kind in _WIDTHS:
        raw.seek(_WIDTHS[kind], 1)
    elif kind == _BINARY:
        raw.seek(_read_varint(raw), 1)
    elif kind == _STRUCT:
        _read_struct(raw, depth - 1)
    elif kind in (_LIST, _SET):
        head = _read_byte(raw)
        # In a list, a boolean takes a byte.
        item = head & 15 if head & 15 not in _BOOLEANS else _BYTE
        for _ in range(head >> 4 if head >> 4 < 15 else _read_varint(raw)):
            _read_value(raw, item, depth - 1)
    else:
        raise ValueError("the header of a page has a field of unknown type")
    return None


def _read_byte(raw: IO[bytes]) -> int:
    data = raw.read(1)
    if not data:
        raise ValueError("the header of a page is cut off")
    return data[0]


def _read_varint(raw: IO[bytes]) -> int:
    value = shift = 0
    while shift < 64:
        byte = _read_byte(raw)
        value |= (byte & 127) << shift
        if byte < 128:
            return value
        shift += 7
    raise ValueError("the header of a page has a number of more than 64 bits")


def _read_integer(raw: IO[bytes]) -> int:
    """A signed number, in zigzag encoding."""
    value = _read_varint(raw)
    return (value >> 1) ^ -(value & 1)

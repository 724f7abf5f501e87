"""Text of plain and compressed files: blocks of bytes, and lines with their numbers, read as a stream.

Errors are `DataError`s with the location `file:line`.
"""

from __future__ import annotations

import codecs
import gzip
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, NamedTuple

from postgrad.data.read.files import COMPRESSIONS, error_reason
from postgrad.errors import DataError, MissingExtra
from postgrad.storage.regular_file import open_regular_file

LINE_CAP = 128 * 2**20
"""Bytes in one line: more is a broken file, not a document."""

UNPACK_RATIO, UNPACK_BYTES = 200, 2**28
"""A compressed file may unpack to so many times its size, or to so many bytes, whichever is more."""

_BLOCK = 2**18
_ZSTD_WINDOW = 2**31
"""The longest window that zstandard writes (`zstd --long=31`)."""
_ZSTD_BLOCK = 2**11
"""A byte of zstandard can decompress to 32,768: 2 KiB of input bound the output of one call."""

ReadCallback = Callable[[int], None]
"""Called with the number of bytes read from the file on disk since the last call."""


class Line(NamedTuple):
    """A line of a text file, its end-of-line characters included."""

    number: int
    text: str


class BrokenStream(Exception):
    """A stream that cannot be read further; the caller knows the line and raises a `DataError`."""


class UnpackLimit:
    """Counts what a compressed file unpacks to, which may not be out of proportion to its size."""

    def __init__(self, file: Path) -> None:
        self.unpacked, self.max_bytes = 0, max(UNPACK_BYTES, UNPACK_RATIO * file.stat().st_size)

    def add(self, size: int) -> None:
        """Count further bytes. Raises `BrokenStream` when there are too many."""
        self.unpacked += size
        self.check(self.unpacked)

    def check(self, size: int) -> None:
        """Raise `BrokenStream` for a size above the limit."""
        if size > self.max_bytes:
            raise BrokenStream(
                f"it unpacks to more than {UNPACK_RATIO} times its size (limit: {self.max_bytes:,} bytes); "
                "if it is what it should be, unpack it before"
            )


def ignore_progress(_: int) -> None:
    pass


def read_blocks(file: Path, on_read: ReadCallback) -> Iterator[bytes]:
    """The decompressed bytes of `file`, at most a few MiB at a time."""
    suffix = file.suffix.lower()
    try:
        with open_regular_file(file) as raw:
            reader = {".gz": _read_gzip, ".zst": _read_zstd}.get(suffix, _read_plain)
            limit = UnpackLimit(file) if suffix in COMPRESSIONS else None
            reported = 0
            for block in reader(raw):
                if limit:
                    limit.add(len(block))
                if block:
                    yield block
                offset = raw.tell()
                on_read(offset - reported)
                reported = offset
    except EOFError:
        raise BrokenStream("the compressed file is truncated") from None
    except (OSError, zlib.error) as error:
        raise BrokenStream(f"cannot be read: {error_reason(error)}") from None


def _read_plain(raw: IO[bytes]) -> Iterator[bytes]:
    while block := raw.read(_BLOCK):
        yield block


def _read_gzip(raw: IO[bytes]) -> Iterator[bytes]:
    with gzip.GzipFile(fileobj=raw) as stream:
        while block := stream.read1(_BLOCK):  # yields all complete data before it raises an error
            yield block


def _read_zstd(raw: IO[bytes]) -> Iterator[bytes]:
    try:
        import zstandard
    except ImportError:
        raise MissingExtra(
            "reading .zst needs the package zstandard", where=raw.name, hint="pip install zstandard"
        ) from None
    # A file can consist of several frames; a frame's leftover input starts the next.
    frame = None
    try:
        while data := raw.read(_ZSTD_BLOCK):
            while data:
                frame = frame or zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW).decompressobj()
                yield frame.decompress(data)
                data = frame.unused_data if frame.eof else b""
                frame = None if frame.eof else frame
    except zstandard.ZstdError as error:
        raise OSError(f"not zstandard data ({error})") from None
    if frame is not None:
        raise EOFError


def read_lines(file: Path, on_read: ReadCallback = ignore_progress) -> Iterator[Line]:
    """The lines of a text file, each with its end, so that joined together they are the file (without its BOM).

    A line ends at `\\n`. Raises `DataError` for bytes that are not UTF-8, a NUL, a line above `LINE_CAP` or a truncated
    compressed file.
    """
    number = 0
    for number, line in enumerate(_byte_lines(file, on_read), 1):
        if number == 1:
            refuse_utf16(line, file)
            line = line.removeprefix(codecs.BOM_UTF8)
            if not line:
                continue
        try:
            text = line.decode()
        except UnicodeDecodeError as error:
            raise not_utf8_error(file, number, line[error.start], error.start + 1) from None
        if "\0" in text:
            raise DataError("a NUL character: this is not a text file", where=f"{file}:{number}", expected="UTF-8 text")
        yield Line(number, text)


def _byte_lines(file: Path, on_read: ReadCallback) -> Iterator[bytes]:
    number, pending, size = 1, [], 0
    try:
        for block in read_blocks(file, on_read):
            start = 0
            if pending:  # the start of a line that a former block left open
                end = block.find(b"\n") + 1
                pending.append(block[:end] if end else block)
                size += len(pending[-1])
                if size > LINE_CAP:
                    pending = []
                    raise BrokenStream(f"a line of more than {LINE_CAP:,} bytes")
                if not end:
                    continue
                yield b"".join(pending)
                number, pending, size, start = number + 1, [], 0, end
            lines = block[start:].splitlines(keepends=True) if b"\r" not in block else _split_lines(block[start:])
            if lines and not lines[-1].endswith(b"\n"):
                pending = [lines.pop()]
                size = len(pending[0])
            for line in lines:
                yield line
                number += 1
        if pending:
            yield b"".join(pending)
    except BrokenStream as error:
        raise DataError(str(error), where=f"{file}:{number}", expected="a complete, readable file") from None


def _split_lines(block: bytes) -> list[bytes]:
    """Lines that end at `\\n` only; `splitlines` would also end them at a lone `\\r`."""
    lines = [line + b"\n" for line in block.split(b"\n")]
    lines[-1] = lines[-1][:-1]
    return lines if lines[-1] else lines[:-1]


def refuse_utf16(start: bytes, file: Path) -> None:
    """Raise `DataError` when the first bytes of a file are a UTF-16 BOM."""
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise DataError(
            "the file is UTF-16, not UTF-8",
            where=f"{file}:1",
            expected="UTF-8 text",
            hint=f"iconv -f UTF-16 -t UTF-8 {file} > new-file",
        )


def not_utf8_error(file: Path, line: int, byte: int, column: int) -> DataError:
    return DataError(
        f"byte 0x{byte:02x} at position {column} is not UTF-8",
        where=f"{file}:{line}",
        expected="UTF-8 text",
        hint="convert the file, for instance with iconv -f LATIN1 -t UTF-8",
    )

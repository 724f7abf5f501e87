"""Which files hold the text, and what rows are in them?

A source is a file, a folder, a pattern or a Hub data set. Its rows are read as a stream: memory does not grow
with the file, whether it is text, JSON lines, one huge JSON array, CSV or Parquet, plain or compressed. Every
row knows its place (`file:line`, or `file:row` where lines mean nothing), and everything that can be wrong
with a file ends in a `DataError` that names the place.
"""

from __future__ import annotations

import codecs
import csv
import glob
import gzip
import json
import os
import re
import tempfile
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any, NamedTuple

from postgrad.errors import DataError, MissingExtra, suggest_nearest

FILE_SUFFIXES = (".txt", ".md", ".jsonl", ".json", ".csv", ".parquet")
COMPRESSIONS = (".gz", ".zst")
TEXT_SUFFIXES = (".txt", ".md")

LINE_CAP = 128 * 2**20
"""Bytes in one line: more is a broken file, not a document."""

VALUE_CAP = 64 * 2**20
"""Characters in one value of a `.json` file (a window of twice as many is held while it is sought)."""

FIELD_CAP = 16 * 2**20
"""Characters in one CSV field. The parser holds four bytes for each, and a lost quote swallows the rest."""

_BLOCK = 2**18
_ZST_FEED = 2**11
"""A compressed byte of zstandard can stand for 32,768: feeding 2 KiB bounds what one call can return."""
_BOMB_RATIO, _BOMB_BYTES = 200, 2**30

ReadCallback = Callable[[int], None]
"""Told how many more bytes of the file on disk have been read."""


@dataclass(frozen=True)
class HubDataset:
    """A data set of the Hugging Face Hub (or a folder that `datasets.load_dataset` understands)."""

    name: str
    subset: str | None = None
    split: str = "train"
    revision: str | None = None


@dataclass(frozen=True)
class RawSource:
    """One source of a mixture: where its rows are, and how they become documents.

    `path` (relative to `root`) or `hub` is given, never both. `columns` renames (`{"text": "abstract"}`);
    `documents` says how a text file is cut (`auto`, `file`, `passages`, `paragraphs`, `lines`); `where` is
    the key path that errors name, such as `data.sources[0]`; `kind` is what the rows are, `auto` what their
    columns say; of `only` each column must have one of the values (as text) for a row to be read.
    """

    name: str
    path: str | None = None
    hub: HubDataset | None = None
    columns: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    documents: str = "auto"
    root: Path = Path()
    where: str = "data.sources"
    kind: str = "auto"
    row_filter: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: MappingProxyType({}))

    def __post_init__(self) -> None:
        if (self.path is None) == (self.hub is None):
            met = "neither a path nor a Hub data set" if self.path is None else "a path and a Hub data set"
            raise DataError(
                f"source '{self.name}' has {met}",
                where=self.where,
                expected="exactly one of `path` and `hub`",
            )


class Line(NamedTuple):
    """A line of a text file, its end-of-line characters included."""

    number: int
    text: str


class Record(NamedTuple):
    """A record and its place: `file:line`, or `file:row` for Parquet, JSON and Hub rows; both from 1."""

    values: Mapping[str, Any]
    file: str
    number: int

    @property
    def location(self) -> str:
        return f"{self.file}:{self.number}"


# --- finding files -------------------------------------------------------------------------------------


def file_suffix(file: Path) -> str:
    """The suffix that says how to read `file`, without its compression; empty when it is none of `KINDS`."""
    name = file.name.lower()
    for compression in COMPRESSIONS:
        name = name.removesuffix(compression)
    suffix = Path(name).suffix
    return suffix if suffix in FILE_SUFFIXES else ""


def find_files(path: str, root: Path, where: str) -> list[Path]:
    """The files that `path` (a file, a folder or a pattern, `**` included) means, sorted, relative to `root`.

    A folder is searched to its depth for known suffixes; hidden files are passed over. Raises a `DataError`
    that names the pattern when nothing matches.
    """
    if not path or "\0" in path:
        raise DataError(f"{path!r} is not a path", where=where, expected="a file, a folder or a pattern")
    given = root / Path(path).expanduser()
    try:
        if given.is_dir():
            met = _walk_files(given)
        elif given.exists():
            met = [given]
        else:
            pattern = str(Path(glob.escape(str(root))) / Path(path).expanduser())
            met = [Path(name) for name in glob.glob(pattern, recursive=True)]
            met = [file for file in met if not file.is_dir()]
        found = sorted({file for file in met if file_suffix(file) and file.is_file()}, key=lambda file: file.parts)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {_error_reason(error)}", where=where) from None
    if found:
        return found
    if met:
        raise DataError(
            f"{path} holds no file of a known kind (met: {_format_names(file.name for file in sorted(met))})",
            where=where,
            expected=f"{' '.join(FILE_SUFFIXES)}, each also with {' or '.join(COMPRESSIONS)}",
        )
    if given.is_dir():
        raise DataError(f"the folder {path} holds no files", where=where, expected=f"files: {' '.join(FILE_SUFFIXES)}")
    raise DataError(
        f"no file matches {path}",
        where=where,
        expected="a file, a folder or a pattern",
        hint=_path_hint(given),
    )


def _walk_files(folder: Path) -> list[Path]:
    files: list[Path] = []
    for here, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        files += [Path(here, name) for name in names if not name.startswith(".")]
    return files


def _path_hint(missing: Path) -> str:
    """A hint: the near name beside the missing one, or what is there."""
    parent = missing.parent
    while not parent.is_dir() and parent != parent.parent:
        missing, parent = parent, parent.parent
    try:
        names = sorted(entry.name for entry in parent.iterdir() if not entry.name.startswith("."))
    except OSError:
        return ""
    return suggest_nearest(missing.name, names) or (
        f"{parent} holds {_format_names(names)}" if names else f"{parent} is empty"
    )


def _format_names(names: Collection[str] | Iterator[str], limit: int = 6) -> str:
    listed = list(names)
    return ", ".join(listed[:limit]) + (f" and {len(listed) - limit} more" if len(listed) > limit else "")


def _error_reason(error: BaseException) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__


# --- bytes ---------------------------------------------------------------------------------------------


class _BrokenStream(Exception):
    """A stream that cannot be read on; the reader above knows the line and turns it into a `DataError`."""


def _ignore_progress(_: int) -> None:
    pass


def _read_blocks(file: Path, on_read: ReadCallback) -> Iterator[bytes]:
    """The bytes of `file` with its compression taken off, at most a few MiB at a time."""
    suffix = file.suffix.lower()
    try:
        with open(file, "rb") as raw:
            reader = {".gz": _read_gzip, ".zst": _read_zstd}.get(suffix, _read_plain)
            done = 0
            for block in reader(raw):
                if block:
                    yield block
                on_read((at := raw.tell()) - done)
                done = at
    except (OSError, EOFError, zlib.error) as error:
        cut = isinstance(error, EOFError)
        raise _BrokenStream(
            "the compressed file is cut off" if cut else f"cannot be read: {_error_reason(error)}"
        ) from None


def _read_plain(raw: IO[bytes]) -> Iterator[bytes]:
    while block := raw.read(_BLOCK):
        yield block


def _read_gzip(raw: IO[bytes]) -> Iterator[bytes]:
    with gzip.GzipFile(fileobj=raw) as stream:
        while block := stream.read1(_BLOCK):  # what is whole comes before the error behind it
            yield block


def _read_zstd(raw: IO[bytes]) -> Iterator[bytes]:
    try:
        import zstandard
    except ImportError:
        raise MissingExtra(
            "reading .zst needs the package zstandard", where=raw.name, hint="pip install zstandard"
        ) from None
    frame = None
    try:
        while fed := raw.read(_ZST_FEED):
            while fed:
                frame = frame or zstandard.ZstdDecompressor().decompressobj()
                yield frame.decompress(fed)
                fed = frame.unused_data if frame.eof else b""
                frame = None if frame.eof else frame
    except zstandard.ZstdError as error:
        raise OSError(f"not zstandard data ({error})") from None
    if frame is not None:
        raise EOFError


# --- lines ---------------------------------------------------------------------------------------------


def read_lines(file: Path, on_read: ReadCallback = _ignore_progress) -> Iterator[Line]:
    """The lines of a text file, each with its end, so that joined together they are the file (less its BOM).

    A line ends at `\\n`. Raises `DataError` with `file:line` for bytes that are not UTF-8, a NUL, a line
    above `LINE_CAP` or a compressed file that is cut off.
    """
    number = 0
    for number, line in enumerate(_byte_lines(file, on_read), 1):
        if number == 1:
            _refuse_utf16(line, file)
            line = line.removeprefix(codecs.BOM_UTF8)
            if not line:
                continue
        try:
            text = line.decode()
        except UnicodeDecodeError as error:
            raise _not_utf8_error(file, number, line[error.start], error.start + 1) from None
        if "\0" in text:
            raise DataError("a NUL character: this is not a text file", where=f"{file}:{number}", expected="UTF-8 text")
        yield Line(number, text)


def _byte_lines(file: Path, on_read: ReadCallback) -> Iterator[bytes]:
    number, pending, size = 1, [], 0
    try:
        for block in _read_blocks(file, on_read):
            start = 0
            if pending:
                end = block.find(b"\n") + 1
                pending.append(block[:end] if end else block)
                size += len(pending[-1])
                if size > LINE_CAP:
                    pending = []
                    raise _BrokenStream(f"a line of more than {LINE_CAP:,} bytes")
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
    except _BrokenStream as error:
        raise DataError(str(error), where=f"{file}:{number}", expected="a whole, readable file") from None


def _split_lines(block: bytes) -> list[bytes]:
    """Lines that end at `\\n` only: `splitlines` would also end them at a lone `\\r`."""
    lines = [line + b"\n" for line in block.split(b"\n")]
    lines[-1] = lines[-1][:-1]
    return lines if lines[-1] else lines[:-1]


def _refuse_utf16(start: bytes, file: Path) -> None:
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise DataError(
            "the file is UTF-16, not UTF-8",
            where=f"{file}:1",
            expected="UTF-8 text",
            hint=f"iconv -f UTF-16 -t UTF-8 {file} > new-file",
        )


def _not_utf8_error(file: Path, line: int, byte: int, column: int) -> DataError:
    return DataError(
        f"byte 0x{byte:02x} at position {column} is not UTF-8",
        where=f"{file}:{line}",
        expected="UTF-8 text",
        hint="convert the file, for instance with iconv -f LATIN1 -t UTF-8",
    )


# --- rows ----------------------------------------------------------------------------------------------


def read_records(
    file: Path, column_names: Collection[str] | None = None, on_read: ReadCallback = _ignore_progress
) -> Iterator[Record]:
    """The records of `file`, one at a time; a text file gives a row `{"text": line}` for each line.

    `wanted` names the columns that will be looked at (Parquet reads no other). `seen` is told of the bytes
    read. Raises `DataError` with the place of whatever cannot be read.
    """
    kind = file_suffix(file)
    if kind in TEXT_SUFFIXES:
        return (Record({"text": text}, str(file), number) for number, text in read_lines(file, on_read))
    if kind == ".jsonl":
        return _read_json_lines(file, on_read)
    if kind == ".json":
        return _read_json(file, on_read)
    if kind == ".csv":
        return _read_csv(file, on_read)
    if kind == ".parquet":
        return _read_parquet(file, column_names, on_read)
    raise DataError(f"{file.name} is of no known kind", where=str(file), expected=" ".join(FILE_SUFFIXES))


def _to_record(value: object, file: str, number: int) -> Record:
    if not isinstance(value, dict):
        names = ((list, "a list"), (str, "a string"), (type(None), "null"), (bool, "true or false"))
        name = next((name for kind, name in names if isinstance(value, kind)), "a number")
        expected = 'an object, {"text": ...}'
        raise DataError(f"{name} instead of a record", where=f"{file}:{number}", expected=expected)
    return Record(value, file, number)


def _json_error_message(error: Exception) -> str:
    """What a JSON parser's exception means: broken syntax, absurd nesting, or a number too long to read."""
    if isinstance(error, RecursionError):
        return "the JSON is nested too deeply"
    if isinstance(error, json.JSONDecodeError):
        return f"broken JSON: {error.msg}"
    return "a number of thousands of digits"


def _read_json_lines(file: Path, on_read: ReadCallback) -> Iterator[Record]:
    name, parse = str(file), json.JSONDecoder().decode
    for number, text in read_lines(file, on_read):
        if not text.strip():
            continue
        try:
            value = parse(text)
        except (ValueError, RecursionError) as error:
            column = f" (column {error.pos + 1})" if isinstance(error, json.JSONDecodeError) else ""
            raise DataError(
                _json_error_message(error) + column, where=f"{name}:{number}", expected="one JSON object a line"
            ) from None
        yield _to_record(value, name, number)


class _TextWindow:
    """A window over the decoded text of a file that can be moved on and enlarged."""

    def __init__(self, file: Path, on_read: ReadCallback) -> None:
        self.file, self.window, self.offset, self.line, self.is_exhausted = file, "", 0, 1, False
        self._blocks = _read_blocks(file, on_read)
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._is_first_block = True

    def read_more(self) -> None:
        """Drops what lies behind `at` and reads on: at least as much again as is already held."""
        self.line += self.window.count("\n", 0, self.offset)
        parts, self.offset = [self.window[self.offset :]], 0
        held = goal = len(parts[0])
        try:
            while held <= 2 * goal and not self.is_exhausted:
                block = next(self._blocks, b"")
                if self._is_first_block:
                    _refuse_utf16(block, self.file)
                    self._is_first_block = False
                self.is_exhausted = not block
                parts.append(self._decoder.decode(block, final=self.is_exhausted))
                held += len(parts[-1])
        except _BrokenStream as error:
            line = self.line + sum(part.count("\n") for part in parts)
            raise DataError(str(error), where=f"{self.file}:{line}", expected="a whole, readable file") from None
        except UnicodeDecodeError as error:
            before = self.line + sum(part.count("\n") for part in parts)
            good = error.object[: error.start]
            column = error.start - good.rfind(b"\n")
            raise _not_utf8_error(self.file, before + good.count(b"\n"), error.object[error.start], column) from None
        self.window = "".join(parts)

    def peek(self) -> str:
        """The next character that is not white space, or an empty string at the end of the file."""
        while True:
            self.offset = _SPACE.match(self.window, self.offset).end()  # type: ignore[union-attr]
            if self.offset < len(self.window) or self.is_exhausted:
                return self.window[self.offset : self.offset + 1]
            self.read_more()

    def json_error(self, problem: str, offset: int | None = None) -> DataError:
        line = self.line + self.window.count("\n", 0, self.offset if offset is None else offset)
        return DataError(
            problem, where=f"{self.file}:{line}", expected="an array of JSON objects, or one object a line"
        )


_SPACE = re.compile(r"[ \t\n\r]*")


def _read_json(file: Path, on_read: ReadCallback) -> Iterator[Record]:
    """The elements of one array, or objects one after another; never more than one of them in memory."""
    text, parse, name, number = _TextWindow(file, on_read), json.JSONDecoder().raw_decode, str(file), 0
    array = text.peek() == "["
    if array:
        text.offset += 1
        if text.peek() == "]":
            text.offset += 1
            array = False
    while following := text.peek():
        if array and number and following == "]":
            text.offset += 1
            array = False
            continue
        if array and number:
            if following != ",":
                raise text.json_error("broken JSON: Expecting ',' delimiter")
            text.offset += 1
            text.peek()
        number += 1
        while True:
            try:
                value, end = parse(text.window, text.offset)
            except json.JSONDecodeError as error:
                # A value that runs beyond the window fails at its end, or as a string without an end.
                runs_on = error.msg.startswith("Unterminated") or error.pos >= len(text.window) - 16
                if text.is_exhausted or not runs_on:
                    raise text.json_error(_json_error_message(error), error.pos) from None
            except (ValueError, RecursionError) as error:
                raise text.json_error(_json_error_message(error)) from None
            else:
                # A number at the end of the window may go on behind it.
                if end < len(text.window) or text.is_exhausted:
                    break
            if len(text.window) - text.offset > VALUE_CAP:
                raise text.json_error(f"a JSON value of more than {VALUE_CAP:,} characters")
            text.read_more()
        row = _to_record(value, name, number)
        text.offset = end
        del value
        yield row
    if array:
        raise text.json_error("broken JSON: the array has no end")


def _read_csv(file: Path, on_read: ReadCallback) -> Iterator[Record]:
    name = str(file)
    csv.field_size_limit(max(FIELD_CAP, csv.field_size_limit()))  # of the process: the module has no other
    table = csv.reader((line.text for line in read_lines(file, on_read)), strict=True)
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
        place, start = start, table.line_num + 1
        if not cells:
            continue
        if header is None:
            header = cells
            if len(set(header)) < len(header) or not all(header):
                raise DataError(
                    f"the header names a column twice or not at all: {_format_names(header)}",
                    where=f"{name}:{place}",
                    expected="one name for each column",
                )
            continue
        if len(cells) != len(header):
            raise DataError(
                f"{len(cells)} fields",
                where=f"{name}:{place}",
                expected=f"{len(header)} fields, as in the header",
            )
        yield Record(dict(zip(header, cells, strict=True)), name, place)


def _read_parquet(file: Path, column_names: Collection[str] | None, on_read: ReadCallback) -> Iterator[Record]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise MissingExtra(
            "reading .parquet needs the package pyarrow", where=str(file), hint="pip install pyarrow"
        ) from None
    name, number = str(file), 0
    try:
        with _open_unpacked(file) as raw:
            table = pyarrow.parquet.ParquetFile(raw, buffer_size=2**20, pre_buffer=False)
            rows = max(1, table.metadata.num_rows)
            names = [column for column in table.schema_arrow.names if column_names is None or column in column_names]
            groups = (table.metadata.row_group(index) for index in range(table.metadata.num_row_groups))
            held = sum(group.total_byte_size for group in groups)
            at_once = min(2048, max(1, 2**22 * rows // max(1, held)))  # about 4 MiB of rows
            size = file.stat().st_size
            for batch in table.iter_batches(batch_size=at_once, columns=names):
                columns = [batch.column(index) for index in range(batch.num_columns)]
                try:
                    values = [column.to_pylist() for column in columns]
                except ValueError:  # text that is not UTF-8: go row by row to find the place
                    for index in range(batch.num_rows):
                        number += 1
                        cells = [column[index].as_py() for column in columns]
                        yield Record(dict(zip(names, cells, strict=True)), name, number)
                    continue
                for cells in zip(*values, strict=True) if names else [()] * batch.num_rows:
                    number += 1
                    yield Record(dict(zip(names, cells, strict=True)), name, number)
                on_read(size * number // rows - size * (number - batch.num_rows) // rows)
    except UnicodeDecodeError as error:
        raise _not_utf8_error(file, number, error.object[error.start], error.start + 1) from None
    except (_BrokenStream, pyarrow.ArrowException, OSError, ValueError, OverflowError, RecursionError) as error:
        raise DataError(
            f"not a whole Parquet file: {_error_reason(error).splitlines()[0]}", where=f"{name}:{number + 1}"
        ) from None


def _open_unpacked(file: Path) -> IO[bytes]:
    """Parquet is read from its end, so a compressed one is unpacked into a file that has no name."""
    if file.suffix.lower() not in COMPRESSIONS:
        return open(file, "rb")
    spool = tempfile.TemporaryFile()  # noqa: SIM115 (the caller closes it)
    try:
        written, most = 0, max(_BOMB_BYTES, _BOMB_RATIO * file.stat().st_size)
        for block in _read_blocks(file, _ignore_progress):
            written += len(block)
            if written > most:
                raise _BrokenStream(f"it unpacks to more than {_BOMB_RATIO} times its size")
            spool.write(block)
        spool.seek(0)
    except BaseException:
        spool.close()
        raise
    return spool


# --- the Hub -------------------------------------------------------------------------------------------


def read_hub(hub: HubDataset, root: Path, where: str) -> Iterator[Record]:
    """The rows of a Hub data set, streamed through the package `datasets`; a row's place is `name/split:row`.

    A folder under `root` with the name given is read in the Hub's stead. Raises `MissingExtra` without
    `datasets`, and `DataError` for whatever goes wrong inside it.
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
            yield _to_record(values, f"{hub.name}/{hub.split}", number)
    except DataError:
        raise
    except Exception as error:  # its exceptions have no common root, its file systems raise anything
        said = next(iter(str(error).splitlines()), "")
        raise DataError(
            f"{hub.name} ({hub.split}) cannot be read: {type(error).__name__}: {said}",
            where=f"{where} row {number + 1}",
            expected="a data set, subset, split and revision that `datasets.load_dataset` can stream",
        ) from None

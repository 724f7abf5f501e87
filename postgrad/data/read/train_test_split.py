"""Which rows of one file are trained on, and which are kept to test? Two files, where a user has one.

A row goes by the hash of what it holds, so copies of a row are in the same part, and a row is in the same part every time.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from postgrad.data.read.files import RawSource, Record, find_files, read_records
from postgrad.data.tokens.store import digest
from postgrad.errors import DataError
from postgrad.storage.atomic import write_atomically

_TEST_EVERY = 5
"""One row of so many is kept to test."""
_MIN_ROWS = 10
"""Different rows, of which two parts can be made."""


def split_rows(source: RawSource, train: Path, test: Path) -> tuple[int, int]:
    """Write four fifths of the different rows of a source to `train` and one to `test`, as JSON lines; returns how many.

    Both are in the order of the source. Raises `DataError` for a row that cannot be read, and for too few rows.
    """
    lines = list(dict.fromkeys(map(_json_line, _read_records(source))))
    if len(lines) < _MIN_ROWS:
        raise DataError(
            f"{len(lines)} different rows",
            where=source.where,
            expected=f"at least {_MIN_ROWS}, of which a fifth is kept to test",
            hint="name the rows to test with --test",
        )
    kept = set(sorted(lines, key=lambda line: digest(line.encode()))[: len(lines) // _TEST_EVERY])
    parts = [line for line in lines if line not in kept], [line for line in lines if line in kept]
    for place, part in zip((train, test), parts, strict=True):
        write_atomically(place, "".join(f"{line}\n" for line in part))
    return len(parts[0]), len(parts[1])


def _read_records(source: RawSource) -> Iterator[Record]:
    assert source.path is not None
    for file in find_files(source.path, source.root, source.where):
        yield from read_records(file)


def _json_line(record: Record) -> str:
    return json.dumps(record.values, ensure_ascii=False, default=str)  # a date of a Parquet file is a text

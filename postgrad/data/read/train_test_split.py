"""A train/test split of one source into two files.

Rows are assigned by the hash of their content, so duplicates fall on the same side and the split is reproducible.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from postgrad.data.read.files import RawRow, RawSource
from postgrad.data.read.records import read_records
from postgrad.data.tokens.store import digest
from postgrad.errors import DataError
from postgrad.storage.atomic import write_atomically

_TEST_EVERY = 5
_MIN_ROWS = 10


def split_rows(source: RawSource, train: Path, test: Path) -> tuple[int, int]:
    """Write four fifths of the distinct rows of a source to `train` and one fifth to `test`, as JSON lines, in order.

    Returns the numbers of rows. Raises `DataError` for a row that cannot be read, and for too few rows.
    """
    lines = list(dict.fromkeys(map(_json_line, _read_records(source))))
    if len(lines) < _MIN_ROWS:
        raise DataError(
            f"{len(lines)} distinct rows",
            where=source.where,
            expected=f"at least {_MIN_ROWS}, of which a fifth becomes the test set",
            hint="name a file of test rows with --test",
        )
    test_lines = set(sorted(lines, key=lambda line: digest(line.encode()))[: len(lines) // _TEST_EVERY])
    parts = [line for line in lines if line not in test_lines], [line for line in lines if line in test_lines]
    for path, part in zip((train, test), parts, strict=True):
        write_atomically(path, "".join(f"{line}\n" for line in part))
    return len(parts[0]), len(parts[1])


def _read_records(source: RawSource) -> Iterator[RawRow]:
    for file in source.list_files().files:
        yield from read_records(file)


def _json_line(record: RawRow) -> str:
    return json.dumps(record.values, ensure_ascii=False, default=str)  # a Parquet date becomes a string

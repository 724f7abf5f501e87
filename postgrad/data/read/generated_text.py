"""Was a text written by a model? Rows that `postgrad synthesize` writes say so in a column of their own."""

from __future__ import annotations

from typing import Any

from postgrad.data.read.files import TEXT_KINDS, Source, find_files, kind_of, read_rows

MADE = "made"
"""The column that tells how a row came to be."""


def made_by(source: Source) -> str | None:
    """The model that wrote a source's rows, by the first row of its first file; None for any other text."""
    if source.path is None:
        return None
    for file in find_files(source.path, source.root, source.where):
        if kind_of(file) in TEXT_KINDS:
            return None
        for row in read_rows(file):
            told: Any = row.values.get(MADE)
            return str(told["by"]) if isinstance(told, dict) and "by" in told else None
    return None

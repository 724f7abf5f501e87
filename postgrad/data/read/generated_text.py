"""Was a text written by a model? Rows that `postgrad synthesize` writes say so in a column of their own."""

from __future__ import annotations

from typing import Any

from postgrad.data.read.files import TEXT_SUFFIXES, RawSource, file_suffix, find_files, read_records

GENERATED_COLUMN = "made"
"""The column that tells how a row came to be."""


def get_generator_model(source: RawSource) -> str | None:
    """The model that wrote a source's rows, by the first row of its first file; None for any other text."""
    if source.path is None:
        return None
    for file in find_files(source.path, source.root, source.where):
        if file_suffix(file) in TEXT_SUFFIXES:
            return None
        for row in read_records(file):
            told: Any = row.values.get(GENERATED_COLUMN)
            return str(told["by"]) if isinstance(told, dict) and "by" in told else None
    return None

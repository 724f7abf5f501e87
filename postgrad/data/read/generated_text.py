"""The mark of generated text: a column that `postgrad synthesize` adds to every row it writes."""

from __future__ import annotations

from typing import Any

from postgrad.data.read.files import TEXT_SUFFIXES, RawSource, file_suffix
from postgrad.data.read.records import read_records

GENERATED_COLUMN = "made"
"""The column with a row's provenance."""


def get_generator_model(source: RawSource) -> str | None:
    """The model that generated a source, from the first row of its first file; None for other text."""
    if source.path is None:
        return None
    for file in source.list_files().files:
        if file_suffix(file) in TEXT_SUFFIXES:
            return None
        for record in read_records(file):
            provenance: Any = record.values.get(GENERATED_COLUMN)
            return str(provenance["by"]) if isinstance(provenance, dict) and "by" in provenance else None
    return None

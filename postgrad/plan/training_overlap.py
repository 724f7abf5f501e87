"""13-gram overlap of held-out files with the training text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from postgrad.config import stage as s
from postgrad.data.filter.contamination import measure_overlap
from postgrad.data.read.documents import Document, read_documents
from postgrad.data.read.files import RawSource as Files
from postgrad.data.words import SEGMENTATION
from postgrad.errors import DataError
from postgrad.lineage.record import Contamination
from postgrad.plan.held_out_files import inherit_row_format
from postgrad.plan.sources import ResolvedSource, make_text_files
from postgrad.storage.checked_files import read_cached_json, write_checked_json
from postgrad.storage.fingerprint import fingerprint


def measure_overlaps(
    stage: s.Stage, root: Path, sources: Sequence[ResolvedSource], cache: Path, notes: list[str]
) -> dict[str, Contamination]:
    """Overlap of each held-out file with the training text (a source's own split is exact by construction)."""
    if stage.data.overlap == "off":
        return {}
    overlaps: dict[str, Contamination] = {}
    by_source = {source.spec.source: source.spec for source in sources}
    for role, item in stage.evaluation.held_out_files():
        files = make_text_files(item.name, inherit_row_format(item, role, by_source), root, f"evaluation.{role}")
        counts = overlaps[item.name] = _count_overlaps(files, sources, cache)
        if counts.half_overlap:
            message = (
                f"{item.name}: {counts.half_overlap:,} of {counts.documents:,} held-out documents share at least half of "
                f"their 13-grams with the training text"
            )
            if stage.data.overlap == "refuse":
                raise DataError(message, where=f"evaluation.{role}", hint="remove them, or set data.overlap: report")
            notes.append(message)
    return overlaps


def _count_overlaps(files: Files, sources: Sequence[ResolvedSource], cache: Path) -> Contamination:
    stores = sorted(source.store.fingerprint for source in sources)
    key = fingerprint([str(files), stores, _file_stamps(files), SEGMENTATION])
    path = cache / "contamination" / f"{key}.json"
    if found := read_cached_json(path, Contamination, key):
        return found
    report = measure_overlap(
        read_documents(files), (document for source in sources for document in _read_training_documents(source))
    )
    counts = Contamination(
        documents=report.documents,
        duplicates=report.duplicates,
        any_overlap=report.overlapping,
        half_overlap=report.half_overlapping,
    )
    write_checked_json(path, counts.as_json(), key)
    return counts


def _read_training_documents(source: ResolvedSource) -> Iterator[Document]:
    """The documents of a source that its filters keep."""
    documents = read_documents(source.files)
    if not source.selection:
        return documents
    selected = set(np.asarray(source.store.documents)["digest"].tolist())
    return (document for document in documents if document.digest in selected)


def _file_stamps(files: Files) -> list[list[Any]]:
    if files.path is None:
        return []
    return [[str(p), p.stat().st_size, p.stat().st_mtime_ns] for p in files.list_files().files]

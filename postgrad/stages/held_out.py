"""Which text is scored, and does it occur in the training text?"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from postgrad.data.formats import read_documents
from postgrad.data.overlap import OverlapReport, overlap
from postgrad.data.rows import held_out_mask
from postgrad.data.sources import Source as Files
from postgrad.data.sources import find_files
from postgrad.data.store import TokenStore
from postgrad.data.tokenize import Encoder
from postgrad.errors import DataError, StageError
from postgrad.evaluation.held_out import HeldOut
from postgrad.lineage.fingerprint import fingerprint
from postgrad.publish import write_atomically
from postgrad.stages import stage as s
from postgrad.stages.leaves import Leaf, Progress, store_of


def held_out_sets(
    stage: s.Stage,
    root: Path,
    leaves: Sequence[Leaf],
    seen: dict[str, dict[str, Any]],
    encoder: Encoder,
    cache: Path,
    progress: Progress | None,
    notes: list[str],
) -> tuple[list[HeldOut], list[np.ndarray]]:
    """The sets to be scored, and the document tables of all held-out text (training copies are dropped)."""
    sets: list[HeldOut] = []
    tables: list[np.ndarray] = []
    limit = stage.evaluation.max_tokens
    listed = [("retained", item) for item in stage.evaluation.retained]
    listed += [("learned", item) for item in stage.evaluation.learned]
    for role, item in listed:
        files = held_out_files(item, root, f"evaluation.{role}")
        store = store_of(files, encoder, cache, progress, stage.data.workers)
        sets.append(held_out_set(item.name, role, store, np.arange(len(store)), limit, encoder, notes))
        tables.append(np.asarray(store.documents))
    for leaf in leaves:
        if not leaf.held_out:
            continue
        before = seen.get(leaf.store.fingerprint)
        if before and before["origin"]["held_out"] < leaf.held_out:
            notes.append(
                f"{leaf.name}: an earlier stage trained on part of what is held out now "
                f"({before['origin']['held_out']:.1%} was held out then); its scores look better than they are"
            )
        table = np.asarray(leaf.store.documents)
        chosen = np.flatnonzero(held_out_mask(table["digest"], leaf.held_out))
        role = "retained" if leaf.role == "replay" else "learned"
        name = leaf.name.replace("/", "-")
        if any(h.name == name for h in sets):
            raise StageError(
                f"a held-out file and the held-out part of a source are both called '{name}'", where="evaluation"
            )
        if not len(chosen):
            notes.append(
                f"{leaf.name}: no document fell into the held-out share of {leaf.held_out:.1%} ({len(table)} documents); "
                "it is not measured (a text file can be cut into more documents with `documents: passages`)"
            )
            continue
        sets.append(held_out_set(name, role, leaf.store, chosen, limit, encoder, notes))
        tables.append(table[chosen])
    if not sets:
        raise StageError(
            "no held-out text: what is learnt and forgotten could not be measured",
            where="evaluation",
            way_out="name files under evaluation.retained and evaluation.learned, or leave out `held_out: 0` of the sources",
        )
    if not any(h.role == "retained" for h in sets):
        notes.append("no retained set: forgetting is not measured (name old text under evaluation.retained)")
    return sets, tables


def held_out_files(item: s.HeldOutFile, root: Path, where: str) -> Files:
    """A held-out file as a source."""
    return Files(item.name, item.path, None, item.columns, item.documents, root, where)


def held_out_set(
    name: str,
    role: str,
    store: TokenStore,
    chosen: np.ndarray,
    limit: int,
    encoder: Encoder,
    notes: list[str],
) -> HeldOut:
    """Documents of a store as a set to be scored, in the order of their content hash, up to about `limit` tokens."""
    table = np.asarray(store.documents)[chosen]
    order = chosen[np.argsort(table["digest"], kind="stable")]
    documents: list[np.ndarray] = []
    sizes: list[int] = []
    digests: list[int] = []
    total = 0
    for document in order:
        ids = np.asarray(store.read(int(document))).astype(np.int64)
        ids = ids[:-1] if len(ids) and ids[-1] == encoder.eos else ids
        if len(ids) < 2:
            continue
        documents.append(ids)
        sizes.append(int(store.documents["bytes"][document]))
        digests.append(int(store.documents["digest"][document]))
        total += len(ids)
        if total >= limit:
            break
    if not documents:
        raise DataError(f"no document of the held-out set '{name}' has two tokens", where=f"evaluation.{role}")
    if len(documents) < len(order) and total >= limit:
        notes.append(
            f"{name}: {len(documents):,} of {len(order):,} documents are scored (evaluation.max_tokens: {limit:,})"
        )
    identity = fingerprint([[int(d) for d in np.sort(table["digest"])], limit, encoder.fingerprint])
    found = HeldOut(name, role, tuple(documents), np.array(sizes, np.int64), identity, np.array(digests, np.uint64))
    return found.first(limit)


def overlaps(
    stage: s.Stage, root: Path, leaves: Sequence[Leaf], held_out: Sequence[HeldOut], cache: Path, notes: list[str]
) -> dict[str, dict[str, Any]]:
    """13-gram overlap of each held-out file with the training text (a source's own split is exact by construction)."""
    if stage.data.overlap == "off":
        return {}
    out: dict[str, dict[str, Any]] = {}
    for role in ("retained", "learned"):
        for item in getattr(stage.evaluation, role):
            found = _overlap_with(item, root, role, leaves, cache)
            out[item.name] = found
            if found["half"]:
                message = (
                    f"{item.name}: {found['half']:,} of {found['documents']:,} held-out documents share at least half of "
                    f"their 13-grams with the training text"
                )
                if stage.data.overlap == "refuse":
                    raise DataError(
                        message, where=f"evaluation.{role}", way_out="remove them, or set data.overlap: report"
                    )
                notes.append(message)
    return out


def _overlap_with(item: s.HeldOutFile, root: Path, role: str, leaves: Sequence[Leaf], cache: Path) -> dict[str, Any]:
    files = held_out_files(item, root, f"evaluation.{role}")
    key = fingerprint([str(files), sorted(leaf.store.fingerprint for leaf in leaves), _stamp(files)])
    place = cache / "overlap" / f"{key}.json"
    if place.exists():
        return json.loads(place.read_text())
    report: OverlapReport = overlap(
        read_documents(files), (document for leaf in leaves for document in read_documents(leaf.files))
    )
    found = {
        "documents": report.documents,
        "duplicates": report.duplicates,
        "any": report.touched,
        "half": report.half,
    }
    write_atomically(place, json.dumps(found))
    return found


def _stamp(files: Files) -> list[list[Any]]:
    if files.path is None:
        return []
    return [[str(p), p.stat().st_size, p.stat().st_mtime_ns] for p in find_files(files.path, files.root, files.where)]

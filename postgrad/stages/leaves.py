"""Which texts does a stage read, and what has the start model read before?"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from postgrad.data.mixture import seen_weights
from postgrad.data.sources import HubRows
from postgrad.data.sources import Source as Files
from postgrad.data.store import TokenStore
from postgrad.data.tokenize import Encoder, build_store
from postgrad.errors import StageError
from postgrad.lineage.record import PLAN, read_record, seen_so_far, with_stage
from postgrad.models.pretrained import Start
from postgrad.stages import stage as s
from postgrad.training.state import read_progress

Progress = Callable[[str, int, int], None]
"""Told a source's name, bytes done and bytes in all."""

_HELD_OUT_DOCUMENTS = 200


@dataclass(frozen=True)
class Leaf:
    """A source as it is read: a replay of everything seen becomes one leaf for each origin."""

    name: str
    source: str
    role: str
    part: float
    """Its share of the source: 1, or less when the source is a replay of everything seen."""
    held_out: float
    max_passes: float
    files: Files
    store: TokenStore
    stands_for: int | None


def seen_by(start: Start) -> dict[str, dict[str, Any]]:
    """What the start model has consumed: all of its run, or, for a checkpoint, what was consumed up to there."""
    if start.run is None or start.folder is None:
        return {}
    if (start.folder / "state.json").exists():
        planned = json.loads((start.run / PLAN).read_text())
        trained = read_progress(start.folder).trained_by_source
        return with_stage(planned["seen_before"], consumed(planned["leaves"], trained))
    return seen_so_far(read_record(start.run))


def make_leaves(
    stage: s.Stage,
    root: Path,
    seen: dict[str, dict[str, Any]],
    encoder: Encoder,
    cache: Path,
    progress: Progress | None,
) -> list[Leaf]:
    leaves: list[Leaf] = []
    for i, source in enumerate(stage.data.sources):
        where = f"data.sources[{i}]"
        if source.seen_so_far:
            if not seen:
                raise StageError(
                    f"nothing is recorded of what {stage.model} has seen",
                    where=f"{where}.seen_so_far",
                    expected="a start model that is a run folder of an earlier stage",
                    way_out="give the old text itself as `path`",
                )
            weights = seen_weights({key: entry["tokens"] for key, entry in seen.items()}, 1.0)
            for key, weight in weights.items():
                origin = seen[key]["origin"]
                files = _files(f"{source.name}/{seen[key]['name']}", origin, Path(origin["root"]), where)
                store = store_of(files, encoder, cache, progress, stage.data.workers)
                leaves.append(
                    Leaf(
                        files.name,
                        source.name,
                        "replay",
                        weight,
                        origin["held_out"],
                        source.max_passes,
                        files,
                        store,
                        None,
                    )
                )
            continue
        files = _files(source.name, source.model_dump(), root, where)
        store = store_of(files, encoder, cache, progress, stage.data.workers)
        held_out = source.held_out
        if held_out is None:
            named = stage.evaluation.retained if source.role == "replay" else stage.evaluation.learned
            held_out = 0.0 if named else min(0.1, max(0.005, _HELD_OUT_DOCUMENTS / max(len(store), 1)))
        leaves.append(
            Leaf(
                source.name,
                source.name,
                source.role,
                1.0,
                held_out,
                source.max_passes,
                files,
                store,
                source.stands_for,
            )
        )
    return leaves


def leaves_of(leaves: Sequence[Leaf]) -> list[dict[str, Any]]:
    """What a later stage needs to know of each leaf to replay it."""
    return [
        {
            "name": leaf.name,
            "fingerprint": leaf.store.fingerprint,
            "stands_for": leaf.stands_for or 0,
            "origin": origin_of(leaf),
        }
        for leaf in leaves
    ]


def consumed(leaves: list[dict[str, Any]], trained: dict[str, int]) -> list[dict[str, Any]]:
    """The tokens of each leaf, as `with_stage` takes them."""
    return [
        {
            "fingerprint": leaf["fingerprint"],
            "name": leaf["name"].split("/")[-1],
            "tokens": trained[leaf["name"]] + leaf["stands_for"],
            "origin": leaf["origin"],
        }
        for leaf in leaves
    ]


def origin_of(leaf: Leaf) -> dict[str, Any]:
    """What a later stage needs to read the same documents again."""
    hub = leaf.files.hub
    return {
        "path": leaf.files.path,
        "hub": hub.name if hub else None,
        "subset": hub.subset if hub else None,
        "split": hub.split if hub else "train",
        "revision": hub.revision if hub else None,
        "columns": dict(leaf.files.columns),
        "documents": leaf.files.documents,
        "root": str(leaf.files.root),
        "held_out": leaf.held_out,
    }


def _files(name: str, source: dict[str, Any], root: Path, where: str) -> Files:
    hub = None
    if source["hub"]:
        hub = HubRows(source["hub"], source["subset"], source["split"], source["revision"])
    return Files(name, source["path"], hub, source["columns"], source["documents"], root, where)


def store_of(files: Files, encoder: Encoder, cache: Path, progress: Progress | None, workers: int | None) -> TokenStore:
    report = (lambda done, total: progress(files.name, done, total)) if progress else None
    return build_store(files, encoder, cache, report, workers)

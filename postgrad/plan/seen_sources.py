"""The training data of a lineage: what the start model has seen, and what a later stage needs to replay a source."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from postgrad.config import stage as s
from postgrad.config.renamed_keys import upgrade_source
from postgrad.lineage.record import PLAN, add_stage, get_seen_data, read_record
from postgrad.models.pretrained import ModelLocation
from postgrad.plan.filter_documents import resolve_methods
from postgrad.plan.sources import ResolvedSource
from postgrad.training.checkpoint_files import read_progress


def get_seen_sources(start_model: ModelLocation) -> dict[str, dict[str, Any]]:
    """Training data of the start model by fingerprint: of its whole run, or, for a checkpoint, up to that step."""
    if start_model.run is None or start_model.folder is None:
        return {}
    if (start_model.folder / "state.json").exists():
        saved_plan = json.loads((start_model.run / PLAN).read_text())
        trained = read_progress(start_model.folder).trained_by_source
        return add_stage(saved_plan["seen_before"], count_consumed_tokens(saved_plan["leaves"], trained))
    return get_seen_data(read_record(start_model.run))


def make_source_records(
    sources: Sequence[ResolvedSource], start_model: ModelLocation, seed: int
) -> list[dict[str, Any]]:
    """What a later stage needs to replay each source, as plain data."""
    return [
        {
            "name": source.name,
            "fingerprint": source.store.fingerprint,
            "stands_for": source.spec.stands_for or 0,
            "origin": make_source_origin(source, start_model, seed),
        }
        for source in sources
    ]


def count_consumed_tokens(sources: list[dict[str, Any]], trained_tokens: dict[str, int]) -> list[dict[str, Any]]:
    """The tokens of each source record, as `add_stage` takes them."""
    return [
        {
            "fingerprint": source["fingerprint"],
            "name": source["name"].split("/")[-1],
            "tokens": trained_tokens[source["name"]] + source["stands_for"],
            "origin": source["origin"],
        }
        for source in sources
    ]


def make_source_origin(source: ResolvedSource, start_model: ModelLocation, seed: int) -> dict[str, Any]:
    """What a later stage needs to read the same documents again, as plain data."""
    files, spec = source.files, source.spec
    hub, template = files.hub, spec.template
    return {
        "path": files.path,
        "hub": hub.name if hub else None,
        "subset": hub.subset if hub else None,
        "split": hub.split if hub else "train",
        "revision": hub.revision if hub else None,
        "kind": files.kind,
        "columns": dict(files.columns),
        "document_unit": files.documents,
        "filter": {column: list(values) for column, values in files.row_filter.items()},
        "cluster": spec.cluster,
        "prompt": template.prompt,
        "answer": template.answer,
        "label_words": dict(template.words),
        "root": str(files.root),
        "held_out": source.held_out,
        **({"select": resolve_methods(spec.select, start_model, seed, files.root)} if spec.select else {}),
    }


def make_replay_source(source: Mapping[str, Any]) -> dict[str, Any]:
    """A stage's source, as plain data, that reads what an earlier stage trained on, from its source record."""
    origin = upgrade_source(source["origin"])
    root = Path(origin.pop("root"))
    origin["path"] = str(root / origin["path"]) if origin["path"] else None
    name = source["name"].replace("/", "-")
    keys = s.Source.model_fields
    return {"name": name, **{key: value for key, value in origin.items() if key in keys and value is not None}}

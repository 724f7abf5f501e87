"""The training data of a lineage: what the start model has seen, and what a later stage needs to replay a source."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from postgrad.config import stage as s
from postgrad.config.renamed_keys import upgrade_source
from postgrad.errors import StageError
from postgrad.lineage.record import PLAN, ConsumedSource, add_consumed, read_record
from postgrad.lineage.saved_plan import ReplayableSource, read_plan
from postgrad.models.location import ModelLocation
from postgrad.plan.filter_documents import resolve_methods
from postgrad.plan.sources import ResolvedSource
from postgrad.training.checkpoint_state import read_progress


def get_seen_sources(start_model: ModelLocation) -> dict[str, ConsumedSource]:
    """Training data of the start model by fingerprint: of its whole run, or, for a checkpoint, up to that step."""
    if start_model.run is None or start_model.folder is None:
        return {}
    if (start_model.folder / "state.json").exists():
        saved_plan = read_plan(start_model.run)
        trained = read_progress(start_model.folder).trained_by_source
        return add_consumed(saved_plan.consumed_before, count_consumed_tokens(saved_plan.resolved_sources, trained))
    return read_record(start_model.run).consumed


def make_source_records(
    sources: Sequence[ResolvedSource], start_model: ModelLocation, seed: int
) -> list[ReplayableSource]:
    """What a later stage needs to replay each source."""
    return [
        ReplayableSource(
            name=source.name,
            fingerprint=source.store.fingerprint,
            prior_tokens=source.spec.prior_tokens or 0,
            origin=make_source_origin(source, start_model, seed),
        )
        for source in sources
    ]


def count_consumed_tokens(
    sources: Sequence[ReplayableSource], trained_tokens: Mapping[str, int]
) -> list[tuple[str, ConsumedSource]]:
    """What a model has consumed of each source, with its data fingerprint."""
    return [
        (
            source.fingerprint,
            ConsumedSource(
                name=source.name.split("/")[-1],
                tokens=trained_tokens[source.name] + source.prior_tokens,
                origin=source.origin,
            ),
        )
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


def make_replay_source(name: str, origin: Mapping[str, Any]) -> dict[str, Any]:
    """A stage's source, as plain data, that reads what an earlier stage trained on."""
    origin = upgrade_source(origin)
    root, path = origin.pop("root", None), origin.get("path")
    if not isinstance(root, str) or not isinstance(path, str | None):
        raise StageError(
            f"the record of the source {name} does not say where it comes from",
            where=PLAN,
            expected="an origin with a root and a path",
            hint="name its files as a source of this stage",
        )
    origin["path"] = str(Path(root) / path) if path else None
    keys = s.Source.model_fields
    settings = {key: value for key, value in origin.items() if key in keys and value is not None}
    return {"name": name.replace("/", "-"), **settings}

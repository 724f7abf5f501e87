"""The documents of all held-out sets: those of held-out files, and the held-out part of each source."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from postgrad.config import stage as s
from postgrad.config.objectives import ClassifyObjective, RowsObjective
from postgrad.data.read.files import RawSource as Files
from postgrad.data.render.renderer import Renderer
from postgrad.data.tokens.held_out_split import held_out_mask, select_documents
from postgrad.data.tokens.store import TokenStore
from postgrad.errors import DataError, StageError
from postgrad.lineage.record import ConsumedSource
from postgrad.plan.held_out_files import HeldOutFileSpec, describe_new_labels
from postgrad.plan.model_inputs import ModelInputs
from postgrad.plan.objective_matching import get_evaluation_objective, get_start_objectives
from postgrad.plan.objective_rows import describe_omitted, describe_passed_over, describe_skipped
from postgrad.plan.sources import ProgressCallback, ResolvedSource, load_token_store
from postgrad.plan.unseen_labels import collect_labels, refuse_unseen_labels


@dataclass(frozen=True)
class HeldOutDocuments:
    """Documents to be scored, before they become a model's inputs."""

    name: str
    role: str
    store: TokenStore
    documents: np.ndarray
    objective: RowsObjective
    renderer: Renderer | None
    words: Mapping[str, str] = field(default_factory=dict)
    """Words for the labels."""
    files: Files | None = None
    """Where it comes from, unless it is part of a source."""

    @property
    def document_table(self) -> np.ndarray:
        """The store's table of its documents."""
        return np.asarray(self.store.documents)[self.documents]


def select_held_out_documents(
    stage: s.Stage,
    sources: Sequence[ResolvedSource],
    file_specs: Sequence[HeldOutFileSpec],
    seen_sources: dict[str, ConsumedSource],
    model_inputs: ModelInputs,
    cache: Path,
    progress: ProgressCallback | None,
    notes: list[str],
) -> tuple[list[HeldOutDocuments], list[np.ndarray]]:
    """The documents to be scored, and the document tables of all held-out text (training copies are dropped)."""
    sets: list[HeldOutDocuments] = []
    for spec in file_specs:
        store = load_token_store(spec.files, model_inputs.encoder, cache, progress, stage.data.workers, spec.renderer)
        documents = np.arange(len(store))
        sets.append(
            HeldOutDocuments(
                spec.name, spec.role, store, documents, spec.objective, spec.renderer, spec.words, spec.files
            )
        )
        new_labels = describe_new_labels(spec, [source.spec for source in sources], cache)
        notes += [
            f"{spec.name}: {note}"
            for note in (
                *describe_passed_over(spec.files),
                *describe_skipped(store.skipped),
                *describe_omitted(store.omitted),
                *new_labels,
            )
        ]
    start_objectives = get_start_objectives(model_inputs.start_model)
    for source in sources:
        if not source.held_out:
            continue
        part = _held_out_part(source, start_objectives, seen_sources, notes)
        if any(h.name == part.name for h in sets):
            raise StageError(
                f"a held-out file and the held-out part of a source are both called '{part.name}'", where="evaluation"
            )
        if len(part.documents):
            sets.append(part)
    if not sets:
        small = [source.name for source in sources if source.held_out]
        way = f"give {small[0]} a larger `held_out`" if small else "remove `held_out: 0` from the sources"
        raise StageError(
            "no held-out text, so neither learning nor forgetting can be measured"
            + (f": the held-out share of {small[0]} is no whole document" if small else ""),
            where="evaluation",
            hint=f"name files under evaluation.retained and evaluation.learned, or {way}",
        )
    if model_inputs.start_model.scratch_recipe is None and not any(h.role == "retained" for h in sets):
        notes.append("no retained set: forgetting is not measured (name old text under evaluation.retained)")
    return _remove_test_copies(sets, notes), [held_out.document_table for held_out in sets]


def _held_out_part(
    source: ResolvedSource,
    start_objectives: Sequence[RowsObjective],
    seen_sources: dict[str, ConsumedSource],
    notes: list[str],
) -> HeldOutDocuments:
    """The held-out documents of a source; none (and a note) in a source with too few documents."""
    seen = seen_sources.get(source.store.fingerprint)
    if seen and seen.origin["held_out"] < source.held_out:
        notes.append(
            f"{source.name}: an earlier stage held out only {seen.origin['held_out']:.1%} and trained on some "
            "documents that are held out now; their scores are too optimistic"
        )
    table = np.asarray(source.store.documents)
    documents = np.flatnonzero(held_out_mask(table["digest"], source.held_out))
    if not len(documents):
        notes.append(
            f"{source.name}: the held-out share of {source.held_out:.1%} selects none of {len(table)} documents; it is "
            "not measured (`documents: passages` cuts a text file into more documents)"
        )
    return HeldOutDocuments(
        source.name.replace("/", "-"),
        "retained" if source.role == "replay" else "learned",
        source.store,
        documents,
        get_evaluation_objective(source.spec.objective, start_objectives),
        source.renderer,
        source.spec.template.words,
    )


def _remove_test_copies(sets: Sequence[HeldOutDocuments], notes: list[str]) -> list[HeldOutDocuments]:
    """Remove the documents of test sets from the sets that are scored during training."""
    tests = [held_out.document_table["digest"] for held_out in sets if held_out.role == "test"]
    if not tests:
        return list(sets)
    test_digests = np.unique(np.concatenate(tests))
    disjoint: list[HeldOutDocuments] = []
    for held_out in sets:
        copies = np.isin(held_out.document_table["digest"], test_digests)
        if held_out.role == "test" or not copies.any():
            disjoint.append(held_out)
            continue
        if copies.all():
            raise DataError(
                f"every document of '{held_out.name}' is also in a test set, which is scored once, after training",
                where=f"evaluation.{held_out.role}",
                expected="documents that are in no test set",
            )
        notes.append(f"{held_out.name}: {int(copies.sum()):,} copies of test documents are removed")
        disjoint.append(replace(held_out, documents=held_out.documents[~copies]))
    return disjoint


def check_labels(
    sets: Sequence[HeldOutDocuments],
    sources: Sequence[ResolvedSource],
    excluded: np.ndarray | None,
    cache: Path,
    notes: list[str],
) -> None:
    """Compare the labels of classification sets with those of the training rows.

    Raises `DataError` for one that only a held-out file has; one that only the held-out part of a source has is noted.
    """
    sets = [h for h in sets if isinstance(h.objective, ClassifyObjective) and h.objective.labels is None]
    if not sets:
        return
    trained = set[str | int]()
    for source in sources:
        documents = select_documents(source.store, held_out=source.held_out, excluded=excluded).documents
        trained |= collect_labels(source.store, documents)
    for held_out in sets:
        unseen = collect_labels(held_out.store, held_out.documents) - trained
        if unseen and held_out.files is not None:
            refuse_unseen_labels(held_out.name, held_out.files, trained, cache, from_stage=False)
        elif unseen:
            listed = ", ".join(sorted(map(str, unseen)))
            notes.append(f"{held_out.name}: all rows with the label {listed} are held out, none is trained on")

"""Which text is scored, and does it occur in the training text?"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from postgrad.config import stage as s
from postgrad.config.objectives import (
    AnyObjective,
    ClassifyObjective,
    MaskedObjective,
    NextTokenObjective,
    RowsObjective,
)
from postgrad.data.filter.contamination import OverlapReport, measure_overlap
from postgrad.data.layouts.windows import locate_texts, max_text_tokens, split_windows
from postgrad.data.problem_type import ProblemType
from postgrad.data.read.documents import Document, detect_kind, read_documents
from postgrad.data.read.examples import RUNNING_TEXT_KINDS
from postgrad.data.read.files import RawSource as Files
from postgrad.data.read.files import find_files
from postgrad.data.read.labels import Labels
from postgrad.data.render.renderer import Renderer
from postgrad.data.tokens.held_out_split import held_out_mask, select_documents
from postgrad.data.tokens.store import TokenStore
from postgrad.data.tokens.subset import Subset
from postgrad.data.tokens.tokenize import read_all_labels
from postgrad.errors import DataError, StageError
from postgrad.evaluation.held_out import HeldOutRows, HeldOutSet, HeldOutText
from postgrad.evaluation.pseudo_perplexity import MaskedHeldOutText, MaskedWindow
from postgrad.lineage.record import ConsumedSource, Contamination
from postgrad.plan.model_inputs import ModelInputs
from postgrad.plan.objective_rows import (
    DemonstrationWrapper,
    describe_dropped,
    describe_skipped,
    get_evaluation_objective,
    get_start_objectives,
    make_renderer,
    make_rows,
    match_objectives,
    verbalisers,
)
from postgrad.plan.sources import (
    ProgressCallback,
    ResolvedSource,
    SourceSpec,
    check_template,
    load_token_store,
    make_row_template,
    make_text_files,
)
from postgrad.plan.unseen_labels import collect_labels, refuse_unseen_labels
from postgrad.storage.atomic import write_atomically
from postgrad.storage.fingerprint import fingerprint


@dataclass(frozen=True)
class HeldOutDocuments:
    """Documents to be scored, before it is settled how a model reads them."""

    name: str
    role: str
    store: TokenStore
    documents: np.ndarray
    objective: RowsObjective
    renderer: Renderer | None
    words: Mapping[str, str] = field(default_factory=dict)
    """How labels are said."""
    files: Files | None = None
    """Of a set that is no part of a source: where it comes from."""

    @property
    def document_table(self) -> np.ndarray:
        """What the store says of its documents."""
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
    for given in file_specs:
        store = load_token_store(given.files, model_inputs.encoder, cache, progress, stage.data.workers, given.renderer)
        every = np.arange(len(store))
        sets.append(
            HeldOutDocuments(
                given.name, given.role, store, every, given.objective, given.renderer, given.words, given.files
            )
        )
        strange = describe_new_labels(given, [leaf.spec for leaf in sources], cache)
        notes += [f"{given.name}: {said}" for said in (*describe_skipped(store.skipped), *strange)]
    for leaf in sources:
        if not leaf.held_out:
            continue
        before = seen_sources.get(leaf.store.fingerprint)
        if before and before.origin["held_out"] < leaf.held_out:
            notes.append(
                f"{leaf.name}: an earlier stage trained on part of what is held out now "
                f"({before.origin['held_out']:.1%} was held out then); its scores look better than they are"
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
        objective = get_evaluation_objective(leaf.spec.objective, get_start_objectives(model_inputs.start_model))
        words = leaf.spec.template.words
        sets.append(HeldOutDocuments(name, role, leaf.store, chosen, objective, leaf.renderer, words))
    if not sets:
        raise StageError(
            "no held-out text: what is learnt and forgotten could not be measured",
            where="evaluation",
            hint="name files under evaluation.retained and evaluation.learned, or leave out `held_out: 0` of the sources",
        )
    if model_inputs.start_model.scratch_recipe is None and not any(h.role == "retained" for h in sets):
        notes.append("no retained set: forgetting is not measured (name old text under evaluation.retained)")
    return _remove_test_copies(sets, notes), [chosen.document_table for chosen in sets]


def _remove_test_copies(sets: Sequence[HeldOutDocuments], notes: list[str]) -> list[HeldOutDocuments]:
    """The sets, those that are looked at during training without the documents of test sets."""
    tests = [chosen.document_table["digest"] for chosen in sets if chosen.role == "test"]
    if not tests:
        return list(sets)
    secret = np.unique(np.concatenate(tests))
    out: list[HeldOutDocuments] = []
    for chosen in sets:
        copies = np.isin(chosen.document_table["digest"], secret)
        if chosen.role == "test" or not copies.any():
            out.append(chosen)
            continue
        if copies.all():
            raise DataError(
                f"every document of '{chosen.name}' is also in a test set, which is looked at once, after training",
                where=f"evaluation.{chosen.role}",
                expected="documents of its own",
            )
        notes.append(f"{chosen.name}: {int(copies.sum()):,} documents are copies of test documents and are left out")
        out.append(replace(chosen, documents=chosen.documents[~copies]))
    return out


def check_labels(
    sets: Sequence[HeldOutDocuments],
    sources: Sequence[ResolvedSource],
    excluded: np.ndarray | None,
    cache: Path,
    notes: list[str],
) -> None:
    """Hold the labels of classification sets against those of the rows that are trained on.

    Raises `DataError` for one that only a held-out file has; one that only the held-out part of a source has is noted.
    """
    asked = [c for c in sets if isinstance(c.objective, ClassifyObjective) and c.objective.labels is None]
    if not asked:
        return
    trained = set[str | int]()
    for leaf in sources:
        documents = select_documents(leaf.store, held_out=leaf.held_out, excluded=excluded).documents
        trained |= collect_labels(leaf.store, documents)
    for chosen in asked:
        unseen = collect_labels(chosen.store, chosen.documents) - trained
        if unseen and chosen.files is not None:
            refuse_unseen_labels(chosen.name, chosen.files, trained, cache, from_stage=False)
        elif unseen:
            listed = ", ".join(sorted(map(str, unseen)))
            notes.append(f"{chosen.name}: no row with the label {listed} is left to train on; all are held out")


@dataclass(frozen=True)
class HeldOutFileSpec:
    """A held-out file before it is read."""

    name: str
    role: str
    files: Files
    kind: str
    objective: RowsObjective
    renderer: Renderer | None
    words: Mapping[str, str]


def resolve_held_out_files(
    stage: s.Stage,
    root: Path,
    source_specs: Sequence[SourceSpec],
    objectives: Sequence[AnyObjective],
    labels: Labels | None,
    add_demonstrations: DemonstrationWrapper | None,
    model_inputs: ModelInputs,
    cache: Path,
) -> list[HeldOutFileSpec]:
    """The files under `evaluation`, and how their rows are worded: tried on the first of each, before anything is tokenised.

    Raises `DataError` for rows that cannot be worded and for labels that a classifier does not know, `StageError` for rows
    that no objective serves.
    """
    out: list[HeldOutFileSpec] = []
    by_source = {each.source: each for each in source_specs}
    for role, item in stage.evaluation.held_out_files():
        where = f"evaluation.{role}"
        given = inherit_row_format(item, role, by_source)
        files = make_text_files(item.name, given, root, where)
        kind = detect_kind(files)
        own = get_start_objectives(model_inputs.start_model)
        objective = get_evaluation_objective(
            match_objectives(item.same_format_as or item.name, kind, objectives, own, where).row_objective, own
        )
        renderer = make_renderer(objective, kind, model_inputs, make_row_template(given), labels, add_demonstrations)
        if labels and labels.names and isinstance(objective, ClassifyObjective):
            refuse_unseen_labels(item.name, files, labels.names, cache, from_stage=objective.labels is not None)
        check_template(files, renderer)
        out.append(HeldOutFileSpec(item.name, role, files, kind, objective, renderer, given["label_words"]))
    return out


def describe_new_labels(file_spec: HeldOutFileSpec, source_specs: Sequence[SourceSpec], cache: Path) -> list[str]:
    """Labels of held-out rows that are written in words and that no row of a source has, told.

    Old rows of another task have labels of their own; they are told only where some of their labels are trained.
    """
    alike = [each for each in source_specs if each.kind == file_spec.kind]
    decided = isinstance(file_spec.objective, ClassifyObjective | MaskedObjective)
    if file_spec.kind not in ("labelled", "tagged") or not alike or decided:
        return []
    try:
        names, known = (
            set(read_all_labels([file_spec.files], cache).names),
            set(read_all_labels([w.files for w in alike], cache).names),
        )
    except DataError:  # labels of several sorts: they are only words here
        return []
    strange = sorted(map(str, names - known))
    if not strange or (file_spec.role == "retained" and not names & known):
        return []
    shown = ", ".join(strange[:6]) + (" ..." if len(strange) > 6 else "")
    return [f"{len(strange):,} labels occur in no row that is trained on: {shown}"]


def inherit_row_format(item: s.HeldOutFile, role: str, by_source: dict[str, SourceSpec]) -> dict[str, Any]:
    """A held-out file as plain data; what it does not say it has from the source that it is like.

    Without `same_format_as`, a file whose kind is not said is like the only source of its role whose kind is said.
    """
    given = {**item.model_dump(), "hub": None}
    alike = [by_source[item.same_format_as]] if item.same_format_as and item.same_format_as in by_source else []
    if not alike and item.kind == "auto":
        wanted = "replay" if role == "retained" else "new"
        alike = [w for w in by_source.values() if w.role == wanted and w.files.kind != "auto"]
    if len(alike) == 1:
        other = alike[0]
        own = item.model_fields_set
        given |= {"kind": other.files.kind} if "kind" not in own else {}
        given |= {"columns": dict(other.files.columns)} if "columns" not in own else {}
        for key, value in (
            ("prompt", other.template.prompt),
            ("answer", other.template.answer),
            ("label_words", dict(other.template.words)),
        ):
            given |= {key: value} if key not in own else {}
    return given


def make_held_out_set(
    held_out: HeldOutDocuments,
    model_inputs: ModelInputs,
    limit: int,
    notes: list[str],
    *,
    reserved_positions: int = 0,
    problem: ProblemType = ProblemType.CLASS,
) -> HeldOutSet:
    """A set as a model reads it, in the order of the documents' content hash, up to about `limit` tokens.

    `spare`: positions that windows of running text leave free. Raises `DataError` when nothing of it can be scored.
    """
    running = held_out.store.kind in RUNNING_TEXT_KINDS
    if running and isinstance(held_out.objective, NextTokenObjective):
        found: HeldOutSet = replace(
            make_held_out_text(
                held_out.name, held_out.role, held_out.store, held_out.documents, limit, model_inputs, notes
            ),
            virtual_tokens=model_inputs.virtual_tokens,
            reserved_positions=reserved_positions,
        )
        return found
    return _make_held_out_rows(held_out, model_inputs, limit, notes, problem)


def make_masked_held_out_text(held_out: HeldOutDocuments, model_inputs: ModelInputs, limit: int) -> MaskedHeldOutText:
    """Running text of which about `limit` tokens are masked one at a time: whole windows, up to the one that reaches it."""
    table = np.asarray(held_out.store.documents)[held_out.documents]
    order = np.argsort(table["digest"], kind="stable")
    most = int(np.searchsorted(np.cumsum(table["tokens"][order]), 2 * limit)) + 1
    part = Subset(held_out.store, held_out.documents[order[:most]])
    cut = split_windows(
        locate_texts(part, select_documents(part), model_inputs.lead),
        max_text_tokens(model_inputs.length, model_inputs.frame.size(1), 1),
    )
    special, found, tokens = np.array(model_inputs.special_ids), [], 0
    scored: dict[int, int] = {}
    for document, start, stop in zip(cut.document_R.tolist(), cut.start_R.tolist(), cut.stop_R.tolist(), strict=True):
        text = part.read(document, start, stop).astype(np.int64)
        places = np.flatnonzero(~np.isin(text, special))
        if not len(places):
            continue
        number = list(scored).index(document) if document in scored else len(scored)
        found.append(MaskedWindow(number, model_inputs.frame.wrap(text), places + len(model_inputs.frame.prefix_ids)))
        scored[document] = scored.get(document, 0) + len(text)
        tokens += len(places)
        if tokens >= limit:
            break
    if not found:
        raise DataError(
            f"no document of the held-out set '{held_out.name}' has a token to mask",
            where=f"evaluation.{held_out.role}",
        )
    kept = part.documents[list(scored)]
    share = np.minimum(1.0, np.array(list(scored.values())) / np.maximum(kept["tokens"] - 1 - model_inputs.lead, 1))
    identity = [
        [int(d) for d in kept["digest"]],
        model_inputs.encoder.fingerprint,
        [
            list(part)
            for part in (model_inputs.frame.prefix_ids, model_inputs.frame.separator_ids, model_inputs.frame.suffix_ids)
        ],
        model_inputs.length,
    ]
    return MaskedHeldOutText(
        held_out.name,
        held_out.role,
        tuple(found),
        np.rint(kept["bytes"] * share).astype(np.int64),
        fingerprint(identity),
        model_inputs.mask_id,
    )


def make_held_out_text(
    name: str,
    role: str,
    store: TokenStore,
    document_indices: np.ndarray,
    limit: int,
    model_inputs: ModelInputs,
    notes: list[str],
) -> HeldOutText:
    """Running text to be scored by a decoder."""
    table = np.asarray(store.documents)[document_indices]
    order = document_indices[np.argsort(table["digest"], kind="stable")]
    encoder = model_inputs.encoder
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
    found = HeldOutText(
        name,
        role,
        tuple(documents),
        np.array(sizes, np.int64),
        identity,
        np.array(digests, np.uint64),
        bos=encoder.bos,
    )
    return found.take_tokens(limit)


def _make_held_out_rows(
    held_out: HeldOutDocuments, model_inputs: ModelInputs, limit: int, notes: list[str], problem: ProblemType
) -> HeldOutRows:
    """Rows of a task, or text for an encoder or an encoder-decoder, as the objective makes them."""
    table = np.asarray(held_out.store.documents)[held_out.documents]
    order = np.argsort(table["digest"], kind="stable")
    most = int(np.searchsorted(np.cumsum(table["tokens"][order]), limit)) + 1
    part = Subset(held_out.store, held_out.documents[order[:most]])
    model_inputs = replace(
        model_inputs, seed=0
    )  # what is masked or cut out of held-out text is the same in every stage
    rows = make_rows(held_out.objective, part, model_inputs, problem=problem, pack=False, words=held_out.words)
    notes += [f"{held_out.name}: {said}" for said in describe_dropped(rows)]
    cloze = isinstance(held_out.objective, MaskedObjective) and held_out.store.kind == "labelled"
    if not len(rows):
        raise DataError(
            f"no document of the held-out set '{held_out.name}' can be scored",
            where=f"evaluation.{held_out.role}",
            expected="documents that fit a row and have something to predict",
        )
    if most < len(order):
        notes.append(
            f"{held_out.name}: {most:,} of {len(order):,} documents are scored (evaluation.max_tokens: {limit:,})"
        )
    # Documents that are no rows (too short, too long) are none of the set.
    kept, document_R = np.unique(np.asarray(rows.document_R), return_inverse=True)
    labels = held_out.store.labels or ()
    return HeldOutRows(
        held_out.name,
        held_out.role,
        tuple(rows.get_row(i, i) for i in range(len(rows))),
        document_R,
        part.documents["bytes"][kept].astype(np.int64),
        fingerprint(
            [
                [int(d) for d in np.sort(table["digest"])],
                limit,
                model_inputs.encoder.fingerprint,
                held_out.objective.model_dump(mode="json"),
                held_out.renderer.fingerprint if held_out.renderer else None,
                model_inputs.length,
            ]
        ),
        part.documents["digest"][kept].astype(np.uint64),
        part.documents["tokens"][kept].astype(np.int64),
        problem if isinstance(held_out.objective, ClassifyObjective) else ProblemType.CLASS if cloze else None,
        tuple(str(label) for label in labels),
        (model_inputs.frame.prefix_ids, model_inputs.frame.separator_ids, model_inputs.frame.suffix_ids),
        model_inputs.pad_id,
        tuple(verbalisers(part, model_inputs, held_out.words)) if cloze else (),
    )


def measure_overlaps(
    stage: s.Stage,
    root: Path,
    sources: Sequence[ResolvedSource],
    held_out: Sequence[HeldOutSet],
    cache: Path,
    notes: list[str],
) -> dict[str, Contamination]:
    """13-gram overlap of each held-out file with the training text (a source's own split is exact by construction)."""
    if stage.data.overlap == "off":
        return {}
    out: dict[str, Contamination] = {}
    by_source = {leaf.spec.source: leaf.spec for leaf in sources}
    for role, item in stage.evaluation.held_out_files():
        files = make_text_files(item.name, inherit_row_format(item, role, by_source), root, f"evaluation.{role}")
        found = _measure_overlap(files, sources, cache)
        out[item.name] = found
        if found.half_overlap:
            message = (
                f"{item.name}: {found.half_overlap:,} of {found.documents:,} held-out documents share at least half of "
                f"their 13-grams with the training text"
            )
            if stage.data.overlap == "refuse":
                raise DataError(message, where=f"evaluation.{role}", hint="remove them, or set data.overlap: report")
            notes.append(message)
    return out


def _measure_overlap(files: Files, sources: Sequence[ResolvedSource], cache: Path) -> Contamination:
    key = fingerprint([str(files), sorted(leaf.store.fingerprint for leaf in sources), _file_stamps(files)])
    place = cache / "contamination" / f"{key}.json"
    if place.exists():
        return Contamination.model_validate_json(place.read_text())
    report: OverlapReport = measure_overlap(
        read_documents(files), (document for leaf in sources for document in _read_training_documents(leaf))
    )
    found = Contamination(
        documents=report.documents,
        duplicates=report.duplicates,
        any_overlap=report.overlapping,
        half_overlap=report.half_overlapping,
    )
    write_atomically(place, json.dumps(found.as_json()))
    return found


def _read_training_documents(source: ResolvedSource) -> Iterator[Document]:
    """The documents of a source, those that its selection left."""
    documents = read_documents(source.files)
    if not source.selection:
        return documents
    left = set(np.asarray(source.store.documents)["digest"].tolist())
    return (document for document in documents if document.digest in left)


def _file_stamps(files: Files) -> list[list[Any]]:
    if files.path is None:
        return []
    return [[str(p), p.stat().st_size, p.stat().st_mtime_ns] for p in find_files(files.path, files.root, files.where)]

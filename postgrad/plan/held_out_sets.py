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
from postgrad.data.filter.contamination import OverlapReport, overlap
from postgrad.data.layouts.rows import held_out_mask, keep
from postgrad.data.layouts.windows import room_for_text, texts_of, windows_of
from postgrad.data.read.documents import Document, read_documents, source_kind
from postgrad.data.read.examples import RUNNING, Labels, Renderer
from postgrad.data.read.files import Source as Files
from postgrad.data.read.files import find_files
from postgrad.data.tokens.store import TokenStore
from postgrad.data.tokens.subset import Part
from postgrad.data.tokens.tokenize import labels_of
from postgrad.errors import DataError, StageError
from postgrad.evaluation.held_out import AnyHeldOut, HeldOut, HeldOutRows
from postgrad.evaluation.pseudo_perplexity import OneByOne, Window
from postgrad.objectives.classification_loss import Problem
from postgrad.plan.model_inputs import Reading
from postgrad.plan.objective_rows import (
    Demonstrated,
    left_out,
    lost,
    made_with,
    make_rows,
    objective_for,
    renderer_for,
    scored_as,
    verbalisers,
)
from postgrad.plan.sources import Leaf, Progress, Wanted, files_of, store_of, try_wording, wording_of
from postgrad.plan.unseen_labels import labels_among, refuse_unseen
from postgrad.storage.atomic import write_atomically
from postgrad.storage.fingerprint import fingerprint


@dataclass(frozen=True)
class Chosen:
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
    def table(self) -> np.ndarray:
        """What the store says of its documents."""
        return np.asarray(self.store.documents)[self.documents]


def held_out_sets(
    stage: s.Stage,
    leaves: Sequence[Leaf],
    listed: Sequence[Listed],
    seen: dict[str, dict[str, Any]],
    reading: Reading,
    cache: Path,
    progress: Progress | None,
    notes: list[str],
) -> tuple[list[Chosen], list[np.ndarray]]:
    """The documents to be scored, and the document tables of all held-out text (training copies are dropped)."""
    sets: list[Chosen] = []
    for given in listed:
        store = store_of(given.files, reading.encoder, cache, progress, stage.data.workers, given.renderer)
        every = np.arange(len(store))
        sets.append(
            Chosen(given.name, given.role, store, every, given.objective, given.renderer, given.words, given.files)
        )
        strange = new_labels(given, [leaf.wanted for leaf in leaves], cache)
        notes += [f"{given.name}: {said}" for said in (*left_out(store.skipped), *strange)]
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
        objective = scored_as(leaf.wanted.objective, made_with(reading.start))
        words = leaf.wanted.wording.words
        sets.append(Chosen(name, role, leaf.store, chosen, objective, leaf.renderer, words))
    if not sets:
        raise StageError(
            "no held-out text: what is learnt and forgotten could not be measured",
            where="evaluation",
            way_out="name files under evaluation.retained and evaluation.learned, or leave out `held_out: 0` of the sources",
        )
    if reading.start.made is None and not any(h.role == "retained" for h in sets):
        notes.append("no retained set: forgetting is not measured (name old text under evaluation.retained)")
    return _apart(sets, notes), [chosen.table for chosen in sets]


def _apart(sets: Sequence[Chosen], notes: list[str]) -> list[Chosen]:
    """The sets, those that are looked at during training without the documents of test sets."""
    tests = [chosen.table["digest"] for chosen in sets if chosen.role == "test"]
    if not tests:
        return list(sets)
    secret = np.unique(np.concatenate(tests))
    out: list[Chosen] = []
    for chosen in sets:
        copies = np.isin(chosen.table["digest"], secret)
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
    sets: Sequence[Chosen], leaves: Sequence[Leaf], excluded: np.ndarray | None, cache: Path, notes: list[str]
) -> None:
    """Hold the labels of classification sets against those of the rows that are trained on.

    Raises `DataError` for one that only a held-out file has; one that only the held-out part of a source has is noted.
    """
    asked = [c for c in sets if isinstance(c.objective, ClassifyObjective) and c.objective.labels is None]
    if not asked:
        return
    trained = set[str | int]()
    for leaf in leaves:
        documents = keep(leaf.store, held_out=leaf.held_out, excluded=excluded).documents
        trained |= labels_among(leaf.store, documents)
    for chosen in asked:
        unseen = labels_among(chosen.store, chosen.documents) - trained
        if unseen and chosen.files is not None:
            refuse_unseen(chosen.name, chosen.files, trained, cache, listed=False)
        elif unseen:
            listed = ", ".join(sorted(map(str, unseen)))
            notes.append(f"{chosen.name}: no row with the label {listed} is left to train on; all are held out")


@dataclass(frozen=True)
class Listed:
    """A held-out file before it is read."""

    name: str
    role: str
    files: Files
    kind: str
    objective: RowsObjective
    renderer: Renderer | None
    words: Mapping[str, str]


def listed_files(
    stage: s.Stage,
    root: Path,
    wanted: Sequence[Wanted],
    objectives: Sequence[AnyObjective],
    labels: Labels | None,
    demonstrated: Demonstrated | None,
    reading: Reading,
    cache: Path,
) -> list[Listed]:
    """The files under `evaluation`, and how their rows are worded: tried on the first of each, before anything is tokenised.

    Raises `DataError` for rows that cannot be worded and for labels that a classifier does not know, `StageError` for rows
    that no objective serves.
    """
    out: list[Listed] = []
    by_source = {each.source: each for each in wanted}
    for role, item in stage.evaluation.files():
        where = f"evaluation.{role}"
        given = worded(item, role, by_source)
        files = files_of(item.name, given, root, where)
        kind = source_kind(files)
        own = made_with(reading.start)
        objective = scored_as(objective_for(item.like or item.name, kind, objectives, own, where).made_for, own)
        renderer = renderer_for(objective, kind, reading, wording_of(given), labels, demonstrated)
        if labels and labels.names and isinstance(objective, ClassifyObjective):
            refuse_unseen(item.name, files, labels.names, cache, listed=objective.labels is not None)
        try_wording(files, renderer)
        out.append(Listed(item.name, role, files, kind, objective, renderer, given["words"]))
    return out


def new_labels(given: Listed, wanted: Sequence[Wanted], cache: Path) -> list[str]:
    """Labels of held-out rows that are written in words and that no row of a source has, told.

    Old rows of another task have labels of their own; they are told only where some of their labels are trained.
    """
    alike = [each for each in wanted if each.kind == given.kind]
    decided = isinstance(given.objective, ClassifyObjective | MaskedObjective)
    if given.kind not in ("labelled", "tagged") or not alike or decided:
        return []
    try:
        names, known = set(labels_of([given.files], cache).names), set(labels_of([w.files for w in alike], cache).names)
    except DataError:  # labels of several sorts: they are only words here
        return []
    strange = sorted(map(str, names - known))
    if not strange or (given.role == "retained" and not names & known):
        return []
    shown = ", ".join(strange[:6]) + (" ..." if len(strange) > 6 else "")
    return [f"{len(strange):,} labels occur in no row that is trained on: {shown}"]


def worded(item: s.HeldOutFile, role: str, by_source: dict[str, Wanted]) -> dict[str, Any]:
    """A held-out file as plain data; what it does not say it has from the source that it is like.

    Without `like`, a file whose kind is not said is like the only source of its role whose kind is said.
    """
    given = {**item.model_dump(), "hub": None}
    alike = [by_source[item.like]] if item.like and item.like in by_source else []
    if not alike and item.kind == "auto":
        wanted = "replay" if role == "retained" else "new"
        alike = [w for w in by_source.values() if w.role == wanted and w.files.kind != "auto"]
    if len(alike) == 1:
        other = alike[0]
        own = item.model_fields_set
        given |= {"kind": other.files.kind} if "kind" not in own else {}
        given |= {"columns": dict(other.files.columns)} if "columns" not in own else {}
        for key, value in (
            ("prompt", other.wording.prompt),
            ("answer", other.wording.answer),
            ("words", dict(other.wording.words)),
        ):
            given |= {key: value} if key not in own else {}
    return given


def as_read(
    chosen: Chosen, reading: Reading, limit: int, notes: list[str], *, spare: int = 0, problem: Problem = "class"
) -> AnyHeldOut:
    """A set as a model reads it, in the order of the documents' content hash, up to about `limit` tokens.

    `spare`: positions that windows of running text leave free. Raises `DataError` when nothing of it can be scored.
    """
    running = chosen.store.kind in RUNNING
    if running and isinstance(chosen.objective, NextTokenObjective):
        found: AnyHeldOut = replace(
            held_out_text(chosen.name, chosen.role, chosen.store, chosen.documents, limit, reading, notes),
            before=reading.before,
            spare=spare,
        )
        return found
    return _rows(chosen, reading, limit, notes, problem)


def one_by_one(chosen: Chosen, reading: Reading, limit: int) -> OneByOne:
    """Running text of which about `limit` tokens are masked one at a time: whole windows, up to the one that reaches it."""
    table = np.asarray(chosen.store.documents)[chosen.documents]
    order = np.argsort(table["digest"], kind="stable")
    most = int(np.searchsorted(np.cumsum(table["tokens"][order]), 2 * limit)) + 1
    part = Part(chosen.store, chosen.documents[order[:most]])
    cut = windows_of(texts_of(part, keep(part), reading.lead), room_for_text(reading.length, reading.frame.size(1), 1))
    special, found, tokens = np.array(reading.special), [], 0
    scored: dict[int, int] = {}
    for document, start, stop in zip(cut.document_R.tolist(), cut.start_R.tolist(), cut.stop_R.tolist(), strict=True):
        text = part.read(document, start, stop).astype(np.int64)
        places = np.flatnonzero(~np.isin(text, special))
        if not len(places):
            continue
        number = list(scored).index(document) if document in scored else len(scored)
        found.append(Window(number, reading.frame.around(text), places + len(reading.frame.before)))
        scored[document] = scored.get(document, 0) + len(text)
        tokens += len(places)
        if tokens >= limit:
            break
    if not found:
        raise DataError(
            f"no document of the held-out set '{chosen.name}' has a token to mask", where=f"evaluation.{chosen.role}"
        )
    kept = part.documents[list(scored)]
    share = np.minimum(1.0, np.array(list(scored.values())) / np.maximum(kept["tokens"] - 1 - reading.lead, 1))
    identity = [
        [int(d) for d in kept["digest"]],
        reading.encoder.fingerprint,
        [list(part) for part in (reading.frame.before, reading.frame.between, reading.frame.after)],
        reading.length,
    ]
    return OneByOne(
        chosen.name,
        chosen.role,
        tuple(found),
        np.rint(kept["bytes"] * share).astype(np.int64),
        fingerprint(identity),
        reading.mask,
    )


def held_out_text(
    name: str,
    role: str,
    store: TokenStore,
    chosen: np.ndarray,
    limit: int,
    reading: Reading,
    notes: list[str],
) -> HeldOut:
    """Running text to be scored by a decoder."""
    table = np.asarray(store.documents)[chosen]
    order = chosen[np.argsort(table["digest"], kind="stable")]
    encoder = reading.encoder
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
    found = HeldOut(
        name,
        role,
        tuple(documents),
        np.array(sizes, np.int64),
        identity,
        np.array(digests, np.uint64),
        bos=encoder.bos,
    )
    return found.first(limit)


def _rows(chosen: Chosen, reading: Reading, limit: int, notes: list[str], problem: Problem) -> HeldOutRows:
    """Rows of a task, or text for an encoder or an encoder-decoder, as the objective makes them."""
    table = np.asarray(chosen.store.documents)[chosen.documents]
    order = np.argsort(table["digest"], kind="stable")
    most = int(np.searchsorted(np.cumsum(table["tokens"][order]), limit)) + 1
    part = Part(chosen.store, chosen.documents[order[:most]])
    reading = replace(reading, seed=0)  # what is masked or cut out of held-out text is the same in every stage
    rows = make_rows(chosen.objective, part, reading, problem=problem, together=False, words=chosen.words)
    notes += [f"{chosen.name}: {said}" for said in lost(rows)]
    cloze = isinstance(chosen.objective, MaskedObjective) and chosen.store.kind == "labelled"
    if not len(rows):
        raise DataError(
            f"no document of the held-out set '{chosen.name}' can be scored",
            where=f"evaluation.{chosen.role}",
            expected="documents that fit a row and have something to predict",
        )
    if most < len(order):
        notes.append(
            f"{chosen.name}: {most:,} of {len(order):,} documents are scored (evaluation.max_tokens: {limit:,})"
        )
    # Documents that are no rows (too short, too long) are none of the set.
    kept, document_R = np.unique(np.asarray(rows.document_R), return_inverse=True)
    labels = chosen.store.labels or ()
    return HeldOutRows(
        chosen.name,
        chosen.role,
        tuple(rows.at(i, i) for i in range(len(rows))),
        document_R,
        part.documents["bytes"][kept].astype(np.int64),
        fingerprint(
            [
                [int(d) for d in np.sort(table["digest"])],
                limit,
                reading.encoder.fingerprint,
                chosen.objective.model_dump(mode="json"),
                chosen.renderer.fingerprint if chosen.renderer else None,
                reading.length,
            ]
        ),
        part.documents["digest"][kept].astype(np.uint64),
        part.documents["tokens"][kept].astype(np.int64),
        problem if isinstance(chosen.objective, ClassifyObjective) else "answers",
        tuple(str(label) for label in labels),
        (reading.frame.before, reading.frame.between, reading.frame.after),
        reading.pad,
        tuple(verbalisers(part, reading, chosen.words)) if cloze else (),
    )


def overlaps(
    stage: s.Stage, root: Path, leaves: Sequence[Leaf], held_out: Sequence[AnyHeldOut], cache: Path, notes: list[str]
) -> dict[str, dict[str, Any]]:
    """13-gram overlap of each held-out file with the training text (a source's own split is exact by construction)."""
    if stage.data.overlap == "off":
        return {}
    out: dict[str, dict[str, Any]] = {}
    by_source = {leaf.wanted.source: leaf.wanted for leaf in leaves}
    for role, item in stage.evaluation.files():
        files = files_of(item.name, worded(item, role, by_source), root, f"evaluation.{role}")
        found = _overlap_with(files, leaves, cache)
        out[item.name] = found
        if found["half"]:
            message = (
                f"{item.name}: {found['half']:,} of {found['documents']:,} held-out documents share at least half of "
                f"their 13-grams with the training text"
            )
            if stage.data.overlap == "refuse":
                raise DataError(message, where=f"evaluation.{role}", way_out="remove them, or set data.overlap: report")
            notes.append(message)
    return out


def _overlap_with(files: Files, leaves: Sequence[Leaf], cache: Path) -> dict[str, Any]:
    key = fingerprint([str(files), sorted(leaf.store.fingerprint for leaf in leaves), _stamp(files)])
    place = cache / "overlap" / f"{key}.json"
    if place.exists():
        return json.loads(place.read_text())
    report: OverlapReport = overlap(
        read_documents(files), (document for leaf in leaves for document in _training(leaf))
    )
    found = {
        "documents": report.documents,
        "duplicates": report.duplicates,
        "any": report.touched,
        "half": report.half,
    }
    write_atomically(place, json.dumps(found))
    return found


def _training(leaf: Leaf) -> Iterator[Document]:
    """The documents of a source, those that its selection left."""
    documents = read_documents(leaf.files)
    if not leaf.selection:
        return documents
    left = set(np.asarray(leaf.store.documents)["digest"].tolist())
    return (document for document in documents if document.digest in left)


def _stamp(files: Files) -> list[list[Any]]:
    if files.path is None:
        return []
    return [[str(p), p.stat().st_size, p.stat().st_mtime_ns] for p in find_files(files.path, files.root, files.where)]

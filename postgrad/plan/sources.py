"""Which texts does a stage read, what is each for, and what has the start model read before?"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from postgrad.config import stage as s
from postgrad.config.document_filters import AnySelection
from postgrad.config.objectives import AnyObjective, ClassifyObjective, MaskedObjective, RowsObjective
from postgrad.config.tunings import InstructionPrompt
from postgrad.data.layouts.rows import held_out_mask
from postgrad.data.loading.mixture import seen_weights
from postgrad.data.read.documents import read_examples, source_kind
from postgrad.data.read.examples import RUNNING, Example, Labels, Renderer
from postgrad.data.read.files import HubRows
from postgrad.data.read.files import Source as Files
from postgrad.data.read.generated_text import made_by
from postgrad.data.render.demonstrations import Demonstrations
from postgrad.data.tokens.store import TokenStore, digest
from postgrad.data.tokens.tokenize import Encoder, build_store, labels_of, render_at
from postgrad.errors import StageError
from postgrad.lineage.record import PLAN, read_record, seen_so_far, with_stage
from postgrad.models.pretrained import Start
from postgrad.plan.filter_documents import resolved, select
from postgrad.plan.model_inputs import Reading
from postgrad.plan.objective_rows import Demonstrated, Wording, objective_for, renderer_for
from postgrad.training.checkpoint_files import read_progress

Progress = Callable[[str, int, int], None]
"""Told a source's name, bytes done and bytes in all."""

_HELD_OUT_DOCUMENTS = 200
_SELECTIONS: TypeAdapter[list[AnySelection]] = TypeAdapter(list[AnySelection])


@dataclass(frozen=True)
class Wanted:
    """A source before it is read: a replay of everything seen becomes one for each origin."""

    name: str
    source: str
    role: str
    part: float
    """Its share of the source: 1, or less when the source is a replay of everything seen."""
    held_out: float | None
    max_passes: float
    files: Files
    wording: Wording
    stands_for: int | None
    objective: RowsObjective
    """What its rows are made for."""
    weighed: tuple[int, ...]
    """The numbers of the objectives that weigh them."""
    cluster: str | None = None
    """The sort of task its rows are."""
    select: tuple[AnySelection, ...] = ()
    """Which of its documents are read at all."""

    @cached_property
    def kind(self) -> str:
        """What its rows are."""
        return source_kind(self.files)


@dataclass(frozen=True)
class Leaf:
    """A source as it is read."""

    wanted: Wanted
    held_out: float
    renderer: Renderer | None
    store: TokenStore
    selection: tuple[dict[str, Any], ...] = ()
    """Of each way to select documents what it did, as plain data; the store has those that are left."""

    @property
    def name(self) -> str:
        """Names it in the plan, the metrics and the report."""
        return self.wanted.name

    @property
    def role(self) -> str:
        """`new` or `replay`."""
        return self.wanted.role

    @property
    def files(self) -> Files:
        """Where its documents come from."""
        return self.wanted.files

    @cached_property
    def made_by(self) -> str | None:
        """The model that wrote its documents, when one did."""
        return made_by(self.files)


def seen_by(start: Start) -> dict[str, dict[str, Any]]:
    """What the start model has consumed: all of its run, or, for a checkpoint, what was consumed up to there."""
    if start.run is None or start.folder is None:
        return {}
    if (start.folder / "state.json").exists():
        planned = json.loads((start.run / PLAN).read_text())
        trained = read_progress(start.folder).trained_by_source
        return with_stage(planned["seen_before"], consumed(planned["leaves"], trained))
    return seen_so_far(read_record(start.run))


def wanted_sources(
    stage: s.Stage,
    objectives: Sequence[AnyObjective],
    own: Sequence[RowsObjective],
    root: Path,
    seen: dict[str, dict[str, Any]],
) -> list[Wanted]:
    """The sources of a stage with what each is for. Raises `StageError` for rows that no objective serves."""
    out: list[Wanted] = []
    for i, source in enumerate(stage.data.sources):
        where = f"data.sources[{i}]"
        if not source.seen_so_far:
            origins = [(1.0, source.name, source.model_dump(), root, source.held_out, source.stands_for)]
        elif seen:
            weights = seen_weights({key: entry["tokens"] for key, entry in seen.items()}, 1.0)
            origins = [
                (
                    weight,
                    f"{source.name}/{seen[key]['name']}",
                    seen[key]["origin"],
                    Path(seen[key]["origin"]["root"]),
                    seen[key]["origin"]["held_out"],
                    None,
                )
                for key, weight in weights.items()
            ]
        else:
            raise StageError(
                f"nothing is recorded of what {stage.model if isinstance(stage.model, str) else 'a new model'} has seen",
                where=f"{where}.seen_so_far",
                expected="a start model that is a run folder of an earlier stage",
                way_out="give the old text itself as `path`",
            )
        for part, name, given, base, held_out, stands_for in origins:
            files = files_of(name, given, base, where)
            weighed = objective_for(source.name, source_kind(files), objectives, own, where)
            if not weighed.numbers:
                raise StageError(
                    f"no objective is taken on '{source.name}'",
                    where=where,
                    expected="an objective that names it under `on`, or one without `on`",
                )
            role = "replay" if source.seen_so_far else source.role
            wording = wording_of(given)
            out.append(
                Wanted(
                    name,
                    source.name,
                    role,
                    part,
                    held_out,
                    source.max_passes,
                    files,
                    wording,
                    stands_for,
                    *weighed,
                    given.get("cluster"),
                    tuple(_SELECTIONS.validate_python(given.get("select") or [])),
                )
            )
    return out


def labels_for(wanted: Sequence[Wanted], cache: Path) -> Labels | None:
    """What a classifier of this stage decides between; None when there is no classifier.

    Raises `StageError` when sources are labelled in different ways, `DataError` for labels that do not go together.
    """
    found: dict[str, Labels] = {}
    asked = None
    for item in wanted:
        objective = item.objective
        cloze = isinstance(objective, MaskedObjective) and item.kind == "labelled"
        if cloze or isinstance(objective, ClassifyObjective):
            asked = objective if isinstance(objective, ClassifyObjective) else ClassifyObjective(kind="classify")
            found[item.name] = labels_of([item.files], cache)
    if asked is None:
        return None
    problems = {labels.problem: name for name, labels in found.items()}
    if len(problems) > 1:
        (one, first), (two, second), *_ = problems.items()
        raise StageError(
            f"'{first}' has labels of the sort {one} and '{second}' of the sort {two}",
            where="data.sources",
            expected="one sort of labels for a classifier",
        )
    (problem,) = problems
    problem = problem if asked.problem == "auto" else asked.problem
    if problem == "number":
        return Labels("number")
    names = set().union(*(labels.names for labels in found.values()))
    if asked.labels is None:
        texts = sorted(name for name in names if isinstance(name, str))
        return Labels(problem, (*sorted(name for name in names if not isinstance(name, str)), *texts))
    by_text = {str(name): name for name in names}
    unknown = sorted(by_text.keys() - set(asked.labels))
    if unknown:
        raise StageError(
            f"the rows have a label '{unknown[0]}', which is not listed",
            where="objectives.labels",
            expected=f"all of {', '.join(sorted(by_text))}",
        )
    return Labels(problem, tuple(by_text.get(name, name) for name in asked.labels))


def make_leaves(
    stage: s.Stage,
    wanted: Sequence[Wanted],
    labels: Labels | None,
    demonstrated: Demonstrated | None,
    reading: Reading,
    cache: Path,
    progress: Progress | None,
) -> list[Leaf]:
    """Read and tokenise the sources."""
    leaves: list[Leaf] = []
    renderers = [
        renderer_for(item.objective, item.kind, reading, item.wording, labels, demonstrated) for item in wanted
    ]
    for item, renderer in zip(wanted, renderers, strict=True):
        try_wording(item.files, renderer)
    for item, renderer in zip(wanted, renderers, strict=True):
        store = store_of(item.files, reading.encoder, cache, progress, stage.data.workers, renderer)
        left = select(store, item.select, item.files, reading, cache, seed=stage.seed, told=progress)
        leaves.append(Leaf(item, held_out_share(stage, item, len(left.store)), renderer, left.store, left.steps))
    return leaves


def try_wording(files: Files, renderer: Renderer | None) -> None:
    """Word the first row that can be: what a template lacks is lacking in all rows, and nothing is tokenised yet.

    Raises `DataError` with the place of the row.
    """
    if renderer is not None:
        for example, place in read_examples(files):
            render_at(example, place, renderer)
            return


def held_out_share(stage: s.Stage, item: Wanted | s.Source, documents: int) -> float:
    """The share of a source's documents that is kept for evaluation."""
    if item.held_out is not None:
        return item.held_out
    named = stage.evaluation.retained if item.role == "replay" else stage.evaluation.learned
    return 0.0 if named else min(0.1, max(0.005, _HELD_OUT_DOCUMENTS / max(documents, 1)))


def demonstrating(stage: s.Stage, wanted: Sequence[Wanted], reading: Reading) -> Demonstrated | None:
    """What sets demonstrations before each example, when the stage's tuning asks for them: from the training rows alone.

    Raises `StageError` when no source has examples.
    """
    if not isinstance(stage.tuning, InstructionPrompt):
        return None
    pool: list[Example] = []
    for item in wanted:
        if item.kind not in RUNNING:
            found = [example for example, _ in read_examples(item.files)]
            digests = np.array([digest(example.text.encode()) for example in found], np.uint64)
            kept = ~held_out_mask(digests, held_out_share(stage, item, len(found)))
            pool += [example for example, keep in zip(found, kept, strict=True) if keep]
    if not pool:
        raise StageError(
            "no source has examples that could be demonstrations",
            where="tuning.demonstrations",
            expected="rows with answers, such as prompt and completion",
        )
    asked, seed = stage.tuning.demonstrations, stage.seed

    def demonstrated(inner: Renderer, kind: str) -> Renderer:
        alike = [example for example in pool if example.kind == kind]  # what words one kind may have none for another
        if not alike:
            return inner
        return Demonstrations(inner, alike, asked.count, asked.by, asked.tokens, reading.size, reading.vector, seed)

    return demonstrated


def leaves_of(leaves: Sequence[Leaf], start: Start, seed: int) -> list[dict[str, Any]]:
    """What a later stage needs to know of each leaf to replay it, of a stage with such a start and seed."""
    return [
        {
            "name": leaf.name,
            "fingerprint": leaf.store.fingerprint,
            "stands_for": leaf.wanted.stands_for or 0,
            "origin": origin_of(leaf, start, seed),
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


def origin_of(leaf: Leaf, start: Start, seed: int) -> dict[str, Any]:
    """What a later stage needs to read the same documents again."""
    selected = {"select": resolved(leaf.wanted.select, start, seed, leaf.files.root)} if leaf.wanted.select else {}
    hub, wording = leaf.files.hub, leaf.wanted.wording
    return {
        "path": leaf.files.path,
        "hub": hub.name if hub else None,
        "subset": hub.subset if hub else None,
        "split": hub.split if hub else "train",
        "revision": hub.revision if hub else None,
        "kind": leaf.files.kind,
        "columns": dict(leaf.files.columns),
        "documents": leaf.files.documents,
        "only": {column: list(values) for column, values in leaf.files.only.items()},
        "cluster": leaf.wanted.cluster,
        "prompt": wording.prompt,
        "answer": wording.answer,
        "words": dict(wording.words),
        "root": str(leaf.files.root),
        "held_out": leaf.held_out,
        **selected,
    }


def source_again(leaf: Mapping[str, Any]) -> dict[str, Any]:
    """A source as plain data that reads the documents which an earlier stage read, less what that held out.

    `leaf`: what `leaves_of` says of one.
    """
    origin = dict(leaf["origin"])
    base = Path(origin.pop("root"))
    origin["path"] = str(base / origin["path"]) if origin["path"] else None
    known = s.Source.model_fields
    name = leaf["name"].replace("/", "-")
    return {"name": name, **{key: value for key, value in origin.items() if key in known and value is not None}}


def wording_of(given: dict[str, Any]) -> Wording:
    """How rows are put into words, from a source or its origin as plain data."""
    return Wording(given.get("prompt"), given.get("answer"), given.get("words") or {})


def files_of(name: str, given: dict[str, Any], root: Path, where: str) -> Files:
    """A source, its origin or a held-out file, given as plain data, as something to read."""
    hub = None
    if given.get("hub"):
        hub = HubRows(given["hub"], given["subset"], given["split"], given["revision"])
    kind = given.get("kind", "auto")
    only = {column: tuple(values) for column, values in (given.get("only") or {}).items()}
    return Files(name, given["path"], hub, given["columns"], given["documents"], root, where, kind, only)


def store_of(
    files: Files,
    encoder: Encoder,
    cache: Path,
    progress: Progress | None,
    workers: int | None,
    renderer: Renderer | None = None,
) -> TokenStore:
    """The token store of a source's documents."""
    report = (lambda done, total: progress(files.name, done, total)) if progress else None
    return build_store(files, encoder, cache, report, workers, renderer)

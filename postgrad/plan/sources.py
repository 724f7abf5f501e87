"""Which texts does a stage read, what is each for, and what has the start model read before?"""

from __future__ import annotations

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
from postgrad.config.renamed_keys import upgrade_source
from postgrad.config.tunings import InstructionPromptTuning
from postgrad.data.loading.mixture import seen_weights
from postgrad.data.problem_type import ProblemType
from postgrad.data.read.documents import detect_kind, read_examples
from postgrad.data.read.examples import RUNNING_TEXT_KINDS, Example
from postgrad.data.read.files import HubDataset
from postgrad.data.read.files import RawSource as Files
from postgrad.data.read.generated_text import get_generator_model
from postgrad.data.read.labels import Labels
from postgrad.data.render.demonstrations import Demonstrations
from postgrad.data.render.renderer import Renderer
from postgrad.data.tokens.held_out_split import held_out_mask
from postgrad.data.tokens.store import TokenStore, digest
from postgrad.data.tokens.tokenize import Encoder, build_store, read_all_labels, render_example
from postgrad.errors import StageError
from postgrad.lineage.record import ConsumedSource, add_consumed, read_record
from postgrad.lineage.saved_plan import ReplayableSource, read_plan
from postgrad.models.pretrained import ModelLocation
from postgrad.plan.filter_documents import resolve_methods, select_documents
from postgrad.plan.model_inputs import ModelInputs
from postgrad.plan.objective_rows import DemonstrationWrapper, RowTemplate, make_renderer, match_objectives
from postgrad.training.checkpoint_files import read_progress

ProgressCallback = Callable[[str, int, int], None]
"""Told a source's name, bytes done and bytes in all."""

_HELD_OUT_DOCUMENTS = 200
_SELECTIONS: TypeAdapter[list[AnySelection]] = TypeAdapter(list[AnySelection])


@dataclass(frozen=True)
class SourceSpec:
    """A source before it is read: a replay of everything seen becomes one for each origin."""

    name: str
    source: str
    role: str
    fraction: float
    """Its share of the source: 1, or less when the source is a replay of everything seen."""
    held_out: float | None
    max_passes: float
    files: Files
    template: RowTemplate
    prior_tokens: int | None
    objective: RowsObjective
    """What its rows are made for."""
    objective_indices: tuple[int, ...]
    """The numbers of the objectives that weigh them."""
    cluster: str | None = None
    """The sort of task its rows are."""
    select: tuple[AnySelection, ...] = ()
    """Which of its documents are read at all."""

    @cached_property
    def kind(self) -> str:
        """What its rows are."""
        return detect_kind(self.files)


@dataclass(frozen=True)
class ResolvedSource:
    """A source as it is read."""

    spec: SourceSpec
    held_out: float
    renderer: Renderer | None
    store: TokenStore
    selection: tuple[dict[str, Any], ...] = ()
    """Of each way to select documents what it did, as plain data; the store has those that are left."""

    @property
    def name(self) -> str:
        """Names it in the plan, the metrics and the report."""
        return self.spec.name

    @property
    def role(self) -> str:
        """`new` or `replay`."""
        return self.spec.role

    @property
    def files(self) -> Files:
        """Where its documents come from."""
        return self.spec.files

    @cached_property
    def generated_by(self) -> str | None:
        """The model that wrote its documents, when one did."""
        return get_generator_model(self.files)


def get_seen_sources(start_model: ModelLocation) -> dict[str, ConsumedSource]:
    """What the start model has consumed: all of its run, or, for a checkpoint, what was consumed up to there."""
    if start_model.run is None or start_model.folder is None:
        return {}
    if (start_model.folder / "state.json").exists():
        planned = read_plan(start_model.run)
        trained = read_progress(start_model.folder).trained_by_source
        return add_consumed(planned.consumed_before, count_consumed_tokens(planned.resolved_sources, trained))
    return read_record(start_model.run).consumed


def resolve_source_specs(
    stage: s.Stage,
    objectives: Sequence[AnyObjective],
    start_objectives: Sequence[RowsObjective],
    root: Path,
    seen_sources: dict[str, ConsumedSource],
) -> list[SourceSpec]:
    """The sources of a stage with what each is for. Raises `StageError` for rows that no objective serves."""
    out: list[SourceSpec] = []
    for i, source in enumerate(stage.data.sources):
        where = f"data.sources[{i}]"
        if not source.seen_so_far:
            origins = [(1.0, source.name, source.model_dump(), root, source.held_out, source.prior_tokens)]
        elif seen_sources:
            weights = seen_weights({key: entry.tokens for key, entry in seen_sources.items()}, 1.0)
            origins = [
                (
                    weight,
                    f"{source.name}/{seen_sources[key].name}",
                    upgrade_source(seen_sources[key].origin),
                    Path(seen_sources[key].origin["root"]),
                    seen_sources[key].origin["held_out"],
                    None,
                )
                for key, weight in weights.items()
            ]
        else:
            raise StageError(
                f"nothing is recorded of what {stage.model if isinstance(stage.model, str) else 'a new model'} has seen",
                where=f"{where}.seen_so_far",
                expected="a start model that is a run folder of an earlier stage",
                hint="give the old text itself as `path`",
            )
        for part, name, given, base, held_out, prior_tokens in origins:
            files = make_text_files(name, given, base, where)
            weighed = match_objectives(source.name, detect_kind(files), objectives, start_objectives, where)
            if not weighed.objective_indices:
                raise StageError(
                    f"no objective is taken on '{source.name}'",
                    where=where,
                    expected="an objective that names it under `on`, or one without `on`",
                )
            role = "replay" if source.seen_so_far else source.role
            wording = make_row_template(given)
            out.append(
                SourceSpec(
                    name,
                    source.name,
                    role,
                    part,
                    held_out,
                    source.max_passes,
                    files,
                    wording,
                    prior_tokens,
                    *weighed,
                    given.get("cluster"),
                    tuple(_SELECTIONS.validate_python(given.get("select") or [])),
                )
            )
    return out


def resolve_labels(source_specs: Sequence[SourceSpec], cache: Path) -> Labels | None:
    """What a classifier of this stage decides between; None when there is no classifier.

    Raises `StageError` when sources are labelled in different ways, `DataError` for labels that do not go together.
    """
    found: dict[str, Labels] = {}
    asked = None
    for item in source_specs:
        objective = item.objective
        cloze = isinstance(objective, MaskedObjective) and item.kind == "labelled"
        if cloze or isinstance(objective, ClassifyObjective):
            asked = objective if isinstance(objective, ClassifyObjective) else ClassifyObjective(kind="classify")
            found[item.name] = read_all_labels([item.files], cache)
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
    problem = problem if asked.problem == "auto" else ProblemType(asked.problem)
    if problem == ProblemType.NUMBER:
        return Labels(ProblemType.NUMBER)
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


def resolve_sources(
    stage: s.Stage,
    source_specs: Sequence[SourceSpec],
    labels: Labels | None,
    add_demonstrations: DemonstrationWrapper | None,
    model_inputs: ModelInputs,
    cache: Path,
    progress: ProgressCallback | None,
) -> list[ResolvedSource]:
    """Read and tokenise the sources."""
    leaves: list[ResolvedSource] = []
    renderers = [
        make_renderer(item.objective, item.kind, model_inputs, item.template, labels, add_demonstrations)
        for item in source_specs
    ]
    for item, renderer in zip(source_specs, renderers, strict=True):
        check_template(item.files, renderer)
    for item, renderer in zip(source_specs, renderers, strict=True):
        store = load_token_store(item.files, model_inputs.encoder, cache, progress, stage.data.workers, renderer)
        left = select_documents(store, item.select, item.files, model_inputs, cache, seed=stage.seed, progress=progress)
        leaves.append(
            ResolvedSource(item, held_out_share(stage, item, len(left.store)), renderer, left.store, left.steps)
        )
    return leaves


def check_template(files: Files, renderer: Renderer | None) -> None:
    """Word the first row that can be: what a template lacks is lacking in all rows, and nothing is tokenised yet.

    Raises `DataError` with the place of the row.
    """
    if renderer is not None:
        for example, place in read_examples(files):
            render_example(example, place, renderer)
            return


def held_out_share(stage: s.Stage, source: SourceSpec | s.Source, documents: int) -> float:
    """The share of a source's documents that is kept for evaluation."""
    if source.held_out is not None:
        return source.held_out
    named = stage.evaluation.retained if source.role == "replay" else stage.evaluation.learned
    return 0.0 if named else min(0.1, max(0.005, _HELD_OUT_DOCUMENTS / max(documents, 1)))


def make_demonstration_wrapper(
    stage: s.Stage, source_specs: Sequence[SourceSpec], model_inputs: ModelInputs
) -> DemonstrationWrapper | None:
    """What sets demonstrations before each example, when the stage's tuning asks for them: from the training rows alone.

    Raises `StageError` when no source has examples.
    """
    if not isinstance(stage.tuning, InstructionPromptTuning):
        return None
    pool: list[Example] = []
    for item in source_specs:
        if item.kind not in RUNNING_TEXT_KINDS:
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
        return Demonstrations(
            inner,
            alike,
            asked.count,
            "seed" if asked.sampler == "random" else asked.sampler,
            asked.max_tokens,
            model_inputs.count_tokens,
            model_inputs.mean_embedding,
            seed,
        )

    return demonstrated


def make_source_records(
    sources: Sequence[ResolvedSource], start_model: ModelLocation, seed: int
) -> list[ReplayableSource]:
    """What a later stage needs to know of each leaf to replay it, of a stage with such a start and seed."""
    return [
        ReplayableSource(
            name=leaf.name,
            fingerprint=leaf.store.fingerprint,
            prior_tokens=leaf.spec.prior_tokens or 0,
            origin=make_source_origin(leaf, start_model, seed),
        )
        for leaf in sources
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
    """What a later stage needs to read the same documents again."""
    selected = (
        {"select": resolve_methods(source.spec.select, start_model, seed, source.files.root)}
        if source.spec.select
        else {}
    )
    hub, wording = source.files.hub, source.spec.template
    return {
        "path": source.files.path,
        "hub": hub.name if hub else None,
        "subset": hub.subset if hub else None,
        "split": hub.split if hub else "train",
        "revision": hub.revision if hub else None,
        "kind": source.files.kind,
        "columns": dict(source.files.columns),
        "document_unit": source.files.documents,
        "filter": {column: list(values) for column, values in source.files.row_filter.items()},
        "cluster": source.spec.cluster,
        "prompt": wording.prompt,
        "answer": wording.answer,
        "label_words": dict(wording.words),
        "root": str(source.files.root),
        "held_out": source.held_out,
        **selected,
    }


def make_replay_source(name: str, origin: Mapping[str, Any]) -> dict[str, Any]:
    """A source of a stage file that reads the documents an earlier stage read, without its held-out ones."""
    origin = upgrade_source(origin)
    base = Path(origin.pop("root"))
    origin["path"] = str(base / origin["path"]) if origin["path"] else None
    known = s.Source.model_fields
    settings = {key: value for key, value in origin.items() if key in known and value is not None}
    return {"name": name.replace("/", "-"), **settings}


def make_row_template(config: dict[str, Any]) -> RowTemplate:
    """How rows are put into words, from a source or its origin as plain data."""
    return RowTemplate(config.get("prompt"), config.get("answer"), config.get("label_words") or {})


def make_text_files(name: str, config: dict[str, Any], root: Path, where: str) -> Files:
    """A source, its origin or a held-out file, given as plain data, as something to read."""
    hub = None
    if config.get("hub"):
        hub = HubDataset(config["hub"], config["subset"], config["split"], config["revision"])
    kind = config.get("kind", "auto")
    only = {column: tuple(values) for column, values in (config.get("filter") or {}).items()}
    return Files(name, config["path"], hub, config["columns"], config["document_unit"], root, where, kind, only)


def load_token_store(
    files: Files,
    encoder: Encoder,
    cache: Path,
    progress: ProgressCallback | None,
    workers: int | None,
    renderer: Renderer | None = None,
) -> TokenStore:
    """The token store of a source's documents."""
    report = (lambda done, total: progress(files.name, done, total)) if progress else None
    return build_store(files, encoder, cache, report, workers, renderer)

"""The sources of a stage: their files, objectives, templates and held-out shares, then tokenised and filtered."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import TypeAdapter

from postgrad.config import stage as s
from postgrad.config.document_filters import AnySelection
from postgrad.config.objectives import AnyObjective, AnyTeacherContext, RowsObjective
from postgrad.config.renamed_keys import upgrade_source
from postgrad.data.loading.replay_weights import seen_weights
from postgrad.data.read.documents import detect_kind, read_examples
from postgrad.data.read.examples import NO_LABEL
from postgrad.data.read.files import HubDataset
from postgrad.data.read.files import RawSource as Files
from postgrad.data.read.generated_text import get_generator_model
from postgrad.data.read.labels import Labels
from postgrad.data.render.renderer import Renderer
from postgrad.data.tokens.encode import render_example
from postgrad.data.tokens.encoder import Encoder
from postgrad.data.tokens.store import TokenStore
from postgrad.data.tokens.tokenize import build_store
from postgrad.errors import StageError
from postgrad.lineage.record import ConsumedSource, DocumentSelection
from postgrad.plan.filter_documents import select_documents
from postgrad.plan.model_inputs import ModelInputs
from postgrad.plan.objective_matching import match_objectives
from postgrad.plan.row_renderers import DemonstrationWrapper, RowTemplate, make_renderer, make_row_template
from postgrad.plan.teacher_contexts import find_source_context, get_context_column

ProgressCallback = Callable[[str, int, int], None]
"""Called with a source's name, the bytes done and the bytes in all."""

_HELD_OUT_DOCUMENTS = 200
_SELECTIONS: TypeAdapter[list[AnySelection]] = TypeAdapter(list[AnySelection])


@dataclass(frozen=True)
class SourceSpec:
    """A source before it is read: a replay of everything seen becomes one for each origin."""

    name: str
    source: str
    """The source in the stage."""
    role: str
    fraction: float
    """Its share of the source in the stage: 1, or less for an origin of a replay of everything seen."""
    held_out: float | None
    max_passes: float
    files: Files
    template: RowTemplate
    prior_tokens: int | None
    objective: RowsObjective
    """The objective that determines the layout of its rows."""
    objective_indices: tuple[int, ...]
    """Indices of the objectives that train on its rows."""
    cluster: str | None = None
    """Task cluster of its rows."""
    select: tuple[AnySelection, ...] = ()
    """Filters of its documents."""
    context: AnyTeacherContext | None = None
    """What its teachers read beside its rows."""

    @cached_property
    def kind(self) -> str:
        """Kind of its rows."""
        return detect_kind(self.files)


@dataclass(frozen=True)
class ResolvedSource:
    """A tokenised source."""

    spec: SourceSpec
    held_out: float
    renderer: Renderer | None
    store: TokenStore
    """The documents that its filters keep."""
    selection: tuple[DocumentSelection, ...] = ()
    """The result of each filter."""

    @property
    def name(self) -> str:
        """Name in the plan, the metrics and the report."""
        return self.spec.name

    @property
    def role(self) -> str:
        """`new` or `replay`."""
        return self.spec.role

    @property
    def files(self) -> Files:
        """Files of its documents."""
        return self.spec.files

    @cached_property
    def generated_by(self) -> str | None:
        """The model that generated its documents, if one did."""
        return get_generator_model(self.files)


def resolve_source_specs(
    stage: s.Stage,
    objectives: Sequence[AnyObjective],
    start_objectives: Sequence[RowsObjective],
    root: Path,
    seen_sources: dict[str, ConsumedSource],
) -> list[SourceSpec]:
    """The sources of a stage with their objectives. Raises `StageError` for rows that no objective supports."""
    specs: list[SourceSpec] = []
    for i, source in enumerate(stage.data.sources):
        where = f"data.sources[{i}]"
        for origin in _source_origins(stage, source, root, seen_sources, where):
            files = make_text_files(origin.name, origin.config, origin.root, where)
            kind = detect_kind(files)
            matched = match_objectives(source.name, kind, objectives, start_objectives, where)
            context = find_source_context(
                source.name, kind, matched.row_objective, objectives, matched.objective_indices
            )
            if not matched.objective_indices:
                raise StageError(
                    f"no objective trains on '{source.name}'",
                    where=where,
                    expected="an objective that names it under `on`, or one without `on`",
                )
            spec = SourceSpec(
                name=origin.name,
                source=source.name,
                role="replay" if source.seen_so_far else source.role,
                fraction=origin.fraction,
                held_out=origin.held_out,
                max_passes=source.max_passes,
                files=replace(files, context=get_context_column(context)),
                template=make_row_template(origin.config),
                prior_tokens=origin.prior_tokens,
                objective=matched.row_objective,
                objective_indices=matched.objective_indices,
                cluster=origin.config.get("cluster"),
                select=tuple(_SELECTIONS.validate_python(origin.config.get("select") or [])),
                context=context,
            )
            specs.append(spec)
    return specs


class _Origin(NamedTuple):
    """Where a source's text comes from: the stage itself, or an earlier one for a replay of everything seen."""

    name: str
    fraction: float
    config: dict[str, Any]
    root: Path
    held_out: float | None
    prior_tokens: int | None


def _source_origins(
    stage: s.Stage, source: s.Source, root: Path, seen_sources: dict[str, ConsumedSource], where: str
) -> Iterator[_Origin]:
    if not source.seen_so_far:
        yield _Origin(source.name, 1.0, source.model_dump(), root, source.held_out, source.prior_tokens)
        return
    if not seen_sources:
        raise StageError(
            f"no record of what {stage.model if isinstance(stage.model, str) else 'a new model'} was trained on",
            where=f"{where}.seen_so_far",
            expected="a start model that is a run folder of an earlier stage",
            hint="give the old text itself as `path`",
        )
    for key, weight in seen_weights({key: entry.tokens for key, entry in seen_sources.items()}, 1.0).items():
        name, origin = f"{source.name}/{seen_sources[key].name}", upgrade_source(seen_sources[key].origin)
        yield _Origin(name, weight, origin, Path(origin["root"]), origin["held_out"], None)


def resolve_sources(
    stage: s.Stage,
    source_specs: Sequence[SourceSpec],
    labels: Labels | None,
    add_demonstrations: DemonstrationWrapper | None,
    model_inputs: ModelInputs,
    cache: Path,
    progress: ProgressCallback | None,
) -> list[ResolvedSource]:
    """Tokenise and filter the sources, after a check of all templates."""
    renderers = [
        make_renderer(spec.objective, spec.kind, model_inputs, spec.template, labels, add_demonstrations)
        for spec in source_specs
    ]
    for spec, renderer in zip(source_specs, renderers, strict=True):
        check_template(spec.files, renderer)
    sources: list[ResolvedSource] = []
    for spec, renderer in zip(source_specs, renderers, strict=True):
        store = load_token_store(spec.files, model_inputs.encoder, cache, progress, stage.data.workers, renderer)
        selected = select_documents(
            store, spec.select, spec.files, model_inputs, cache, seed=stage.seed, progress=progress
        )
        held_out = held_out_share(stage, spec, len(selected.store))
        sources.append(ResolvedSource(spec, held_out, renderer, selected.store, selected.steps))
    return sources


def check_template(files: Files, renderer: Renderer | None) -> None:
    """Render the first row: a field that the template lacks is missing in all rows, and nothing is tokenised yet.

    Raises `DataError` with the location of the row.
    """
    if renderer is not None:
        for example, location in read_examples(files):
            render_example(example, location, renderer)
            return


def held_out_share(stage: s.Stage, source: SourceSpec | s.Source, documents: int) -> float:
    """The share of a source's documents that is held out for evaluation."""
    if source.held_out is not None:
        return source.held_out
    named = stage.evaluation.retained if source.role == "replay" else stage.evaluation.learned
    return 0.0 if named else min(0.1, max(0.005, _HELD_OUT_DOCUMENTS / max(documents, 1)))


def make_text_files(name: str, config: dict[str, Any], root: Path, where: str) -> Files:
    """The files of a source, its origin or a held-out file, given as plain data."""
    hub = None
    if config.get("hub"):
        hub = HubDataset(config["hub"], config["subset"], config["split"], config["revision"])
    kind = config.get("kind", "auto")
    only = {column: tuple(values) for column, values in (config.get("filter") or {}).items()}
    # Held-out text is a test or validation split where there is one.
    default = ("test", "validation", "train") if where.startswith("evaluation") else ("train",)
    splits = (config["split"],) if config.get("split") else default
    # A word for the label -1 says that it is a class.
    no_label = None if str(NO_LABEL) in (config.get("label_words") or {}) else NO_LABEL
    return Files(
        name, config["path"], hub, config["columns"], config["document_unit"], root, where, kind, only, no_label, splits
    )


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

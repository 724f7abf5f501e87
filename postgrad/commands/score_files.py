"""Files as held-out sets, and any model's scores on them, outside of any stage."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np

from postgrad.config import stage as s
from postgrad.config.objectives import TextToTextObjective
from postgrad.data.problem_type import ProblemType
from postgrad.data.read.documents import detect_kind, read_labels
from postgrad.data.read.files import RawSource
from postgrad.data.read.labels import Labels
from postgrad.data.tokens.tokenize import build_store
from postgrad.distributed.world import World
from postgrad.errors import ModelError, require_choice
from postgrad.evaluation import before_after
from postgrad.evaluation.held_out import HeldOutSet
from postgrad.evaluation.perplexity import Scores, score_held_out
from postgrad.hardware import machine
from postgrad.models.auto_classes import load_config
from postgrad.models.location import ModelLocation
from postgrad.models.model import wrap_model
from postgrad.models.model_sizes import load_model_sizes
from postgrad.models.pretrained import load_tokenizer
from postgrad.models.task import Task
from postgrad.plan.held_out_documents import HeldOutDocuments
from postgrad.plan.held_out_sets import make_held_out_set
from postgrad.plan.model_inputs import ModelInputs, make_encoder, make_model_inputs
from postgrad.plan.objective_matching import get_start_objectives, match_objectives, resolve_objectives
from postgrad.plan.row_renderers import RowTemplate, make_renderer
from postgrad.plan.sources import make_text_files
from postgrad.tuning.open_model import BaseReference, get_task, open_model, start_fingerprint

DEFAULT_CONTEXT = 1024
"""Tokens a model reads at once, at most, unless a context is given."""
_MAX_TOKENS = 10_000_000
_DOCUMENT_UNITS = get_args(s.HeldOutFile.model_fields["document_unit"].annotation)
_CLASSIFIER_ROW_KINDS = {Task.CLASSIFY: "labelled", Task.TAG: "tagged"}
"""The kind of rows that a classifier is scored on, by its task."""


@dataclass(frozen=True)
class FileSets:
    """Files as held-out sets, tokenised for one model."""

    model_inputs: ModelInputs
    documents: tuple[HeldOutDocuments, ...]
    sets: tuple[HeldOutSet, ...]


def load_file_sets(
    start: ModelLocation,
    files: Sequence[str],
    document_unit: str,
    column: str | None,
    context: int,
    cache: Path,
    limit: int = _MAX_TOKENS,
) -> FileSets:
    """Files as held-out sets, tokenised for the model of a start. `limit`: about how many tokens of each file."""
    model_inputs = load_model_inputs(start, context)
    documents = list(load_documents(start, files, document_unit, column, model_inputs, cache))
    sets = [make_held_out_set(chosen, model_inputs, limit, [], problem=problem) for chosen, problem in documents]
    return FileSets(model_inputs, tuple(chosen for chosen, _ in documents), tuple(sets))


def load_documents(
    start: ModelLocation,
    files: Sequence[str],
    document_unit: str,
    column: str | None,
    model_inputs: ModelInputs,
    cache: Path,
) -> Iterator[tuple[HeldOutDocuments, ProblemType]]:
    """The documents of each file with the objective of the model's own task, and the problem type of a classifier.

    Raises `StageError` for an unknown `document_unit`.
    """
    require_choice("document unit", document_unit, _DOCUMENT_UNITS, where="--document-unit")
    objectives = resolve_objectives([], start)
    if model_inputs.task.is_encoder_decoder:  # which also scores rows with answers
        objectives += (TextToTextObjective(kind="text-to-text"),)
    row_kind = _CLASSIFIER_ROW_KINDS.get(model_inputs.task)
    names: set[str] = set()
    for path in files:
        item = s.HeldOutFile.model_validate(
            {
                **s.expand_held_out_file(path),
                "document_unit": document_unit,
                "columns": {"text": column} if column else {},
            }
        )
        name, number = item.name, 2
        while name in names:
            name, number = f"{item.name}-{number}", number + 1
        names.add(name)
        row_format = {"kind": row_kind} if row_kind else {}
        source = make_text_files(name, {**item.model_dump(), "hub": None, **row_format}, Path.cwd(), path)
        kind = detect_kind(source)
        objective = match_objectives(name, kind, objectives, get_start_objectives(start), path).row_objective
        labels = _class_labels(start, model_inputs.task, source) if row_kind else None
        renderer = make_renderer(objective, kind, model_inputs, RowTemplate(), labels)
        store = build_store(source, model_inputs.encoder, cache, renderer=renderer)
        problem = labels.problem if labels else ProblemType.CLASS
        yield HeldOutDocuments(name, "learned", store, np.arange(len(store)), objective, renderer), problem


def _class_labels(start: ModelLocation, task: Task, files: RawSource) -> Labels:
    """The labels of a classifier, spelled as the rows spell them."""
    reference = BaseReference.read_folder(start)
    if reference and reference.layer:
        names, problem = reference.layer.labels, reference.layer.problem
    else:
        config: Any = load_config(start.name_or_path)
        names = tuple(config.id2label[i] for i in range(config.num_labels))
        problem = config.problem_type
    decision = ProblemType.TAGS if task == Task.TAG else ProblemType.from_transformers(problem, len(names))
    if decision == ProblemType.NUMBER:
        return Labels(ProblemType.NUMBER)
    spelling = {str(name): name for name in read_labels(files).names}
    return Labels(decision, tuple(spelling.get(name, name) for name in names))


def load_model_inputs(start: ModelLocation, context: int) -> ModelInputs:
    """How the model of a start encodes text, outside of any stage."""
    tokenizer = load_tokenizer(start)
    encoder = make_encoder(tokenizer, load_model_sizes(start).vocab_size)
    return make_model_inputs(get_task(start), start, tokenizer, encoder, length=context, seed=0)


def score_model(
    start: ModelLocation,
    sets: Sequence[before_after.ScoredSet],
    context: int,
    cache: Path,
    scorer: Callable[..., Scores] = score_held_out,
) -> dict[str, Scores]:
    """Score the model of a start on sets; scores already in the cache are read from there."""
    device = machine.default_device()
    identity = start_fingerprint(start)
    opened = open_model(start)
    model = wrap_model(opened.model, opened.task).to(device)
    return before_after.score_sets(
        model, sets, scorer, context=context, world=World(device), identity=identity, cache=cache
    )


def context_length(start: ModelLocation, requested: int | None) -> int:
    """Tokens that a model reads at once: those requested, or its own limit up to 1,024."""
    limit = load_model_sizes(start).positions or DEFAULT_CONTEXT
    if requested is not None and not 2 <= requested <= limit:
        raise ModelError(
            f"a context of {requested} does not fit {start.name}", where="--context", expected=f"2 to {limit}"
        )
    return requested or min(limit, DEFAULT_CONTEXT)

"""Held-out files of a stage: their row format, objective and renderer, checked before anything is tokenised."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from postgrad.config import stage as s
from postgrad.config.objectives import AnyObjective, ClassifyObjective, MaskedObjective, RowsObjective
from postgrad.data.read.documents import detect_kind
from postgrad.data.read.files import RawSource as Files
from postgrad.data.read.labels import Labels
from postgrad.data.render.renderer import Renderer
from postgrad.data.tokens.source_files import read_all_labels
from postgrad.errors import DataError
from postgrad.plan.model_inputs import ModelInputs
from postgrad.plan.objective_matching import get_evaluation_objective, get_start_objectives, match_objectives
from postgrad.plan.row_renderers import DemonstrationWrapper, make_renderer, make_row_template
from postgrad.plan.sources import SourceSpec, check_template, make_text_files
from postgrad.plan.unseen_labels import refuse_unseen_labels

_MAX_LABEL_NAMES = 6


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
    """The files under `evaluation`; the first row of each is rendered as a check.

    Raises `DataError` for rows that cannot be rendered and for labels that the classifier does not have, `StageError` for
    rows that no objective supports.
    """
    file_specs: list[HeldOutFileSpec] = []
    by_source = {spec.source: spec for spec in source_specs}
    start_objectives = get_start_objectives(model_inputs.start_model)
    for role, item in stage.evaluation.held_out_files():
        where = f"evaluation.{role}"
        config = inherit_row_format(item, role, by_source)
        files = make_text_files(item.name, config, root, where)
        kind = detect_kind(files)
        matched = match_objectives(item.same_format_as or item.name, kind, objectives, start_objectives, where)
        objective = get_evaluation_objective(matched.row_objective, start_objectives)
        renderer = make_renderer(objective, kind, model_inputs, make_row_template(config), labels, add_demonstrations)
        if labels and labels.names and isinstance(objective, ClassifyObjective):
            refuse_unseen_labels(item.name, files, labels.names, cache, from_stage=objective.labels is not None)
        check_template(files, renderer)
        file_specs.append(HeldOutFileSpec(item.name, role, files, kind, objective, renderer, config["label_words"]))
    return file_specs


def describe_new_labels(file_spec: HeldOutFileSpec, source_specs: Sequence[SourceSpec], cache: Path) -> list[str]:
    """A note on labels of held-out rows, written as text, that no training row has.

    Old rows of another task have labels of their own: a retained file is noted only if some of its labels are trained.
    """
    same_kind = [spec for spec in source_specs if spec.kind == file_spec.kind]
    has_classes = isinstance(file_spec.objective, ClassifyObjective | MaskedObjective)
    if file_spec.kind not in ("labelled", "tagged") or not same_kind or has_classes:
        return []
    try:
        names = set(read_all_labels([file_spec.files], cache).names)
        trained = set(read_all_labels([spec.files for spec in same_kind], cache).names)
    except DataError:  # labels of mixed types are no error where they are only text
        return []
    new_names = sorted(map(str, names - trained))
    if not new_names or (file_spec.role == "retained" and not names & trained):
        return []
    listed = ", ".join(new_names[:_MAX_LABEL_NAMES]) + (" ..." if len(new_names) > _MAX_LABEL_NAMES else "")
    return [f"{len(new_names):,} labels occur in no training row: {listed}"]


def inherit_row_format(item: s.HeldOutFile, role: str, by_source: dict[str, SourceSpec]) -> dict[str, Any]:
    """A held-out file as plain data; its `same_format_as` source supplies the keys that it does not set.

    Without `same_format_as` and `kind`, it inherits from the only source of its role with a `kind`.
    """
    config = {**item.model_dump(), "hub": None}
    candidates = [by_source[item.same_format_as]] if item.same_format_as in by_source else []
    if not candidates and item.kind == "auto":
        role = "replay" if role == "retained" else "new"
        candidates = [spec for spec in by_source.values() if spec.role == role and spec.files.kind != "auto"]
    if len(candidates) == 1:
        (source,) = candidates
        inherited = {
            "kind": source.files.kind,
            "columns": dict(source.files.columns),
            "prompt": source.template.prompt,
            "answer": source.template.answer,
            "label_words": dict(source.template.words),
        }
        config |= {key: value for key, value in inherited.items() if key not in item.model_fields_set}
    return config

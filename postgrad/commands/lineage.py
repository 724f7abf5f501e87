"""Trace the stages that led to a run, with the loss on every held-out set after every stage (the R matrix)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from postgrad.commands.cache import cache_folder
from postgrad.commands.results import Result
from postgrad.commands.score_files import score_model
from postgrad.config.stage_file import parse_stage
from postgrad.evaluation.held_out import HeldOutSet
from postgrad.hardware import machine
from postgrad.lineage.record import Record
from postgrad.lineage.tree import lineage_matrix, read_lineage, set_key
from postgrad.models.pretrained import ModelLocation, locate_model
from postgrad.plan.plan import make_plan
from postgrad.plan.start_model import resolve_start_model


@dataclass(frozen=True)
class LineageStage(Result):
    """A stage of a lineage; the first one is the start model."""

    name: str
    path: str
    model: str
    """The model that the stage started from."""
    tokens: int
    """Tokens that the stage trained on."""
    created: str | None = None


@dataclass(frozen=True)
class LineageSet(Result):
    """A held-out set of a lineage."""

    name: str
    learnt_at: int | None
    """The row of the matrix whose stage trained on this kind of text; None where no stage did."""


@dataclass(frozen=True)
class LineageSummary(Result):
    """Transfer over a lineage, of scores that are negative losses in nats per token."""

    ACC: float | None
    """Mean score on all sets after the last stage."""
    BWT: float | None
    """Backward transfer: below zero, later stages raised the loss on earlier text."""
    FWT: float | None
    """Forward transfer to text that was not yet trained on."""
    forgetting: float | None
    """Mean rise from the lowest loss at any earlier stage to the last one."""
    denominators: Mapping[str, str] = field(default_factory=dict)
    """How many sets each of them is a mean of."""


@dataclass(frozen=True)
class Lineage(Result):
    """The stages that led to a run."""

    stages: tuple[LineageStage, ...]
    sets: tuple[LineageSet, ...]
    R: tuple[tuple[float | None, ...], ...]
    """Loss in nats per token, a row a stage and a column a set; None where a stage's set can no longer be read."""
    summary: LineageSummary


def trace_lineage(run: Path | str, *, cache: Path | None = None) -> Lineage:
    """The chain of stages that led to a run, with the R matrix; cells that no run scored are scored now."""
    machine.tune_allocator()
    cache = cache or cache_folder()
    stages = read_lineage(Path(run))
    sets: dict[str, HeldOutSet] = {}

    def score_missing(row: int, key: str) -> float | None:
        path, record = stages[0] if row == 0 else stages[row - 1]
        if key not in sets:
            sets.update(_load_stage_sets(stages, key, cache))
        if key not in sets:
            return None
        start = _load_first_start(record, cache) if row == 0 else locate_model(str(path), Path.cwd())
        held_out = sets[key]
        return score_model(start, [held_out], record["model"]["context"], cache)[held_out.name].nats

    matrix = lineage_matrix(stages, score_missing)
    return Lineage(
        tuple(LineageStage(**stage) for stage in matrix["stages"]),
        tuple(LineageSet(**entry) for entry in matrix["sets"]),
        tuple(tuple(row) for row in matrix["R"]),
        LineageSummary(**matrix["summary"]),
    )


def _load_first_start(record: Record, cache: Path) -> ModelLocation:
    """The model that a run started from; one trained from scratch is initialised again if it is gone."""
    if "fresh" not in record["model"]:
        return locate_model(record["model"]["source"], Path(record["root"]))
    return resolve_start_model(
        parse_stage(yaml.safe_load(record["stage_yaml"]), record["name"]), Path(record["root"]), cache
    )


def _load_stage_sets(stages: list[tuple[Path, Record]], key: str, cache: Path) -> dict[str, HeldOutSet]:
    """The held-out sets of the stage whose record has `key`, read again."""
    for _, record in stages:
        if any(set_key(record, name) == key for name in record.get("changes", {})):
            raw = yaml.safe_load(record["stage_yaml"])
            raw["evaluation"]["tasks"] = []  # their files may have moved, and the matrix has no column for them
            plan = make_plan(parse_stage(raw, record["name"]), Path(record["root"]), cache)
            return {f"{h.name}:{h.fingerprint}": h for h in plan.evaluation.sets}
    return {}

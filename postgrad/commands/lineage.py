"""Trace the stages that led to a run, with the loss on every held-out set after every stage (the R matrix)."""

from __future__ import annotations

from pathlib import Path

from postgrad.commands.score_files import DEFAULT_CONTEXT, score_model
from postgrad.config.stage_file import parse_recorded_stage
from postgrad.evaluation.held_out import HeldOutSet
from postgrad.hardware import machine
from postgrad.lineage.record import Record
from postgrad.lineage.tree import Lineage, Stages, lineage_matrix, read_lineage, set_key
from postgrad.models.location import ModelLocation, locate_model
from postgrad.plan.plan import make_plan
from postgrad.plan.start_model import resolve_start_model
from postgrad.storage.cache_folder import cache_folder


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
        return score_model(start, [held_out], record.model.context_length or DEFAULT_CONTEXT, cache)[held_out.name].nats

    return lineage_matrix(stages, score_missing)


def _load_first_start(record: Record, cache: Path) -> ModelLocation:
    """The model that a run started from; one trained from scratch is initialised again if it is gone."""
    folder = Path(record.stage_folder or ".")
    if record.model.new_model is None:
        return locate_model(record.model.source or record.model.start_model, folder)
    return resolve_start_model(parse_recorded_stage(record.stage, record.name), folder, cache)


def _load_stage_sets(stages: Stages, key: str, cache: Path) -> dict[str, HeldOutSet]:
    """The held-out sets of the stage whose record has `key`, read again."""
    for _, record in stages:
        if any(set_key(record, name) == key for name in record.changes):
            stage = parse_recorded_stage(record.stage, record.name)
            # The files of tasks may have moved, and the matrix has no column for them.
            evaluation = stage.evaluation.model_copy(update={"tasks": [], "abilities": None})
            stage = stage.model_copy(update={"evaluation": evaluation})
            plan = make_plan(stage, Path(record.stage_folder or "."), cache)
            return {f"{h.name}:{h.fingerprint}": h for h in plan.evaluation.sets}
    return {}

"""The plan that a run saves before it trains: `plan.json`, what a resumed run must match and a later stage may replay."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from postgrad.errors import StageError
from postgrad.lineage.previous_format import upgrade_plan
from postgrad.lineage.record import (
    PLAN,
    RECORD,
    ConsumedSource,
    ExecutionSummary,
    PlanSummary,
    RecordedStage,
    RecordPart,
    RunId,
    Time,
    refuse_other_run,
    validate_part,
)
from postgrad.storage.checked_files import read_checked_json, write_checked_json

_DAMAGED_HINT = "restore it from a backup, or train the stage again with another `output`"


class ReplayableSource(RecordPart):
    """A training source, with what a later stage needs to read the same documents again."""

    name: str
    fingerprint: str
    prior_tokens: int = 0
    """Tokens that the start model had consumed of it before this run."""
    origin: dict[str, Any] = {}
    """Where the source comes from, in the keys of a stage file."""


class SavedPlan(RecordPart):
    """`plan.json`."""

    id: RunId
    created: Time
    stage: RecordedStage
    start_model: str | None = None
    fingerprints: dict[str, Any] = {}
    execution: ExecutionSummary
    plan: PlanSummary
    consumed_before: dict[str, ConsumedSource] = {}
    """What the start model has consumed, by data fingerprint."""
    resolved_sources: list[ReplayableSource] = []
    schedule_curve: list[tuple[int, float]] = []
    """Learning rate at some of the planned steps."""
    penalty_strengths: dict[str, dict[str, Any]] = {}
    """Of penalties with `strength: auto`."""


def write_plan(run_folder: Path, plan: SavedPlan) -> None:
    """Write a run's plan atomically."""
    write_checked_json(run_folder / PLAN, plan.as_json(), plan.id, without_secrets=True)


def read_plan(run_folder: Path) -> SavedPlan:
    """A run's plan. Raises `StageError` when it cannot be read, or the record beside it is of another run."""
    path = run_folder / PLAN
    raw: dict[str, Any] = read_checked_json(path, dict[str, Any], error=StageError, hint=_DAMAGED_HINT)
    if "leaves" in raw:
        raw = upgrade_plan(raw)
    plan = validate_part(SavedPlan, raw, str(path))
    refuse_other_run(path, plan.id, run_folder / RECORD)
    return plan

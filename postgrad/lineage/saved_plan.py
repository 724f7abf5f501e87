"""The plan that a run saves before it trains: `plan.json`, what a resumed run must match and a later stage may replay."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from postgrad.errors import StageError
from postgrad.lineage.previous_format import upgrade_plan
from postgrad.lineage.record import PLAN, ConsumedSource, ExecutionSummary, PlanSummary, RecordPart, validate_part
from postgrad.storage.atomic import write_without_secrets


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

    id: str
    created: str
    stage: dict[str, Any]
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
    write_without_secrets(run_folder / PLAN, json.dumps(plan.as_json(), indent=1))


def read_plan(run_folder: Path) -> SavedPlan:
    """A run's plan. Raises `StageError` when it cannot be read."""
    path = run_folder / PLAN
    try:
        raw = json.loads(path.read_text())
    except ValueError as error:
        raise StageError(f"not JSON: {error}", where=str(path)) from error
    if isinstance(raw, dict) and "leaves" in raw:
        raw = upgrade_plan(raw)
    return validate_part(SavedPlan, raw, str(path))

"""The report of a run from the files in its folder, also while the run goes on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from postgrad.config.stage_file import dump_stage
from postgrad.lineage.metrics import METRICS, MetricsRow, read_metrics, read_run_metrics
from postgrad.lineage.record import (
    LOCK,
    PLAN,
    RECORD,
    Record,
    no_run_error,
    read_record,
    validate_part,
)
from postgrad.lineage.saved_plan import read_plan
from postgrad.reports.html import document
from postgrad.reports.pages import run_page
from postgrad.storage.file_lock import is_locked


def rewrite_report(run_folder: Path) -> Path:
    """Write `report.html` of a run folder again. Raises `StageError` when `run_folder` is not one."""
    return document.write_page(run_folder / "report.html", render_report(run_folder))


def render_report(run_folder: Path) -> str:
    """The page of a run folder as it is now. Raises `StageError` when `run_folder` is not one."""
    record = read_record(run_folder) if (run_folder / RECORD).exists() else None
    metrics = read_run_metrics(run_folder, record) if record else None
    if record is None or metrics is None or _is_resumed(run_folder, record, metrics.rows):
        if not (run_folder / PLAN).exists():
            raise no_run_error(run_folder)
        record = _unfinished_record(run_folder)
        metrics = read_metrics(run_folder / METRICS, record.id)
    return run_page.run_page(record, metrics, metrics.damage)


def _is_resumed(run_folder: Path, record: Record, rows: Sequence[MetricsRow]) -> bool:
    """Whether a run has gone on since it was stopped, so that its record is an old one."""
    last_step = max((row.step for row in rows), default=0)
    return record.status == "stopped" and (last_step > record.totals.steps or is_locked(run_folder / LOCK))


def _unfinished_record(run_folder: Path) -> Record:
    """The record of a run that has not written one yet, from its plan."""
    saved = read_plan(run_folder)
    start = saved.start_model or saved.stage.get("model", "")
    parts = {
        "id": saved.id,
        "name": str(saved.stage.get("name", run_folder.name)),
        "status": "running",
        "created": saved.created,
        "stage": saved.stage,
        "stage_yaml": dump_stage(saved.stage),
        "model": {"start_model": str(start)},
        "fingerprints": saved.fingerprints,
        "execution": saved.execution,
        "plan": saved.plan,
        "schedule_curve": saved.schedule_curve,
    }
    return validate_part(Record, parts, str(run_folder / PLAN))

"""The report of a run from the files in its folder, also while the run is going on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from postgrad.errors import StageError
from postgrad.lineage.metrics import METRICS, MetricsRow, read_metrics
from postgrad.lineage.record import LOCK, PLAN, RECORD, STAGE, Fingerprints, ModelSummary, Record, read_record
from postgrad.lineage.saved_plan import read_plan
from postgrad.reports.html import document
from postgrad.reports.pages import run_page
from postgrad.storage.file_lock import is_locked


def rewrite_report(run_folder: Path) -> Path:
    """Write `report.html` of a run folder again. Raises `StageError` when `run_folder` is not one."""
    rows = list(read_metrics(run_folder / METRICS))
    record = read_record(run_folder) if (run_folder / RECORD).exists() else None
    if record is None or _is_resumed(run_folder, record, rows):
        if not (run_folder / PLAN).exists():
            raise StageError(f"{run_folder} is not a run folder", expected="the output folder of `postgrad train`")
        record = _unfinished_record(run_folder)
    html = run_page.run_page(record, rows)
    return document.write_page(run_folder / "report.html", html)


def _is_resumed(run_folder: Path, record: Record, rows: Sequence[MetricsRow]) -> bool:
    """Whether a run has gone on since it was stopped, so that its record is an old one."""
    last_step = max((row.step for row in rows), default=0)
    return record.status == "stopped" and (last_step > record.totals.steps or is_locked(run_folder / LOCK))


def _unfinished_record(run_folder: Path) -> Record:
    """The record of a run that has not written one yet, from its plan."""
    saved = read_plan(run_folder)
    start = saved.start_model or saved.stage["model"]
    return Record(
        id=saved.id,
        name=saved.stage["name"],
        status="running",
        created=saved.created,
        stage=saved.stage,
        stage_yaml=(run_folder / STAGE).read_text(),
        model=ModelSummary(start_model=str(start)),
        fingerprints=Fingerprints.model_validate(saved.fingerprints),
        execution=saved.execution,
        plan=saved.plan,
        schedule_curve=saved.schedule_curve,
    )

"""The report of a run from the files in its folder, also while the run is going on."""

from __future__ import annotations

from pathlib import Path

from postgrad.config.stage_file import dump_stage
from postgrad.errors import StageError
from postgrad.lineage.metrics import read_run_metrics
from postgrad.lineage.record import PLAN, RECORD, Fingerprints, ModelSummary, Record, read_record, validate_part
from postgrad.lineage.saved_plan import read_plan
from postgrad.reports.html import document
from postgrad.reports.pages import run_page


def rewrite_report(run_folder: Path) -> Path:
    """Write `report.html` of a run folder again. Raises `StageError` when `run_folder` is not one."""
    if (run_folder / RECORD).exists():
        record = read_record(run_folder)
    elif (run_folder / PLAN).exists():
        record = _unfinished_record(run_folder)
    else:
        raise StageError(f"{run_folder} is not a run folder", expected="the output folder of `postgrad train`")
    metrics = read_run_metrics(run_folder, record)
    html = run_page.run_page(record, metrics, metrics.damage)
    return document.write_page(run_folder / "report.html", html)


def _unfinished_record(run_folder: Path) -> Record:
    """The record of a run that has not written one yet, from its plan."""
    saved = read_plan(run_folder)
    start = saved.start_model or saved.stage.get("model", "")
    return Record(
        id=saved.id,
        name=str(saved.stage.get("name", run_folder.name)),
        status="running",
        created=saved.created,
        stage=saved.stage,
        stage_yaml=dump_stage(saved.stage),
        model=ModelSummary(start_model=str(start)),
        fingerprints=validate_part(Fingerprints, saved.fingerprints, str(run_folder / PLAN)),
        execution=saved.execution,
        plan=saved.plan,
    )

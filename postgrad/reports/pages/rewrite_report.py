"""A run's page from what lies in its folder, also while it is still going on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from postgrad.errors import StageError
from postgrad.reports.html import document
from postgrad.reports.pages import run_page


def rewrite_report(run_folder: Path) -> Path:
    """Write `report.html` of a run folder anew. Raises `StageError` when `run` is none."""
    record: dict[str, Any]
    if (run_folder / "record.json").exists():
        record = json.loads((run_folder / "record.json").read_text())
    elif (run_folder / "plan.json").exists():
        planned = json.loads((run_folder / "plan.json").read_text())
        record = {
            "name": planned["stage"]["name"],
            "status": "stopped",
            "created": planned["created"],
            "stage": planned["stage"],
            "stage_yaml": (run_folder / "stage.yaml").read_text(),
            "plan": planned["plan"],
            "execution": planned["execution"],
            "fingerprints": planned["fingerprints"],
            "model": {"start": planned.get("start") or planned["stage"]["model"]},
        }
    else:
        raise StageError(f"{run_folder} is not a run folder", expected="the output folder of `postgrad train`")
    metrics: list[dict[str, Any]] = []
    if (run_folder / "metrics.jsonl").exists():
        with (run_folder / "metrics.jsonl").open() as file:
            for line in file:
                try:
                    metrics.append(json.loads(line))
                except ValueError:  # the line that is being written
                    break
    return document.write_page(run_folder / "report.html", run_page.run_page(record, metrics))

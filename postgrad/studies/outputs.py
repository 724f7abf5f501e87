"""Output files of a study (`study.json`, `study.csv`, `report.html`) and its closing summary."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from postgrad.reports.html import document
from postgrad.reports.html.notation import format_duration, format_percent
from postgrad.reports.pages.study_page import study_page
from postgrad.reports.result_models import StudyResults
from postgrad.reports.sections.study_table import claims_table, study_arms_table, study_csv
from postgrad.run.run_folder import REPORT
from postgrad.storage.atomic import write_without_secrets
from postgrad.studies.results import compute_results
from postgrad.studies.run_study import PreparedStudy, study_text

STUDY_JSON, STUDY_CSV = "study.json", "study.csv"


def write_outputs(prepared: PreparedStudy, failed: Mapping[str, str]) -> dict[str, Any]:
    """Compute the results from the runs alone, and write the output files."""
    found = compute_results(prepared, failed)
    home = prepared.folder.path
    found["study_yaml"] = study_text(prepared)
    write_without_secrets(home / STUDY_JSON, json.dumps(found, indent=1) + "\n")
    study = StudyResults.model_validate(found)
    write_without_secrets(home / STUDY_CSV, study_csv(study))
    document.write_page(home / REPORT, study_page(study))
    return found


def outputs_text(prepared: PreparedStudy, results: Mapping[str, Any], command: str, *, stopped: bool) -> str:
    """The closing summary: table, claims, failures, output paths and the next command."""
    home, time, study = prepared.folder.path, results["time"], StudyResults.model_validate(results)
    lines = ["", study_arms_table(study, brief=True).text(), ""]
    claims = claims_table(study)
    if claims:
        lines += [claims.text(max_characters=100), ""]
    lines += results["summary"]
    lines += ["", *(f"FAILED: {name}: {error}" for name, error in results["failed"].items())]
    spent = f"{format_duration(time['training'])} training, {format_duration(time['evaluation'])} evaluation"
    spent += f", {format_duration(time['making'])} preparing replay, importance and blends" if time["making"] else ""
    outside = "" if time["outside"] is None else f"; {format_percent(time['outside'])} of the time was overhead"
    lines.append(f"{time['runs']} runs instead of {time['runs_requested']} by sharing: {spent}{outside}")
    lines += [f"table:  {_relative_to_cwd(home / STUDY_CSV)}", f"report: {_relative_to_cwd(home / REPORT)}"]
    left = len(prepared.remaining_steps)
    following = command if stopped or left else f"open {_relative_to_cwd(home / REPORT)} in a browser"
    return "\n".join([*(line for line in lines), f"next: {following}"])


def _relative_to_cwd(path: Path) -> Path:
    """A path relative to the working directory, where possible."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path

"""What does a study leave behind? `study.json`, `study.csv`, `report.html`, and what is said at its end."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from postgrad.reports.html import document
from postgrad.reports.html.notation import duration, percent
from postgrad.reports.pages.study_page import study_page
from postgrad.reports.sections.study_table import arms_table, as_csv, claims_table
from postgrad.run.run import REPORT
from postgrad.storage.atomic import write_atomically
from postgrad.studies.results import findings
from postgrad.studies.run_study import Prepared, study_text

RECORD, CSV = "study.json", "study.csv"


def finish(prepared: Prepared, failed: Mapping[str, str]) -> dict[str, Any]:
    """Write down what was found until now; it is worked out anew each time, from the runs alone."""
    found = findings(prepared, failed)
    home = prepared.folder.home
    found["study_yaml"] = study_text(prepared)
    write_atomically(home / RECORD, json.dumps(found, indent=1) + "\n")
    write_atomically(home / CSV, as_csv(found))
    document.write(home / REPORT, study_page(found))
    return found


def finish_text(prepared: Prepared, found: Mapping[str, Any], command: str, *, stopped: bool) -> str:
    """The table, the claims, the summary, what failed, where everything lies, and the next command."""
    home, time = prepared.folder.home, found["time"]
    lines = ["", arms_table(found, brief=True).text(), ""]
    claims = claims_table(found)
    if claims:
        lines += [claims.text(most=100), ""]
    lines += found["summary"]
    lines += ["", *(f"FAILED: {name}: {error}" for name, error in found["failed"].items())]
    spent = f"{duration(time['training'])} training, {duration(time['evaluation'])} evaluation"
    spent += f", {duration(time['making'])} making replay, importance and blends" if time["making"] else ""
    outside = "" if time["outside"] is None else f"; {percent(time['outside'])} of the time was spent outside of these"
    lines.append(f"{time['runs']} runs where {time['runs_asked']} were asked for: {spent}{outside}")
    lines += [f"table:  {_near(home / CSV)}", f"report: {_near(home / REPORT)}"]
    left = len(prepared.left)
    following = command if stopped or left else f"open {_near(home / REPORT)} in a browser"
    return "\n".join([*(line for line in lines), f"next: {following}"])


def _near(place: Path) -> Path:
    """A place as it is seen from here."""
    return place.relative_to(Path.cwd()) if place.is_relative_to(Path.cwd()) else place

"""The page of a run that goes on after a stop: it says so, and draws the whole schedule."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path

import pytest

from postgrad.lineage.metrics import METRICS, read_metrics
from postgrad.reports.pages import rewrite_report
from postgrad.reports.pages.run_page import run_page
from postgrad.run.events import StepCompleted
from postgrad.run.run import run_stage
from tests.conftest import StageOf
from tests.run.test_run import plan_of


def page(run: Path) -> str:
    return rewrite_report.rewrite_report(run).read_text()


def ticks(html: str) -> set[str]:
    """The numbers on the axis of the learning rate."""
    (chart, *_) = [svg for svg in re.findall(r"<svg.*?</svg>", html, re.DOTALL) if ">learning rate<" in svg]
    return set(re.findall(r"<text[^>]*>([\d,.]+)</text>", chart))


def test_a_resumed_run_is_not_called_stopped(
    stage_of: StageOf, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw, run, pages = stage_of(), tmp_path / "run", {}
    for stop_at in (8, 12):
        for event in run_stage(plan_of(raw, cache), command="test", cache=cache):
            if isinstance(event, StepCompleted):
                if event.report.step in (6, 10, stop_at):
                    pages[event.report.step] = page(run)
                if event.report.step == stop_at:
                    without = rewrite_report._unfinished_record(run).model_copy(update={"schedule_curve": []})
                    assert "20" not in ticks(run_page(without, read_metrics(run / METRICS)))  # the mutant: no schedule
                    with monkeypatch.context() as patched:  # the mutant: the record of the stop is believed
                        patched.setattr(rewrite_report, "_is_resumed", lambda *_: False)
                        pages["believed", stop_at] = page(run)
                    os.kill(os.getpid(), signal.SIGTERM)
    for step in (6, 10, 12):
        assert "This run is not finished" in pages[step] and "was stopped" not in pages[step]
        assert ">now</text>" in pages[step] and "20" in ticks(pages[step])  # of 24 steps
    assert "was stopped" in pages["believed", 12]
    assert "This run was stopped after step 12 of 24" in page(run)
    # A resumed run that was killed holds no lock, but has gone on.
    lines = (run / "metrics.jsonl").read_text().splitlines()
    step = next(line for line in reversed(lines) if '"kind": "step"' in line)
    with (run / "metrics.jsonl").open("a") as file:
        row = {key: value for key, value in json.loads(step).items() if key != "checksum"}
        file.write(json.dumps({**row, "step": 13}) + "\n")
    assert "This run is not finished" in page(run)

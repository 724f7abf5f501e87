"""Results show themselves in a notebook: tables and curves, in which foreign text stays text."""

from __future__ import annotations

import html
from pathlib import Path

from postgrad.commands.check import StageCheck
from postgrad.commands.compare import BitsPerByteChange, ModelComparison, ModelOnText, compare_runs
from postgrad.commands.evaluate import TextEvaluation
from postgrad.commands.results import TextScore
from postgrad.lineage.matrix import Lineage, LineageSet, LineageStage, LineageSummary
from postgrad.lineage.record import PlannedSource, PlanSummary, read_record
from postgrad.models.task import Task
from postgrad.reports.notebook import plan_html
from postgrad.run.events import RunFinished
from tests.tiny_lineage import LineageRuns

HOSTILE = "<script>x</script>"
SCORE = TextScore(2.0, 1.9, 2.1, 7.4, 1.1, 100, 400, 10)


def test_runs_and_records_show_their_tables_and_curves(runs: LineageRuns, tmp_path: Path) -> None:
    record = read_record(runs.replay)
    assert "old-heldout" in record._repr_html_() and "<table" in record._repr_html_()
    shown = RunFinished(record, runs.replay)._repr_html_()
    assert shown.startswith('<iframe sandbox=""') and "<svg" in html.unescape(shown) and "<script" not in shown
    assert RunFinished(record, tmp_path)._repr_html_() == record._repr_html_()
    compared = compare_runs([runs.naive, runs.replay])._repr_html_()
    assert "two" in compared and "replay" in compared


def test_foreign_text_stays_text() -> None:
    source = PlannedSource(name=HOSTILE, role="new")
    shown = [
        TextEvaluation(HOSTILE, 32, {HOSTILE: SCORE}, Task.CAUSAL, False)._repr_html_(),
        ModelComparison(
            (HOSTILE, "b"), 32, (ModelOnText("b", HOSTILE, SCORE, BitsPerByteChange((0.1, 0.0, 0.2))),)
        )._repr_html_(),
        plan_html(HOSTILE, PlanSummary(steps=1, tokens=2, sources=[source])),
        Lineage(
            stages=[LineageStage(name=HOSTILE, path="p", model="m")],
            sets=[LineageSet(name=HOSTILE, learnt_at=0)],
            R=[[1.0]],
            summary=LineageSummary(),
        )._repr_html_(),
        StageCheck._repr_html_(type("Check", (), {"text": HOSTILE})()),  # type: ignore[arg-type]
    ]
    for text in shown:
        assert HOSTILE not in text and html.escape(HOSTILE) in text

"""The terminal summary of a finished stage."""

from __future__ import annotations

import shlex

from postgrad.reports.html import tables
from postgrad.reports.sections.drift_tables import changed_weights_sentence, drift_table
from postgrad.reports.sections.task_tables import cluster_table, task_table
from postgrad.run.events import RunFinished
from postgrad.run.run_folder import MODEL, REPORT


def summary_text(outcome: RunFinished) -> str:
    """Scores, gate, output paths, and the next command."""
    record, folder = outcome.record, outcome.run_folder
    lines = ["this stage was already complete", ""] if outcome.already_complete else [""]
    lines.append(tables.score_table(record, brief=True).text())
    for table in (
        tables.pseudo_perplexity_table(record, brief=True),
        tables.metrics_table(record),
        tables.source_losses_table(record),
        drift_table(record),
        task_table(record, brief=True),
        cluster_table(record),
    ):
        if table:
            lines += ["", table.text()]
    gate = record.get("gate")
    if gate:
        worst = gate["worst"]
        verdict = "passed" if gate["passed"] else "FAILED"
        lines.append(
            f"\nretention gate {verdict}: the loss on {worst['set']} rose by {worst['rise']:+.2%} "
            f"(upper end {worst['high']:+.2%}), allowed {gate['max_forgetting']:.2%}"
        )
    changed = changed_weights_sentence(record) if record.get("update") else None
    lines += ["", changed] if changed else []
    chosen = tables.selected_step_sentences(record)
    lines += ["", *chosen] if chosen else []
    lines += ["", f"model:  {folder / MODEL}", f"report: {folder / REPORT}"]
    writes = record["model"].get("task", "causal") in ("causal", "text-to-text")
    verb = "generate" if record["status"] == "finished" and writes else "lineage"
    return "\n".join([*lines, f"next: {shlex.join(['postgrad', verb, str(folder)])}"])

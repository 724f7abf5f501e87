"""The text at the end of a stage."""

from __future__ import annotations

import shlex
from pathlib import Path

from postgrad.lineage.record import Record
from postgrad.reports.sections.ability_section import ability_table, gate_sentence
from postgrad.reports.sections.drift_section import changed_weights_sentence, drift_table
from postgrad.reports.sections.held_out_tables import (
    class_tables,
    expected_losses_table,
    metrics_table,
    pseudo_perplexity_table,
    score_table,
    unknown_tokens_table,
)
from postgrad.reports.sections.mixture_section import source_losses_table
from postgrad.reports.sections.overview import skipped_steps_sentence
from postgrad.reports.sections.published_step import selected_step_sentences
from postgrad.reports.sections.task_section import cluster_table, task_table
from postgrad.run.events import RunFinished
from postgrad.run.run_folder import MODEL, REPORT

_MAX_CLASSES = 8


def _gate_remedies(record: Record, folder: Path, max_forgetting: float) -> str:
    """What helps after a failed retention gate, with the commands."""
    bound = f"{100 * max_forgetting:.3g}%"
    blend = [str(folder), "--max-forgetting", bound, "--out", f"{folder}-blend"]
    remedies = [
        f"replay, distillation or a penalty, found by short runs: postgrad keep STAGE --max-forgetting {bound}",
        f"a model between start and end: {shlex.join(['postgrad', 'blend', *blend])}",
    ]
    if record.model.task == "causal":
        has_replay = any(source.role == "replay" for source in record.totals.sources)
        restore = [str(folder), *([] if has_replay else ["--prompts", "OLD-TEXT"])]
        remedies.append(f"recover old text afterwards: {shlex.join(['postgrad', 'restore', *restore])}")
    return "\n".join(["what helps:", *(f"  {remedy}" for remedy in remedies)])


def _ability_remedies(record: Record, folder: Path) -> str:
    """What helps after a failed gate on abilities."""
    blend = shlex.join(["postgrad", "blend", str(folder), "--weight", "0.5", "--out", f"{folder}-blend"])
    measure = shlex.join(["postgrad", "eval", f"{folder}-blend", "--abilities", "all"])
    remedies = [
        "rows that show what was lost, such as conversations, as a source with role: replay",
        "the start model as the teacher on them: an objective of kind distill",
    ]
    if record.changes_with_role("retained"):  # which a blend measures
        remedies.append(f"a model between start and end: {blend}; then {measure}")
    return "\n".join(["what helps:", *(f"  {remedy}" for remedy in remedies)])


def summary_text(outcome: RunFinished) -> str:
    """The scores, the retention gate, where everything is, and the next command."""
    record, folder = outcome.record, outcome.run_folder
    lines = ["this stage was already complete", ""] if outcome.already_complete else [""]
    lines.append(score_table(record, brief=True).text())
    for table in (
        expected_losses_table(record),
        pseudo_perplexity_table(record, brief=True),
        metrics_table(record),
        *class_tables(record, _MAX_CLASSES),
        unknown_tokens_table(record),
        source_losses_table(record),
        drift_table(record),
        task_table(record, brief=True),
        cluster_table(record),
        ability_table(record, brief=True),
    ):
        if table:
            lines += ["", table.text()]
    if gate := record.retention_gate:
        worst, verdict = gate.worst, "passed" if gate.passed else "FAILED"
        lines.append(
            f"\nretention gate {verdict}: the loss on {worst.set} rose by {worst.relative_difference:+.2%} "
            f"(upper end {worst.relative_high:+.2%}), allowed {gate.max_forgetting:.2%}"
        )
        if not gate.passed:
            lines.append(_gate_remedies(record, folder, gate.max_forgetting))
    if record.abilities and (bound := record.abilities.gate):
        lines.append(f"\ngate on abilities {'passed' if bound.passed else 'FAILED'}: {gate_sentence(bound)}")
        if not bound.passed:
            lines.append(_ability_remedies(record, folder))
    changed = changed_weights_sentence(record) if record.sparse_update else None
    lines += ["", changed] if changed else []
    if record.totals.skipped_steps:
        lines += ["", f"warning: {skipped_steps_sentence(record.totals.skipped_steps)}"]
    selected = selected_step_sentences(record)
    lines += ["", *selected] if selected else []
    lines += ["", f"model:  {folder / MODEL}", f"report: {folder / REPORT}"]
    can_generate = record.status == "finished" and record.model.task in ("causal", "text-to-text")
    verb = "generate" if can_generate else "lineage"
    return "\n".join([*lines, f"next: {shlex.join(['postgrad', verb, str(folder)])}"])

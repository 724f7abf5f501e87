"""The published checkpoint: which step was selected, and by what."""

from __future__ import annotations

from postgrad.foreign_text import plain_text
from postgrad.lineage.record import PublishedCheckpoint, Record
from postgrad.reports.html.charts import Series, VerticalMark, line_chart
from postgrad.reports.html.document import figure, intro_paragraph, side_by_side
from postgrad.reports.html.notation import format_count, format_fixed, format_percent
from postgrad.reports.sections.curves import X_LABEL, Curves


def selected_step_sentences(record: Record) -> list[str]:
    """Which step was published and why; empty when the last step is published by rule."""
    selected = record.published_checkpoint
    if selected is None:
        return []
    rule = _rule_text(selected)
    count = selected.evaluations
    sentences = [
        f"Published: step {format_count(selected.step)} of {format_count(selected.last_step)}, the best of "
        f"{format_count(count)} evaluation{'s' * (count != 1)} by {rule} ({format_fixed(selected.value, 4)})."
    ]
    if selected.max_forgetting is not None and not selected.within_max_forgetting:
        sentences.append(
            f"No evaluation kept the loss on every retained set within {format_percent(selected.max_forgetting)}; "
            f"this one forgot least ({format_percent(selected.relative_high)} at the upper end)."
        )
    elif selected.max_forgetting is not None:
        sentences.append(
            f"Evaluations at which a retained set's loss had risen by more than {format_percent(selected.max_forgetting)} "
            "were not candidates."
        )
    if selected.stopped_early:
        end = f"Training ended at step {format_count(selected.last_step)} of {format_count(record.plan.steps)}"
        if selected.stop_at is not None and not selected.evaluations_since_best:
            sentences.append(f"{end}: {rule} reached {format_fixed(selected.stop_at, 4)}.")
        else:
            number = format_count(selected.evaluations_since_best)
            sentences.append(f"{end}: {number} evaluations without improvement.")
    return sentences


def _rule_text(selected: PublishedCheckpoint) -> str:
    return f"{plain_text(selected.metric, 40)} on {plain_text(selected.set, 60)}"


def published_mark(record: Record) -> list[VerticalMark]:
    """A mark at the published step, when one was selected."""
    selected = record.published_checkpoint
    if selected is None:
        return []
    return [VerticalMark(selected.trained_tokens, "published")]


def published_step_section(record: Record, curves: Curves) -> str:
    """The selection metric at each evaluation, and the selected step."""
    selected = record.published_checkpoint
    if selected is None:
        return ""
    chart = ""
    if curves.selection_values:
        metric = plain_text(selected.metric, 40)
        series = [Series(metric, curves.selection_values, has_markers=True, has_label=False)]
        marks = published_mark(record)
        rule = _rule_text(selected)
        chart = figure(
            rule[:1].upper() + rule[1:],
            lambda w: line_chart(
                series, title=f"{rule} at each evaluation", x_label=X_LABEL, y_label=metric, width=w, marks=marks
            ),
            note="Each evaluation scores the whole set. Candidates are the evaluations from step "
            f"{format_count(selected.first_step)} on.",
        )
    return "".join(intro_paragraph(line) for line in selected_step_sentences(record)) + side_by_side(chart)

"""The result: every held-out set before and after, as tables and forest plots."""

from __future__ import annotations

from postgrad.lineage.record import Record
from postgrad.reports.html.charts import LimitLine, forest_plot
from postgrad.reports.html.document import details, figure, side_by_side
from postgrad.reports.html.notation import format_signed
from postgrad.reports.sections.curves import change_estimates
from postgrad.reports.sections.held_out_tables import (
    class_tables,
    expected_losses_table,
    loss_unit,
    metrics_table,
    pseudo_perplexity_table,
    score_table,
    set_names,
    unknown_tokens_table,
)

_GLOSSARY = (
    '<p class="note">Held-out text was kept out of the training data. The loss is the mean negative log probability of the'
    " next token, in <b>nats per token</b>. <b>Perplexity</b> is e to the power of the loss. <b>Bits per byte</b> do not depend"
    " on the tokenizer. A 95 % interval that does not contain zero is evidence of a change. <b>Share of range</b> is the"
    " difference as a share of the range from the loss before to that of a uniform guess, ln V.</p>"
)


def result_section(record: Record) -> str:
    """The section of a run's page; empty without held-out sets."""
    if not set_names(record):
        return ""
    tables = (
        score_table(record), expected_losses_table(record), pseudo_perplexity_table(record), metrics_table(record),
        *class_tables(record),        unknown_tokens_table(record),
    )  # fmt: skip
    return (
        "".join(table.html() for table in tables if table)
        + details("How to read these numbers", _GLOSSARY)
        + side_by_side(*_forest_plots(record))
    )


def _forest_plots(record: Record) -> list[str]:
    retained, learned, test = (
        change_estimates(record.changes_with_role(role)) for role in ("retained", "learned", "test")
    )
    level = record.retention_gate.loss_rise_limit if record.retention_gate else None
    limit = LimitLine(level, f"gate {format_signed(level)}") if level is not None else None
    label = f"change of the loss, {loss_unit(record)}"
    plots = []
    if retained:
        plots.append(
            figure(
                "Retained sets",
                lambda w: forest_plot(
                    retained, title="Change on retained sets", width=w, limit=limit, x_label=label, left_word="better",
                    right_word="worse",
                ),
                note="Old text. Zero is no change; bars are 95 % intervals.",
            )
        )  # fmt: skip
    if learned or test:
        rows = [*learned, *test, *retained]
        plots.append(
            figure(
                "All sets on one scale" if retained else "Learned and test sets" if test else "Learned sets",
                lambda w: forest_plot(
                    rows, title="Change on all sets", width=w, x_label=label, left_word="better", right_word="worse"
                ),
                note="Gain and forgetting side by side.",
            )
        )
    return plots

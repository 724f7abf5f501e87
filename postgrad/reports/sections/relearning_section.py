"""The relearning test: forgetting that a few steps on old text recover."""

from __future__ import annotations

from postgrad.lineage.record import Record
from postgrad.reports.html.document import intro_paragraph
from postgrad.reports.html.notation import format_count, format_percent, format_signed
from postgrad.reports.html.table import VALUE_FIELDS, Column, Table, count_cell, interval_cell, text_cell


def relearning_table(record: Record) -> Table | None:
    """Forgotten, recovered and remaining, by set; None when not measured."""
    if record.relearning is None:
        return None
    body = []
    for name, entry in record.relearning.sets.items():
        losses = (entry.forgotten, entry.recovered, entry.remaining, entry.start_model_change)
        share = interval_cell(entry.recovered_share, 0, write=format_percent, absent="no significant forgetting")
        body.append(
            (
                text_cell(name),
                *(interval_cell(loss, write=format_signed) for loss in losses),
                share,
                count_cell(entry.documents),
            )
        )
    unit = "nats per token"
    columns = (
        Column("set", is_text=True),
        Column("forgotten (95 %)", unit, fields=VALUE_FIELDS),
        Column("recovered (95 %)", unit, fields=VALUE_FIELDS),
        Column("remaining (95 %)", unit, fields=VALUE_FIELDS),
        Column("change of the start model (95 %)", unit, fields=VALUE_FIELDS),
        Column("share recovered (95 %)", fields=VALUE_FIELDS),
        Column("documents"),
    )
    notes = (
        "Remaining: the trained model against the start model, both after the same steps. Recovered: the rest of what was"
        " forgotten. The scored documents are not those of the steps.",
    )
    return Table("Forgetting recovered by a few steps", columns, tuple(body), notes)


def relearning_section(record: Record) -> str:
    """The section of a run's page; empty when not measured."""
    table = relearning_table(record)
    if table is None or record.relearning is None:
        return ""
    test = record.relearning
    intro = intro_paragraph(
        f"Copies of both models were trained for {format_count(test.steps)} steps on {format_count(test.tokens)} tokens of old"
        " text. What this recovers was not lost but misaligned. The published model is unchanged."
    )
    return intro + table.html()

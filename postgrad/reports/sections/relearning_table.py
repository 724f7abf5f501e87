"""How does a report say what of the forgetting a few steps win back? What was forgotten, came back and is left, by set."""

from __future__ import annotations

from collections.abc import Mapping

from postgrad.reports.html.document import intro_paragraph
from postgrad.reports.html.notation import as_mapping, as_number, format_count, format_percent, format_signed
from postgrad.reports.html.tables import Cell, Column, Number, Table, count_cell, text_cell


def relearning_table(record: Mapping[str, object]) -> Table | None:
    """What was forgotten of each set, what of it came back and what is left; None when it was not tried."""
    found = as_mapping(record.get("realign"))
    sets = as_mapping(found.get("sets"))
    if not sets:
        return None
    body = []
    for name, entry in ((name, as_mapping(value)) for name, value in sets.items()):
        parts = (_interval_cell(entry.get(key)) for key in ("forgot", "won", "left", "start_learnt"))
        body.append((text_cell(name), *parts, _share_cell(entry.get("share")), count_cell(entry.get("documents"))))
    columns = (
        Column("set", is_text=True),
        Column("forgotten (95 %)", "nats per token"),
        Column("won back (95 %)", "nats per token"),
        Column("left (95 %)", "nats per token"),
        Column("the start model learnt", "nats per token"),
        Column("share won back (95 %)"),
        Column("documents"),
    )
    notes = (
        "Left: the trained model after these steps against the start model after the same steps, which is what is forgotten in"
        " earnest. Won back: the rest. The documents are none that the steps have read.",
    )
    return Table("Forgetting that a few steps win back", columns, tuple(body), notes)


def relearning_section(record: Mapping[str, object]) -> str:
    """The section of a run's page; empty when it was not tried."""
    table = relearning_table(record)
    if table is None:
        return ""
    found = as_mapping(record.get("realign"))
    said = intro_paragraph(
        f"What {format_count(found.get('steps'))} steps on {format_count(found.get('tokens'))} tokens of old text bring back was not lost but"
        " out of reach. The steps were taken on copies; the published model is as it was."
    )
    return said + table.html()


def _interval_cell(entry: object) -> Cell:
    found = as_mapping(entry)
    value = as_number(found.get("value"))
    if value is None:
        return text_cell("")
    return Cell(
        (Number(format_signed(value), value),),
        below=(f"{format_signed(found.get('low'))} to {format_signed(found.get('high'))}",),
    )


def _share_cell(entry: object) -> Cell:
    found = as_mapping(entry)
    value = as_number(found.get("value"))
    if value is None:
        return text_cell("nothing forgotten for certain")
    return Cell(
        (Number(format_percent(value, 0), value),),
        below=(f"{format_percent(found.get('low'), 0)} to {format_percent(found.get('high'), 0)}",),
    )

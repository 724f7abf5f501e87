"""How does a report say what of the forgetting a few steps win back? What was forgotten, came back and is left, by set."""

from __future__ import annotations

from collections.abc import Mapping

from postgrad.reports.html.document import about
from postgrad.reports.html.notation import count, mapping, number, percent, signed
from postgrad.reports.html.tables import Cell, Column, Number, Table, whole, words


def realign_table(record: Mapping[str, object]) -> Table | None:
    """What was forgotten of each set, what of it came back and what is left; None when it was not tried."""
    found = mapping(record.get("realign"))
    sets = mapping(found.get("sets"))
    if not sets:
        return None
    body = []
    for name, entry in ((name, mapping(value)) for name, value in sets.items()):
        parts = (_with_interval(entry.get(key)) for key in ("forgot", "won", "left", "start_learnt"))
        body.append((words(name), *parts, _share(entry.get("share")), whole(entry.get("documents"))))
    columns = (
        Column("set", words=True),
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


def section(record: Mapping[str, object]) -> str:
    """The section of a run's page; empty when it was not tried."""
    table = realign_table(record)
    if table is None:
        return ""
    found = mapping(record.get("realign"))
    said = about(
        f"What {count(found.get('steps'))} steps on {count(found.get('tokens'))} tokens of old text bring back was not lost but"
        " out of reach. The steps were taken on copies; the published model is as it was."
    )
    return said + table.html()


def _with_interval(entry: object) -> Cell:
    found = mapping(entry)
    value = number(found.get("value"))
    if value is None:
        return words("")
    return Cell((Number(signed(value), value),), below=(f"{signed(found.get('low'))} to {signed(found.get('high'))}",))


def _share(entry: object) -> Cell:
    found = mapping(entry)
    value = number(found.get("value"))
    if value is None:
        return words("nothing forgotten for certain")
    return Cell(
        (Number(percent(value, 0), value),),
        below=(f"{percent(found.get('low'), 0)} to {percent(found.get('high'), 0)}",),
    )

"""Tables of a lineage: the loss matrix and its summary."""

from __future__ import annotations

from postgrad.lineage.matrix import Lineage
from postgrad.reports.html.table import Column, Table, change_cell, count_cell, text_cell, value_cell

_MEANINGS = {
    "ACC": "minus the mean loss over all sets after the last stage (higher is better)",
    "BWT": "backward transfer: minus the rise of the loss on earlier sets since their stage (higher is better)",
    "FWT": "forward transfer: minus the rise of the loss on later sets before their stage (higher is better)",
    "forgetting": "rise of the loss above the lowest of any earlier stage (lower is better)",
}


def lineage_table(lineage: Lineage) -> Table:
    """The matrix R: row i, column j is the loss on set j after stage i, in nats per token."""
    body = [
        (text_cell(stage.name), count_cell(stage.tokens), *(value_cell(loss) for loss in row))
        for stage, row in zip(lineage.stages, lineage.R, strict=True)
    ]
    columns = (
        Column("after", is_text=True),
        Column("trained tokens"),
        *(Column(s.name, "loss, nats per token") for s in lineage.sets),
    )
    return Table("Loss on every held-out set after every stage", columns, tuple(body), growth_notes(lineage))


def growth_notes(lineage: Lineage) -> tuple[str, ...]:
    """That the lineage begins behind a loss, where the vocabulary of its start model was grown."""
    if lineage.growth is None:
        return ()
    return (f"No row shows that {lineage.growth.sentence()}.",)


def lineage_summary_table(lineage: Lineage) -> Table:
    """The matrix in a few numbers, each with its denominator."""
    summary = lineage.summary
    body = [
        (
            text_cell(name),
            value_cell(value) if name == "ACC" else change_cell(value),
            text_cell(meaning),
            text_cell(summary.denominators.get(name)),
        )
        for (name, meaning), value in zip(
            _MEANINGS.items(), (summary.ACC, summary.BWT, summary.FWT, summary.forgetting), strict=True
        )
    ]
    columns = (Column("measure", is_text=True), Column("value", unit="nats per token"),
               Column("meaning", is_text=True), Column("divided by", is_text=True))  # fmt: skip
    return Table("The matrix in a few numbers", columns, tuple(body))

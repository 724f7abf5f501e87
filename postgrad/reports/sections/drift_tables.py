"""How does a report say how far a model has moved? What it says by set, and its weights and outputs by layer."""

from __future__ import annotations

import math
from collections.abc import Mapping

from postgrad.reports.html.document import figure, intro_paragraph, side_by_side
from postgrad.reports.html.figures import Series, line_chart
from postgrad.reports.html.notation import as_list, as_mapping, as_number, format_count, format_percent, plain_text
from postgrad.reports.html.tables import Cell, Column, Number, Table, count_cell, text_cell, value_cell


def drift_table(record: Mapping[str, object]) -> Table | None:
    """What the model says now against what it said before, by set; None when it was not measured."""
    sets = as_mapping(as_mapping(record.get("drift")).get("sets"))
    if not sets:
        return None
    body = []
    for name, entry in ((name, as_mapping(value)) for name, value in sets.items()):
        body.append(
            (
                text_cell(name),
                text_cell(entry.get("role")),
                _interval_cell(entry.get("divergence")),
                value_cell(as_mapping(entry.get("base_cross_entropy")).get("value")),
                _share_cell(entry.get("right_before")),
                _share_cell(entry.get("lost")),
                _share_cell(entry.get("won")),
                count_cell(entry.get("tokens")),
            )
        )
    columns = (
        Column("set", is_text=True),
        Column("role", is_text=True),
        Column("KL(before || after) (95 %)", "nats per token"),
        Column("on its own predictions", "nats per token"),
        Column("right before", "likeliest token"),
        Column("lost", "likeliest token"),
        Column("won", "likeliest token"),
        Column("tokens"),
    )
    notes = (
        "KL: how differently it speaks of the same text. On its own predictions: the cross-entropy against what the start"
        " model itself said. Lost and won: tokens that were its first guess before and are not now, and the other way round.",
    )
    return Table("What the model says now against what it said before", columns, tuple(body), notes)


def changed_weights_sentence(record: Mapping[str, object]) -> str | None:
    """How many numbers of the start model are no longer what they were, and how many each update moved; None: not known."""
    changed = as_mapping(as_mapping(record.get("drift")).get("changed"))
    update = as_mapping(record.get("update"))
    numbers, of = as_number(changed.get("numbers")), as_number(changed.get("of"))
    if numbers is None or not of:
        return None
    moved, could = as_number(update.get("moved")), as_number(update.get("of"))
    each = (
        f"; each update moved {format_count(moved)} of {format_count(could)} ({format_percent(moved / could, 1)})"
        if moved and could
        else ""
    )
    return f"{format_count(numbers)} of {format_count(of)} weights differ from the start model's ({format_percent(numbers / of, 1)}){each}."


def drift_section(record: Mapping[str, object]) -> str:
    """The section of a run's page; empty when nothing was measured."""
    table = drift_table(record)
    if table is None:
        return ""
    found = as_mapping(record.get("drift"))
    weights = [(name, as_number(value)) for name, value in as_mapping(found.get("weights")).items()]
    outputs = [
        Series(
            plain_text(name, 40),
            [(i, _number_or_nan(value)) for i, value in enumerate(as_list(as_mapping(entry).get("outputs")))],
            has_markers=True,
        )
        for name, entry in as_mapping(found.get("sets")).items()
        if any(value is not None for value in as_list(as_mapping(entry).get("outputs")))
    ]
    blocks = [(int(name.split()[1]), value) for name, value in weights if name.startswith("block ")]
    others = ", ".join(f"{name} {format_percent(value, 2)}" for name, value in weights if not name.startswith("block "))
    drawn = []
    beside = f"Beside the blocks: {others or 'nothing'}."
    many = max([*(i for i, _ in blocks), *(len(line.points) - 1 for line in outputs)], default=0)
    numbers = [(float(i), str(i)) for i in range(many + 1)]  # there is no block between two
    if any(value for _, value in weights):
        drawn.append(
            figure(
                "How far the weights of each block have moved",
                lambda w: line_chart(
                    [Series("weights", [(i, _number_or_nan(v)) for i, v in blocks], has_markers=True)],
                    title="Change of weights by block",
                    width=w,
                    x_ticks=numbers,
                    x_label="block",
                    y_label="change over size",
                    zero=True,
                ),
                note=f"2-norm of the change over that of the weights. {beside} {changed_weights_sentence(record) or ''}".strip(),
            )
        )
    if outputs:
        drawn.append(
            figure(
                "How far the output of each block has moved",
                lambda w: line_chart(
                    outputs,
                    title="Change of outputs by block",
                    width=w,
                    x_ticks=numbers,
                    x_label="block",
                    y_label="change over size",
                    zero=True,
                ),
                note="On the same tokens, before and after.",
            )
        )
    said = intro_paragraph(
        "A loss can stay the same while a model says other things. Measured on a part of each held-out set."
    )
    return f"{said}{table.html()}{side_by_side(*drawn)}"


def _interval_cell(entry: object) -> Cell:
    found = as_mapping(entry)
    value, low, high = (as_number(found.get(key)) for key in ("value", "low", "high"))
    if value is None or low is None or high is None:
        return text_cell("")
    return Cell((Number(f"{value:.4f}", value),), below=(f"{low:.4f} to {high:.4f}",))


def _share_cell(entry: object) -> Cell:
    value = as_number(as_mapping(entry).get("value"))
    return Cell((Number(format_percent(value, 1), value),))


def _number_or_nan(value: object) -> float:
    found = as_number(value)
    return math.nan if found is None else found

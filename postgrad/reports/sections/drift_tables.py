"""How does a report say how far a model has moved? What it says by set, and its weights and outputs by layer."""

from __future__ import annotations

import math
from collections.abc import Mapping

from postgrad.reports.html.document import about, figure, side_by_side
from postgrad.reports.html.figures import Series, line_chart
from postgrad.reports.html.notation import count, mapping, number, percent, plain, rows
from postgrad.reports.html.tables import Cell, Column, Number, Table, level, whole, words


def drift_table(record: Mapping[str, object]) -> Table | None:
    """What the model says now against what it said before, by set; None when it was not measured."""
    sets = mapping(mapping(record.get("drift")).get("sets"))
    if not sets:
        return None
    body = []
    for name, entry in ((name, mapping(value)) for name, value in sets.items()):
        body.append(
            (
                words(name),
                words(entry.get("role")),
                _with_interval(entry.get("divergence")),
                level(mapping(entry.get("base_cross_entropy")).get("value")),
                _share(entry.get("right_before")),
                _share(entry.get("lost")),
                _share(entry.get("won")),
                whole(entry.get("tokens")),
            )
        )
    columns = (
        Column("set", words=True),
        Column("role", words=True),
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


def changed_line(record: Mapping[str, object]) -> str | None:
    """How many numbers of the start model are no longer what they were, and how many each update moved; None: not known."""
    changed = mapping(mapping(record.get("drift")).get("changed"))
    update = mapping(record.get("update"))
    numbers, of = number(changed.get("numbers")), number(changed.get("of"))
    if numbers is None or not of:
        return None
    moved, could = number(update.get("moved")), number(update.get("of"))
    each = (
        f"; each update moved {count(moved)} of {count(could)} ({percent(moved / could, 1)})" if moved and could else ""
    )
    return f"{count(numbers)} of {count(of)} weights differ from the start model's ({percent(numbers / of, 1)}){each}."


def section(record: Mapping[str, object]) -> str:
    """The section of a run's page; empty when nothing was measured."""
    table = drift_table(record)
    if table is None:
        return ""
    found = mapping(record.get("drift"))
    weights = [(name, number(value)) for name, value in mapping(found.get("weights")).items()]
    outputs = [
        Series(
            plain(name, 40),
            [(i, _value(value)) for i, value in enumerate(rows(mapping(entry).get("outputs")))],
            markers=True,
        )
        for name, entry in mapping(found.get("sets")).items()
        if any(value is not None for value in rows(mapping(entry).get("outputs")))
    ]
    blocks = [(int(name.split()[1]), value) for name, value in weights if name.startswith("block ")]
    others = ", ".join(f"{name} {percent(value, 2)}" for name, value in weights if not name.startswith("block "))
    drawn = []
    beside = f"Beside the blocks: {others or 'nothing'}."
    many = max([*(i for i, _ in blocks), *(len(line.points) - 1 for line in outputs)], default=0)
    numbers = [(float(i), str(i)) for i in range(many + 1)]  # there is no block between two
    if any(value for _, value in weights):
        drawn.append(
            figure(
                "How far the weights of each block have moved",
                lambda w: line_chart(
                    [Series("weights", [(i, _value(v)) for i, v in blocks], markers=True)],
                    title="Change of weights by block",
                    width=w,
                    x_ticks=numbers,
                    x_label="block",
                    y_label="change over size",
                    zero=True,
                ),
                about=f"2-norm of the change over that of the weights. {beside} {changed_line(record) or ''}".strip(),
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
                about="On the same tokens, before and after.",
            )
        )
    said = about("A loss can stay the same while a model says other things. Measured on a part of each held-out set.")
    return f"{said}{table.html()}{side_by_side(*drawn)}"


def _with_interval(entry: object) -> Cell:
    found = mapping(entry)
    value, low, high = (number(found.get(key)) for key in ("value", "low", "high"))
    if value is None or low is None or high is None:
        return words("")
    return Cell((Number(f"{value:.4f}", value),), below=(f"{low:.4f} to {high:.4f}",))


def _share(entry: object) -> Cell:
    value = number(mapping(entry).get("value"))
    return Cell((Number(percent(value, 1), value),))


def _value(value: object) -> float:
    found = number(value)
    return math.nan if found is None else found

"""The keys in which the stages of several runs differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from postgrad.foreign_text import mask_secrets, plain_text
from postgrad.lineage.record import Record
from postgrad.reports.html.table import Cell, Column, Table, text_cell

_IGNORED = ("name", "output")
_MAX_ROWS = 60


def stage_differences_table(records: Sequence[Record], names: Sequence[str]) -> Table:
    """A row for each key whose value is not the same in all stages; items of lists are known by their names."""
    stages = [_flatten(record.stage, "") for record in records]
    keys = dict.fromkeys(key for stage in stages for key in stage)
    rows = [
        (text_cell(key), *(text_cell(stage.get(key, "")) for stage in stages))
        for key in keys
        if key not in _IGNORED and len({stage.get(key) for stage in stages}) > 1
    ]
    more = len(rows) - _MAX_ROWS
    notes = ["An empty cell: the stage does not have the key, and its default applies."]
    notes += [f"{more} more keys differ."] if more > 0 else []
    columns = (Column("key", is_text=True), *(Column(plain_text(name, 60), is_text=True) for name in names))
    body: tuple[tuple[Cell, ...], ...] = tuple(rows[:_MAX_ROWS])
    return Table("What differs between the stages", columns, body, tuple(notes))


def _flatten(value: object, key: str) -> dict[str, str]:
    """The leaves of a stage as text, by the paths of their keys."""
    if isinstance(value, Mapping):
        items = {str(name): item for name, item in value.items()}
    elif isinstance(value, Sequence) and not isinstance(value, str) and any(isinstance(i, Mapping) for i in value):
        items = {
            str(item.get("name") or item.get("kind") or number) if isinstance(item, Mapping) else str(number): item
            for number, item in enumerate(value)
        }
    else:
        return {} if value is None else {key: plain_text(mask_secrets(value), 200)}
    return {
        path: text
        for name, item in items.items()
        for path, text in _flatten(item, f"{key}.{name}" if key else name).items()
    }

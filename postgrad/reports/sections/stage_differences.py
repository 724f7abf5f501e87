"""The keys in which the stages of several runs differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from postgrad.foreign_text import mask_secrets, plain_text
from postgrad.lineage.record import Record
from postgrad.reports.html.table import Cell, Column, Table, text_cell

_IGNORED = ("name", "output")
_MAX_ROWS = 60


def stage_differences_table(records: Sequence[Record], names: Sequence[str]) -> Table:
    """A row for each key whose value is not the same in all stages, and for each item of a list that some stages lack.

    Items of lists are known by their names, so their order does not matter.
    """
    stages = [record.stage for record in records]
    rows = [(key, texts) for key, texts in _differences(stages, "") if key not in _IGNORED]
    more = len(rows) - _MAX_ROWS
    columns = (Column("key", is_text=True), *(Column(plain_text(name, 60), is_text=True) for name in names))
    body: tuple[tuple[Cell, ...], ...] = tuple(tuple(map(text_cell, (key, *texts))) for key, texts in rows[:_MAX_ROWS])
    return Table("What differs between the stages", columns, body, (f"{more} more keys differ.",) if more > 0 else ())


def _differences(values: Sequence[object], key: str) -> list[tuple[str, list[str]]]:
    """The differing keys below `key` with the text of each stage's value, empty where it has none."""
    items = [_items(value) for value in values]
    is_list = any(isinstance(value, list) for value in values)
    if any(value is not None and parts is None for value, parts in zip(values, items, strict=True)):
        texts = ["" if value is None else _text(value) for value in values]
        return [(key, texts)] if len(set(texts)) > 1 else []
    parts = [part or {} for part in items]
    found: list[tuple[str, list[str]]] = []
    for name in dict.fromkeys(name for part in parts for name in part):
        path = f"{key}.{name}" if key else name
        if is_list and not all(name in part for part in parts):
            found.append((path, [_describe_item(part, name) for part in parts]))
        else:
            found += _differences([part.get(name) for part in parts], path)
    return found


def _items(value: object) -> dict[str, object] | None:
    """The values of a mapping by key, or the mappings of a list by name; None for anything else."""
    if isinstance(value, Mapping):
        return {str(name): item for name, item in value.items()}
    if isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
        items: dict[str, object] = {}
        for number, item in enumerate(value):
            name = str(item.get("name") or item.get("kind") or number)
            items[f"{name} {number}" if name in items else name] = item
        return items
    return None


def _describe_item(items: Mapping[str, object], name: str) -> str:
    """What an item of a list has and its neighbours have not; "yes" when that is nothing, and empty without the item."""
    item = items.get(name)
    if not isinstance(item, Mapping):
        return ""
    others = [other for other_name, other in items.items() if other_name != name and isinstance(other, Mapping)]
    own = [
        f"{key} {_text(value)}"
        for key, value in item.items()
        if key != "name" and value not in (None, [], {}) and all(other.get(key) != value for other in others)
    ]
    return ", ".join(own) or "yes"


def _text(value: object) -> str:
    return plain_text(mask_secrets(value), 200)

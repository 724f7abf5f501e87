"""Table of several runs side by side, with the share of forgetting that each arm removed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

from postgrad.foreign_text import plain_text
from postgrad.lineage.record import Record, SetChange
from postgrad.reports.html.notation import finite
from postgrad.reports.html.table import (
    CHANGE_FIELDS,
    Cell,
    Column,
    Table,
    change_cell,
    difference_cell,
    share_cell,
    text_cell,
    value_cell,
)
from postgrad.reports.html.verdicts import tone_of
from postgrad.reports.sections.held_out_tables import set_names


def mean_difference(changes: Mapping[str, SetChange]) -> float | None:
    """Mean over sets of the loss difference; None unless every set has one."""
    values = [finite(change.difference) for change in changes.values()]
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known and len(known) == len(values) else None


def removed_share(arm: float | None, baseline: float | None) -> float | None:
    """Share of the baseline's forgetting that an arm removed, 1 - arm / baseline; None without forgetting in the baseline."""
    of_arm, of_baseline = finite(arm), finite(baseline)
    if of_arm is None or of_baseline is None or of_baseline <= 0:
        return None
    share = 1 - of_arm / of_baseline
    return share if math.isfinite(share) else None


def arm_names(records: Sequence[Record]) -> list[str]:
    """A distinct name for each arm: its own, numbered where two arms share it."""
    names: list[str] = []
    for i, record in enumerate(records):
        name = plain_text(record.name, 120) or f"arm {i + 1}"
        names.append(name if name not in names else f"{name} ({i + 1})")
    return names


def comparison_table(records: Sequence[Record], baseline: str | None = None) -> Table:
    """Arms side by side: loss on each held-out set, its change, and the share of forgetting removed."""
    names = arm_names(records)
    base = records[names.index(baseline)] if baseline in names else None
    roles: dict[str, str] = {}
    for record in records:
        for name in set_names(record):
            change = record.changes.get(name)
            roles[name] = roles.get(name) or (change.role if change else "")
    sets = {n: roles[n] for n in sorted(roles, key=lambda n: {"retained": 0, "learned": 1}.get(roles[n], 2))}
    columns = _columns(sets, base is not None)
    rows = [_arm_row(record, arm, sets, base) for record, arm in zip(records, names, strict=True)]
    notes = [
        "Losses and changes in nats per token; a change is after minus before with its 95 % interval. Lower is better."
    ]
    if base is not None:
        notes.append(
            f"Removed: share of forgetting removed, 1 \u2212 (change of the arm) / (change of {plain_text(baseline, 60)})."
            " 100 % is no forgetting, more than 100 % is better than before the stage, a negative share is more forgetting."
        )
    elif baseline is not None:
        notes.append(f"The baseline {plain_text(baseline, 60)} is not among the arms.")
    return Table("Arms side by side", tuple(columns), tuple(rows), tuple(notes))


def _has_several_retained(sets: Mapping[str, str]) -> bool:
    return sum(role == "retained" for role in sets.values()) > 1


def _columns(sets: Mapping[str, str], has_baseline: bool) -> list[Column]:
    columns = [Column("arm", is_text=True)]
    for name, role in sets.items():
        group = f"{plain_text(name, 60)} ({role})" if role else plain_text(name, 60)
        columns += [Column("loss", group), Column("change (95 %)", group, fields=CHANGE_FIELDS)]
        if has_baseline and role == "retained":
            columns.append(Column("removed", group))
    if _has_several_retained(sets):
        columns.append(Column("mean forgetting", "all retained sets"))
        if has_baseline:
            columns.append(Column("removed", "all retained sets"))
    return columns


def _arm_row(record: Record, arm: str, sets: Mapping[str, str], base: Record | None) -> tuple[Cell, ...]:
    row = [Cell((arm, " (baseline)" if record is base else ""))]
    for name, role in sets.items():
        change, after = record.changes.get(name), record.scores.after.get(name)
        row += [value_cell(after.nats if after else None), difference_cell(change, tone=tone_of(change))]
        if base is not None and role == "retained":
            own, of_base = (c.difference if c else None for c in (change, base.changes.get(name)))
            row.append(_removed_cell(record is base, own, of_base))
    if _has_several_retained(sets):
        mean = mean_difference(record.changes_with_role("retained"))
        row.append(change_cell(mean))
        if base is not None:
            row.append(_removed_cell(record is base, mean, mean_difference(base.changes_with_role("retained"))))
    return tuple(row)


def _removed_cell(is_base: bool, arm_change: float | None, baseline_change: float | None) -> Cell:
    return text_cell("baseline") if is_base else share_cell(removed_share(arm_change, baseline_change), 0)

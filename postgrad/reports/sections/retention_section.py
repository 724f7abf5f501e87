"""Forgetting during training: the loss of every held-out set at each evaluation, and stability gaps."""

from __future__ import annotations

from collections.abc import Sequence

from postgrad.foreign_text import plain_text
from postgrad.lineage.record import Record
from postgrad.reports.html.charts import Chart, LimitLine, VerticalMark, line_chart
from postgrad.reports.html.document import figure, intro_paragraph, side_by_side
from postgrad.reports.html.notation import format_compact, format_fixed, format_percent, format_signed
from postgrad.reports.html.table import CHANGE_FIELDS, Column, Table, count_cell, difference_cell, value_cell
from postgrad.reports.sections.curves import (
    EARLY_SHARE,
    EARLY_TEXT,
    MAX_SERIES,
    X_LABEL,
    Curves,
    SetPoint,
    change_series,
)
from postgrad.reports.sections.held_out_tables import loss_unit
from postgrad.reports.sections.published_step import published_mark
from postgrad.stats.stability_gap import EvaluationPoint, StabilityGap, stability_gap

_HEADINGS = {"retained": "Retained", "learned": "Learned", "": "Held-out"}
_MAX_ROWS = 60


def retention_section(record: Record, curves: Curves) -> str:
    """The section of a run's page; empty without evaluations."""
    if not curves.set_losses:
        return ""
    groups: dict[str, list[str]] = {role: [] for role in _HEADINGS}
    for name in curves.set_losses:
        role = curves.set_roles[name]
        groups[role if role in groups else ""].append(name)
    total = max(p.x for points in curves.set_losses.values() for p in points)
    if record.status != "finished":
        total = max(total, record.plan.tokens)
    gaps = _stability_gaps(groups["retained"], curves)
    intro = (
        "Change of the loss on held-out text since the start of the stage. Above zero is forgetting; the shaded bands are"
        " 95 % intervals."
    )
    if any(names and _has_early_points(names, curves, total) for names in groups.values()):
        intro += (
            f" Most forgetting happens right after the switch, so the first {EARLY_TEXT} have a panel of their own."
        )
    return (
        intro_paragraph(intro)
        + "".join(intro_paragraph(_gap_sentence(name, gap, record, total)) for name, gap in gaps.items())
        + "".join(_role_figures(role, names, record, curves, total, gaps) for role, names in groups.items() if names)
    )


def _has_early_points(names: Sequence[str], curves: Curves, total: float) -> bool:
    return sum(1 for p in curves.set_losses[names[0]] if p.x <= EARLY_SHARE * total) >= 3


def _role_figures(
    role: str, names: Sequence[str], record: Record, curves: Curves, total: float, gaps: dict[str, StabilityGap]
) -> str:
    """The curves of the sets of one role: the whole run, and its first part."""
    heading, unit = _HEADINGS[role], loss_unit(record)
    series = [change_series(name, curves.set_losses[name]) for name in names[:MAX_SERIES]]
    gate = record.retention_gate.loss_rise_limit if record.retention_gate else None
    levels = [LimitLine(gate, "gate")] if gate is not None and role == "retained" else []
    deepest = max(gaps.values(), key=lambda g: g.peak, default=None) if role == "retained" else None
    marks = [*published_mark(record), *([VerticalMark(deepest.peak_x, "gap")] if deepest else [])]

    def draw(width: float, title: str, marks: list[VerticalMark], x_range: tuple[float, float] | None = None) -> Chart:
        return line_chart(
            series, title=title, x_label=X_LABEL, y_label=f"change, {unit}", width=width, zero=True, least=0.01,
            levels=levels, marks=marks, x_range=x_range,
        )  # fmt: skip

    more = len(names) - MAX_SERIES
    whole = figure(
        f"{heading} sets, the whole run",
        lambda w: draw(w, f"{heading} sets through the run", marks),
        numbers=_evaluation_table(names, curves, unit),
        note=f"{more} more sets are in the table only." if more > 0 else "",
    )
    if not _has_early_points(names, curves, total):
        return side_by_side(whole)
    early = figure(
        f"{heading} sets, the first {EARLY_TEXT}",
        lambda w: draw(
            w, f"{heading} sets in the first {EARLY_TEXT} of the run", [VerticalMark(0.0, "switch")],
            (0.0, EARLY_SHARE * total),
        ),
    )  # fmt: skip
    return side_by_side(whole, early)


def _stability_gaps(names: Sequence[str], curves: Curves) -> dict[str, StabilityGap]:
    """The stability gap of each retained set that has one."""
    gaps = {}
    for name in names:
        points = [EvaluationPoint(p.x, p.change, p.low, p.high) for p in curves.set_losses[name]]
        if gap := stability_gap(points):
            gaps[name] = gap
    return gaps


def _gap_sentence(name: str, gap: StabilityGap, record: Record, total_tokens: float) -> str:
    return (
        f"Stability gap of {plain_text(name, 80)}: after the switch its loss rose by {format_fixed(gap.peak)}"
        f" {loss_unit(record)} (at {format_compact(gap.peak_x)} tokens, {format_percent(gap.peak_x / total_tokens)} of the"
        f" stage), and {format_percent(gap.recovered_share, 0)} of that recovered during training (down to"
        f" {format_signed(gap.recovery)} at {format_compact(gap.recovery_x)} tokens). Checkpoints inside the gap are worse than"
        " later ones."
    )


def _evaluation_table(names: Sequence[str], curves: Curves, unit: str) -> Table:
    """The numbers of the curves: at most 60 evaluations, the first and last among them."""
    at: dict[float, dict[str, SetPoint]] = {}
    for name in names:
        for point in curves.set_losses[name]:
            at.setdefault(point.x, {})[name] = point
    xs = sorted(at)
    if len(xs) > _MAX_ROWS:
        xs = [xs[round(i * (len(xs) - 1) / (_MAX_ROWS - 1))] for i in range(_MAX_ROWS)]
    columns = [Column(X_LABEL)]
    for name in names:
        group = plain_text(name, 60)
        columns += [Column("loss", group), Column("change (95 %)", group, fields=CHANGE_FIELDS)]
    body = []
    for x in xs:
        row = [count_cell(x)]
        for name in names:
            point = at[x].get(name)
            row += [
                value_cell(point.nats if point else None),
                difference_cell(_PointChange(point) if point else None, 4),
            ]
        body.append(tuple(row))
    return Table(f"Evaluations during training, {unit}", tuple(columns), tuple(body))


class _PointChange:
    """The change at an evaluation as a `difference_cell` takes it."""

    def __init__(self, point: SetPoint) -> None:
        self.difference, self.low, self.high = point.change, point.low, point.high

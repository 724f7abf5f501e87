"""A sweep between two models: what each point recovers of the forgetting, and what it gives up of the gain."""

from __future__ import annotations

import math
from collections.abc import Container, Sequence
from typing import TYPE_CHECKING

from postgrad.reports.html.charts import ScatterPoint, Series, line_chart, scatter
from postgrad.reports.html.document import figure, intro_paragraph, render_page, side_by_side
from postgrad.reports.html.notation import escape_html
from postgrad.reports.html.table import Column, Table, difference_cell, text_cell
from postgrad.reports.sections.curves import drawn_ends

if TYPE_CHECKING:
    from postgrad.commands.blend import Blend, BlendedModel


def blend_page(result: Blend) -> str:
    """The page of a sweep."""
    chosen = f" Selected: <b>{escape_html(result.chosen.name)}</b>." if result.chosen else ""
    between = (
        f"Between {escape_html(result.start, 120)} (weight 0) and {escape_html(result.describe_end(), 120)} (weight 1)."
    )
    labelled = {"0", "0.5", "1", *([result.chosen.name] if result.chosen else [])}
    labelled |= {f"{end.name} at 1" for end in result.ends}
    ends = [end.name for end in result.ends] if len(result.ends) > 1 else [""]
    frontier = _frontier_section(result.points, ends, labelled)
    sections = [
        ("frontier", "Frontier", "Recovered forgetting against lost gain", frontier),
        ("numbers", "Numbers", "Every point", _points_table(result.points)),
    ]
    return render_page("Blend", "blend", result.run, f'<p class="lead">{between}{chosen}</p>', sections)


def _frontier_section(points: Sequence[BlendedModel], ends: Sequence[str], labelled_points: Container[str]) -> str:
    """The loss by weight towards each of `ends`, and gain against forgetting; only `labelled_points` have a label."""
    series = [
        Series(
            f"{name} ({item.role})" + (f", {end}" if end else ""),
            [(p.weight, p.changes[name].change.difference) for p in whole],
            [(p.weight, *drawn_ends(p.changes[name].change)) for p in whole],
            has_markers=True,
        )
        for number, end in enumerate(ends)
        if (whole := [p for p in points if p.block is None and (p.weight == 0 or p.end == number)])
        for name, item in points[0].changes.items()
    ]
    spots = [
        ScatterPoint(
            point.name,
            _mean_change(point, "retained"),
            -_mean_change(point, "learned"),
            is_muted=point.name not in labelled_points,
        )
        for point in points
    ]
    intro = "A blend recovers some forgetting at the price of some gain. It does not replace replay."
    return intro_paragraph(intro) + side_by_side(
        figure(
            "Loss against the weight of the trained model",
            lambda w: line_chart(
                series, title="Loss against the weight", width=w, x_label="weight", y_label="change, nats per token", zero=True
            ),
            note="Change against the start model with 95 % intervals.",
        ),
        figure(
            "Gain against forgetting",
            lambda w: scatter(
                spots, title="Gain against forgetting", width=w, x_label="forgetting: rise on retained sets, nats per token",
                y_label="gain: fall on learned sets, nats per token", best_corner_text="better",
            ),
            note="Means over the sets of each role. Grey: the other points of the table.",
        ),
    )  # fmt: skip


def _points_table(points: Sequence[BlendedModel]) -> str:
    columns = (Column("weight"), *(Column(name, item.role) for name, item in points[0].changes.items()))
    rows = tuple(
        (text_cell(point.name), *(difference_cell(item.change, 4) for item in point.changes.values()))
        for point in points
    )
    return Table("Change against the start model, nats per token, with 95 % intervals", columns, rows).html()


def _mean_change(point: BlendedModel, role: str) -> float:
    mean = point.mean_change(role)
    return math.nan if mean is None else mean

"""How does a sweep between two models look? What each point gives back, against what it gives up."""

from __future__ import annotations

import math
from collections.abc import Container, Mapping, Sequence

from postgrad.reports.html.document import FOOTER, figure, intro_paragraph, render_page, side_by_side
from postgrad.reports.html.figures import ScatterPoint, Series, line_chart, scatter
from postgrad.reports.html.notation import as_list, as_mapping, as_number, escape_html
from postgrad.reports.html.tables import Column, Table, difference_cell, text_cell

_Points = Sequence[Mapping[str, object]]


def blend_page(result: Mapping[str, object]) -> str:
    """The page of a sweep."""
    points = [as_mapping(point) for point in as_list(result["points"])]
    end = f"the mean of its last {result['average']} checkpoints" if result.get("average") else str(result["run"])
    chosen = f" Chosen: <b>{escape_html(result['chosen'])}</b>." if result.get("chosen") else ""
    header = (
        '<p class="over">postgrad · blend</p>'
        f"<h1><bdi>{escape_html(result['run'], 160)}</bdi></h1>"
        f'<p class="lead">Between {escape_html(result["start"], 120)} (weight 0) and {escape_html(end, 120)} (weight 1).{chosen}</p>'
    )
    sections = [
        (
            "frontier",
            "Frontier",
            "What a weight gives back, and what it gives up",
            _frontier_section(points, {"0", "0.5", "1", str(result.get("chosen"))}),
        ),
        ("numbers", "Numbers", "Every point", _points_table(points)),
    ]
    return render_page("Blend – postgrad", header, sections, FOOTER)


def _frontier_section(points: _Points, labelled_points: Container[str]) -> str:
    """Two figures; `told`: the points that have their names beside them."""
    whole = [point for point in points if point.get("block") is None]
    names = list(as_mapping(points[0]["changes"]))
    series = []
    for name in names:
        found = [(as_number(point["weight"]) or 0.0, as_mapping(as_mapping(point["changes"])[name])) for point in whole]
        series.append(
            Series(
                f"{name} ({found[0][1].get('role')})",
                [(w, _number_or_nan(change, "difference")) for w, change in found],
                [(w, _number_or_nan(change, "low"), _number_or_nan(change, "high")) for w, change in found],
                has_markers=True,
            )
        )
    spots = [
        ScatterPoint(
            str(point["name"]),
            _role_mean(point, "retained"),
            -_role_mean(point, "learned"),
            is_muted=str(point["name"]) not in labelled_points,
        )
        for point in points
    ]
    return intro_paragraph(
        "A blend gives back some of what was forgotten for some of what was learnt. It is no replacement for replay."
    ) + side_by_side(
        figure(
            "Loss against the weight of the trained model",
            lambda w: line_chart(
                series,
                title="Loss against the weight",
                width=w,
                x_label="weight",
                y_label="change, nats per token",
                zero=True,
            ),
            note="Change against the start model with 95 % intervals.",
        ),
        figure(
            "Gain against forgetting",
            lambda w: scatter(
                spots,
                title="Gain against forgetting",
                width=w,
                x_label="forgetting: rise on retained sets, nats per token",
                y_label="gain: fall on learned sets, nats per token",
                best_corner_text="better",
            ),
            note="Means over the sets of each role. Grey: the other points of the table.",
        ),
    )


def _points_table(points: _Points) -> str:
    names = list(as_mapping(points[0]["changes"]))
    roles = [str(as_mapping(as_mapping(points[0]["changes"])[name]).get("role")) for name in names]
    columns = (Column("weight"), *(Column(name, role) for name, role in zip(names, roles, strict=True)))
    lines = tuple(
        (
            text_cell(point["name"]),
            *(difference_cell(as_mapping(as_mapping(point["changes"])[name]), 4) for name in names),
        )
        for point in points
    )
    return Table("Change against the start model, nats per token, with 95 % intervals", columns, lines).html()


def _role_mean(point: Mapping[str, object], role: str) -> float:
    found = [
        _number_or_nan(as_mapping(c), "difference")
        for c in as_mapping(point["changes"]).values()
        if as_mapping(c).get("role") == role
    ]
    return sum(found) / len(found) if found else math.nan


def _number_or_nan(change: Mapping[str, object], key: str) -> float:
    value = as_number(change.get(key))
    return math.nan if value is None else value

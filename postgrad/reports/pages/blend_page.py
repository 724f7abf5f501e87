"""How does a sweep between two models look? What each point gives back, against what it gives up."""

from __future__ import annotations

import math
from collections.abc import Container, Mapping, Sequence

from postgrad.reports.html.document import FOOTER, about, document, figure, side_by_side
from postgrad.reports.html.figures import Series, Spot, line_chart, scatter
from postgrad.reports.html.notation import escaped, mapping, number, rows
from postgrad.reports.html.tables import Column, Table, difference, words

_Points = Sequence[Mapping[str, object]]


def blend_page(found: Mapping[str, object]) -> str:
    """The page of a sweep."""
    points = [mapping(point) for point in rows(found["points"])]
    end = f"the mean of its last {found['average']} checkpoints" if found.get("average") else str(found["run"])
    chosen = f" Chosen: <b>{escaped(found['chosen'])}</b>." if found.get("chosen") else ""
    header = (
        '<p class="over">postgrad · blend</p>'
        f"<h1><bdi>{escaped(found['run'], 160)}</bdi></h1>"
        f'<p class="lead">Between {escaped(found["start"], 120)} (weight 0) and {escaped(end, 120)} (weight 1).{chosen}</p>'
    )
    sections = [
        (
            "frontier",
            "Frontier",
            "What a weight gives back, and what it gives up",
            _frontier(points, {"0", "0.5", "1", str(found.get("chosen"))}),
        ),
        ("numbers", "Numbers", "Every point", _numbers(points)),
    ]
    return document("Blend – postgrad", header, sections, FOOTER)


def _frontier(points: _Points, told: Container[str]) -> str:
    """Two figures; `told`: the points that have their names beside them."""
    whole = [point for point in points if point.get("block") is None]
    names = list(mapping(points[0]["changes"]))
    series = []
    for name in names:
        found = [(number(point["weight"]) or 0.0, mapping(mapping(point["changes"])[name])) for point in whole]
        series.append(
            Series(
                f"{name} ({found[0][1].get('role')})",
                [(w, _value(change, "difference")) for w, change in found],
                [(w, _value(change, "low"), _value(change, "high")) for w, change in found],
                markers=True,
            )
        )
    spots = [
        Spot(
            str(point["name"]),
            _mean(point, "retained"),
            -_mean(point, "learned"),
            quiet=str(point["name"]) not in told,
        )
        for point in points
    ]
    return about(
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
            about="Change against the start model with 95 % intervals.",
        ),
        figure(
            "Gain against forgetting",
            lambda w: scatter(
                spots,
                title="Gain against forgetting",
                width=w,
                x_label="forgetting: rise on retained sets, nats per token",
                y_label="gain: fall on learned sets, nats per token",
                best="better",
            ),
            about="Means over the sets of each role. Grey: the other points of the table.",
        ),
    )


def _numbers(points: _Points) -> str:
    names = list(mapping(points[0]["changes"]))
    roles = [str(mapping(mapping(points[0]["changes"])[name]).get("role")) for name in names]
    columns = (Column("weight"), *(Column(name, role) for name, role in zip(names, roles, strict=True)))
    lines = tuple(
        (words(point["name"]), *(difference(mapping(mapping(point["changes"])[name]), 4) for name in names))
        for point in points
    )
    return Table("Change against the start model, nats per token, with 95 % intervals", columns, lines).html()


def _mean(point: Mapping[str, object], role: str) -> float:
    found = [
        _value(mapping(c), "difference") for c in mapping(point["changes"]).values() if mapping(c).get("role") == role
    ]
    return sum(found) / len(found) if found else math.nan


def _value(change: Mapping[str, object], key: str) -> float:
    value = number(change.get(key))
    return math.nan if value is None else value

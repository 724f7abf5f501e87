"""How does a study look? Its arms as one table, one frontier, curves with the switch marked, and what is not shown."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from postgrad.reports.html.document import (
    FOOTER,
    about,
    details,
    document,
    facts,
    figure,
    named,
    preformatted,
    side_by_side,
)
from postgrad.reports.html.figures import Estimate, Level, Mark, Series, Spot, forest_plot, line_chart, scatter
from postgrad.reports.html.notation import compact, duration, escaped, mapping, number, percent, plain, rows
from postgrad.reports.html.tables import Column, Table, difference, words
from postgrad.reports.sections.study_table import arms_table, claims_table

_Entry = Mapping[str, object]
_MOST = 8
"""Arms in a figure of curves; more could not be told apart."""


def study_page(found: _Entry) -> str:
    """The page of a study."""
    arms = [mapping(a) for a in rows(found.get("arms"))]
    done = [a for a in arms if mapping(a.get("loss"))]
    claims = claims_table(found)
    sections = [
        ("summary", "Summary", "What the numbers say", _summary(found)),
        ("arms", "Arms", "Every arm", arms_table(found).html() if done else ""),
        ("claims", "Claims", "What was claimed, and what was measured", claims.html() if claims else ""),
        ("frontier", "Frontier", "Gain against forgetting", _frontier(done)),
        ("replay", "Replay", "By the share of replay", _by_share(found)),
        ("curves", "Curves", "Before and after the switch", _curves(found, done)),
        ("seeds", "Seeds", "Seed by seed", _seeds(done)),
        ("method", "Method", "How it was measured", _method(found)),
    ]
    many = f"{len(arms)} arms" if len(arms) != 1 else "1 arm"
    seeds = len(rows(found.get("seeds")))
    header = (
        f'<p class="over">postgrad · study of {many}, {seeds} seed{"s" * (seeds != 1)}</p>'
        f"<h1><bdi>{escaped(found.get('name'), 160)}</bdi></h1>{_lead(found, arms)}"
    )
    return document(f"{plain(found.get('name'), 80)} – postgrad", header, sections, FOOTER)


def _lead(found: _Entry, arms: Sequence[_Entry]) -> str:
    missing = [a for a in arms if a.get("status") != "finished"]
    lines = [plain(line, 1000) for line in rows(found.get("summary"))]
    first = next((line for line in lines if not line.startswith("Not finished")), "")
    notice = ""
    if missing:
        listed = ", ".join(f"{named(a.get('name'))} ({escaped(a.get('status'), 40)})" for a in missing[:12])
        notice = f'<div class="notice"><p><b>Not complete:</b> {listed}. What they lack is left empty.</p></div>'
    return f'<p class="lead">{escaped(first, 1000)}</p>{notice}'


def _summary(found: _Entry) -> str:
    lines = "".join(f"<li>{escaped(line, 1000)}</li>" for line in rows(found.get("summary")))
    return about("Made from the numbers below and from nothing else.") + f"<ul>{lines}</ul>"


def _interval(entry: _Entry, sign: int = 1) -> tuple[float, float] | None:
    low, high = number(entry.get("low")), number(entry.get("high"))
    if low is None or high is None:
        return None
    return (low, high) if sign > 0 else (-high, -low)


def _value(entry: _Entry, sign: int = 1) -> float:
    value = number(entry.get("value"))
    return math.nan if value is None else sign * value


def _frontier(done: Sequence[_Entry]) -> str:
    """Gain against forgetting, arms that another one dominates in grey; and the share of forgetting removed."""
    spots = []
    for arm in done:
        if arm.get("from_scratch"):
            continue
        old, new = (mapping(mapping(arm.get("change")).get(what)) for what in ("old", "new"))
        quiet = bool(rows(arm.get("dominated_by")))
        name = plain(arm.get("name"), 60)
        spots.append(
            Spot(
                name,
                _value(old),
                _value(new, -1),
                None if quiet else _interval(old),
                None if quiet else _interval(new, -1),
                quiet,
            )
        )
    if not spots:
        return ""
    removed = [
        Estimate(plain(a.get("name"), 60), 100 * _value(r), *(100 * end for end in (_interval(r) or (0.0, 0.0))),
                 tone="good" if (number(r.get("low")) or 0.0) > 0 else "open")
        for a in done if (r := mapping(a.get("removed"))) and not a.get("from_scratch")
    ]  # fmt: skip
    first = figure(
        "Gain against forgetting",
        lambda w: scatter(
            spots, title="Gain against forgetting", width=w, best="better",
            x_label="forgetting: rise on old text, nats per token", y_label="gain: fall on new text, nats per token",
        ),
        about="Grey: another arm forgets no more and gains no less, by the values. Bars are 95 % intervals over documents.",
        numbers=_spot_table(done),
    )  # fmt: skip
    second = ""
    if removed:
        second = figure(
            "Share of forgetting removed",
            lambda w: forest_plot(
                removed[:40], title="Share of forgetting removed", width=w, decimals=0,
                x_label="% of the forgetting of the arm without protection"
            ),
            about="100: nothing is forgotten. Intervals over documents, paired.",
        )  # fmt: skip
    return side_by_side(first, second)


def _spot_table(done: Sequence[_Entry]) -> Table:
    lines = [
        (words(a.get("name")), *(_cell(mapping(mapping(a.get("change")).get(what))) for what in ("old", "new")),
         words(", ".join(plain(n, 40) for n in rows(a.get("dominated_by")))))
        for a in done
    ]  # fmt: skip
    columns = (
        Column("arm", words=True),
        Column("forgetting"),
        Column("change on new"),
        Column("dominated by", words=True),
    )
    return Table("Forgetting and change on new text of each arm, nats per token", columns, tuple(lines))


def _cell(entry: _Entry):
    return difference({"difference": entry.get("value"), "low": entry.get("low"), "high": entry.get("high")})


def _by_share(found: _Entry) -> str:
    """Forgetting and loss on new text against the share of replay, with the laws that fit them."""
    replay = mapping(found.get("replay"))
    points = [mapping(p) for p in rows(replay.get("points"))]
    if len(points) < 2:
        return ""
    laws = mapping(replay.get("laws"))
    parts = []
    for what, caption, label, of in (
        ("old", "Forgetting", "rise on old text, nats per token", "change"),
        ("new", "Loss on new text", "nats per token", "loss"),
    ):
        measured = [(100 * (number(p.get("share")) or 0.0), mapping(mapping(p.get(of)).get(what))) for p in points]
        series = [
            Series(
                "measured",
                [(x, _value(e)) for x, e in measured],
                [(x, *(_interval(e) or (math.nan, math.nan))) for x, e in measured],
                markers=True,
            )
        ]
        law = mapping(laws.get(what))
        line = [[number(v) or 0.0 for v in rows(p)] for p in rows(law.get("line"))]
        if line:
            series.append(
                Series(
                    "fitted",
                    [(100 * x, y) for x, y, _, _ in line],
                    [(100 * x, lo, hi) for x, _, lo, hi in line],
                    dash=True,
                )
            )
        said = f"Dashed: {plain(law.get('source'), 200)}." if line else "Too few shares for a law to be fitted."
        parts.append(
            figure(
                caption,
                lambda w, s=series, c=caption, y=label: line_chart(
                    s, title=f"{c} by the share of replay", width=w, x_label="replay, % of the tokens", y_label=y
                ),
                about=said,
            )
        )
    return about("Arms that differ from the one without protection by their share of replay alone.") + side_by_side(
        *parts
    )


def _curves(found: _Entry, done: Sequence[_Entry]) -> str:
    """The loss of each set by trained tokens: the base before the switch, the arms after it."""
    going_on = [a for a in done if not a.get("from_scratch") and rows(mapping(a.get("curve")).get("switches"))]
    chosen = _few(going_on, found.get("against"))
    base = mapping(mapping(mapping(found.get("base")).get("curve")).get("sets"))
    union = next((a for a in done if a.get("name") == found.get("union")), None)
    parts = []
    for entry in map(mapping, rows(found.get("sets"))):
        name, role = plain(entry.get("name"), 60), plain(entry.get("role"), 20)
        series, marks = [], {0.0}
        before = _points(base.get(name))
        if before:
            last = before[-1][0]
            series.append(Series("the base", [(x - last, y) for x, y in before[1:]], faint=True))
        for i, arm in enumerate(chosen):
            curve = mapping(arm.get("curve"))
            series.append(Series(plain(arm.get("name"), 60), _points(mapping(curve.get("sets")).get(name)), colour=i))
            marks |= {number(x) or 0.0 for x in rows(curve.get("switches"))}
        if not any(len(s.points) > 1 for s in series):
            continue
        level = number(mapping(mapping(mapping(union or {}).get("loss")).get(name)).get("value"))
        levels = [Level(level, plain(mapping(union or {}).get("name"), 40))] if level is not None else []
        shown = [Mark(x, "switch" if x == 0 else "next text") for x in sorted(marks)]
        parts.append(
            figure(
                f"{name} ({role})",
                lambda w, s=series, m=shown, v=levels, n=name: line_chart(
                    s, title=f"Loss on {n} by arm", width=w, x_label="tokens since the switch", y_label="nats per token",
                    marks=m, levels=v,
                ),
            )
        )  # fmt: skip
    if not parts:
        return ""
    left_out = len(going_on) - len(chosen)
    more = f" {left_out} more arms are in the table." if left_out > 0 else ""
    said = "Loss on the first part of each held-out set, mean over seeds; the level is of all text at once, scored in full."
    return about(said + more) + side_by_side(*parts)


def _few(arms: Sequence[_Entry], against: object) -> list[_Entry]:
    """Not more arms than can be told apart: the reference, those on the frontier, then the others."""
    rank = {True: 0}
    ordered = sorted(arms, key=lambda a: (rank.get(a.get("name") == against, 1), bool(rows(a.get("dominated_by")))))
    return ordered[:_MOST]


def _points(value: object) -> list[tuple[float, float]]:
    found = [[number(v) for v in rows(p)] for p in rows(value)]
    return [(p[0], p[1]) for p in found if len(p) == 2 and p[0] is not None and p[1] is not None]


def _seeds(done: Sequence[_Entry]) -> str:
    """Each seed's loss, apart from the intervals over documents."""
    if not any(len(mapping(a.get("by_seed"))) > 1 for a in done):
        return ""
    lines = []
    for arm in done:
        for seed, losses in mapping(arm.get("by_seed")).items():
            cells = [difference({"difference": mapping(losses).get(w)}, 4) for w in ("old", "new", "average")]
            lines.append((words(arm.get("name")), words(seed), *cells))
    columns = (Column("arm", words=True), Column("seed"), Column("old"), Column("new"), Column("average"))
    table = Table("Loss of each seed, nats per token", columns, tuple(lines))
    said = about(
        "What another seed (order of the rows, fresh weights) would have given is told by how far these lie apart. "
        "The intervals elsewhere are over documents and know nothing of it."
    )
    return said + details("Every seed", table.html())


def _method(found: _Entry) -> str:
    machine, time = mapping(found.get("machine")), mapping(found.get("time"))
    versions, how = mapping(machine.get("versions")), mapping(machine.get("execution"))
    sets = [mapping(s) for s in rows(found.get("sets"))]
    listed = facts(
        [
            *(
                (
                    f"{plain(s.get('name'), 60)} ({plain(s.get('role'), 20)})",
                    f"{s.get('documents')} documents, {s.get('tokens')} tokens",
                )
                for s in sets
            ),
            ("base", mapping(found.get("base")).get("name")),
            ("weights", compact(machine.get("parameters")) if machine.get("parameters") else None),
            (
                "machine",
                f"{machine.get('cpu')}, {machine.get('cores')} cores ({machine.get('device')})" if machine else None,
            ),
            ("arithmetic", ", ".join(f"{k} {v}" for k, v in how.items())),
            ("versions", ", ".join(f"{k} {v}" for k, v in versions.items())),
            ("runs", f"{time.get('runs')} made where {time.get('runs_asked')} were asked for"),
            ("training", duration(time.get("training"))),
            ("evaluation", duration(time.get("evaluation"))),
            ("outside of both", percent(time.get("outside")) if number(time.get("outside")) is not None else None),
        ]
    )
    said = about(
        "An arm's loss on old (new) text is the mean over its retained (learned) sets; on average the mean of both. Intervals "
        "are 95 % percentiles of 2,000 draws of documents; every draw takes the same documents for all arms, so differences, "
        "shares removed and gaps are paired. Several seeds are averaged document by document."
    )
    yaml = found.get("study_yaml")
    return said + listed + (details("The study file", preformatted(yaml)) if yaml else "")

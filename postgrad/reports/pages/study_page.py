"""How does a study look? Its arms as one table, one frontier, curves with the switch marked, and what is not shown."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from postgrad.reports.html.document import (
    FOOTER,
    bold_name,
    details,
    facts,
    figure,
    intro_paragraph,
    preformatted,
    render_page,
    side_by_side,
)
from postgrad.reports.html.figures import (
    ForestRow,
    LimitLine,
    ScatterPoint,
    Series,
    VerticalMark,
    forest_plot,
    line_chart,
    scatter,
)
from postgrad.reports.html.notation import (
    as_list,
    as_mapping,
    as_number,
    escape_html,
    format_compact,
    format_duration,
    format_percent,
    plain_text,
)
from postgrad.reports.html.tables import Column, Table, difference_cell, text_cell
from postgrad.reports.sections.study_table import claims_table, study_arms_table

_Entry = Mapping[str, object]
_MAX_ARMS = 8
"""Arms in a figure of curves; more could not be told apart."""


def study_page(results: _Entry) -> str:
    """The page of a study."""
    arms = [as_mapping(a) for a in as_list(results.get("arms"))]
    done = [a for a in arms if as_mapping(a.get("loss"))]
    claims = claims_table(results)
    sections = [
        ("summary", "Summary", "What the numbers say", _summary_section(results)),
        ("arms", "Arms", "Every arm", study_arms_table(results).html() if done else ""),
        ("claims", "Claims", "What was claimed, and what was measured", claims.html() if claims else ""),
        ("frontier", "Frontier", "Gain against forgetting", _frontier_section(done)),
        ("replay", "Replay", "By the share of replay", _replay_section(results)),
        ("curves", "Curves", "Before and after the switch", _curves_section(results, done)),
        ("seeds", "Seeds", "Seed by seed", _seeds_section(done)),
        ("method", "Method", "How it was measured", _method_section(results)),
    ]
    many = f"{len(arms)} arms" if len(arms) != 1 else "1 arm"
    seeds = len(as_list(results.get("seeds")))
    header = (
        f'<p class="over">postgrad · study of {many}, {seeds} seed{"s" * (seeds != 1)}</p>'
        f"<h1><bdi>{escape_html(results.get('name'), 160)}</bdi></h1>{_headline(results, arms)}"
    )
    return render_page(f"{plain_text(results.get('name'), 80)} – postgrad", header, sections, FOOTER)


def _headline(results: _Entry, arms: Sequence[_Entry]) -> str:
    missing = [a for a in arms if a.get("status") != "finished"]
    lines = [plain_text(line, 1000) for line in as_list(results.get("summary"))]
    first = next((line for line in lines if not line.startswith("Not finished")), "")
    notice = ""
    if missing:
        listed = ", ".join(f"{bold_name(a.get('name'))} ({escape_html(a.get('status'), 40)})" for a in missing[:12])
        notice = f'<div class="notice"><p><b>Not complete:</b> {listed}. What they lack is left empty.</p></div>'
    return f'<p class="lead">{escape_html(first, 1000)}</p>{notice}'


def _summary_section(results: _Entry) -> str:
    lines = "".join(f"<li>{escape_html(line, 1000)}</li>" for line in as_list(results.get("summary")))
    return intro_paragraph("Made from the numbers below and from nothing else.") + f"<ul>{lines}</ul>"


def _signed_interval(entry: _Entry, sign: int = 1) -> tuple[float, float] | None:
    low, high = as_number(entry.get("low")), as_number(entry.get("high"))
    if low is None or high is None:
        return None
    return (low, high) if sign > 0 else (-high, -low)


def _signed_value(entry: _Entry, sign: int = 1) -> float:
    value = as_number(entry.get("value"))
    return math.nan if value is None else sign * value


def _frontier_section(finished_arms: Sequence[_Entry]) -> str:
    """Gain against forgetting, arms that another one dominates in grey; and the share of forgetting removed."""
    spots = []
    for arm in finished_arms:
        if arm.get("from_scratch"):
            continue
        old, new = (as_mapping(as_mapping(arm.get("change")).get(what)) for what in ("old", "new"))
        quiet = bool(as_list(arm.get("dominated_by")))
        name = plain_text(arm.get("name"), 60)
        spots.append(
            ScatterPoint(
                name,
                _signed_value(old),
                _signed_value(new, -1),
                None if quiet else _signed_interval(old),
                None if quiet else _signed_interval(new, -1),
                quiet,
            )
        )
    if not spots:
        return ""
    removed = [
        ForestRow(plain_text(a.get("name"), 60), 100 * _signed_value(r), *(100 * end for end in (_signed_interval(r) or (0.0, 0.0))),
                 tone="good" if (as_number(r.get("low")) or 0.0) > 0 else "open")
        for a in finished_arms if (r := as_mapping(a.get("removed"))) and not a.get("from_scratch")
    ]  # fmt: skip
    first = figure(
        "Gain against forgetting",
        lambda w: scatter(
            spots, title="Gain against forgetting", width=w, best_corner_text="better",
            x_label="forgetting: rise on old text, nats per token", y_label="gain: fall on new text, nats per token",
        ),
        note="Grey: another arm forgets no more and gains no less, by the values. Bars are 95 % intervals over documents.",
        numbers=_frontier_table(finished_arms),
    )  # fmt: skip
    second = ""
    if removed:
        second = figure(
            "Share of forgetting removed",
            lambda w: forest_plot(
                removed[:40], title="Share of forgetting removed", width=w, decimals=0,
                x_label="% of the forgetting of the arm without protection"
            ),
            note="100: nothing is forgotten. Intervals over documents, paired.",
        )  # fmt: skip
    return side_by_side(first, second)


def _frontier_table(finished_arms: Sequence[_Entry]) -> Table:
    lines = [
        (text_cell(a.get("name")), *(_interval_cell(as_mapping(as_mapping(a.get("change")).get(what))) for what in ("old", "new")),
         text_cell(", ".join(plain_text(n, 40) for n in as_list(a.get("dominated_by")))))
        for a in finished_arms
    ]  # fmt: skip
    columns = (
        Column("arm", is_text=True),
        Column("forgetting"),
        Column("change on new"),
        Column("dominated by", is_text=True),
    )
    return Table("Forgetting and change on new text of each arm, nats per token", columns, tuple(lines))


def _interval_cell(entry: _Entry):
    return difference_cell({"difference": entry.get("value"), "low": entry.get("low"), "high": entry.get("high")})


def _replay_section(results: _Entry) -> str:
    """Forgetting and loss on new text against the share of replay, with the laws that fit them."""
    replay = as_mapping(results.get("replay"))
    points = [as_mapping(p) for p in as_list(replay.get("points"))]
    if len(points) < 2:
        return ""
    laws = as_mapping(replay.get("laws"))
    parts = []
    for what, caption, label, of in (
        ("old", "Forgetting", "rise on old text, nats per token", "change"),
        ("new", "Loss on new text", "nats per token", "loss"),
    ):
        measured = [
            (100 * (as_number(p.get("share")) or 0.0), as_mapping(as_mapping(p.get(of)).get(what))) for p in points
        ]
        series = [
            Series(
                "measured",
                [(x, _signed_value(e)) for x, e in measured],
                [(x, *(_signed_interval(e) or (math.nan, math.nan))) for x, e in measured],
                has_markers=True,
            )
        ]
        law = as_mapping(laws.get(what))
        line = [[as_number(v) or 0.0 for v in as_list(p)] for p in as_list(law.get("line"))]
        if line:
            series.append(
                Series(
                    "fitted",
                    [(100 * x, y) for x, y, _, _ in line],
                    [(100 * x, lo, hi) for x, _, lo, hi in line],
                    is_dashed=True,
                )
            )
        said = f"Dashed: {plain_text(law.get('source'), 200)}." if line else "Too few shares for a law to be fitted."
        parts.append(
            figure(
                caption,
                lambda w, s=series, c=caption, y=label: line_chart(
                    s, title=f"{c} by the share of replay", width=w, x_label="replay, % of the tokens", y_label=y
                ),
                note=said,
            )
        )
    return intro_paragraph(
        "Arms that differ from the one without protection by their share of replay alone."
    ) + side_by_side(*parts)


def _curves_section(results: _Entry, finished_arms: Sequence[_Entry]) -> str:
    """The loss of each set by trained tokens: the base before the switch, the arms after it."""
    going_on = [
        a for a in finished_arms if not a.get("from_scratch") and as_list(as_mapping(a.get("curve")).get("switches"))
    ]
    chosen = _select_arms(going_on, results.get("against"))
    base = as_mapping(as_mapping(as_mapping(results.get("base")).get("curve")).get("sets"))
    union = next((a for a in finished_arms if a.get("name") == results.get("union")), None)
    parts = []
    for entry in map(as_mapping, as_list(results.get("sets"))):
        name, role = plain_text(entry.get("name"), 60), plain_text(entry.get("role"), 20)
        series, marks = [], {0.0}
        before = _as_points(base.get(name))
        if before:
            last = before[-1][0]
            series.append(Series("the base", [(x - last, y) for x, y in before[1:]], is_faint=True))
        for i, arm in enumerate(chosen):
            curve = as_mapping(arm.get("curve"))
            series.append(
                Series(plain_text(arm.get("name"), 60), _as_points(as_mapping(curve.get("sets")).get(name)), colour=i)
            )
            marks |= {as_number(x) or 0.0 for x in as_list(curve.get("switches"))}
        if not any(len(s.points) > 1 for s in series):
            continue
        level = as_number(as_mapping(as_mapping(as_mapping(union or {}).get("loss")).get(name)).get("value"))
        levels = [LimitLine(level, plain_text(as_mapping(union or {}).get("name"), 40))] if level is not None else []
        shown = [VerticalMark(x, "switch" if x == 0 else "next text") for x in sorted(marks)]
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
    return intro_paragraph(said + more) + side_by_side(*parts)


def _select_arms(arms: Sequence[_Entry], baseline: object) -> list[_Entry]:
    """Not more arms than can be told apart: the reference, those on the frontier, then the others."""
    rank = {True: 0}
    ordered = sorted(arms, key=lambda a: (rank.get(a.get("name") == baseline, 1), bool(as_list(a.get("dominated_by")))))
    return ordered[:_MAX_ARMS]


def _as_points(value: object) -> list[tuple[float, float]]:
    found = [[as_number(v) for v in as_list(p)] for p in as_list(value)]
    return [(p[0], p[1]) for p in found if len(p) == 2 and p[0] is not None and p[1] is not None]


def _seeds_section(finished_arms: Sequence[_Entry]) -> str:
    """Each seed's loss, apart from the intervals over documents."""
    if not any(len(as_mapping(a.get("by_seed"))) > 1 for a in finished_arms):
        return ""
    lines = []
    for arm in finished_arms:
        for seed, losses in as_mapping(arm.get("by_seed")).items():
            cells = [difference_cell({"difference": as_mapping(losses).get(w)}, 4) for w in ("old", "new", "average")]
            lines.append((text_cell(arm.get("name")), text_cell(seed), *cells))
    columns = (Column("arm", is_text=True), Column("seed"), Column("old"), Column("new"), Column("average"))
    table = Table("Loss of each seed, nats per token", columns, tuple(lines))
    said = intro_paragraph(
        "What another seed (order of the rows, fresh weights) would have given is told by how far these lie apart. "
        "The intervals elsewhere are over documents and know nothing of it."
    )
    return said + details("Every seed", table.html())


def _method_section(results: _Entry) -> str:
    machine, time = as_mapping(results.get("machine")), as_mapping(results.get("time"))
    versions, how = as_mapping(machine.get("versions")), as_mapping(machine.get("execution"))
    sets = [as_mapping(s) for s in as_list(results.get("sets"))]
    listed = facts(
        [
            *(
                (
                    f"{plain_text(s.get('name'), 60)} ({plain_text(s.get('role'), 20)})",
                    f"{s.get('documents')} documents, {s.get('tokens')} tokens",
                )
                for s in sets
            ),
            ("base", as_mapping(results.get("base")).get("name")),
            ("weights", format_compact(machine.get("parameters")) if machine.get("parameters") else None),
            (
                "machine",
                f"{machine.get('cpu')}, {machine.get('cores')} cores ({machine.get('device')})" if machine else None,
            ),
            ("arithmetic", ", ".join(f"{k} {v}" for k, v in how.items())),
            ("versions", ", ".join(f"{k} {v}" for k, v in versions.items())),
            ("runs", f"{time.get('runs')} made where {time.get('runs_asked')} were asked for"),
            ("training", format_duration(time.get("training"))),
            ("evaluation", format_duration(time.get("evaluation"))),
            (
                "outside of both",
                format_percent(time.get("outside")) if as_number(time.get("outside")) is not None else None,
            ),
        ]
    )
    said = intro_paragraph(
        "An arm's loss on old (new) text is the mean over its retained (learned) sets; on average the mean of both. Intervals "
        "are 95 % percentiles of 2,000 draws of documents; every draw takes the same documents for all arms, so differences, "
        "shares removed and gaps are paired. Several seeds are averaged document by document."
    )
    yaml = results.get("study_yaml")
    return said + listed + (details("The study file", preformatted(yaml)) if yaml else "")

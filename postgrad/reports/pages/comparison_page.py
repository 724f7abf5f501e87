"""How do several runs from one base become one page, side by side? What a record lacks is left empty."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from postgrad.reports.html import figures, tables
from postgrad.reports.html.document import (
    FOOTER,
    MOST_YAML,
    about,
    details,
    document,
    figure,
    named,
    preformatted,
    prose,
    sample_box,
    side_by_side,
)
from postgrad.reports.html.figures import Estimate, Mark, Spot
from postgrad.reports.html.notation import (
    duration,
    escaped,
    mapping,
    masked,
    number,
    passage,
    percent,
    plain,
    rows,
    signed,
)
from postgrad.reports.html.tables import Column, Table
from postgrad.reports.sections import task_tables
from postgrad.reports.sections.curves import (
    EARLY,
    EARLY_WORDS,
    MOST_SERIES,
    Curves,
    change_series,
    estimates,
    read_curves,
)

_MOST_SAMPLES = 6


def comparison_page(
    records: Sequence[Mapping[str, object]],
    metrics: Sequence[Iterable[Mapping[str, object]]],
    title: str,
    baseline: str | None,
) -> str:
    """Several runs from one base side by side; `metrics[i]` are the rows of `records[i]` (may be shorter).

    `baseline` names the arm against which the removed share of forgetting is measured.
    """
    records = [mapping(r) for r in records]
    names = tables.arm_names(records)
    curves = [read_curves(metrics[i] if i < len(metrics) else ()) for i in range(len(records))]
    asked = task_tables.arms_task_table(records)
    sections = [
        (
            "arms",
            "Arms",
            "The arms",
            tables.arms_table(records, baseline).html() + _trade(records, names) if records else "",
        ),
        ("tasks", "Tasks", "What the arms answered", asked.html() if asked else ""),
        ("curves", "Curves", "Every set, every arm", _overlays(records, names, curves)),
        ("samples", "Samples", "Text by arm", _samples_by_arm(records, names)),
        ("runs", "Runs", "The runs", _runs(records, names)),
    ]
    unfinished = [n for n, r in zip(names, records, strict=True) if r.get("status") not in ("finished", "gate-failed")]
    notice = ""
    if unfinished:
        listed = ", ".join(named(n) for n in unfinished[:8])
        notice = f'<div class="notice"><p><b>Not finished:</b> {listed}. What they lack is left empty.</p></div>'
    how_many = "1 run" if len(records) == 1 else f"{len(records)} runs"
    header = (
        f'<p class="over">postgrad \u00b7 comparison of {how_many}</p>'
        f"<h1><bdi>{escaped(title or 'Comparison', 160)}</bdi></h1>"
        f"{_verdict_of_arms(records, names, baseline)}{notice}"
    )
    return document(f"{title or 'Comparison'} \u2013 postgrad", header, sections, FOOTER)


def _verdict_of_arms(records: Sequence[Mapping[str, object]], names: Sequence[str], baseline: str | None) -> str:
    """The comparison in plain words: who forgot least, what that cost, against the baseline."""
    forgot = {n: tables.mean_difference(tables.retained(r)) for n, r in zip(names, records, strict=True)}
    gained = {n: tables.mean_difference(tables.learned(r)) for n, r in zip(names, records, strict=True)}
    known = {n: v for n, v in forgot.items() if v is not None}
    if len(known) < 2:
        return '<p class="lead">There are not two arms with scores on retained text to compare yet.</p>'
    best = min(known, key=lambda n: known[n])
    words = [f"{named(best)} kept most: {signed(known[best])} nats per token on retained text."]
    base = known.get(baseline or "")
    part = tables.removed(known[best], base)
    if part is not None and best != baseline:
        words.append(f"That is {percent(part, 0)} less forgetting than {named(baseline)} ({signed(base)}).")
    learnt = {n: v for n, v in gained.items() if v is not None}
    if learnt:
        most = min(learnt, key=lambda n: learnt[n])
        if most == best:
            words.append(f"It also learnt most: {signed(learnt[most])} on new text.")
        elif best in learnt:
            words.append(
                f"{named(most)} learnt most: {signed(learnt[most])} on new text, against {signed(learnt[best])}."
            )
    return f'<p class="lead">{" ".join(words)}</p>'


def _trade(records: Sequence[Mapping[str, object]], names: Sequence[str]) -> str:
    spots = []
    for name, record in zip(names, records, strict=True):
        kept, learnt = tables.retained(record), tables.learned(record)
        x, y = tables.mean_difference(kept), tables.mean_difference(learnt)
        spots.append(
            Spot(
                name,
                math.nan if x is None else x,
                math.nan if y is None else -y,
                _one_interval(kept, 1),
                _one_interval(learnt, -1),
            )
        )
    if not any(math.isfinite(s.x) and math.isfinite(s.y) for s in spots):
        return ""
    by_set: dict[str, list[Estimate]] = {}
    for name, record in zip(names, records, strict=True):
        for e in estimates(tables.retained(record)):
            by_set.setdefault(e.name, []).append(Estimate(name, e.value, e.low, e.high, e.tone, e.note))
    first = figure(
        "Gain against forgetting",
        lambda w: figures.scatter(
            spots, title="Gain against forgetting", width=w,
            x_label="forgetting: rise on retained sets, nats per token",
            y_label="gain: fall on learned sets, nats per token", best="better"
        ),
        about="One point an arm, mean over its sets; bars are 95 % intervals where there is one set.",
    )  # fmt: skip
    forests = [
        figure(
            f"Forgetting of {plain(set_name, 60)} by arm",
            lambda w, entries=entries, of=set_name: figures.forest_plot(
                entries[:40], title=f"Change on {plain(of, 60)} by arm", width=w, left_word="better",
                right_word="worse", x_label="change of the loss, nats per token"
            ),
            about="Change of the loss with 95 % intervals.",
        )
        for set_name, entries in list(by_set.items())[:5]
    ]  # fmt: skip
    return side_by_side(first, *forests)


def _one_interval(entries: Mapping[str, Mapping[str, object]], sign: int) -> tuple[float, float] | None:
    """The interval where there is one set: intervals of several sets cannot be averaged."""
    if len(entries) != 1:
        return None
    entry = next(iter(entries.values()))
    ends = [number(entry.get("low")), number(entry.get("high"))]
    known = [sign * v for v in ends if v is not None]
    return (min(known), max(known)) if len(known) == 2 else None


def _overlays(records: Sequence[Mapping[str, object]], names: Sequence[str], curves: Sequence[Curves]) -> str:
    roles: dict[str, str] = {}
    for record, arm in zip(records, curves, strict=True):
        for name in arm.sets:
            role = arm.roles.get(name) or plain(mapping(mapping(record.get("changes")).get(name)).get("role"))
            roles[name] = roles.get(name) or role
    order = sorted(roles, key=lambda n: {"retained": 0, "learned": 1}.get(roles[n], 2))
    unit = "step" if any(c.unit == "step" and c.sets for c in curves) else "tokens trained"
    same = all(c.unit == unit for c in curves if c.sets)
    if not order:
        return ""
    body = about(
        "Change of the loss since the switch to the new data, one line an arm, with 95 % intervals."
        + ("" if same else " Some arms count steps and others tokens: their x axes do not agree.")
    )
    for name in order[:MOST_SERIES]:
        series, whole = [], 0.0
        for i, (arm, arm_name) in enumerate(zip(curves, names, strict=True)):
            if name in arm.sets:
                series.append(change_series(arm_name, arm.sets[name], colour=i))
                whole = max(whole, arm.sets[name][-1][0])
        early = max(sum(1 for x, _ in s.points if x <= EARLY * whole) for s in series) >= 3
        role = f" ({roles[name]})" if roles[name] else ""
        words = {"x_label": unit, "y_label": "change, nats per token", "zero": True, "least": 0.01}
        mark = [Mark(0.0, "switch")]
        first = figure(
            f"{plain(name, 60)}{role}",
            lambda w, s=series, k=words, m=mark, n=name: figures.line_chart(
                s, title=f"Change on {plain(n, 60)} by arm", width=w, marks=m, **k
            ),
        )
        second = ""
        if early:
            second = figure(
                f"{plain(name, 60)}, the first {EARLY_WORDS}",
                lambda w, s=series, k=words, m=mark, n=name, e=EARLY * whole: figures.line_chart(
                    s, title=f"Change on {plain(n, 60)} by arm, first {EARLY_WORDS}", width=w, marks=m,
                    x_range=(0.0, e), **k
                ),
            )  # fmt: skip
        body += side_by_side(first, second)
    return body


def _samples_by_arm(records: Sequence[Mapping[str, object]], names: Sequence[str]) -> str:
    found: dict[tuple[str, str], dict] = {}
    for record, arm in zip(records, names, strict=True):
        for sample in map(mapping, rows(record.get("samples"))):
            key = (plain(sample.get("set")), passage(sample.get("prompt")))
            entry = found.setdefault(key, {"sample": sample, "arms": []})
            if sample.get("after") not in (None, ""):
                entry["arms"].append((arm, sample["after"]))
    shown = []
    for entry in list(found.values())[:_MOST_SAMPLES]:
        sample = entry["sample"]
        texts = [(w, sample[k]) for w, k in (("Reference", "reference"), ("Before", "before")) if sample.get(k)]
        boxes = "".join(
            f'<div><h4><bdi>{escaped(word, 80)}</bdi></h4><p dir="auto">{prose(text).strip()}</p></div>'
            for word, text in [*texts, *entry["arms"][:MOST_SERIES]]
        )
        shown.append(sample_box(sample, boxes))
    return "".join(shown)


def _runs(records: Sequence[Mapping[str, object]], names: Sequence[str]) -> str:
    body = []
    for name, record in zip(names, records, strict=True):
        achieved = mapping(record.get("achieved"))
        body.append(
            (
                tables.words(name),
                tables.words(record.get("status")),
                tables.words(masked(mapping(record.get("model")).get("start"))),
                tables.whole(achieved.get("tokens")),
                tables.Cell((tables.Number(duration(achieved.get("seconds")), number(achieved.get("seconds"))),)),
                tables.whole(achieved.get("tokens_per_second")),
                tables.words(masked(record.get("command"))),
            )
        )
    columns = (
        Column("arm", words=True), Column("status", words=True), Column("start", words=True),
        Column("trained tokens"), Column("time", fields=("seconds",)), Column("tokens/s"),
        Column("command", words=True),
    )  # fmt: skip
    stages = "".join(
        details(f"Stage file of {name}", preformatted(record["stage_yaml"], MOST_YAML // max(len(records), 1)))
        for name, record in zip(names, records, strict=True)
        if record.get("stage_yaml")
    )
    return Table("Runs of this comparison", columns, tuple(body)).html() + stages if body else ""

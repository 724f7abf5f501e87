"""How do several runs from one base become one page, side by side? What a record lacks is left empty."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from postgrad.reports.html import figures, tables
from postgrad.reports.html.document import (
    FOOTER,
    MAX_YAML_CHARACTERS,
    bold_name,
    details,
    escaped_passage,
    figure,
    intro_paragraph,
    preformatted,
    render_page,
    sample_box,
    side_by_side,
)
from postgrad.reports.html.figures import ForestRow, ScatterPoint, VerticalMark
from postgrad.reports.html.notation import (
    as_list,
    as_mapping,
    as_number,
    escape_html,
    format_duration,
    format_percent,
    format_signed,
    mask_secrets,
    multiline_text,
    plain_text,
)
from postgrad.reports.html.tables import Column, Table
from postgrad.reports.sections import task_tables
from postgrad.reports.sections.curves import (
    EARLY_SHARE,
    EARLY_TEXT,
    MAX_SERIES,
    Curves,
    change_estimates,
    change_series,
    read_curves,
)

_MAX_SAMPLES = 6


def comparison_page(
    records: Sequence[Mapping[str, object]],
    metrics: Sequence[Iterable[Mapping[str, object]]],
    title: str,
    baseline: str | None,
) -> str:
    """Several runs from one base side by side; `metrics[i]` are the rows of `records[i]` (may be shorter).

    `baseline` names the arm against which the removed share of forgetting is measured.
    """
    records = [as_mapping(r) for r in records]
    names = tables.arm_names(records)
    curves = [read_curves(metrics[i] if i < len(metrics) else ()) for i in range(len(records))]
    asked = task_tables.comparison_task_table(records)
    sections = [
        (
            "arms",
            "Arms",
            "The arms",
            tables.comparison_table(records, baseline).html() + _trade_off_figures(records, names) if records else "",
        ),
        ("tasks", "Tasks", "What the arms answered", asked.html() if asked else ""),
        ("curves", "Curves", "Every set, every arm", _curves_section(records, names, curves)),
        ("samples", "Samples", "Text by arm", _samples_section(records, names)),
        ("runs", "Runs", "The runs", _runs_section(records, names)),
    ]
    unfinished = [n for n, r in zip(names, records, strict=True) if r.get("status") not in ("finished", "gate-failed")]
    notice = ""
    if unfinished:
        listed = ", ".join(bold_name(n) for n in unfinished[:8])
        notice = f'<div class="notice"><p><b>Not finished:</b> {listed}. What they lack is left empty.</p></div>'
    how_many = "1 run" if len(records) == 1 else f"{len(records)} runs"
    header = (
        f'<p class="over">postgrad \u00b7 comparison of {how_many}</p>'
        f"<h1><bdi>{escape_html(title or 'Comparison', 160)}</bdi></h1>"
        f"{_headline(records, names, baseline)}{notice}"
    )
    return render_page(f"{title or 'Comparison'} \u2013 postgrad", header, sections, FOOTER)


def _headline(records: Sequence[Mapping[str, object]], names: Sequence[str], baseline: str | None) -> str:
    """The comparison in plain words: who forgot least, what that cost, against the baseline."""
    forgot = {n: tables.mean_difference(tables.retained_changes(r)) for n, r in zip(names, records, strict=True)}
    gained = {n: tables.mean_difference(tables.learned_changes(r)) for n, r in zip(names, records, strict=True)}
    known = {n: v for n, v in forgot.items() if v is not None}
    if len(known) < 2:
        return '<p class="lead">There are not two arms with scores on retained text to compare yet.</p>'
    best = min(known, key=lambda n: known[n])
    words = [f"{bold_name(best)} kept most: {format_signed(known[best])} nats per token on retained text."]
    base = known.get(baseline or "")
    part = tables.removed_share(known[best], base)
    if part is not None and best != baseline:
        words.append(
            f"That is {format_percent(part, 0)} less forgetting than {bold_name(baseline)} ({format_signed(base)})."
        )
    learnt = {n: v for n, v in gained.items() if v is not None}
    if learnt:
        most = min(learnt, key=lambda n: learnt[n])
        if most == best:
            words.append(f"It also learnt most: {format_signed(learnt[most])} on new text.")
        elif best in learnt:
            words.append(
                f"{bold_name(most)} learnt most: {format_signed(learnt[most])} on new text, against {format_signed(learnt[best])}."
            )
    return f'<p class="lead">{" ".join(words)}</p>'


def _trade_off_figures(records: Sequence[Mapping[str, object]], names: Sequence[str]) -> str:
    spots = []
    for name, record in zip(names, records, strict=True):
        kept, learnt = tables.retained_changes(record), tables.learned_changes(record)
        x, y = tables.mean_difference(kept), tables.mean_difference(learnt)
        spots.append(
            ScatterPoint(
                name,
                math.nan if x is None else x,
                math.nan if y is None else -y,
                _single_set_interval(kept, 1),
                _single_set_interval(learnt, -1),
            )
        )
    if not any(math.isfinite(s.x) and math.isfinite(s.y) for s in spots):
        return ""
    by_set: dict[str, list[ForestRow]] = {}
    for name, record in zip(names, records, strict=True):
        for e in change_estimates(tables.retained_changes(record)):
            by_set.setdefault(e.name, []).append(ForestRow(name, e.value, e.low, e.high, e.tone, e.note))
    first = figure(
        "Gain against forgetting",
        lambda w: figures.scatter(
            spots, title="Gain against forgetting", width=w,
            x_label="forgetting: rise on retained sets, nats per token",
            y_label="gain: fall on learned sets, nats per token", best_corner_text="better"
        ),
        note="One point an arm, mean over its sets; bars are 95 % intervals where there is one set.",
    )  # fmt: skip
    forests = [
        figure(
            f"Forgetting of {plain_text(set_name, 60)} by arm",
            lambda w, entries=entries, of=set_name: figures.forest_plot(
                entries[:40], title=f"Change on {plain_text(of, 60)} by arm", width=w, left_word="better",
                right_word="worse", x_label="change of the loss, nats per token"
            ),
            note="Change of the loss with 95 % intervals.",
        )
        for set_name, entries in list(by_set.items())[:5]
    ]  # fmt: skip
    return side_by_side(first, *forests)


def _single_set_interval(entries: Mapping[str, Mapping[str, object]], sign: int) -> tuple[float, float] | None:
    """The interval where there is one set: intervals of several sets cannot be averaged."""
    if len(entries) != 1:
        return None
    entry = next(iter(entries.values()))
    ends = [as_number(entry.get("low")), as_number(entry.get("high"))]
    known = [sign * v for v in ends if v is not None]
    return (min(known), max(known)) if len(known) == 2 else None


def _curves_section(records: Sequence[Mapping[str, object]], names: Sequence[str], curves: Sequence[Curves]) -> str:
    roles: dict[str, str] = {}
    for record, arm in zip(records, curves, strict=True):
        for name in arm.set_losses:
            role = arm.set_roles.get(name) or plain_text(
                as_mapping(as_mapping(record.get("changes")).get(name)).get("role")
            )
            roles[name] = roles.get(name) or role
    order = sorted(roles, key=lambda n: {"retained": 0, "learned": 1}.get(roles[n], 2))
    unit = "step" if any(c.unit == "step" and c.set_losses for c in curves) else "tokens trained"
    same = all(c.unit == unit for c in curves if c.set_losses)
    if not order:
        return ""
    body = intro_paragraph(
        "Change of the loss since the switch to the new data, one line an arm, with 95 % intervals."
        + ("" if same else " Some arms count steps and others tokens: their x axes do not agree.")
    )
    for name in order[:MAX_SERIES]:
        series, whole = [], 0.0
        for i, (arm, arm_name) in enumerate(zip(curves, names, strict=True)):
            if name in arm.set_losses:
                series.append(change_series(arm_name, arm.set_losses[name], colour=i))
                whole = max(whole, arm.set_losses[name][-1][0])
        early = max(sum(1 for x, _ in s.points if x <= EARLY_SHARE * whole) for s in series) >= 3
        role = f" ({roles[name]})" if roles[name] else ""
        words = {"x_label": unit, "y_label": "change, nats per token", "zero": True, "least": 0.01}
        mark = [VerticalMark(0.0, "switch")]
        first = figure(
            f"{plain_text(name, 60)}{role}",
            lambda w, s=series, k=words, m=mark, n=name: figures.line_chart(
                s, title=f"Change on {plain_text(n, 60)} by arm", width=w, marks=m, **k
            ),
        )
        second = ""
        if early:
            second = figure(
                f"{plain_text(name, 60)}, the first {EARLY_TEXT}",
                lambda w, s=series, k=words, m=mark, n=name, e=EARLY_SHARE * whole: figures.line_chart(
                    s, title=f"Change on {plain_text(n, 60)} by arm, first {EARLY_TEXT}", width=w, marks=m,
                    x_range=(0.0, e), **k
                ),
            )  # fmt: skip
        body += side_by_side(first, second)
    return body


def _samples_section(records: Sequence[Mapping[str, object]], names: Sequence[str]) -> str:
    found: dict[tuple[str, str], dict] = {}
    for record, arm in zip(records, names, strict=True):
        for sample in map(as_mapping, as_list(record.get("samples"))):
            key = (plain_text(sample.get("set")), multiline_text(sample.get("prompt")))
            entry = found.setdefault(key, {"sample": sample, "arms": []})
            if sample.get("after") not in (None, ""):
                entry["arms"].append((arm, sample["after"]))
    shown = []
    for entry in list(found.values())[:_MAX_SAMPLES]:
        sample = entry["sample"]
        texts = [(w, sample[k]) for w, k in (("Reference", "reference"), ("Before", "before")) if sample.get(k)]
        boxes = "".join(
            f'<div><h4><bdi>{escape_html(word, 80)}</bdi></h4><p dir="auto">{escaped_passage(text).strip()}</p></div>'
            for word, text in [*texts, *entry["arms"][:MAX_SERIES]]
        )
        shown.append(sample_box(sample, boxes))
    return "".join(shown)


def _runs_section(records: Sequence[Mapping[str, object]], names: Sequence[str]) -> str:
    body = []
    for name, record in zip(names, records, strict=True):
        achieved = as_mapping(record.get("achieved"))
        body.append(
            (
                tables.text_cell(name),
                tables.text_cell(record.get("status")),
                tables.text_cell(mask_secrets(as_mapping(record.get("model")).get("start"))),
                tables.count_cell(achieved.get("tokens")),
                tables.Cell(
                    (tables.Number(format_duration(achieved.get("seconds")), as_number(achieved.get("seconds"))),)
                ),
                tables.count_cell(achieved.get("tokens_per_second")),
                tables.text_cell(mask_secrets(record.get("command"))),
            )
        )
    columns = (
        Column("arm", is_text=True), Column("status", is_text=True), Column("start", is_text=True),
        Column("trained tokens"), Column("time", fields=("seconds",)), Column("tokens/s"),
        Column("command", is_text=True),
    )  # fmt: skip
    stages = "".join(
        details(
            f"Stage file of {name}", preformatted(record["stage_yaml"], MAX_YAML_CHARACTERS // max(len(records), 1))
        )
        for name, record in zip(names, records, strict=True)
        if record.get("stage_yaml")
    )
    return Table("Runs of this comparison", columns, tuple(body)).html() + stages if body else ""

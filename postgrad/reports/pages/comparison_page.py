"""Several runs from one base side by side, on one page."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from postgrad.foreign_text import mask_secrets, plain_text
from postgrad.lineage.metrics import MetricsRow
from postgrad.lineage.record import Record, Sample, SetChange
from postgrad.reports.html.charts import (
    Chart,
    ForestRow,
    ScatterPoint,
    Series,
    VerticalMark,
    forest_plot,
    line_chart,
    scatter,
)
from postgrad.reports.html.document import (
    MAX_YAML_CHARACTERS,
    bold_name,
    details,
    figure,
    intro_paragraph,
    preformatted,
    render_page,
    sample_box,
    side_by_side,
)
from postgrad.reports.html.notation import finite, format_duration, format_percent, format_signed
from postgrad.reports.html.table import Cell, Column, Number, Table, count_cell, text_cell
from postgrad.reports.sections.ability_section import comparison_ability_table
from postgrad.reports.sections.comparison_table import arm_names, comparison_table, mean_difference, removed_share
from postgrad.reports.sections.curves import (
    EARLY_SHARE,
    EARLY_TEXT,
    MAX_SERIES,
    X_LABEL,
    Curves,
    change_estimates,
    change_series,
    read_curves,
)
from postgrad.reports.sections.overview import damage_notice
from postgrad.reports.sections.stage_differences import stage_differences_table
from postgrad.reports.sections.task_section import comparison_task_table

_MAX_SAMPLES, _MAX_FORESTS, _MAX_FOREST_ROWS = 6, 5, 40


def comparison_page(
    records: Sequence[Record],
    metrics: Sequence[Iterable[MetricsRow]],
    title: str,
    baseline: str | None,
    damage: Sequence[str] = (),
) -> str:
    """Several runs from one base side by side; `metrics[i]` are the rows of `records[i]` (may be shorter).

    `baseline` names the arm against which the removed share of forgetting is measured. `damage`: of the metrics
    files.
    """
    names = arm_names(records)
    curves = [read_curves(metrics[i] if i < len(metrics) else ()) for i in range(len(records))]
    tasks, abilities = comparison_task_table(records), comparison_ability_table(records)
    differences = stage_differences_table(records, names)
    arms = comparison_table(records, baseline).html() + _trade_off_figures(records, names) if records else ""
    sections = [
        ("arms", "Arms", "The arms", arms),
        ("differences", "Settings", "What differs", differences.html() if differences.rows else ""),
        ("tasks", "Tasks", "Tasks", tasks.html() if tasks else ""),
        ("abilities", "Abilities", "Abilities", abilities.html() if abilities else ""),
        ("curves", "Curves", "Forgetting during training", _curves_section(names, curves)),
        ("samples", "Samples", "Text by arm", _samples_section(records, names)),
        ("runs", "Runs", "The runs", _runs_section(records, names)),
    ]
    unfinished = [n for n, r in zip(names, records, strict=True) if r.status not in ("finished", "gate-failed")]
    notice = ""
    if unfinished:
        listed = ", ".join(bold_name(n) for n in unfinished[:8])
        notice = f'<div class="notice"><p><b>Not finished:</b> {listed}. Their missing values are empty.</p></div>'
    number = "1 run" if len(records) == 1 else f"{len(records)} runs"
    title, lead = title or "Comparison", damage_notice(damage) + _headline(records, names, baseline)
    return render_page(title, f"comparison of {number}", title, f"{lead}{notice}", sections)


def _mean_changes(records: Sequence[Record], names: Sequence[str], role: str) -> dict[str, float]:
    means = {n: mean_difference(r.changes_with_role(role)) for n, r in zip(names, records, strict=True)}
    return {name: value for name, value in means.items() if value is not None}


def _headline(records: Sequence[Record], names: Sequence[str], baseline: str | None) -> str:
    """The arm that forgot least, its gain, and both against the baseline."""
    forgetting = _mean_changes(records, names, "retained")
    if len(forgetting) < 2:
        return '<p class="lead">Fewer than two arms have scores on retained text.</p>'
    best = min(forgetting, key=lambda n: forgetting[n])
    sentences = [f"{bold_name(best)} forgot least: {format_signed(forgetting[best])} nats per token on retained text."]
    base = forgetting.get(baseline or "")
    removed = removed_share(forgetting[best], base)
    if removed is not None and best != baseline:
        sentences.append(
            f"That is {format_percent(removed, 0)} less forgetting than {bold_name(baseline)} ({format_signed(base)})."
        )
    learned = _mean_changes(records, names, "learned")
    most = min(learned, key=lambda n: learned[n], default=None)
    if most is not None and most == best:
        sentences.append(f"It also learned most: {format_signed(learned[most])} on new text.")
    elif most is not None and best in learned:
        change = f"{format_signed(learned[most])} on new text, against {format_signed(learned[best])}"
        sentences.append(f"{bold_name(most)} learned most: {change}.")
    return f'<p class="lead">{" ".join(sentences)}</p>'


def _trade_off_figures(records: Sequence[Record], names: Sequence[str]) -> str:
    points = [_trade_off_point(name, record) for name, record in zip(names, records, strict=True)]
    if not any(math.isfinite(p.x) and math.isfinite(p.y) for p in points):
        return ""
    by_set: dict[str, list[ForestRow]] = {}
    for name, record in zip(names, records, strict=True):
        for e in change_estimates(record.changes_with_role("retained")):
            by_set.setdefault(e.name, []).append(ForestRow(name, e.value, e.low, e.high, e.tone, e.note))
    first = figure(
        "Gain against forgetting",
        lambda w: scatter(
            points, title="Gain against forgetting", width=w, x_label="forgetting: rise on retained sets, nats per token",
            y_label="gain: fall on learned sets, nats per token", best_corner_text="better",
        ),
        note="One point per arm, mean over its sets; bars are 95 % intervals where there is one set.",
    )  # fmt: skip
    forests = [
        figure(
            f"Forgetting of {plain_text(name, 60)} by arm",
            lambda w, rows=rows, of=name: forest_plot(
                rows[:_MAX_FOREST_ROWS], title=f"Change on {plain_text(of, 60)} by arm", width=w, left_word="better",
                right_word="worse", x_label="change of the loss, nats per token",
            ),
            note="Change of the loss with 95 % intervals.",
        )
        for name, rows in list(by_set.items())[:_MAX_FORESTS]
    ]  # fmt: skip
    return side_by_side(first, *forests)


def _trade_off_point(name: str, record: Record) -> ScatterPoint:
    retained, learned = record.changes_with_role("retained"), record.changes_with_role("learned")
    x, y = mean_difference(retained), mean_difference(learned)
    return ScatterPoint(
        name,
        math.nan if x is None else x,
        math.nan if y is None else -y,
        _single_set_interval(retained, 1),
        _single_set_interval(learned, -1),
    )


def _single_set_interval(changes: Mapping[str, SetChange], sign: int) -> tuple[float, float] | None:
    """The interval where there is one set: intervals of several sets cannot be averaged."""
    if len(changes) != 1:
        return None
    change = next(iter(changes.values()))
    ends = [sign * v for v in (finite(change.low), finite(change.high)) if v is not None]
    return (min(ends), max(ends)) if len(ends) == 2 else None


def _curves_section(names: Sequence[str], curves: Sequence[Curves]) -> str:
    roles: dict[str, str] = {}
    for arm in curves:
        roles |= {name: roles.get(name) or role for name, role in arm.set_roles.items()}
    if not roles:
        return ""
    sets = sorted(roles, key=lambda n: {"retained": 0, "learned": 1}.get(roles[n], 2))
    intro = "Change of the loss since the switch to the new data, one line per arm, with 95 % intervals."
    return intro_paragraph(intro) + "".join(
        _set_figures(name, roles[name], names, curves) for name in sets[:MAX_SERIES]
    )


def _set_figures(name: str, role: str, names: Sequence[str], curves: Sequence[Curves]) -> str:
    """The curves of one held-out set by arm: the whole run, and its first part where it has points."""
    arms = [(i, arm.set_losses[name]) for i, arm in enumerate(curves) if name in arm.set_losses]
    series = [change_series(names[i], points, colour=i) for i, points in arms]
    early_end = EARLY_SHARE * max(points[-1].x for _, points in arms)
    title = plain_text(name, 60)
    whole = figure(f"{title} ({role})" if role else title, lambda w: _arm_chart(series, f"Change on {title} by arm", w))
    if max(sum(1 for x, _ in line.points if x <= early_end) for line in series) < 3:
        return side_by_side(whole)
    early = figure(
        f"{title}, the first {EARLY_TEXT}",
        lambda w: _arm_chart(series, f"Change on {title} by arm, first {EARLY_TEXT}", w, (0.0, early_end)),
    )
    return side_by_side(whole, early)


def _arm_chart(series: Sequence[Series], title: str, width: float, x_range: tuple[float, float] | None = None) -> Chart:
    return line_chart(
        series, title=title, width=width, x_label=X_LABEL, y_label="change, nats per token", zero=True, least=0.01,
        marks=[VerticalMark(0.0, "switch")], x_range=x_range,
    )  # fmt: skip


def _samples_section(records: Sequence[Record], names: Sequence[str]) -> str:
    samples: dict[tuple[str, str], Sample] = {}
    continuations: dict[tuple[str, str], list[tuple[str, str | None]]] = {}
    for record, arm in zip(records, names, strict=True):
        for sample in record.samples:
            key = (sample.set, sample.prompt)
            samples.setdefault(key, sample)
            continuations.setdefault(key, []).append((arm, sample.after))
    return "".join(
        sample_box(
            sample,
            [("Reference", sample.reference), ("Before", sample.before), *continuations[key][:MAX_SERIES]],
        )
        for key, sample in list(samples.items())[:_MAX_SAMPLES]
    )


def _runs_section(records: Sequence[Record], names: Sequence[str]) -> str:
    body = []
    for name, record in zip(names, records, strict=True):
        totals = record.totals
        body.append(
            (
                text_cell(name),
                text_cell(record.status),
                text_cell(mask_secrets(record.model.start_model)),
                count_cell(totals.tokens),
                Cell((Number(format_duration(totals.seconds), totals.seconds),)),
                count_cell(totals.tokens_per_second),
                text_cell(mask_secrets(record.command)),
            )
        )
    columns = (
        Column("arm", is_text=True), Column("status", is_text=True), Column("start", is_text=True),
        Column("trained tokens"), Column("time", fields=("seconds",)), Column("tokens/s"),
        Column("command", is_text=True),
    )  # fmt: skip
    limit = MAX_YAML_CHARACTERS // max(len(records), 1)
    stages = "".join(
        details(f"Stage file of {name}", preformatted(record.stage_yaml, limit))
        for name, record in zip(names, records, strict=True)
        if record.stage_yaml
    )
    return Table("Runs of this comparison", columns, tuple(body)).html() + stages if body else ""

"""A study on one page: its arms as a table, the frontier, curves with the switch marked, and what is not shown."""

from __future__ import annotations

import math
from collections.abc import Sequence

from postgrad.foreign_text import plain_text
from postgrad.reports.html.charts import (
    ForestRow,
    LimitLine,
    ScatterPoint,
    Series,
    VerticalMark,
    forest_plot,
    line_chart,
    scatter,
)
from postgrad.reports.html.document import (
    bold_name,
    details,
    facts,
    figure,
    intro_paragraph,
    preformatted,
    render_page,
    side_by_side,
)
from postgrad.reports.html.notation import escape_html, format_compact, format_duration, format_percent, format_signed
from postgrad.reports.html.table import Cell, Column, Table, change_cell, interval_cell, text_cell
from postgrad.reports.result_models import EstimateInterval, StudyArm, StudyCurve, StudyResults, StudySet
from postgrad.reports.sections.study_table import claims_table, study_arms_table

_MAX_ARMS = 8
"""Arms in a figure of curves."""


def study_page(study: StudyResults) -> str:
    """The page of a study."""
    finished = [arm for arm in study.arms if arm.loss]
    claims = claims_table(study)
    sections = [
        ("summary", "Summary", "Summary", _summary_section(study)),
        ("arms", "Arms", "Every arm", study_arms_table(study).html() if finished else ""),
        ("claims", "Claims", "Claims and measurements", claims.html() if claims else ""),
        ("frontier", "Frontier", "Gain against forgetting", _frontier_section(finished)),
        ("replay", "Replay", "By the share of replay", _replay_section(study)),
        ("curves", "Curves", "Before and after the switch", _curves_section(study, finished)),
        ("seeds", "Seeds", "Seed by seed", _seeds_section(finished)),
        ("method", "Method", "Method", _method_section(study)),
    ]
    arm_count, seed_count = len(study.arms), len(study.seeds)
    kind = f"study of {arm_count} arm{'s' * (arm_count != 1)}, {seed_count} seed{'s' * (seed_count != 1)}"
    return render_page(plain_text(study.name, 80), kind, study.name, _headline(study), sections)


def _headline(study: StudyResults) -> str:
    unfinished = [arm for arm in study.arms if arm.status != "finished"]
    first = next((line for line in study.summary if not line.startswith("Not finished")), "")
    notice = ""
    if unfinished:
        listed = ", ".join(f"{bold_name(arm.name)} ({escape_html(arm.status, 40)})" for arm in unfinished[:12])
        notice = f'<div class="notice"><p><b>Not complete:</b> {listed}. Their missing values are empty.</p></div>'
    return f'<p class="lead">{escape_html(first, 1000)}</p>{notice}'


def _summary_section(study: StudyResults) -> str:
    items = "".join(f"<li>{escape_html(line, 1000)}</li>" for line in study.summary)
    return intro_paragraph("Derived from the numbers below alone.") + f"<ul>{items}</ul>"


def _signed_interval(entry: EstimateInterval | None, sign: int = 1) -> tuple[float, float] | None:
    if entry is None or entry.low is None or entry.high is None:
        return None
    return (entry.low, entry.high) if sign > 0 else (-entry.high, -entry.low)


def _signed_value(entry: EstimateInterval | None, sign: int = 1) -> float:
    return math.nan if entry is None or entry.value is None else sign * entry.value


def _frontier_section(finished: Sequence[StudyArm]) -> str:
    """Gain against forgetting, dominated arms in grey; and the share of forgetting removed."""
    arms = [arm for arm in finished if not arm.from_scratch]
    if not arms:
        return ""
    points = [_frontier_point(arm) for arm in arms]
    first = figure(
        "Gain against forgetting",
        lambda w: scatter(
            points, title="Gain against forgetting", width=w, best_corner_text="better",
            x_label="forgetting: rise on old text, nats per token", y_label="gain: fall on new text, nats per token",
        ),
        note="Grey: another arm forgets no more and gains no less, by their values. Bars are 95 % intervals over documents.",
        numbers=_frontier_table(finished),
    )  # fmt: skip
    removed = [_removed_row(arm.name, arm.removed) for arm in arms if arm.removed]
    if not removed:
        return side_by_side(first)
    second = figure(
        "Share of forgetting removed",
        lambda w: forest_plot(
            removed[:40], title="Share of forgetting removed", width=w, decimals=0,
            x_label="% of the forgetting of the arm without protection",
        ),
        note="100: no forgetting. Intervals over documents, paired.",
    )  # fmt: skip
    return side_by_side(first, second)


def _frontier_point(arm: StudyArm) -> ScatterPoint:
    old, new = arm.change.get("old"), arm.change.get("new")
    intervals = (None, None) if arm.dominated_by else (_signed_interval(old), _signed_interval(new, -1))
    return ScatterPoint(
        plain_text(arm.name, 60), _signed_value(old), _signed_value(new, -1), *intervals, bool(arm.dominated_by)
    )


def _removed_row(name: str, removed: EstimateInterval) -> ForestRow:
    low, high = _signed_interval(removed) or (0.0, 0.0)
    tone = "good" if low > 0 else "open"
    return ForestRow(plain_text(name, 60), 100 * _signed_value(removed), 100 * low, 100 * high, tone)


def _frontier_table(finished: Sequence[StudyArm]) -> Table:
    rows = tuple(
        (
            text_cell(arm.name),
            *(interval_cell(arm.change.get(kind), write=format_signed) for kind in ("old", "new")),
            text_cell(", ".join(plain_text(name, 40) for name in arm.dominated_by or ())),
        )
        for arm in finished
    )
    columns = (
        Column("arm", is_text=True),
        Column("forgetting"),
        Column("change on new"),
        Column("dominated by", is_text=True),
    )
    return Table("Forgetting and change on new text of each arm, nats per token", columns, rows)


def _replay_section(study: StudyResults) -> str:
    """Forgetting and loss on new text against the share of replay, with the fitted laws."""
    if study.replay is None or len(study.replay.points) < 2:
        return ""
    points = study.replay.points
    forgetting = [(100 * p.share, p.change.get("old")) for p in points]
    losses = [(100 * p.share, p.loss.get("new")) for p in points]
    intro = intro_paragraph("Arms that differ from the one without protection by their share of replay alone.")
    return intro + side_by_side(
        _replay_figure(study, "old", "Forgetting", "rise on old text, nats per token", forgetting),
        _replay_figure(study, "new", "Loss on new text", "nats per token", losses),
    )


def _replay_figure(
    study: StudyResults, kind: str, caption: str, label: str, measured: Sequence[tuple[float, EstimateInterval | None]]
) -> str:
    nan = (math.nan, math.nan)
    series = [
        Series(
            "measured",
            [(x, _signed_value(e)) for x, e in measured],
            [(x, *(_signed_interval(e) or nan)) for x, e in measured],
            has_markers=True,
        )
    ]
    law = study.replay.laws.get(kind) if study.replay else None
    note = "Too few shares to fit a law."
    if law and law.line:
        curve = [(100 * x, y) for x, y, _, _ in law.line]
        series.append(Series("fitted", curve, [(100 * x, low, high) for x, _, low, high in law.line], is_dashed=True))
        note = f"Dashed: {plain_text(law.source, 200)}."
    return figure(
        caption,
        lambda w: line_chart(
            series, title=f"{caption} by the share of replay", width=w, x_label="replay, % of the tokens", y_label=label
        ),
        note=note,
    )


def _curves_section(study: StudyResults, finished: Sequence[StudyArm]) -> str:
    """The loss of each set by trained tokens: the base before the switch, the arms after it."""
    continued = [arm for arm in finished if not arm.from_scratch and arm.curve and arm.curve.switches]
    # Not more arms than can be told apart: the baseline, those on the frontier, then the others.
    shown = sorted(continued, key=lambda arm: (arm.name != study.against, bool(arm.dominated_by)))[:_MAX_ARMS]
    charts = [chart for s in study.sets if (chart := _set_figure(study, s, shown))]
    if not charts:
        return ""
    intro = "Loss on the first part of each held-out set, mean over seeds; the level is of all text at once, scored in full."
    more = len(continued) - len(shown)
    return intro_paragraph(intro + (f" {more} more arms are in the table." if more > 0 else "")) + side_by_side(*charts)


def _set_figure(study: StudyResults, held_out: StudySet, arms: Sequence[StudyArm]) -> str:
    """The curves of one held-out set; empty without points."""
    name = plain_text(held_out.name, 60)
    series = []
    before = study.base.curve.sets.get(held_out.name) if study.base.curve else None
    if before:
        last = before[-1][0]
        series.append(Series("the base", [(x - last, y) for x, y in before[1:]], is_faint=True))
    switches = {0.0}
    for i, arm in enumerate(arms):
        curve = arm.curve or StudyCurve()
        series.append(Series(plain_text(arm.name, 60), curve.sets.get(held_out.name, []), colour=i))
        switches |= set(curve.switches)
    if not any(len(line.points) > 1 for line in series):
        return ""
    union = study.arm(study.union)
    level = union.loss[held_out.name].value if union and held_out.name in union.loss else None
    levels = [LimitLine(level, plain_text(study.union, 40))] if level is not None else []
    marks = [VerticalMark(x, "switch" if x == 0 else "next text") for x in sorted(switches)]
    return figure(
        f"{name} ({plain_text(held_out.role, 20)})",
        lambda w: line_chart(
            series, title=f"Loss on {name} by arm", width=w, x_label="tokens since the switch", y_label="nats per token",
            marks=marks, levels=levels,
        ),
    )  # fmt: skip


def _seeds_section(finished: Sequence[StudyArm]) -> str:
    """Each seed's loss."""
    if not any(len(arm.by_seed) > 1 for arm in finished):
        return ""
    rows: list[tuple[Cell, ...]] = [
        (
            text_cell(arm.name),
            text_cell(seed),
            *(change_cell(losses.get(kind), 4) for kind in ("old", "new", "average")),
        )
        for arm in finished
        for seed, losses in arm.by_seed.items()
    ]
    columns = (Column("arm", is_text=True), Column("seed"), Column("old"), Column("new"), Column("average"))
    table = Table("Loss of each seed, nats per token", columns, tuple(rows))
    intro = intro_paragraph(
        "The spread over seeds (order of the rows, new weights) shows what another seed might have given. The intervals"
        " elsewhere are over documents and do not include it."
    )
    return intro + details("Every seed", table.html())


def _method_section(study: StudyResults) -> str:
    machine, time = study.machine, study.time
    sets = [
        (f"{plain_text(s.name, 60)} ({plain_text(s.role, 20)})", f"{s.documents} documents, {s.tokens} tokens")
        for s in study.sets
    ]
    compute: list[tuple[str, object]] = []
    if machine and machine.cpu:
        settings, versions = (
            ", ".join(f"{k} {v}" for k, v in part.items()) for part in (machine.execution, machine.versions)
        )
        compute = [
            ("weights", format_compact(machine.parameters) if machine.parameters else None),
            ("machine", f"{machine.cpu}, {machine.cores} cores ({machine.device})"),
            ("arithmetic", settings),
            ("versions", versions),
        ]
    overhead = format_percent(time.outside) if time.outside is not None else None
    listed = facts(
        [
            *sets,
            ("base", study.base.name),
            *compute,
            ("runs", f"{time.runs} trained, {time.runs_requested} requested"),
            ("training", format_duration(time.training)),
            ("evaluation", format_duration(time.evaluation)),
            ("overhead", overhead),
        ]
    )
    intro = intro_paragraph(
        "An arm's loss on old (new) text is the mean over its retained (learned) sets; on average the mean of both. Intervals"
        " are 95 % percentiles of 2,000 bootstrap draws of documents. Every draw takes the same documents for all arms, so"
        " differences, removed shares and gaps are paired. Several seeds are averaged document by document."
    )
    return intro + listed + (details("The study file", preformatted(study.study_yaml)) if study.study_yaml else "")

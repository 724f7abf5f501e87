"""What was answered to tasks? Tables of one model or several, before and after, and a section of the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from postgrad.reports.html import document, figures
from postgrad.reports.html.figures import ForestRow, Series
from postgrad.reports.html.notation import (
    ABSENT,
    as_list,
    as_mapping,
    as_number,
    format_count,
    format_fixed,
    plain_text,
)
from postgrad.reports.html.tables import (
    CHANGE_FIELDS,
    VERDICTS,
    Cell,
    Column,
    Number,
    Table,
    arm_names,
    count_cell,
    difference_cell,
    text_cell,
    value_cell,
    verdict,
)

PERCENT_METRICS = ("BLEU", "chrF")
"""Metrics that run from 0 to 100."""
_INTERVAL_FIELDS = ("value", "low", "high")
_MAX_TASKS = 12


def task_table(record: Mapping[str, object], brief: bool = False) -> Table | None:
    """What was answered to each task before and after, with the paired change; None when no task was asked.

    `brief` leaves what a terminal has room for: the first metric of each task, and no columns of details.
    """
    body, missed = [], []
    for entry in map(as_mapping, as_list(record.get("tasks"))):
        was, now, moved = (as_mapping(entry.get(side)) for side in ("before", "after", "changes"))
        missed += [f"{plain_text(entry.get('name'))}: {omissions_text(entry)}."] * bool(omissions_text(entry))
        for metric in list(map(str, as_list(entry.get("metrics"))))[: 1 if brief else None]:
            then, here, found = as_mapping(was.get(metric)), as_mapping(now.get(metric)), as_mapping(moved.get(metric))
            said = verdict(found) if found else ""
            tone, symbol, told = VERDICTS.get(said, ("", "", ABSENT))
            decimals = _metric_decimals(metric)
            body.append(
                (
                    text_cell(entry.get("name")),
                    text_cell(entry.get("role")),
                    text_cell(prompting_text(entry)),
                    count_cell(entry.get("items")),
                    text_cell(metric),
                    text_cell(f"{symbol} {told}".strip(), tone),
                    _interval_cell(then, decimals),
                    _interval_cell(here, decimals),
                    difference_cell(found, decimals, tone),
                    value_cell(then.get("spread"), decimals),
                    value_cell(here.get("spread"), decimals),
                    text_cell(omissions_text(entry) or "none"),
                )
            )
    if not body:
        return None
    columns = (
        Column("task", is_text=True), Column("role", is_text=True), Column("asked", is_text=True), Column("items"),
        Column("metric", is_text=True), Column("verdict", is_text=True),
        Column("before (95 %)", fields=_INTERVAL_FIELDS), Column("after (95 %)", fields=_INTERVAL_FIELDS),
        Column("change (95 %)", fields=CHANGE_FIELDS),
        Column("before", "spread between seeds"), Column("after", "spread between seeds"),
        Column("left out", is_text=True),
    )  # fmt: skip
    picked = [0, 2, 4, 5, 6, 7, 8] if brief else list(range(9))
    if not brief:  # a column that says nothing takes the room of others
        entries = [as_mapping(entry) for entry in as_list(record.get("tasks"))]
        picked += [9, 10] if any((as_number(entry.get("seeds")) or 1) > 1 for entry in entries) else []
        picked += [11] if any(map(omissions_text, entries)) else []
    columns = tuple(columns[i] for i in picked)
    body = [tuple(row[i] for i in picked) for row in body]
    notes = (
        "Higher is better. The change is after minus before on the same items in the same prompts; its interval"
        " resamples items (paired bootstrap).",
        *(missed if brief else ()),
    )
    return Table("Tasks, asked before and after", columns, tuple(body), notes)


def task_score_table(entries: Sequence[Mapping[str, object]], caption: str) -> Table:
    """What one model answered to each task: every metric with its interval, and the spread between prompt seeds."""
    body = [
        (
            text_cell(entry.get("name")),
            text_cell(prompting_text(entry)),
            count_cell(entry.get("items")),
            text_cell(metric),
            _interval_cell(found := as_mapping(as_mapping(entry.get("scores")).get(metric)), _metric_decimals(metric)),
            value_cell(found.get("spread"), _metric_decimals(metric)),
            text_cell(omissions_text(entry) or "none"),
        )
        for entry in entries
        for metric in map(str, as_list(entry.get("metrics")))
    ]
    columns = (
        Column("task", is_text=True), Column("asked", is_text=True), Column("items"), Column("metric", is_text=True),
        Column("value (95 %)", fields=_INTERVAL_FIELDS), Column("spread between seeds"), Column("left out", is_text=True),
    )  # fmt: skip
    return Table(caption, columns, tuple(body))


def comparison_task_table(records: Sequence[Mapping[str, object]]) -> Table | None:
    """Arms side by side: the first metric of each task after the stage, and its change; None when none was asked."""
    names: dict[str, str] = {}
    for record in records:
        for entry in map(as_mapping, as_list(record.get("tasks"))):
            names.setdefault(plain_text(entry.get("name")), plain_text(next(iter(as_list(entry.get("metrics"))), "")))
    if not names:
        return None
    columns = [Column("arm", is_text=True)]
    for name, metric in names.items():
        group = f"{plain_text(name, 60)} ({metric})"
        columns += [
            Column("after (95 %)", group, fields=_INTERVAL_FIELDS),
            Column("change (95 %)", group, fields=CHANGE_FIELDS),
        ]
    body = []
    for record, arm in zip(records, arm_names(records), strict=True):
        entries = {plain_text(as_mapping(e).get("name")): as_mapping(e) for e in as_list(record.get("tasks"))}
        line = [text_cell(arm)]
        for name, metric in names.items():
            entry = entries.get(name, {})
            here, moved = (as_mapping(as_mapping(entry.get(side)).get(metric)) for side in ("after", "changes"))
            tone = VERDICTS.get(verdict(moved) if moved else "", ("",))[0]
            line += [
                _interval_cell(here, _metric_decimals(metric)),
                difference_cell(moved, _metric_decimals(metric), tone),
            ]
        body.append(tuple(line))
    notes = ("A change is after minus before on the same items; higher is better.",)
    return Table("Tasks, arms side by side", tuple(columns), tuple(body), notes)


def _metric_decimals(metric: object) -> int:
    return 1 if metric in PERCENT_METRICS else 3


def _interval_cell(entry: Mapping[str, object], decimals: int) -> Cell:
    """A value with its interval below it."""
    low, high = as_number(entry.get("low")), as_number(entry.get("high"))
    ends: tuple[str | Number, ...] = (Number("", None), Number("", None))
    if low is not None and high is not None:
        ends = (Number(format_fixed(low, decimals), low), " to ", Number(format_fixed(high, decimals), high))
    return Cell(value_cell(entry.get("value"), decimals).parts, "", ends)


def prompting_text(entry: Mapping[str, object]) -> str:
    """`5 shots, 3 seeds, chosen`."""
    shots, seeds = as_number(entry.get("shots")) or 0, as_number(entry.get("seeds")) or 1
    said = "zero-shot" if not shots else f"{shots:.0f} shot{'s' * (shots > 1)}"
    said += f", {seeds:.0f} seeds" if seeds > 1 else ""
    return said + (", chosen" if entry.get("answered") == "choose" else ", written")


def omissions_text(entry: Mapping[str, object]) -> str:
    """What was not asked, and what was asked with fewer demonstrations; empty when all was asked as it was meant."""
    parts = [f"{format_count(n)} {plain_text(reason)}" for reason, n in as_mapping(entry.get("skipped")).items() if n]
    shortened = as_number(entry.get("shortened")) or 0
    if shortened:
        parts.append(f"{format_count(shortened)} prompts with fewer shots")
    return ", ".join(parts)


def cluster_table(record: Mapping[str, object]) -> Table | None:
    """Clusters of tasks that were trained on beside those that were never seen; None when no task names one."""
    body = []
    for entry in map(as_mapping, as_list(record.get("clusters"))):
        said = verdict(entry)
        tone, symbol, told = VERDICTS.get(said, ("", "", ABSENT))
        decimals = _metric_decimals(entry.get("metric"))
        body.append(
            (
                text_cell(entry.get("cluster")),
                text_cell("trained on" if entry.get("seen") else "never seen"),
                count_cell(len(as_list(entry.get("tasks")))),
                text_cell(entry.get("metric")),
                text_cell(f"{symbol} {told}".strip(), tone),
                value_cell(entry.get("before"), decimals),
                value_cell(entry.get("after"), decimals),
                difference_cell(entry, decimals, tone),
            )
        )
    if not body:
        return None
    columns = (
        Column("cluster", is_text=True), Column("seen", is_text=True), Column("tasks"), Column("metric", is_text=True),
        Column("verdict", is_text=True), Column("before"), Column("after"), Column("change (95 %)", fields=CHANGE_FIELDS),
    )  # fmt: skip
    notes = ("Each is the mean over its tasks; items are resampled within each task.",)
    return Table("Clusters of tasks, seen and never seen", columns, tuple(body), notes)


def tasks_section(
    record: Mapping[str, object], evaluations: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]], unit: str
) -> str:
    """Every task before and after, the clusters, a prompt of each; empty when no task was asked.

    `looks`: by metric and task, what was reached after so many of `unit` while it trained.
    """
    table, clusters = task_table(record), cluster_table(record)
    if table is None:
        return ""
    body = document.intro_paragraph(
        "The same questions in the same prompts, put to the model before and after the stage. Demonstrations, where there are"
        " any, come from training rows; none asks what a test row asks."
    )
    body += table.html() + (clusters.html() if clusters else "")
    entries = [as_mapping(entry) for entry in as_list(record.get("tasks"))]
    changed: dict[str, list[ForestRow]] = {}
    for entry in entries:
        metric = plain_text(next(iter(as_list(entry.get("metrics"))), ""))
        found = as_mapping(as_mapping(entry.get("changes")).get(metric))
        value = as_number(found.get("difference"))
        if value is not None:
            said = verdict(found)
            low, high = as_number(found.get("low")), as_number(found.get("high"))
            changed.setdefault(metric, []).append(
                ForestRow(plain_text(entry.get("name")), value, low, high, VERDICTS.get(said, ("open",))[0], said)
            )
    drawn = [
        document.figure(
            f"Change of {metric}",
            lambda w, e=estimates, m=metric: figures.forest_plot(
                e, title=f"Change of {m} by task", width=w, x_label=f"change of {m}", left_word="worse",
                right_word="better"
            ),
            note="Zero is no change; bars are 95 % intervals over items.",
        )
        for metric, estimates in changed.items()
    ]  # fmt: skip
    for metric, lines in evaluations.items():
        series = [Series(name, points, has_markers=True) for name, points in list(lines.items())[:_MAX_TASKS]]
        drawn.append(
            document.figure(
                f"{plain_text(metric, 30)} while it trained",
                lambda w, s=series, m=metric: figures.line_chart(
                    s, title=f"{m} of tasks through the run", width=w, x_label=unit, y_label=m
                ),
            )
        )
    body += "".join(document.side_by_side(*drawn[i : i + 2]) for i in range(0, len(drawn), 2))
    return body + "".join(_answer_details(entry) for entry in entries[:_MAX_TASKS])


def _answer_details(entry: Mapping[str, object]) -> str:
    """A prompt as it was read, and some questions with what was answered."""
    shown = "".join(
        f'<article class="sample"><p class="prompt" dir="auto">{document.escaped_passage(example.get("question"))}</p>'
        f'<div class="texts">{_answer_boxes(example)}</div></article>'
        for example in map(as_mapping, as_list(entry.get("examples")))
    )
    # Without demonstrations the first question is all of its prompt.
    prompt = document.preformatted(entry["prompt"], 6000) if entry.get("prompt") and entry.get("shots") else ""
    return document.details(f"What was asked and answered: {plain_text(entry.get('name'), 60)}", prompt + shown)


def _answer_boxes(example: Mapping[str, object]) -> str:
    named = (("Before", "before"), ("After", "after"), ("Reference", "reference"))
    return "".join(
        f'<div><h4>{word}</h4><p dir="auto">{document.escaped_passage(example[key])}</p></div>'
        for word, key in named
        if example.get(key) is not None
    )

"""Tasks: scores of one model or several, before and after, and the section of a run's page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from postgrad.foreign_text import plain_text
from postgrad.lineage.record import Record, TaskRecord
from postgrad.reports.html.charts import ForestRow, Point, Series, forest_plot, line_chart
from postgrad.reports.html.document import (
    details,
    escaped_passage,
    figure,
    intro_paragraph,
    preformatted,
    side_by_side,
    text_boxes,
)
from postgrad.reports.html.notation import format_count
from postgrad.reports.html.table import (
    CHANGE_FIELDS,
    VALUE_FIELDS,
    Cell,
    Column,
    Table,
    count_cell,
    difference_cell,
    interval_cell,
    text_cell,
    value_cell,
)
from postgrad.reports.html.verdicts import tone_of, verdict_cell, verdict_of
from postgrad.reports.result_models import TaskScore
from postgrad.reports.sections.comparison_table import arm_names
from postgrad.reports.sections.curves import X_LABEL

PERCENT_METRICS = ("BLEU", "chrF")
"""Metrics that run from 0 to 100."""
_MAX_TASKS = 12


def task_table(record: Record, brief: bool = False) -> Table | None:
    """Each task before and after with the paired change; None without tasks.

    `brief` keeps what fits a terminal: the first metric of each task, and no details.
    """
    tasks = record.tasks
    rows = [_task_row(task, metric) for task in tasks for metric in task.metrics[: 1 if brief else None]]
    if not rows:
        return None
    columns = (
        Column("task", is_text=True), Column("role", is_text=True), Column("prompt", is_text=True), Column("items"),
        Column("metric", is_text=True), Column("verdict", is_text=True),
        Column("before (95 %)", fields=VALUE_FIELDS), Column("after (95 %)", fields=VALUE_FIELDS),
        Column("change (95 %)", fields=CHANGE_FIELDS),
        Column("before", "std over seeds"), Column("after", "std over seeds"),
        Column("skipped", is_text=True),
    )  # fmt: skip
    omissions = [f"{plain_text(task.name)}: {text}." for task in tasks if (text := omissions_text(task))]
    picked = [0, 2, 4, 5, 6, 7, 8] if brief else list(range(9))
    if not brief:  # without empty columns
        picked += [9, 10] if any(task.seeds > 1 for task in tasks) else []
        picked += [11] if omissions else []
    notes = (
        "Higher is better. The change is after minus before on the same items with the same prompts; its interval resamples"
        " items (paired bootstrap).",
        *(omissions if brief else ()),
    )
    body = tuple(tuple(row[i] for i in picked) for row in rows)
    return Table("Tasks before and after", tuple(columns[i] for i in picked), body, notes)


def _task_row(task: TaskRecord, metric: str) -> tuple[Cell, ...]:
    before, after, change = task.before.get(metric), task.after.get(metric), task.changes.get(metric)
    decimals = _metric_decimals(metric)
    return (
        text_cell(task.name),
        text_cell(task.role),
        text_cell(prompting_text(task)),
        count_cell(task.items),
        text_cell(_metric_text(task, metric)),
        verdict_cell(change),
        interval_cell(before, decimals, unit="item"),
        interval_cell(after, decimals, unit="item"),
        difference_cell(change, decimals, tone_of(change), "item"),
        value_cell(before.std if before else None, decimals),
        value_cell(after.std if after else None, decimals),
        text_cell(omissions_text(task) or "none"),
    )


def task_score_table(tasks: Sequence[TaskScore], caption: str) -> Table:
    """One model's scores on each task: every metric with its interval and its spread over prompt seeds."""
    body = [
        (
            text_cell(task.name),
            text_cell(prompting_text(task)),
            count_cell(task.items),
            text_cell(_metric_text(task, metric)),
            interval_cell(task.scores.get(metric), _metric_decimals(metric), unit="item"),
            value_cell(task.scores[metric].std if metric in task.scores else None, _metric_decimals(metric)),
            text_cell(omissions_text(task) or "none"),
        )
        for task in tasks
        for metric in task.metrics
    ]
    columns = (
        Column("task", is_text=True), Column("prompt", is_text=True), Column("items"), Column("metric", is_text=True),
        Column("value (95 %)", fields=VALUE_FIELDS), Column("std over seeds"), Column("skipped", is_text=True),
    )  # fmt: skip
    return Table(caption, columns, tuple(body))


def comparison_task_table(records: Sequence[Record]) -> Table | None:
    """Arms side by side: the first metric of each task after the stage, and its change; None without tasks."""
    metrics: dict[str, str] = {}
    for record in records:
        for task in record.tasks:
            metrics.setdefault(task.name, task.metrics[0] if task.metrics else "")
    if not metrics:
        return None
    columns = [Column("arm", is_text=True)]
    for name, metric in metrics.items():
        group = f"{plain_text(name, 60)} ({plain_text(metric)})"
        columns += [
            Column("after (95 %)", group, fields=VALUE_FIELDS),
            Column("change (95 %)", group, fields=CHANGE_FIELDS),
        ]
    body = []
    for record, arm in zip(records, arm_names(records), strict=True):
        tasks = {task.name: task for task in record.tasks}
        row = [text_cell(arm)]
        for name, metric in metrics.items():
            task, decimals = tasks.get(name), _metric_decimals(metric)
            change = task.changes.get(metric) if task else None
            row += [
                interval_cell(task.after.get(metric) if task else None, decimals, unit="item"),
                difference_cell(change, decimals, tone_of(change), "item"),
            ]
        body.append(tuple(row))
    notes = ("A change is after minus before on the same items; higher is better.",)
    return Table("Tasks, arms side by side", tuple(columns), tuple(body), notes)


def _metric_decimals(metric: str) -> int:
    return 1 if metric in PERCENT_METRICS else 3


def _metric_text(task: TaskRecord, metric: str) -> str:
    """`BLEU (zh)`: the metric with its tokenizers, where they are not sacrebleu's default alone."""
    names = task.tokenizers.get(metric, [])
    return metric if names in ([], ["13a"]) else f"{metric} ({', '.join(names)})"


def prompting_text(task: TaskRecord) -> str:
    """`5 shots, 3 seeds, multiple choice`."""
    shots = f"{task.shots} shot{'s' * (task.shots > 1)}" if task.shots else "zero-shot"
    seeds = f", {task.seeds} seeds" if task.seeds > 1 else ""
    return shots + seeds + (", multiple choice" if task.scoring == "multiple-choice" else ", generated")


def omissions_text(task: TaskRecord) -> str:
    """Skipped items by reason, prompts with fewer demonstrations, and items without words; empty without any."""
    parts = [f"{format_count(n)} {plain_text(reason)}" for reason, n in task.skipped.items() if n]
    if task.truncated_prompts:
        parts.append(f"{format_count(task.truncated_prompts)} prompts with fewer shots")
    parts += [
        f"{format_count(n)} without words for {metric}, compared as a whole" for metric, n in task.without_words.items()
    ]
    return ", ".join(parts)


def cluster_table(record: Record) -> Table | None:
    """Task clusters that were trained on beside those that were not; None without clusters."""
    body = [
        (
            text_cell(entry.task_cluster),
            text_cell("yes" if entry.trained_on else "no"),
            count_cell(len(entry.tasks)),
            text_cell(entry.metric),
            verdict_cell(entry),
            value_cell(entry.before, _metric_decimals(entry.metric)),
            value_cell(entry.after, _metric_decimals(entry.metric)),
            difference_cell(entry, _metric_decimals(entry.metric), tone_of(entry), "item"),
        )
        for entry in record.task_clusters
    ]
    if not body:
        return None
    columns = (
        Column("cluster", is_text=True), Column("trained on", is_text=True), Column("tasks"),
        Column("metric", is_text=True), Column("verdict", is_text=True), Column("before"), Column("after"),
        Column("change (95 %)", fields=CHANGE_FIELDS),
    )  # fmt: skip
    notes = ("Mean over the tasks of a cluster; items are resampled within each task.",)
    return Table("Task clusters, trained on and not", columns, tuple(body), notes)


def tasks_section(record: Record, task_values: Mapping[str, Mapping[str, Sequence[Point]]]) -> str:
    """The section of a run's page; empty without tasks. `task_values`: by metric and task, at each evaluation."""
    table, clusters = task_table(record), cluster_table(record)
    if table is None:
        return ""
    intro = intro_paragraph(
        "The same questions with the same prompts before and after the stage. Demonstrations come from training rows and never"
        " from test rows."
    )
    charts = [*_change_figures(record.tasks), *_curve_figures(task_values)]
    return (
        intro
        + table.html()
        + (clusters.html() if clusters else "")
        + "".join(side_by_side(*charts[i : i + 2]) for i in range(0, len(charts), 2))
        + "".join(answer_details(task) for task in record.tasks[:_MAX_TASKS])
    )


def _change_figures(tasks: Sequence[TaskRecord]) -> list[str]:
    """The change of the first metric of each task, one figure per metric."""
    rows: dict[str, list[ForestRow]] = {}
    for task in tasks:
        metric = task.metrics[0] if task.metrics else ""
        change = task.changes.get(metric)
        if change and change.difference is not None:
            row = ForestRow(
                task.name, change.difference, change.low, change.high, tone_of(change, "open"), verdict_of(change)
            )
            rows.setdefault(plain_text(metric), []).append(row)
    return [
        figure(
            f"Change of {metric}",
            lambda w, r=metric_rows, m=metric: forest_plot(
                r,
                title=f"Change of {m} by task",
                width=w,
                x_label=f"change of {m}",
                left_word="worse",
                right_word="better",
            ),
            note="Zero is no change; bars are 95 % intervals over items.",
        )
        for metric, metric_rows in rows.items()
    ]


def _curve_figures(task_values: Mapping[str, Mapping[str, Sequence[Point]]]) -> list[str]:
    return [
        figure(
            f"{plain_text(metric, 30)} during training",
            lambda w, lines=lines, m=metric: line_chart(
                [Series(name, points, has_markers=True) for name, points in list(lines.items())[:_MAX_TASKS]],
                title=f"{m} of tasks during training", width=w, x_label=X_LABEL, y_label=m,
            ),
        )
        for metric, lines in task_values.items()
    ]  # fmt: skip


def answer_details(task: TaskRecord) -> str:
    """A prompt, and some questions with their answers."""
    examples = "".join(
        f'<article class="sample"><p class="prompt" dir="auto">{escaped_passage(example.question)}</p>'
        + text_boxes((("Before", example.before), ("After", example.after), ("Reference", example.reference)))
        + "</article>"
        for example in task.examples
    )
    # Without demonstrations the first question is all of its prompt.
    prompt = preformatted(task.prompt, 6000) if task.prompt and task.shots else ""
    return details(f"Prompts and answers: {plain_text(task.name, 60)}", prompt + examples)

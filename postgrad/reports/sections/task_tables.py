"""What was answered to tasks? Tables of one model or several, before and after, and a section of the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from postgrad.reports.html import document, figures
from postgrad.reports.html.figures import Estimate, Series
from postgrad.reports.html.notation import ABSENT, count, fixed, mapping, number, plain, rows
from postgrad.reports.html.tables import (
    CHANGE,
    VERDICTS,
    Cell,
    Column,
    Number,
    Table,
    arm_names,
    difference,
    level,
    verdict,
    whole,
    words,
)

PERCENT_POINTS = ("BLEU", "chrF")
"""Metrics that run from 0 to 100."""
_ENDS = ("value", "low", "high")
_MOST = 12


def task_table(record: Mapping[str, object], brief: bool = False) -> Table | None:
    """What was answered to each task before and after, with the paired change; None when no task was asked.

    `brief` leaves what a terminal has room for: the first metric of each task, and no columns of details.
    """
    body, missed = [], []
    for entry in map(mapping, rows(record.get("tasks"))):
        was, now, moved = (mapping(entry.get(side)) for side in ("before", "after", "changes"))
        missed += [f"{plain(entry.get('name'))}: {left_out(entry)}."] * bool(left_out(entry))
        for metric in list(map(str, rows(entry.get("metrics"))))[: 1 if brief else None]:
            then, here, found = mapping(was.get(metric)), mapping(now.get(metric)), mapping(moved.get(metric))
            said = verdict(found) if found else ""
            tone, symbol, told = VERDICTS.get(said, ("", "", ABSENT))
            decimals = _decimals(metric)
            body.append(
                (
                    words(entry.get("name")),
                    words(entry.get("role")),
                    words(asked_how(entry)),
                    whole(entry.get("items")),
                    words(metric),
                    words(f"{symbol} {told}".strip(), tone),
                    _with_ends(then, decimals),
                    _with_ends(here, decimals),
                    difference(found, decimals, tone),
                    level(then.get("spread"), decimals),
                    level(here.get("spread"), decimals),
                    words(left_out(entry) or "none"),
                )
            )
    if not body:
        return None
    columns = (
        Column("task", words=True), Column("role", words=True), Column("asked", words=True), Column("items"),
        Column("metric", words=True), Column("verdict", words=True),
        Column("before (95 %)", fields=_ENDS), Column("after (95 %)", fields=_ENDS),
        Column("change (95 %)", fields=CHANGE),
        Column("before", "spread between seeds"), Column("after", "spread between seeds"),
        Column("left out", words=True),
    )  # fmt: skip
    picked = [0, 2, 4, 5, 6, 7, 8] if brief else list(range(9))
    if not brief:  # a column that says nothing takes the room of others
        entries = [mapping(entry) for entry in rows(record.get("tasks"))]
        picked += [9, 10] if any((number(entry.get("seeds")) or 1) > 1 for entry in entries) else []
        picked += [11] if any(map(left_out, entries)) else []
    columns = tuple(columns[i] for i in picked)
    body = [tuple(row[i] for i in picked) for row in body]
    notes = (
        "Higher is better. The change is after minus before on the same items in the same prompts; its interval"
        " resamples items (paired bootstrap).",
        *(missed if brief else ()),
    )
    return Table("Tasks, asked before and after", columns, tuple(body), notes)


def answer_table(entries: Sequence[Mapping[str, object]], caption: str) -> Table:
    """What one model answered to each task: every metric with its interval, and the spread between prompt seeds."""
    body = [
        (
            words(entry.get("name")),
            words(asked_how(entry)),
            whole(entry.get("items")),
            words(metric),
            _with_ends(found := mapping(mapping(entry.get("scores")).get(metric)), _decimals(metric)),
            level(found.get("spread"), _decimals(metric)),
            words(left_out(entry) or "none"),
        )
        for entry in entries
        for metric in map(str, rows(entry.get("metrics")))
    ]
    columns = (
        Column("task", words=True), Column("asked", words=True), Column("items"), Column("metric", words=True),
        Column("value (95 %)", fields=_ENDS), Column("spread between seeds"), Column("left out", words=True),
    )  # fmt: skip
    return Table(caption, columns, tuple(body))


def arms_task_table(records: Sequence[Mapping[str, object]]) -> Table | None:
    """Arms side by side: the first metric of each task after the stage, and its change; None when none was asked."""
    names: dict[str, str] = {}
    for record in records:
        for entry in map(mapping, rows(record.get("tasks"))):
            names.setdefault(plain(entry.get("name")), plain(next(iter(rows(entry.get("metrics"))), "")))
    if not names:
        return None
    columns = [Column("arm", words=True)]
    for name, metric in names.items():
        group = f"{plain(name, 60)} ({metric})"
        columns += [Column("after (95 %)", group, fields=_ENDS), Column("change (95 %)", group, fields=CHANGE)]
    body = []
    for record, arm in zip(records, arm_names(records), strict=True):
        entries = {plain(mapping(e).get("name")): mapping(e) for e in rows(record.get("tasks"))}
        line = [words(arm)]
        for name, metric in names.items():
            entry = entries.get(name, {})
            here, moved = (mapping(mapping(entry.get(side)).get(metric)) for side in ("after", "changes"))
            tone = VERDICTS.get(verdict(moved) if moved else "", ("",))[0]
            line += [_with_ends(here, _decimals(metric)), difference(moved, _decimals(metric), tone)]
        body.append(tuple(line))
    notes = ("A change is after minus before on the same items; higher is better.",)
    return Table("Tasks, arms side by side", tuple(columns), tuple(body), notes)


def _decimals(metric: object) -> int:
    return 1 if metric in PERCENT_POINTS else 3


def _with_ends(entry: Mapping[str, object], decimals: int) -> Cell:
    """A value with its interval below it."""
    low, high = number(entry.get("low")), number(entry.get("high"))
    ends: tuple[str | Number, ...] = (Number("", None), Number("", None))
    if low is not None and high is not None:
        ends = (Number(fixed(low, decimals), low), " to ", Number(fixed(high, decimals), high))
    return Cell(level(entry.get("value"), decimals).parts, "", ends)


def asked_how(entry: Mapping[str, object]) -> str:
    """`5 shots, 3 seeds, chosen`."""
    shots, seeds = number(entry.get("shots")) or 0, number(entry.get("seeds")) or 1
    said = "zero-shot" if not shots else f"{shots:.0f} shot{'s' * (shots > 1)}"
    said += f", {seeds:.0f} seeds" if seeds > 1 else ""
    return said + (", chosen" if entry.get("answered") == "choose" else ", written")


def left_out(entry: Mapping[str, object]) -> str:
    """What was not asked, and what was asked with fewer demonstrations; empty when all was asked as it was meant."""
    parts = [f"{count(n)} {plain(reason)}" for reason, n in mapping(entry.get("skipped")).items() if n]
    shortened = number(entry.get("shortened")) or 0
    if shortened:
        parts.append(f"{count(shortened)} prompts with fewer shots")
    return ", ".join(parts)


def cluster_table(record: Mapping[str, object]) -> Table | None:
    """Clusters of tasks that were trained on beside those that were never seen; None when no task names one."""
    body = []
    for entry in map(mapping, rows(record.get("clusters"))):
        said = verdict(entry)
        tone, symbol, told = VERDICTS.get(said, ("", "", ABSENT))
        decimals = _decimals(entry.get("metric"))
        body.append(
            (
                words(entry.get("cluster")),
                words("trained on" if entry.get("seen") else "never seen"),
                whole(len(rows(entry.get("tasks")))),
                words(entry.get("metric")),
                words(f"{symbol} {told}".strip(), tone),
                level(entry.get("before"), decimals),
                level(entry.get("after"), decimals),
                difference(entry, decimals, tone),
            )
        )
    if not body:
        return None
    columns = (
        Column("cluster", words=True), Column("seen", words=True), Column("tasks"), Column("metric", words=True),
        Column("verdict", words=True), Column("before"), Column("after"), Column("change (95 %)", fields=CHANGE),
    )  # fmt: skip
    notes = ("Each is the mean over its tasks; items are resampled within each task.",)
    return Table("Clusters of tasks, seen and never seen", columns, tuple(body), notes)


def section(
    record: Mapping[str, object], looks: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]], unit: str
) -> str:
    """Every task before and after, the clusters, a prompt of each; empty when no task was asked.

    `looks`: by metric and task, what was reached after so many of `unit` while it trained.
    """
    table, clusters = task_table(record), cluster_table(record)
    if table is None:
        return ""
    body = document.about(
        "The same questions in the same prompts, put to the model before and after the stage. Demonstrations, where there are"
        " any, come from training rows; none asks what a test row asks."
    )
    body += table.html() + (clusters.html() if clusters else "")
    entries = [mapping(entry) for entry in rows(record.get("tasks"))]
    changed: dict[str, list[Estimate]] = {}
    for entry in entries:
        metric = plain(next(iter(rows(entry.get("metrics"))), ""))
        found = mapping(mapping(entry.get("changes")).get(metric))
        value = number(found.get("difference"))
        if value is not None:
            said = verdict(found)
            low, high = number(found.get("low")), number(found.get("high"))
            changed.setdefault(metric, []).append(
                Estimate(plain(entry.get("name")), value, low, high, VERDICTS.get(said, ("open",))[0], said)
            )
    drawn = [
        document.figure(
            f"Change of {metric}",
            lambda w, e=estimates, m=metric: figures.forest_plot(
                e, title=f"Change of {m} by task", width=w, x_label=f"change of {m}", left_word="worse",
                right_word="better"
            ),
            about="Zero is no change; bars are 95 % intervals over items.",
        )
        for metric, estimates in changed.items()
    ]  # fmt: skip
    for metric, lines in looks.items():
        series = [Series(name, points, markers=True) for name, points in list(lines.items())[:_MOST]]
        drawn.append(
            document.figure(
                f"{plain(metric, 30)} while it trained",
                lambda w, s=series, m=metric: figures.line_chart(
                    s, title=f"{m} of tasks through the run", width=w, x_label=unit, y_label=m
                ),
            )
        )
    body += "".join(document.side_by_side(*drawn[i : i + 2]) for i in range(0, len(drawn), 2))
    return body + "".join(_answers(entry) for entry in entries[:_MOST])


def _answers(entry: Mapping[str, object]) -> str:
    """A prompt as it was read, and some questions with what was answered."""
    shown = "".join(
        f'<article class="sample"><p class="prompt" dir="auto">{document.prose(example.get("question"))}</p>'
        f'<div class="texts">{_boxes(example)}</div></article>'
        for example in map(mapping, rows(entry.get("examples")))
    )
    # Without demonstrations the first question is all of its prompt.
    prompt = document.preformatted(entry["prompt"], 6000) if entry.get("prompt") and entry.get("shots") else ""
    return document.details(f"What was asked and answered: {plain(entry.get('name'), 60)}", prompt + shown)


def _boxes(example: Mapping[str, object]) -> str:
    named = (("Before", "before"), ("After", "after"), ("Reference", "reference"))
    return "".join(
        f'<div><h4>{word}</h4><p dir="auto">{document.prose(example[key])}</p></div>'
        for word, key in named
        if example.get(key) is not None
    )

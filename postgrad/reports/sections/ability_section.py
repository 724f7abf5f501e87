"""Abilities: scores of one model, before and after with the mean, the gate, and the section of a run's page."""

from __future__ import annotations

from collections.abc import Sequence

from postgrad.foreign_text import plain_text
from postgrad.lineage.record import AbilitiesRecord, AbilityGate, Record, TaskRecord
from postgrad.reports.html.charts import ForestRow, forest_plot
from postgrad.reports.html.document import figure, intro_paragraph
from postgrad.reports.html.notation import format_signed
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
from postgrad.reports.sections.task_section import answer_details, omissions_text, prompting_text

_DECIMALS = 3
_MEAN = "mean"
_NOTE = (
    "Scores run from 0 to 1, higher is better. The change is after minus before on the same generated probes; its interval"
    " resamples probes (paired bootstrap). The mean is over the first metric of each ability."
)


def ability_table(record: Record, brief: bool = False) -> Table | None:
    """Each ability before and after with the paired change, and their mean; None without any.

    `brief`: the first metric of each ability alone.
    """
    abilities = record.abilities
    if abilities is None or not abilities.tasks:
        return None
    rows = [_ability_row(task, metric) for task in abilities.tasks for metric in task.metrics[: 1 if brief else None]]
    if len(abilities.tasks) > 1:
        rows.append(_mean_row(abilities))
    columns = (
        Column("ability", is_text=True), Column("probes"), Column("metric", is_text=True),
        Column("verdict", is_text=True), Column("before (95 %)", fields=VALUE_FIELDS),
        Column("after (95 %)", fields=VALUE_FIELDS), Column("change (95 %)", fields=CHANGE_FIELDS),
    )  # fmt: skip
    notes = (_NOTE, form_sentence(abilities), *_omissions(abilities.tasks))
    return Table("Abilities before and after", columns, tuple(rows), notes)


def _ability_row(task: TaskRecord, metric: str) -> tuple[Cell, ...]:
    change = task.changes.get(metric)
    return (
        text_cell(task.name),
        count_cell(task.items),
        text_cell(metric),
        verdict_cell(change),
        interval_cell(task.before.get(metric), _DECIMALS, unit="item"),
        interval_cell(task.after.get(metric), _DECIMALS, unit="item"),
        difference_cell(change, _DECIMALS, tone_of(change), "item"),
    )


def _mean_row(abilities: AbilitiesRecord) -> tuple[Cell, ...]:
    change = abilities.change
    return (
        text_cell(_MEAN),
        count_cell(sum(task.items for task in abilities.tasks)),
        text_cell(""),
        verdict_cell(change),
        value_cell(abilities.before, _DECIMALS),
        value_cell(abilities.after, _DECIMALS),
        difference_cell(change, _DECIMALS, tone_of(change), "item"),
    )


def form_sentence(abilities: AbilitiesRecord) -> str:
    """How the probes were put to the model."""
    written = next((task for task in abilities.tasks if task.scoring == "generate"), abilities.tasks[0])
    if abilities.form == "chat":
        return f"Probes are turns of the chat template ({prompting_text(written)})."
    return f"Probes are plain text ({prompting_text(written)}): the start model has no chat template."


def _omissions(tasks: Sequence[TaskRecord]) -> list[str]:
    return [f"{plain_text(task.name)}: {text}." for task in tasks if (text := omissions_text(task))]


def ability_score_table(tasks: Sequence[TaskScore], mean: float, caption: str) -> Table:
    """One model's scores on each ability, and their mean."""
    rows = [
        (
            text_cell(task.name),
            text_cell(prompting_text(task)),
            count_cell(task.items),
            text_cell(metric),
            interval_cell(task.scores.get(metric), _DECIMALS, unit="item"),
        )
        for task in tasks
        for metric in task.metrics
    ]
    if len(tasks) > 1:
        count = count_cell(sum(task.items for task in tasks))
        rows.append((text_cell(_MEAN), text_cell(""), count, text_cell(""), value_cell(mean, _DECIMALS)))
    columns = (
        Column("ability", is_text=True), Column("prompt", is_text=True), Column("probes"), Column("metric", is_text=True),
        Column("score (95 %)", fields=VALUE_FIELDS),
    )  # fmt: skip
    return Table(caption, columns, tuple(rows), tuple(_omissions(tasks)))


def comparison_ability_table(records: Sequence[Record]) -> Table | None:
    """Arms side by side: the score of each ability after the stage, and its change; the mean last. None without any."""
    measured = [record.abilities for record in records]
    names = list(dict.fromkeys(task.name for each in measured if each for task in each.tasks))
    if not names:
        return None
    columns = [Column("ability", is_text=True)]
    for arm in arm_names(records):
        columns += [
            Column("after", plain_text(arm, 60)),
            Column("change (95 %)", plain_text(arm, 60), fields=CHANGE_FIELDS),
        ]
    body = [
        (text_cell(name), *(cell for each in measured for cell in _arm_cells(each, name)))
        for name in (*names, *([_MEAN] if len(names) > 1 else []))
    ]
    notes = ("A change is after minus before on the same generated probes; higher is better.",)
    return Table("Abilities, arms side by side", tuple(columns), tuple(body), notes)


def _arm_cells(abilities: AbilitiesRecord | None, name: str) -> tuple[Cell, Cell]:
    """The score after, and the change, of an ability or the mean; empty cells where an arm did not measure it."""
    after = change = None
    if abilities and name == _MEAN:
        after, change = abilities.after, abilities.change
    elif abilities and (task := next((task for task in abilities.tasks if task.name == name), None)):
        score = task.after.get(task.metrics[0])
        after, change = score.value if score else None, task.changes.get(task.metrics[0])
    return value_cell(after, _DECIMALS), difference_cell(change, _DECIMALS, tone_of(change), "item")


def gate_sentence(gate: AbilityGate) -> str:
    """What the gate found, with its bound."""
    lost = f"; certainly dropped by more: {', '.join(gate.lost)}" if gate.lost else ""
    change, low = (format_signed(-100 * drop + 0.0, 2) for drop in (gate.drop, gate.drop_high))
    return (
        f"the mean score of abilities changed by {change} points of 100 (lower end {low}); "
        f"a drop of {100 * gate.max_drop:g} was allowed{lost}"
    )


def abilities_section(record: Record) -> str:
    """The section of a run's page; empty without abilities."""
    table, abilities = ability_table(record), record.abilities
    if table is None or abilities is None:
        return ""
    intro = intro_paragraph(
        "Generated questions whose answers are scored by code, the same ones before and after the stage. The reference of an"
        " example is one right answer of many."
    )
    rows = [
        ForestRow(name, change.difference, change.low, change.high, tone_of(change, "open"), verdict_of(change))
        for name, change in (
            *((task.name, task.changes.get(task.metrics[0])) for task in abilities.tasks),
            (_MEAN, abilities.change),
        )
        if change and change.difference is not None
    ]
    chart = figure(
        "Change of each ability",
        lambda w: forest_plot(
            rows, title="Change of the score by ability", width=w, x_label="change of the score", left_word="worse",
            right_word="better",
        ),
        note="Zero is no change; bars are 95 % intervals over probes.",
    ) if rows else ""  # fmt: skip
    return intro + table.html() + chart + "".join(answer_details(task) for task in abilities.tasks)

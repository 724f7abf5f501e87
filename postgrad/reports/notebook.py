"""Results as HTML for a notebook, which calls `_repr_html_` of the last value of a cell."""

from __future__ import annotations

import html
from pathlib import Path

from postgrad.lineage.matrix import Lineage
from postgrad.lineage.metrics import read_run_metrics
from postgrad.lineage.record import RECORD, PlanSummary, Record
from postgrad.reports.html.table import Column, Table, count_cell, share_cell, text_cell, value_cell
from postgrad.reports.pages.run_page import run_page
from postgrad.reports.sections.ability_section import ability_table
from postgrad.reports.sections.held_out_tables import metrics_table, score_table
from postgrad.reports.sections.lineage_tables import lineage_summary_table, lineage_table
from postgrad.reports.sections.task_section import task_table

_PAGE_HEIGHT = 640


def tables_html(*tables: Table | None) -> str:
    """The tables that have rows; their text is escaped."""
    return "".join(table.html() for table in tables if table and table.rows)


def record_html(record: Record) -> str:
    """The tables of a record: scores, metrics, tasks, abilities."""
    tasks, abilities = task_table(record, brief=True), ability_table(record, brief=True)
    return tables_html(score_table(record, brief=True), metrics_table(record), tasks, abilities)


def lineage_html(lineage: Lineage) -> str:
    """The loss matrix and its summary."""
    return tables_html(lineage_table(lineage), lineage_summary_table(lineage))


def plan_html(name: str, plan: PlanSummary) -> str:
    """The sources of a plan."""
    columns = (
        Column("source", is_text=True), Column("role", is_text=True), Column("share"), Column("trained tokens"),
        Column("rows"), Column("passes"), Column("documents"),
    )  # fmt: skip
    rows = tuple(
        (
            text_cell(source.name),
            text_cell(source.role),
            share_cell(source.share, 2),
            count_cell(source.trained_tokens),
            count_cell(source.rows),
            value_cell(source.passes, 2),
            count_cell(source.documents),
        )
        for source in plan.sources
    )
    caption = f"{name}: {plan.steps:,} steps, {plan.tokens:,} tokens in rows of {plan.sequence_length:,}"
    return tables_html(Table(caption, columns, rows))


def run_html(record: Record, run_folder: Path) -> str:
    """The page of a run with its curves, in a frame that runs nothing; the tables alone, where the folder has gone."""
    if not (run_folder / RECORD).exists():
        return record_html(record)
    metrics = read_run_metrics(run_folder, record)
    page = html.escape(run_page(record, metrics, metrics.damage), quote=True)
    style = f"width:100%;height:{_PAGE_HEIGHT}px;border:1px solid #8884"
    return f'<iframe sandbox="" title="report" style="{style}" srcdoc="{page}"></iframe>'

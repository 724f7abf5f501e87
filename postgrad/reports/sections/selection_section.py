"""Document filters: what each kept of a source, the distribution of its scores, and examples."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from postgrad.foreign_text import plain_text
from postgrad.lineage.record import DocumentPreview, DocumentSelection, Record
from postgrad.reports.html.charts import Point, Series, line_chart
from postgrad.reports.html.document import details, escaped_passage, figure, intro_paragraph, side_by_side
from postgrad.reports.html.notation import escape_html, format_fixed
from postgrad.reports.html.table import Cell, Column, Number, Table, count_cell, text_cell

_SCORE_NAMES = {"dsir": "log importance weight", "perplexity": "bits per byte"}


def selection_table(record: Record) -> Table | None:
    """What each filter kept of each source; None without filters."""
    body = [
        (
            text_cell(name),
            text_cell(step.kind),
            text_cell(step.description),
            count_cell(step.before.documents),
            count_cell(step.after.documents),
            _share_cell(step.after.documents, step.before.documents),
            _share_cell(step.after.tokens, step.before.tokens),
        )
        for name, step in _selection_steps(record)
    ]
    if not body:
        return None
    columns = (
        Column("source", is_text=True),
        Column("filter", is_text=True),
        Column("keeps", is_text=True),
        Column("documents"),
        Column("kept"),
        Column("of the documents"),
        Column("of the tokens"),
    )
    notes = ("Filters apply in this order. Dropped documents are neither trained on nor held out.",)
    return Table("Selected documents", columns, tuple(body), notes)


def selection_section(record: Record) -> str:
    """The section of a run's page; empty without filters."""
    table = selection_table(record)
    if table is None:
        return ""
    steps = list(_selection_steps(record))
    charts = [chart for name, step in steps if (chart := _histogram_figure(name, step))]
    intro = intro_paragraph(
        "Only a part of the documents was used. Examples of both sides, spread over their scores, are below."
    )
    examples = "".join(_example_documents(name, step) for name, step in steps)
    return f"{intro}{table.html()}{side_by_side(*charts)}{examples}"


def _selection_steps(record: Record) -> Iterator[tuple[str, DocumentSelection]]:
    """Every filter with the name of its source."""
    for source in record.plan.sources:
        for step in source.selection:
            yield plain_text(source.name, 80), step


def _share_cell(part: int, total: int) -> Cell:
    return Cell((Number(f"{part / total:.1%}", part / total),)) if total else text_cell("")


def _histogram_figure(name: str, step: DocumentSelection) -> str:
    """Documents kept and dropped by score; empty without scores."""
    histogram = step.score_histogram
    if histogram is None or len(histogram.bin_edges) < 2:
        return ""
    series = [
        Series(word, _histogram_points(histogram.bin_edges, counts))
        for word, counts in (("kept", histogram.kept), ("dropped", histogram.dropped))
    ]
    return figure(
        f"{name}: documents by {_SCORE_NAMES.get(step.kind, 'score')}",
        lambda w: line_chart(
            series, title="Documents by score", x_label=plain_text(step.unit, 20), y_label="documents", width=w
        ),
        note="The first and the last bin include the outermost 1 % of the documents on their side.",
    )


def _histogram_points(edges: Sequence[float], counts: Sequence[int]) -> list[Point]:
    """A histogram as a step line."""
    bins = zip(itertools.pairwise(edges), counts, strict=False)
    return [(edge, float(count)) for ends, count in bins for edge in ends]


def _example_documents(name: str, step: DocumentSelection) -> str:
    boxes = "".join(
        _document_box(word, document, step.unit)
        for word, documents in (("kept", step.kept), ("dropped", step.dropped))
        for document in documents
    )
    if not boxes:
        return ""
    body = f'<article class="sample"><div class="texts">{boxes}</div></article>'
    return details(f"{name}: documents by {plain_text(step.kind, 20)}", body)


def _document_box(word: str, document: DocumentPreview, unit: str) -> str:
    value = "" if document.value is None else f" ({format_fixed(document.value)} {escape_html(unit, 20)})"
    original = (
        f'<p class="over">duplicate of</p><p dir="auto">{escaped_passage(document.duplicate_of)}</p>'
        if document.duplicate_of
        else ""
    )
    return f'<div><h4>{word}{value}</h4><p dir="auto">{escaped_passage(document.text)}</p>{original}</div>'

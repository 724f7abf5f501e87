"""How does a report say which documents were read? What each way to select kept, by which values, with examples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from postgrad.reports.html.document import details, escaped_passage, figure, intro_paragraph, side_by_side
from postgrad.reports.html.figures import Point, Series, line_chart
from postgrad.reports.html.notation import as_list, as_mapping, as_number, escape_html, format_fixed, plain_text
from postgrad.reports.html.tables import Cell, Column, Number, Table, count_cell, text_cell

_SIDES = (("kept", "kept"), ("dropped", "left out"))


def selection_table(record: Mapping[str, object]) -> Table | None:
    """What each way to select kept of each source; None where everything is read."""
    body = []
    for name, step in _selection_steps(record):
        before, after = as_mapping(step.get("before")), as_mapping(step.get("after"))
        body.append(
            (
                text_cell(name),
                text_cell(step.get("kind")),
                text_cell(step.get("how")),
                count_cell(before.get("documents")),
                count_cell(after.get("documents")),
                _share_cell(after.get("documents"), before.get("documents")),
                _share_cell(after.get("tokens"), before.get("tokens")),
            )
        )
    if not body:
        return None
    columns = (
        Column("source", is_text=True),
        Column("by", is_text=True),
        Column("keeps", is_text=True),
        Column("documents"),
        Column("kept"),
        Column("of the documents"),
        Column("of the tokens"),
    )
    notes = ("Each way acts on what the one before it left. What is left out is neither trained on nor held out.",)
    return Table("Documents that were selected", columns, tuple(body), notes)


def selection_section(record: Mapping[str, object]) -> str:
    """The section of a run's page; empty where everything was read."""
    table = selection_table(record)
    if table is None:
        return ""
    steps = list(_selection_steps(record))
    drawn = [chart for name, step in steps if (chart := _histogram_figure(name, step))]
    said = intro_paragraph(
        "Only a part of the documents was read. A few of both sides, spread over their values, are below."
    )
    shown = "".join(_example_documents(name, step) for name, step in steps)
    return f"{said}{table.html()}{side_by_side(*drawn)}{shown}"


def _selection_steps(record: Mapping[str, object]) -> Iterator[tuple[str, Mapping[str, object]]]:
    """Every way of every source, with the source's name."""
    for source in map(as_mapping, as_list(as_mapping(record.get("plan")).get("sources"))):
        for step in as_list(source.get("selected")):
            yield plain_text(source.get("name"), 80), as_mapping(step)


def _share_cell(part: object, total: object) -> Cell:
    some, all_ = as_number(part), as_number(total)
    return text_cell("") if some is None or not all_ else Cell((Number(f"{some / all_:.1%}", some / all_),))


def _histogram_figure(name: str, step: Mapping[str, object]) -> str:
    """How many documents were kept and left out at which values; empty where there are none."""
    values = as_mapping(step.get("values"))
    edges = [as_number(edge) for edge in as_list(values.get("edges"))]
    if len(edges) < 2 or None in edges:
        return ""
    lines = [Series(word, _histogram_points(edges, as_list(values.get(side)))) for side, word in _SIDES]  # type: ignore[arg-type]
    unit = plain_text(step.get("unit"), 20)
    what = {"dsir": "log importance weight", "perplexity": "how hard the model finds them"}
    return figure(
        f"{name}: documents by {what.get(plain_text(step.get('kind')), 'value')}",
        lambda w: line_chart(lines, title="Documents by value", x_label=unit, y_label="documents", width=w),
        note="The outermost hundredth of the documents on each side is counted in the last step.",
    )


def _histogram_points(edges: Sequence[float], counts: Sequence[object]) -> list[Point]:
    """A histogram as a line."""
    return [
        (edge, as_number(count) or 0.0)
        for low, high, count in zip(edges, edges[1:], counts, strict=False)
        for edge in (low, high)
    ]


def _example_documents(name: str, step: Mapping[str, object]) -> str:
    boxes = []
    for side, word in _SIDES:
        for shown in map(as_mapping, as_list(step.get(side))):
            value = (
                f" ({format_fixed(shown['value'])} {escape_html(step.get('unit'), 20)})"
                if shown.get("value") is not None
                else ""
            )
            like = (
                f'<p class="over">like</p><p dir="auto">{escaped_passage(shown["like"])}</p>'
                if shown.get("like")
                else ""
            )
            boxes.append(
                f'<div><h4>{word}{value}</h4><p dir="auto">{escaped_passage(shown.get("text"))}</p>{like}</div>'
            )
    if not boxes:
        return ""
    body = f'<article class="sample"><div class="texts">{"".join(boxes)}</div></article>'
    return details(f"{name}: documents by {plain_text(step.get('kind'), 20)}", body)

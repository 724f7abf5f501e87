"""How does a report say which documents were read? What each way to select kept, by which values, with examples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from postgrad.reports.html.document import about, details, figure, prose, side_by_side
from postgrad.reports.html.figures import Point, Series, line_chart
from postgrad.reports.html.notation import escaped, fixed, mapping, number, plain, rows
from postgrad.reports.html.tables import Cell, Column, Number, Table, whole, words

_SIDES = (("kept", "kept"), ("dropped", "left out"))


def selection_table(record: Mapping[str, object]) -> Table | None:
    """What each way to select kept of each source; None where everything is read."""
    body = []
    for name, step in _steps(record):
        before, after = mapping(step.get("before")), mapping(step.get("after"))
        body.append(
            (
                words(name),
                words(step.get("kind")),
                words(step.get("how")),
                whole(before.get("documents")),
                whole(after.get("documents")),
                _share(after.get("documents"), before.get("documents")),
                _share(after.get("tokens"), before.get("tokens")),
            )
        )
    if not body:
        return None
    columns = (
        Column("source", words=True),
        Column("by", words=True),
        Column("keeps", words=True),
        Column("documents"),
        Column("kept"),
        Column("of the documents"),
        Column("of the tokens"),
    )
    notes = ("Each way acts on what the one before it left. What is left out is neither trained on nor held out.",)
    return Table("Documents that were selected", columns, tuple(body), notes)


def section(record: Mapping[str, object]) -> str:
    """The section of a run's page; empty where everything was read."""
    table = selection_table(record)
    if table is None:
        return ""
    steps = list(_steps(record))
    drawn = [chart for name, step in steps if (chart := _chart(name, step))]
    said = about("Only a part of the documents was read. A few of both sides, spread over their values, are below.")
    shown = "".join(_examples(name, step) for name, step in steps)
    return f"{said}{table.html()}{side_by_side(*drawn)}{shown}"


def _steps(record: Mapping[str, object]) -> Iterator[tuple[str, Mapping[str, object]]]:
    """Every way of every source, with the source's name."""
    for source in map(mapping, rows(mapping(record.get("plan")).get("sources"))):
        for step in rows(source.get("selected")):
            yield plain(source.get("name"), 80), mapping(step)


def _share(part: object, whole_: object) -> Cell:
    some, all_ = number(part), number(whole_)
    return words("") if some is None or not all_ else Cell((Number(f"{some / all_:.1%}", some / all_),))


def _chart(name: str, step: Mapping[str, object]) -> str:
    """How many documents were kept and left out at which values; empty where there are none."""
    values = mapping(step.get("values"))
    edges = [number(edge) for edge in rows(values.get("edges"))]
    if len(edges) < 2 or None in edges:
        return ""
    lines = [Series(word, _steps_of(edges, rows(values.get(side)))) for side, word in _SIDES]  # type: ignore[arg-type]
    unit = plain(step.get("unit"), 20)
    what = {"dsir": "log importance weight", "perplexity": "how hard the model finds them"}
    return figure(
        f"{name}: documents by {what.get(plain(step.get('kind')), 'value')}",
        lambda w: line_chart(lines, title="Documents by value", x_label=unit, y_label="documents", width=w),
        about="The outermost hundredth of the documents on each side is counted in the last step.",
    )


def _steps_of(edges: Sequence[float], counts: Sequence[object]) -> list[Point]:
    """A histogram as a line."""
    return [
        (edge, number(count) or 0.0)
        for low, high, count in zip(edges, edges[1:], counts, strict=False)
        for edge in (low, high)
    ]


def _examples(name: str, step: Mapping[str, object]) -> str:
    boxes = []
    for side, word in _SIDES:
        for shown in map(mapping, rows(step.get(side))):
            value = (
                f" ({fixed(shown['value'])} {escaped(step.get('unit'), 20)})" if shown.get("value") is not None else ""
            )
            like = f'<p class="over">like</p><p dir="auto">{prose(shown["like"])}</p>' if shown.get("like") else ""
            boxes.append(f'<div><h4>{word}{value}</h4><p dir="auto">{prose(shown.get("text"))}</p>{like}</div>')
    if not boxes:
        return ""
    body = f'<article class="sample"><div class="texts">{"".join(boxes)}</div></article>'
    return details(f"{name}: documents by {plain(step.get('kind'), 20)}", body)

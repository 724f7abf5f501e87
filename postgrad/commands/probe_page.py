"""Linear probes of every layer: a table for the terminal, and a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from postgrad.data.problem_type import ProblemType
from postgrad.foreign_text import mask_secrets, plain_text
from postgrad.lineage.record import Interval
from postgrad.reports.html.charts import LimitLine, Series, line_chart
from postgrad.reports.html.document import (
    escaped_passage,
    facts,
    figure,
    intro_paragraph,
    render_page,
    side_by_side,
)
from postgrad.reports.html.notation import (
    ABSENT,
    escape_html,
    format_count,
    format_fixed,
    format_percent,
    format_signed,
)
from postgrad.reports.html.table import Cell, Column, Number, Table, change_cell, interval_parts, text_cell, value_cell
from postgrad.reports.sections.curves import drawn_ends

if TYPE_CHECKING:
    from postgrad.commands.probe import LayerProbe, LayerView


def probe_table(result: LayerProbe) -> Table:
    """Every view: its main metric with the interval and its change against the last layer, then the other metrics."""
    main = result.metric
    others = [name for name in result.views[0].metrics if name != main] if result.views else []
    baseline = "baseline: the mean" if result.problem == ProblemType.NUMBER else "baseline: the most frequent"
    body = [_view_row(v.name, v.metrics, v.against_last, v.strength, main, others) for v in result.views]
    body.append(_view_row(baseline, result.guess, {}, None, main, others))
    columns = (
        Column("view", is_text=True),
        Column(plain_text(main)),
        Column("95 %"),
        Column("against last"),
        Column("95 %"),
        *(Column(plain_text(name)) for name in others),
        Column("penalty"),
    )
    return Table(f"{plain_text(mask_secrets(result.model))}: linear probes by layer", columns, tuple(body))


def _view_row(
    name: str,
    metrics: Mapping[str, Interval],
    against_last: Mapping[str, Interval],
    strength: float | None,
    main: str,
    others: Sequence[str],
) -> tuple[Cell, ...]:
    values = [value_cell(metrics[metric].value if metric in metrics else None) for metric in (main, *others)]
    change = against_last.get(main)
    return (
        text_cell(name),
        values[0],
        _ends_cell(metrics.get(main)),
        change_cell(change.value if change else None),
        _ends_cell(change, signs=True),
        *values[1:],
        Cell((Number(f"{strength:g}" if strength else ABSENT, strength),)),
    )


def _ends_cell(entry: Interval | None, *, signs: bool = False) -> Cell:
    """The ends of an interval."""
    write = format_signed if signs else format_fixed
    return Cell((Number(ABSENT, None),) if entry is None else interval_parts(entry, write))


def probe_page(result: LayerProbe) -> str:
    """The main metric by layer, the layer weights of the mix, and all numbers."""
    sections = [
        ("layers", "Layers", "Layer by layer", side_by_side(_layers_figure(result), _mix_figure(result))),
        ("numbers", "Numbers", "In numbers", probe_table(result).html()),
        ("how", "Method", "Method", _method_section(result)),
    ]
    title = f"Layers of {plain_text(mask_secrets(result.model))}"
    return render_page(title, "probe", "Layer by layer", _lead(result), sections)


def _lead(result: LayerProbe) -> str:
    best, guess = result.best, result.guess.get(result.metric)
    lead = f"Best on dev: <b>{escape_html(best.name)}</b>, {escape_html(result.metric)}"
    lead += f" {format_fixed(best.metrics[result.metric].value)}"
    if guess is not None:
        lead += f" on the test part (baseline: {format_fixed(guess.value)})"
    return f'<p class="lead">{lead}.</p>'


def _method_section(result: LayerProbe) -> str:
    settings = facts(
        [
            ("Model", result.model),
            ("Rows", f"{result.kind}, {result.problem}"),
            ("Labels", ", ".join(plain_text(label) for label in result.labels)),
            ("Stack", result.stack),
            ("Pooling", result.pooling),
            ("Layers", f"{result.layers} of width {format_count(result.width)}, and the embeddings"),
            *(
                (part, f"{format_count(count)} items of {format_count(result.documents.get(part))} documents")
                for part, count in result.items.items()
            ),
            ("Penalties", ", ".join(f"{value:g}" for value in result.strengths)),
        ]
    )
    intro = intro_paragraph(
        "Features are the frozen hidden states: pooled over the tokens of a text, or of the first token of a word, standardized"
        " on the training items. Each classifier is linear; its penalty is selected on the dev part. The test part is scored"
        " once, with the selected penalty."
    )
    return intro + settings + "".join(f"<p>{escaped_passage(note)}</p>" for note in result.notes)


def _mix_figure(result: LayerProbe) -> str:
    shares = next((view.shares for view in result.views if view.shares), [])
    if not shares:
        return ""
    series = [Series("weight", [(float(i), share) for i, share in enumerate(shares)], has_markers=True)]
    return figure(
        "Layer weights of the mix",
        lambda w: line_chart(
            series, title="Weight of each layer in the mix", x_label="layer", y_label="weight", width=w,
            x_ticks=_layer_ticks(result.layers),
        ),
        note="Learned by the classifier on the mix of all layers.",
    )  # fmt: skip


def _layers_figure(result: LayerProbe) -> str:
    main, guess = result.metric, result.guess.get(result.metric)
    single = [view for view in result.views if view.kind == "state"]
    joined = [view for view in result.views if view.kind != "state"]
    positions = [result.layers + 1.0 + i for i in range(len(joined))]
    series = [_view_series("single layers", main, single, [float(view.states[0]) for view in single], 0)]
    series += [
        _view_series(plain_text(view.name), main, [view], [x], 1 + i)
        for i, (view, x) in enumerate(zip(joined, positions, strict=True))
    ]
    labels = [*_layer_ticks(result.layers), *((x, view.kind) for x, view in zip(positions, joined, strict=True))]
    levels = []
    if guess and guess.value:
        text = format_percent(guess.value) if 0 <= guess.value <= 1 else format_fixed(guess.value)
        levels.append(LimitLine(guess.value, f"baseline {text}"))
    return figure(
        f"{main} by layer",
        lambda w: line_chart(
            series, title=f"{main} by layer", x_label="layer, and layers joined", y_label=main, width=w, levels=levels,
            x_ticks=labels,
        ),
        note="A linear classifier on each frozen layer. Bands and bars are 95 % intervals over resampled documents.",
    )  # fmt: skip


def _view_series(name: str, main: str, views: Sequence[LayerView], positions: Sequence[float], colour: int) -> Series:
    entries = [(x, view.metrics[main]) for x, view in zip(positions, views, strict=True) if main in view.metrics]
    return Series(
        name,
        [(x, entry.value) for x, entry in entries],
        band=[(x, *drawn_ends(entry)) for x, entry in entries],
        has_markers=True,
        colour=colour,
    )


def _layer_ticks(layers: int) -> list[tuple[float, str]]:
    return [(0.0, "emb."), *((float(layer), str(layer)) for layer in range(1, layers + 1))]

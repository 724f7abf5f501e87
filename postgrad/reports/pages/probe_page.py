"""How does a probe of all layers read, in a terminal and on a page?"""

from __future__ import annotations

from collections.abc import Mapping

from postgrad.reports.html import figures
from postgrad.reports.html.document import (
    FOOTER,
    escaped_passage,
    facts,
    figure,
    intro_paragraph,
    render_page,
    side_by_side,
)
from postgrad.reports.html.figures import LimitLine, Series
from postgrad.reports.html.notation import (
    as_list,
    as_mapping,
    as_number,
    escape_html,
    format_count,
    format_fixed,
    format_percent,
    format_signed,
    mask_secrets,
    plain_text,
)
from postgrad.reports.html.tables import Cell, Column, Number, Table, change_cell, text_cell, value_cell

_JOIN_LABELS = {"sum": "sum", "concat": "concat", "mix": "mix"}


def probe_table(result: Mapping[str, object]) -> Table:
    """Every view: its main metric with the interval and its change against the last layer, the other metrics beside."""
    main = plain_text(result.get("metric"))
    views = [as_mapping(view) for view in as_list(result.get("views"))]
    others = [name for name in as_mapping(views[0].get("metrics")) if name != main] if views else []
    body = []
    guess = "nothing: the mean" if result.get("problem") == "number" else "nothing: the most frequent"
    for view in [*views, {"name": guess, "metrics": result.get("guess")}]:
        metrics = as_mapping(view.get("metrics"))
        entry, against = as_mapping(metrics.get(main)), as_mapping(as_mapping(view.get("against_last")).get(main))
        body.append(
            (
                text_cell(view.get("name")),
                value_cell(entry.get("value")),
                _interval_cell(entry),
                change_cell(against.get("value")),
                _interval_cell(against, signs=True),
                *(value_cell(as_mapping(metrics.get(name)).get("value")) for name in others),
                Cell(
                    (Number(f"{strength:g}" if (strength := as_number(view.get("strength"))) else "\u2013", strength),)
                ),
            )
        )
    columns = (
        Column("reads", is_text=True),
        Column(main),
        Column("95 %"),
        Column("against last"),
        Column("95 %"),
        *(Column(name) for name in others),
        Column("penalty"),
    )
    return Table(
        f"{plain_text(mask_secrets(result.get('model')))}: what each layer knows of the labels", columns, tuple(body)
    )


def _interval_cell(entry: Mapping[str, object], *, signs: bool = False) -> Cell:
    write = format_signed if signs else format_fixed
    low, high = as_number(entry.get("low")), as_number(entry.get("high"))
    if low is None or high is None:
        return Cell((Number("\u2013", None),))
    return Cell((Number(write(low, 3), low), " to ", Number(write(high, 3), high)))


def probe_page(result: Mapping[str, object]) -> str:
    """A page with the main metric by layer, what the mix reads, and all numbers."""
    main, layers = plain_text(result.get("metric")), int(as_number(result.get("layers")) or 0)
    views = [as_mapping(view) for view in as_list(result.get("views"))]
    guess = as_number(as_mapping(as_mapping(result.get("guess")).get(main)).get("value"))
    shares = next((as_list(view.get("shares")) for view in views if view.get("shares")), [])
    drawn = figure(
        f"{main} by layer",
        lambda width: _layer_chart(views, main, layers, guess, width),
        note="A linear classifier on each layer, frozen. Bands and bars are 95 % intervals over resampled documents.",
    )
    mixed = figure(
        "What the mix reads",
        lambda width: figures.line_chart(
            [Series("share", [(float(s), as_number(v) or 0.0) for s, v in enumerate(shares)], has_markers=True)],
            title="Share of each layer in the mix",
            x_label="layer",
            y_label="share",
            width=width,
            x_ticks=_layer_ticks(layers),
        ),
        note="The shares that the classifier on the mix of all layers has learnt.",
    )
    documents, items = as_mapping(result.get("documents")), as_mapping(result.get("items"))
    said = facts(
        [
            ("Model", result.get("model")),
            ("Rows", f"{plain_text(result.get('kind'))}, {plain_text(result.get('problem'))}"),
            ("Labels", ", ".join(plain_text(label) for label in as_list(result.get("labels")))),
            ("Half", result.get("stack")),
            ("Pooling", result.get("pooling")),
            ("Layers", f"{layers} of width {format_count(result.get('width'))}, and the embeddings"),
            *(
                (part, f"{format_count(items.get(part))} items of {format_count(documents.get(part))} documents")
                for part in items
            ),
            ("Penalties", ", ".join(f"{as_number(value):g}" for value in as_list(result.get("strengths")))),
        ]
    )
    notes = "".join(f"<p>{escaped_passage(note)}</p>" for note in as_list(result.get("notes")))
    how = intro_paragraph(
        "Features are the frozen hidden states: of a text its tokens, pooled; of a word its first token. They are standardised"
        " by the training items. Each classifier is linear, trained under several penalties; which of them holds is chosen on"
        " the dev part. The test part is answered once, by what was chosen."
    )
    best = max(views, key=lambda v: (as_number(v.get("dev")) or 0.0) * (-1 if main == "MSE" else 1), default={})
    value = as_mapping(as_mapping(as_mapping(best).get("metrics")).get(main))
    lead = f"Best on dev: <b>{escape_html(best.get('name'))}</b>, {escape_html(main)} {format_fixed(value.get('value'), 3)}"
    if guess is not None:
        lead += f" on the test (guessing: {format_fixed(guess, 3)})"
    header = f'<p class="over">postgrad \u00b7 probe</p><h1>Layer by layer</h1><p class="lead">{lead}.</p>'
    sections = [
        ("layers", "Layers", "What each layer knows", side_by_side(drawn, mixed if shares else "")),
        ("numbers", "Numbers", "In numbers", probe_table(result).html()),
        ("how", "How", "How it was measured", how + said + notes),
    ]
    return render_page(
        f"Layers of {plain_text(mask_secrets(result.get('model')))} \u2013 postgrad", header, sections, FOOTER
    )


def _layer_chart(views: list[Mapping[str, object]], main: str, layers: int, guess: float | None, width: float) -> str:
    alone = [view for view in views if view.get("kind") == "state"]
    series = [_view_series("single layers", main, alone, [float(_layer_index(view)) for view in alone], 0)]
    joined = [view for view in views if view.get("kind") != "state"]
    places = [layers + 1.0 + i for i in range(len(joined))]
    for i, (view, place) in enumerate(zip(joined, places, strict=True)):
        series.append(_view_series(plain_text(view.get("name")), main, [view], [place], 1 + i))
    ticks = [
        *_layer_ticks(layers),
        *((x, _JOIN_LABELS[plain_text(view.get("kind"))]) for x, view in zip(places, joined, strict=True)),
    ]
    levels = (
        [LimitLine(guess, f"guessing {format_percent(guess, 1) if 0 <= guess <= 1 else format_fixed(guess)}")]
        if guess
        else []
    )
    return figures.line_chart(
        series,
        title=f"{main} by layer",
        x_label="layer, and layers joined",
        y_label=main,
        width=width,
        levels=levels,
        x_ticks=ticks,
    )


def _view_series(
    name: str, main: str, views: list[Mapping[str, object]], positions: list[float], colour: int
) -> Series:
    found = [as_mapping(as_mapping(view.get("metrics")).get(main)) for view in views]
    known = [(x, entry) for x, entry in zip(positions, found, strict=True) if as_number(entry.get("value")) is not None]
    return Series(
        name,
        [(x, as_number(entry.get("value")) or 0.0) for x, entry in known],
        band=[(x, as_number(entry.get("low")) or 0.0, as_number(entry.get("high")) or 0.0) for x, entry in known],
        has_markers=True,
        colour=colour,
    )


def _layer_index(view: Mapping[str, object]) -> int:
    return int(as_number(as_list(view.get("states"))[0]) or 0)


def _layer_ticks(layers: int) -> list[tuple[float, str]]:
    return [(0.0, "emb."), *((float(layer), str(layer)) for layer in range(1, layers + 1))]

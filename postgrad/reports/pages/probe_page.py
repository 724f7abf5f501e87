"""How does a probe of all layers read, in a terminal and on a page?"""

from __future__ import annotations

from collections.abc import Mapping

from postgrad.reports.html import figures
from postgrad.reports.html.document import FOOTER, about, document, facts, figure, prose, side_by_side
from postgrad.reports.html.figures import Level, Series
from postgrad.reports.html.notation import count, escaped, fixed, mapping, masked, number, percent, plain, rows, signed
from postgrad.reports.html.tables import Cell, Column, Number, Table, change, level, words

_SHORT = {"sum": "sum", "concat": "concat", "mix": "mix"}


def table(result: Mapping[str, object]) -> Table:
    """Every view: its main metric with the interval and its change against the last layer, the other metrics beside."""
    main = plain(result.get("metric"))
    views = [mapping(view) for view in rows(result.get("views"))]
    others = [name for name in mapping(views[0].get("metrics")) if name != main] if views else []
    body = []
    guess = "nothing: the mean" if result.get("problem") == "number" else "nothing: the most frequent"
    for view in [*views, {"name": guess, "metrics": result.get("guess")}]:
        metrics = mapping(view.get("metrics"))
        entry, against = mapping(metrics.get(main)), mapping(mapping(view.get("against_last")).get(main))
        body.append(
            (
                words(view.get("name")),
                level(entry.get("value")),
                _interval(entry),
                change(against.get("value")),
                _interval(against, signs=True),
                *(level(mapping(metrics.get(name)).get("value")) for name in others),
                Cell((Number(f"{strength:g}" if (strength := number(view.get("strength"))) else "\u2013", strength),)),
            )
        )
    columns = (
        Column("reads", words=True),
        Column(main),
        Column("95 %"),
        Column("against last"),
        Column("95 %"),
        *(Column(name) for name in others),
        Column("penalty"),
    )
    return Table(f"{plain(masked(result.get('model')))}: what each layer knows of the labels", columns, tuple(body))


def _interval(entry: Mapping[str, object], *, signs: bool = False) -> Cell:
    write = signed if signs else fixed
    low, high = number(entry.get("low")), number(entry.get("high"))
    if low is None or high is None:
        return Cell((Number("\u2013", None),))
    return Cell((Number(write(low, 3), low), " to ", Number(write(high, 3), high)))


def probe_page(result: Mapping[str, object]) -> str:
    """A page with the main metric by layer, what the mix reads, and all numbers."""
    main, layers = plain(result.get("metric")), int(number(result.get("layers")) or 0)
    views = [mapping(view) for view in rows(result.get("views"))]
    guess = number(mapping(mapping(result.get("guess")).get(main)).get("value"))
    shares = next((rows(view.get("shares")) for view in views if view.get("shares")), [])
    drawn = figure(
        f"{main} by layer",
        lambda width: _by_layer(views, main, layers, guess, width),
        about="A linear classifier on each layer, frozen. Bands and bars are 95 % intervals over resampled documents.",
    )
    mixed = figure(
        "What the mix reads",
        lambda width: figures.line_chart(
            [Series("share", [(float(s), number(v) or 0.0) for s, v in enumerate(shares)], markers=True)],
            title="Share of each layer in the mix",
            x_label="layer",
            y_label="share",
            width=width,
            x_ticks=_ticks(layers),
        ),
        about="The shares that the classifier on the mix of all layers has learnt.",
    )
    documents, items = mapping(result.get("documents")), mapping(result.get("items"))
    said = facts(
        [
            ("Model", result.get("model")),
            ("Rows", f"{plain(result.get('kind'))}, {plain(result.get('problem'))}"),
            ("Labels", ", ".join(plain(label) for label in rows(result.get("labels")))),
            ("Half", result.get("stack")),
            ("Pooling", result.get("pooling")),
            ("Layers", f"{layers} of width {count(result.get('width'))}, and the embeddings"),
            *((part, f"{count(items.get(part))} items of {count(documents.get(part))} documents") for part in items),
            ("Penalties", ", ".join(f"{number(value):g}" for value in rows(result.get("strengths")))),
        ]
    )
    notes = "".join(f"<p>{prose(note)}</p>" for note in rows(result.get("notes")))
    how = about(
        "Features are the frozen hidden states: of a text its tokens, pooled; of a word its first token. They are standardised"
        " by the training items. Each classifier is linear, trained under several penalties; which of them holds is chosen on"
        " the dev part. The test part is answered once, by what was chosen."
    )
    best = max(views, key=lambda v: (number(v.get("dev")) or 0.0) * (-1 if main == "MSE" else 1), default={})
    value = mapping(mapping(mapping(best).get("metrics")).get(main))
    lead = f"Best on dev: <b>{escaped(best.get('name'))}</b>, {escaped(main)} {fixed(value.get('value'), 3)}"
    if guess is not None:
        lead += f" on the test (guessing: {fixed(guess, 3)})"
    header = f'<p class="over">postgrad \u00b7 probe</p><h1>Layer by layer</h1><p class="lead">{lead}.</p>'
    sections = [
        ("layers", "Layers", "What each layer knows", side_by_side(drawn, mixed if shares else "")),
        ("numbers", "Numbers", "In numbers", table(result).html()),
        ("how", "How", "How it was measured", how + said + notes),
    ]
    return document(f"Layers of {plain(masked(result.get('model')))} \u2013 postgrad", header, sections, FOOTER)


def _by_layer(views: list[Mapping[str, object]], main: str, layers: int, guess: float | None, width: float) -> str:
    alone = [view for view in views if view.get("kind") == "state"]
    series = [_series("single layers", main, alone, [float(_state(view)) for view in alone], 0)]
    joined = [view for view in views if view.get("kind") != "state"]
    places = [layers + 1.0 + i for i in range(len(joined))]
    for i, (view, place) in enumerate(zip(joined, places, strict=True)):
        series.append(_series(plain(view.get("name")), main, [view], [place], 1 + i))
    ticks = [*_ticks(layers), *((x, _SHORT[plain(view.get("kind"))]) for x, view in zip(places, joined, strict=True))]
    levels = [Level(guess, f"guessing {percent(guess, 1) if 0 <= guess <= 1 else fixed(guess)}")] if guess else []
    return figures.line_chart(
        series,
        title=f"{main} by layer",
        x_label="layer, and layers joined",
        y_label=main,
        width=width,
        levels=levels,
        x_ticks=ticks,
    )


def _series(name: str, main: str, views: list[Mapping[str, object]], places: list[float], colour: int) -> Series:
    found = [mapping(mapping(view.get("metrics")).get(main)) for view in views]
    known = [(x, entry) for x, entry in zip(places, found, strict=True) if number(entry.get("value")) is not None]
    return Series(
        name,
        [(x, number(entry.get("value")) or 0.0) for x, entry in known],
        band=[(x, number(entry.get("low")) or 0.0, number(entry.get("high")) or 0.0) for x, entry in known],
        markers=True,
        colour=colour,
    )


def _state(view: Mapping[str, object]) -> int:
    return int(number(rows(view.get("states"))[0]) or 0)


def _ticks(layers: int) -> list[tuple[float, str]]:
    return [(0.0, "emb."), *((float(layer), str(layer)) for layer in range(1, layers + 1))]

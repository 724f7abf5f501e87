"""How does a measured shift look? How far the new text is from the old by every measure, and what that asks for."""

from __future__ import annotations

from collections.abc import Mapping

from postgrad.reports.html.document import FOOTER, about, document, facts, figure, side_by_side
from postgrad.reports.html.figures import Estimate, Level, forest_plot
from postgrad.reports.html.notation import escaped, mapping, number, percent, rows, signed
from postgrad.reports.html.tables import Cell, Column, Table, level, words

_MEASURES = {
    "byte trigrams": ("Byte trigrams", "Jensen-Shannon divergence, bits"),
    "tokens": ("Tokens", "Jensen-Shannon divergence, bits"),
    "n-gram log-ratio": ("n-grams", "log-ratio, nats per n-gram"),
    "told apart": ("Passages told apart", "AUC of a classifier"),
}
_LEAD = {
    "none": "The two texts are of one kind.",
    "weak": "The shift is <b>weak</b>: other text of a kind that the model knows.",
    "strong": "The shift is <b>strong</b>: another language, code, or no language at all.",
}


def shift_page(found: Mapping[str, object]) -> str:
    """The page of a measured shift."""
    sections = [
        ("advice", "To begin with", "To begin with", _advice(found)),
        ("distance", "Distance", "How far the new text is from the old", _distances(found)),
        ("model", "Model", "What the model makes of both", _model(found)),
    ]
    surprise = mapping(found.get("surprise"))
    header = (
        '<p class="over">postgrad · shift</p>'
        f"<h1><bdi>{escaped(found.get('model'), 160)}</bdi></h1>"
        f'<p class="lead">{_LEAD[str(found["strength"])]} '
        f"A byte of the new text takes the model {_bits_more(surprise)} than one of the old "
        f"(new less old {signed(surprise.get('low'))} to {signed(surprise.get('high'))}).</p>"
    )
    return document("Shift – postgrad", header, sections, FOOTER)


def _bits_more(surprise: Mapping[str, object]) -> str:
    value = number(surprise.get("value")) or 0.0
    return f"{abs(value):.3f} bits {'less' if value < 0 else 'more'}"


def _advice(found: Mapping[str, object]) -> str:
    """A card for each proposal."""
    cards = []
    for entry in map(mapping, rows(found["proposals"])):
        what, value, reason, source = (escaped(entry.get(key)) for key in ("what", "value", "reason", "source"))
        cards.append(
            f'<li class="t-even"><div class="what"><span>{what}</span></div><p class="big">{value}</p>'
            f"<p>{reason}</p><p>{source}</p></li>"
        )
    said = about("Rules of thumb from published runs. What they cost and bring here is for a stage to measure.")
    return f'{said}<ul class="cards">{"".join(cards)}</ul>'


def _distances(found: Mapping[str, object]) -> str:
    distances = mapping(found["distances"])
    parts = []
    for key, (name, unit) in _MEASURES.items():
        entry = mapping(distances.get(key))
        value, same = number(entry.get("value")), number(entry.get("same"))
        if value is None or same is None:
            continue
        shown = [
            Estimate(
                "old to new",
                value,
                number(entry.get("low")),
                number(entry.get("high")),
                "bad" if value > same else "even",
            )
        ]

        def draw(
            width: float, shown: list[Estimate] = shown, name: str = name, unit: str = unit, same: float = same
        ) -> str:
            limit = Level(same, "no shift")
            return forest_plot(shown, title=name, x_label=unit, width=width, limit=limit, sign=False)

        parts.append(figure(name, draw))
    return about(
        "Passages of 100 words of each text. The dashed line is what two samples of the old text differ by: "
        "only what lies beyond it is a shift."
    ) + side_by_side(*parts)


def _model(found: Mapping[str, object]) -> str:
    old, new = mapping(found["old"]), mapping(found["new"])
    lines: list[list[Cell]] = [
        [words("bits per byte"), *(level(mapping(text["bits"]).get("value")) for text in (old, new))],
        [words("bytes per token"), *(level(text.get("bytes_per_token"), 2) for text in (old, new))],
        [words("tokens per word"), *(level(text.get("tokens_per_word"), 2) for text in (old, new))],
        [words("unknown tokens"), *(words(percent(text.get("unknown"), 2)) for text in (old, new))],
    ]
    columns = (Column("measure", words=True), Column("old"), Column("new"))
    table = Table("Both texts as the model reads them", columns, tuple(map(tuple, lines)))
    said = facts(
        (f"{name} files", ", ".join(str(f) for f in rows(text.get("files"))))
        for name, text in (("old", old), ("new", new))
    )
    return table.html() + said

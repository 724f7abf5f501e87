"""How does a measured shift look? How far the new text is from the old by every measure, and what that asks for."""

from __future__ import annotations

from collections.abc import Mapping

from postgrad.reports.html.document import FOOTER, facts, figure, intro_paragraph, render_page, side_by_side
from postgrad.reports.html.figures import ForestRow, LimitLine, forest_plot
from postgrad.reports.html.notation import as_list, as_mapping, as_number, escape_html, format_percent, format_signed
from postgrad.reports.html.tables import Cell, Column, Table, text_cell, value_cell

_MEASURES = {
    "byte trigrams": ("Byte trigrams", "Jensen-Shannon divergence, bits"),
    "tokens": ("Tokens", "Jensen-Shannon divergence, bits"),
    "n-gram log-ratio": ("n-grams", "log-ratio, nats per n-gram"),
    "told apart": ("Passages told apart", "AUC of a classifier"),
}
_LEADS = {
    "none": "The two texts are of one kind.",
    "weak": "The shift is <b>weak</b>: other text of a kind that the model knows.",
    "strong": "The shift is <b>strong</b>: another language, code, or no language at all.",
}


def shift_page(result: Mapping[str, object]) -> str:
    """The page of a measured shift."""
    sections = [
        ("advice", "To begin with", "To begin with", _advice_section(result)),
        ("distance", "Distance", "How far the new text is from the old", _distance_section(result)),
        ("model", "Model", "What the model makes of both", _model_section(result)),
    ]
    surprise = as_mapping(result.get("surprise"))
    header = (
        '<p class="over">postgrad · shift</p>'
        f"<h1><bdi>{escape_html(result.get('model'), 160)}</bdi></h1>"
        f'<p class="lead">{_LEADS[str(result["strength"])]} '
        f"A byte of the new text takes the model {_bits_difference(surprise)} than one of the old "
        f"(new less old {format_signed(surprise.get('low'))} to {format_signed(surprise.get('high'))}).</p>"
    )
    return render_page("Shift – postgrad", header, sections, FOOTER)


def _bits_difference(surprise: Mapping[str, object]) -> str:
    value = as_number(surprise.get("value")) or 0.0
    return f"{abs(value):.3f} bits {'less' if value < 0 else 'more'}"


def _advice_section(result: Mapping[str, object]) -> str:
    """A card for each proposal."""
    cards = []
    for entry in map(as_mapping, as_list(result["proposals"])):
        what, value, reason, source = (escape_html(entry.get(key)) for key in ("what", "value", "reason", "source"))
        cards.append(
            f'<li class="t-even"><div class="what"><span>{what}</span></div><p class="big">{value}</p>'
            f"<p>{reason}</p><p>{source}</p></li>"
        )
    said = intro_paragraph(
        "Rules of thumb from published runs. What they cost and bring here is for a stage to measure."
    )
    return f'{said}<ul class="cards">{"".join(cards)}</ul>'


def _distance_section(result: Mapping[str, object]) -> str:
    distances = as_mapping(result["distances"])
    parts = []
    for key, (name, unit) in _MEASURES.items():
        entry = as_mapping(distances.get(key))
        value, same = as_number(entry.get("value")), as_number(entry.get("same"))
        if value is None or same is None:
            continue
        shown = [
            ForestRow(
                "old to new",
                value,
                as_number(entry.get("low")),
                as_number(entry.get("high")),
                "bad" if value > same else "even",
            )
        ]

        def draw(
            width: float, shown: list[ForestRow] = shown, name: str = name, unit: str = unit, same: float = same
        ) -> str:
            limit = LimitLine(same, "no shift")
            return forest_plot(shown, title=name, x_label=unit, width=width, limit=limit, sign=False)

        parts.append(figure(name, draw))
    return intro_paragraph(
        "Passages of 100 words of each text. The dashed line is what two samples of the old text differ by: "
        "only what lies beyond it is a shift."
    ) + side_by_side(*parts)


def _model_section(result: Mapping[str, object]) -> str:
    old, new = as_mapping(result["old"]), as_mapping(result["new"])
    lines: list[list[Cell]] = [
        [text_cell("bits per byte"), *(value_cell(as_mapping(text["bits"]).get("value")) for text in (old, new))],
        [text_cell("bytes per token"), *(value_cell(text.get("bytes_per_token"), 2) for text in (old, new))],
        [text_cell("tokens per word"), *(value_cell(text.get("tokens_per_word"), 2) for text in (old, new))],
        [text_cell("unknown tokens"), *(text_cell(format_percent(text.get("unknown"), 2)) for text in (old, new))],
    ]
    columns = (Column("measure", is_text=True), Column("old"), Column("new"))
    table = Table("Both texts as the model reads them", columns, tuple(map(tuple, lines)))
    said = facts(
        (f"{name} files", ", ".join(str(f) for f in as_list(text.get("files"))))
        for name, text in (("old", old), ("new", new))
    )
    return table.html() + said

"""The distance of new text from old text by every measure, and the settings it suggests."""

from __future__ import annotations

from typing import TYPE_CHECKING

from postgrad.reports.html.charts import ForestRow, LimitLine, forest_plot
from postgrad.reports.html.document import facts, figure, intro_paragraph, render_page, side_by_side
from postgrad.reports.html.notation import escape_html, format_interval, format_percent
from postgrad.reports.html.table import Cell, Column, Table, text_cell, value_cell

if TYPE_CHECKING:
    from postgrad.analysis.domain_shift import ShiftEstimate
    from postgrad.commands.shift import MeasuredShift

_MEASURES = {
    "byte trigrams": ("Byte trigrams", "Jensen-Shannon divergence, bits"),
    "tokens": ("Tokens", "Jensen-Shannon divergence, bits"),
    "n-gram log-ratio": ("n-grams", "log-ratio, nats per n-gram"),
    "told apart": ("Classifier", "AUC of old against new passages"),
}
_LEADS = {
    "none": "The two texts are of one kind.",
    "weak": "The shift is <b>weak</b>: the new text resembles text that the model was trained on.",
    "strong": "The shift is <b>strong</b>: another language, code or no natural language, or text that the model hardly knows.",
}


def shift_page(result: MeasuredShift) -> str:
    """The page of a measured shift."""
    sections = [
        ("advice", "Settings", "Suggested settings", _advice_section(result)),
        ("distance", "Distance", "Distance of the new text from the old", _distance_section(result)),
        ("model", "Model", "Both texts under the model", _model_section(result)),
    ]
    surprise = result.surprise
    value = surprise.value
    lead = (
        f'<p class="lead">{_LEADS[result.strength]} The model needs {abs(value):.3f} bits {"fewer" if value < 0 else "more"}'
        f" per byte of the new text than of the old (new minus old {format_interval(surprise.low, surprise.high)}).</p>"
    )
    return render_page("Shift", "shift", result.model, lead, sections)


def _advice_section(result: MeasuredShift) -> str:
    """A card for each proposed setting."""
    cards = "".join(
        f'<li class="t-even"><div class="what"><span>{escape_html(proposal.what)}</span></div>'
        f'<p class="big">{escape_html(proposal.value)}</p><p>{escape_html(proposal.reason)}</p>'
        f"<p>{escape_html(proposal.source)}</p></li>"
        for proposal in result.proposals
    )
    intro = intro_paragraph("Rules of thumb from published runs. Only a stage measures their cost and benefit here.")
    return f'{intro}<ul class="cards">{cards}</ul>'


def _distance_section(result: MeasuredShift) -> str:
    figures = [
        _distance_figure(name, unit, result.distances[key])
        for key, (name, unit) in _MEASURES.items()
        if key in result.distances
    ]
    return intro_paragraph(
        "Measured on passages of 100 words. The dashed line is the distance between two samples of the old text: only larger"
        " values are a shift."
    ) + side_by_side(*figures)


def _distance_figure(name: str, unit: str, distance: ShiftEstimate) -> str:
    if distance.same is None:
        return ""
    tone = "bad" if distance.value > distance.same else "even"
    rows = [ForestRow("old to new", distance.value, distance.low, distance.high, tone)]
    limit = LimitLine(distance.same, "no shift")
    return figure(name, lambda w: forest_plot(rows, title=name, x_label=unit, width=w, limit=limit, sign=False))


def _model_section(result: MeasuredShift) -> str:
    texts = (result.old, result.new)
    rows: list[list[Cell]] = [
        [text_cell("bits per byte"), *(value_cell(text.bits.value) for text in texts)],
        [text_cell("bytes per token"), *(value_cell(text.fertility.bytes_per_token, 2) for text in texts)],
        [text_cell("tokens per word"), *(value_cell(text.fertility.tokens_per_word, 2) for text in texts)],
        [text_cell("unknown tokens"), *(text_cell(format_percent(text.fertility.unknown, 2)) for text in texts)],
    ]
    columns = (Column("measure", is_text=True), Column("old"), Column("new"))
    table = Table("Both texts under the model and its tokenizer", columns, tuple(map(tuple, rows)))
    files = facts((f"{name} files", ", ".join(text.files)) for name, text in zip(("old", "new"), texts, strict=True))
    return table.html() + files

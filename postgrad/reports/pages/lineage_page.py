"""A chain of stages on one page: the loss on every held-out set after every stage."""

from __future__ import annotations

import math

from postgrad.foreign_text import mask_secrets, plain_text
from postgrad.lineage.matrix import Lineage
from postgrad.reports.html.charts import Series, heat_table, line_chart
from postgrad.reports.html.document import figure, format_time, render_page, side_by_side
from postgrad.reports.html.notation import escape_html, format_compact, format_signed
from postgrad.reports.sections.curves import MAX_SERIES
from postgrad.reports.sections.lineage_tables import growth_notes, lineage_summary_table


def lineage_page(lineage: Lineage) -> str:
    """A chain of stages: the matrix R and its summary."""
    sections = [
        ("stages", "Stages", "The stages", _stage_chain(lineage)),
        ("matrix", "Matrix", "Every set after every stage", _matrix_section(lineage)),
        ("summary", "Summary", "In a few numbers", lineage_summary_table(lineage).html()),
    ]
    count, total = len(lineage.stages), sum(stage.tokens for stage in lineage.stages)
    lead = f"{count} {'stage' if count == 1 else 'stages'}"
    lead += f", {format_compact(total)} trained tokens" if total else ""
    if lineage.summary.forgetting is not None:
        lead += f". Forgetting over the chain: {format_signed(lineage.summary.forgetting)} nats per token"
    lead += "".join(f". {escape_html(note.removesuffix('.'), 400)}" for note in growth_notes(lineage))
    return render_page("Lineage", "lineage", "Lineage", f'<p class="lead">{lead}.</p>', sections)


def _stage_chain(lineage: Lineage) -> str:
    items = "".join(
        f"<li><b><bdi>{escape_html(stage.name, 80)}</bdi></b>"
        + (f"<span>{format_compact(stage.tokens)} tokens</span>" if stage.tokens else "")
        + (f"<span><bdi>{escape_html(format_time(stage.created))}</bdi></span>" if stage.created else "")
        + (f"<span><bdi>{escape_html(mask_secrets(stage.path), 120)}</bdi></span>" if stage.path else "")
        + "</li>"
        for stage in lineage.stages
    )
    return f'<ol class="chain">{items}</ol>'


def _matrix_section(lineage: Lineage) -> str:
    if not lineage.sets:
        return ""
    names, sets = [stage.name for stage in lineage.stages], [s.name for s in lineage.sets]
    table = heat_table(
        names, sets, lineage.R, corner="after", outlined_rows=[s.learnt_at or None for s in lineage.sets],
        caption="Loss in nats per token. The stronger the colour, the further above the best loss of any earlier stage;"
        " outlined at the stage that trained on the set.",
    )  # fmt: skip
    series = [
        Series(
            name,
            [(float(i), math.nan if (loss := row[j]) is None else loss) for i, row in enumerate(lineage.R)],
            has_markers=True,
        )
        for j, name in enumerate(sets[:MAX_SERIES])
    ]
    labels = [(float(i), plain_text(name, 18)) for i, name in enumerate(names)]
    chart = figure(
        "Loss from stage to stage",
        lambda w: line_chart(
            series, title="Loss on each set after each stage", x_label="after stage", y_label="nats per token", width=w,
            x_ticks=labels,
        ),
    )  # fmt: skip
    heat = f'<div class="scroll" tabindex="0" role="region" aria-label="Loss matrix">{table}</div>'
    return side_by_side(f"<div>{heat}</div>", chart)

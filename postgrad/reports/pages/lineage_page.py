"""How does a chain of stages become one page?"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from postgrad.reports.html import figures, tables
from postgrad.reports.html.document import FOOTER, figure, format_time, render_page, side_by_side
from postgrad.reports.html.figures import Series
from postgrad.reports.html.notation import (
    as_list,
    as_mapping,
    as_number,
    escape_html,
    format_compact,
    format_signed,
    mask_secrets,
    plain_text,
)
from postgrad.reports.sections.curves import MAX_SERIES


def lineage_page(tree: Mapping[str, object]) -> str:
    """A chain of stages: the matrix R (loss on every set after every stage) and what follows from it."""
    tree = as_mapping(tree)
    names, sets = tables.lineage_names(tree)
    matrix = [[as_number(v) for v in as_list(line)] for line in as_list(tree.get("R"))]
    stages = [as_mapping(s) for s in as_list(tree.get("stages"))]
    shift = 1 if len(names) == len(stages) + 1 and names[:1] == ["start"] else 0
    own = []
    for entry in map(as_mapping, as_list(tree.get("sets"))):
        at = entry.get("learnt_at")
        own.append(at + shift if isinstance(at, int) and not isinstance(at, bool) else None)
    chain = "".join(
        f"<li><b><bdi>{escape_html(s.get('name') or 'stage', 80)}</bdi></b>"
        + (f"<span>{format_compact(s['tokens'])} tokens</span>" if as_number(s.get("tokens")) else "")
        + (f"<span><bdi>{escape_html(format_time(s['created']))}</bdi></span>" if s.get("created") else "")
        + (f"<span><bdi>{escape_html(mask_secrets(s['path']), 120)}</bdi></span>" if s.get("path") else "")
        + "</li>"
        for s in stages
    )
    heat = ""
    if matrix and sets:
        table = figures.heat_table(
            names, sets, matrix, corner="after", outlined_rows=own,
            caption="Loss in nats per token. The stronger the colour, the further above the best loss the set"
            " had at any earlier stage; outlined where the set was learnt.",
        )  # fmt: skip
        heat = f'<div class="scroll" tabindex="0" role="region" aria-label="Loss matrix">{table}</div>'
        series = [
            Series(
                n,
                [(float(i), math.nan if v is None else v) for i, v in enumerate(_matrix_column(matrix, j))],
                has_markers=True,
            )
            for j, n in enumerate(sets[:MAX_SERIES])
        ]
        labels = [(float(i), plain_text(n, 18)) for i, n in enumerate(names)]
        heat = side_by_side(
            f"<div>{heat}</div>",
            figure(
                "Loss from stage to stage",
                lambda w: figures.line_chart(
                    series, title="Loss on each set after each stage", x_label="after stage",
                    y_label="nats per token",
                    width=w, x_ticks=labels
                ),
            )
        )  # fmt: skip
    summary = tables.lineage_summary_table(tree)
    sections = [
        ("stages", "Stages", "The stages", f'<ol class="chain">{chain}</ol>' if chain else ""),
        ("matrix", "Matrix", "Every set after every stage", heat),
        ("summary", "Summary", "In a few numbers", summary.html() if summary.rows else ""),
    ]
    trained = [as_number(s.get("tokens")) for s in stages]
    total = sum(v for v in trained if v is not None)
    lead = f"{len(stages)} {'stage' if len(stages) == 1 else 'stages'}"
    lead += f", {format_compact(total)} trained tokens" if total else ""
    forgetting = as_mapping(tree.get("summary")).get("forgetting")
    if as_number(forgetting) is not None:
        lead += f". Forgetting over the chain: {format_signed(forgetting)} nats per token"
    header = f'<p class="over">postgrad \u00b7 lineage</p><h1>Lineage</h1><p class="lead">{lead}.</p>'
    return render_page("Lineage \u2013 postgrad", header, sections, FOOTER)


def _matrix_column(matrix: Sequence[Sequence[float | None]], j: int) -> list[float | None]:
    return [line[j] if j < len(line) else None for line in matrix]

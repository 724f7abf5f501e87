"""How far the model moved: its predictions by held-out set, its weights and outputs by block."""

from __future__ import annotations

import math
from collections.abc import Sequence

from postgrad.foreign_text import plain_text
from postgrad.lineage.record import DriftRecord, Record, SetDrift
from postgrad.reports.html.charts import Series, line_chart
from postgrad.reports.html.document import figure, intro_paragraph, side_by_side
from postgrad.reports.html.notation import format_count, format_percent
from postgrad.reports.html.table import (
    VALUE_FIELDS,
    Column,
    Table,
    count_cell,
    interval_cell,
    share_cell,
    text_cell,
    value_cell,
)


def drift_table(record: Record) -> Table | None:
    """The predictions after against those before, by set; None when not measured."""
    if record.drift is None or not record.drift.sets:
        return None
    body = [
        (
            text_cell(name),
            text_cell(drift.role),
            interval_cell(drift.kl_divergence, 4),
            value_cell(drift.base_cross_entropy.value),
            share_cell(drift.accuracy_before.value),
            share_cell(drift.correct_to_wrong.value),
            share_cell(drift.wrong_to_correct.value),
            count_cell(drift.tokens),
        )
        for name, drift in record.drift.sets.items()
    ]
    columns = (
        Column("set", is_text=True),
        Column("role", is_text=True),
        Column("KL(before || after) (95 %)", "nats per token", fields=VALUE_FIELDS),
        Column("cross-entropy", "nats per token"),
        Column("correct before", "top-1 token"),
        Column("correct to wrong", "top-1 token"),
        Column("wrong to correct", "top-1 token"),
        Column("tokens"),
    )
    notes = (
        "KL(before || after): per token, on the same text. Cross-entropy: of the trained model under the start model's"
        " predictions. Top-1 token: share of tokens whose most likely prediction is correct.",
    )
    return Table("Predictions of the trained model against those of the start model", columns, tuple(body), notes)


def expert_load_table(record: Record) -> Table | None:
    """How evenly the tokens of each held-out set are spread over the experts, before and after; None without experts."""
    sets = {
        name: drift for name, drift in (record.drift.sets if record.drift else {}).items() if drift.expert_load_after
    }
    if not sets:
        return None
    body = [
        (
            text_cell(name),
            text_cell(drift.role),
            *(
                share_cell(figure(loads))
                for figure in (_largest_load, _unused_experts)
                for loads in (drift.expert_load_before, drift.expert_load_after)
            ),
            share_cell(_moved_load(drift)),
        )
        for name, drift in sets.items()
    ]
    columns = (
        Column("set", is_text=True),
        Column("role", is_text=True),
        Column("largest share before", "of a layer's tokens"),
        Column("largest share after", "of a layer's tokens"),
        Column("unused before", "experts"),
        Column("unused after", "experts"),
        Column("moved", "tokens"),
    )
    notes = (
        "Largest share: of the busiest expert, mean over layers. Unused: experts without a token of the set. Moved: half of the"
        " sum of the changes of the shares.",
    )
    return Table(
        "Load of the experts in the trained model against that in the start model", columns, tuple(body), notes
    )


def _largest_load(loads: Sequence[Sequence[float]]) -> float:
    return sum(max(shares) for shares in loads) / len(loads)


def _unused_experts(loads: Sequence[Sequence[float]]) -> float:
    return sum(share == 0 for shares in loads for share in shares) / sum(map(len, loads))


def _moved_load(drift: SetDrift) -> float:
    layers = list(zip(drift.expert_load_before, drift.expert_load_after, strict=True))
    moved = (abs(was - now) for before, after in layers for was, now in zip(before, after, strict=True))
    return sum(moved) / (2 * len(layers))


def changed_weights_sentence(record: Record) -> str | None:
    """How many weights differ from the start model's, and how many each update changed; None when not measured."""
    if record.drift is None or not record.drift.changed_weights.total:
        return None
    changed, update = record.drift.changed_weights, record.sparse_update
    each = (
        f"; each update changed {format_count(update.updated_weights)} of {format_count(update.total_weights)}"
        f" ({format_percent(update.updated_weights / update.total_weights)})"
        if update and update.updated_weights and update.total_weights
        else ""
    )
    share = format_percent(changed.count / changed.total)
    counts = f"{format_count(changed.count)} of {format_count(changed.total)}"
    return f"{counts} weights differ from the start model's ({share}){each}."


def drift_section(record: Record) -> str:
    """The section of a run's page; empty when not measured."""
    table, drift = drift_table(record), record.drift
    if table is None or drift is None:
        return ""
    blocks = {
        int(name.split()[1]): value for name, value in drift.relative_weight_change.items() if name.startswith("block ")
    }
    others = ", ".join(
        f"{name} {format_percent(value, 2)}"
        for name, value in drift.relative_weight_change.items()
        if not name.startswith("block ")
    )
    outputs = _output_series(drift)
    last = max([*blocks, *(len(line.points) - 1 for line in outputs)], default=0)
    charts = []
    if any(drift.relative_weight_change.values()):
        weights = Series("weights", [(float(i), value) for i, value in blocks.items()], has_markers=True)
        note = f"2-norm of the change over that of the weights. Outside the blocks: {others or 'nothing'}."
        charts.append(
            _block_chart(
                "Relative change of the weights by block", [weights], last,
                f"{note} {changed_weights_sentence(record) or ''}".strip(),
            )
        )  # fmt: skip
    if outputs:
        charts.append(
            _block_chart(
                "Relative change of the outputs by block", outputs, last, "On the same tokens, before and after."
            )
        )
    intro = intro_paragraph(
        "A loss can stay the same while the predictions change. Measured on a part of each held-out set."
    )
    loads = expert_load_table(record)
    return f"{intro}{table.html()}{loads.html() if loads else ''}{side_by_side(*charts)}"


def _output_series(drift: DriftRecord) -> list[Series]:
    return [
        Series(
            plain_text(name, 40),
            [(float(i), math.nan if v is None else v) for i, v in enumerate(entry.relative_output_change)],
            has_markers=True,
        )
        for name, entry in drift.sets.items()
        if any(value is not None for value in entry.relative_output_change)
    ]


def _block_chart(caption: str, series: Sequence[Series], last_block: int, note: str) -> str:
    labels = [(float(i), str(i)) for i in range(last_block + 1)]
    return figure(
        caption,
        lambda w: line_chart(
            series, title=caption, width=w, x_ticks=labels, x_label="block", y_label="relative change", zero=True
        ),
        note=note,
    )

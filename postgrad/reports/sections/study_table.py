"""Tables of a study: every arm with its losses, forgetting, gain and cost; the claims; and a CSV file."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

from postgrad.foreign_text import plain_text
from postgrad.reports.html.notation import (
    finite,
    format_compact,
    format_duration,
    format_fixed,
    format_percent,
    format_signed,
)
from postgrad.reports.html.table import VALUE_FIELDS, Cell, Column, Number, Table, interval_cell, text_cell, value_cell
from postgrad.reports.result_models import EstimateInterval, StudyArm, StudyBase, StudyResults

_VERDICT_TONES = {"holds": "good", "does not hold": "bad", "not shown": "open"}
_EMPTY = text_cell("")


def study_arms_table(study: StudyResults, *, brief: bool = False) -> Table:
    """The arms side by side: loss on old and new text and on average. `brief` omits total tokens and memory."""
    has_seeds = len(study.seeds) > 1
    # The cost of a base that the study did not train is unknown.
    has_total = not brief and any(arm.tokens_in_all for arm in study.arms)
    has_memory = not brief and any(arm.peak_memory for arm in study.arms)
    has_skipped = any(arm.skipped_steps for arm in study.arms)
    columns = _arm_columns(study, has_seeds, has_total, has_memory)
    columns += [Column("skipped steps")] if has_skipped else []
    rows = [[*_base_row(study, has_seeds), *([_tokens_cell(study.base.tokens)] if has_total else [])]]
    for arm in study.arms:
        cost = [*([_tokens_cell(arm.tokens_in_all)] * has_total), *([_memory_cell(arm)] * has_memory)]
        cost += [text_cell(arm.skipped_steps or "")] * has_skipped
        rows.append([*_arm_row(arm, study, has_seeds), *(cost if arm.loss else [])])
    notes = ["Losses and changes in nats per token; intervals resample documents, paired over arms; lower is better."]
    if has_seeds:
        notes.append("± over seeds: the standard deviation of one seed's loss; no interval includes it.")
    if study.against:
        notes.append(f"Removed: the share of the forgetting of {plain_text(study.against, 60)} that the arm avoids.")
    body = tuple((*row, *[_EMPTY] * (len(columns) - len(row)))[: len(columns)] for row in rows)
    return Table(f"{plain_text(study.name, 60)}: every arm", tuple(columns), body, tuple(notes))


def _arm_columns(study: StudyResults, has_seeds: bool, has_total: bool, has_memory: bool) -> list[Column]:
    columns = [
        Column("arm", is_text=True),
        Column("loss", "old text"),
        Column("change (95 %)", "old text", fields=VALUE_FIELDS),
        Column("removed (95 %)", "old text", fields=VALUE_FIELDS),
        Column("loss", "new text"),
        Column("change (95 %)", "new text", fields=VALUE_FIELDS),
        Column("loss", "average"),
    ]
    if study.union:
        columns.append(Column("against union (95 %)", "average", fields=VALUE_FIELDS))
    if has_seeds:
        columns += [Column("old", "± over seeds"), Column("new", "± over seeds")]
    columns += [Column("tokens"), Column("time", fields=("seconds",))]
    columns += [Column("total tokens")] if has_total else []
    return [*columns, *([Column("memory", fields=("bytes",))] if has_memory else [])]


def _estimate_cell(entry: EstimateInterval | None, tone: str = "", share: bool = False) -> Cell:
    """A change, or a share in percent, with its interval below."""
    if entry is None or entry.value is None:
        return text_cell("", tone)
    return interval_cell(entry, 0 if share else 3, tone, format_percent if share else format_signed)


def _loss_cell(loss: dict[str, EstimateInterval], kind: str) -> Cell:
    return value_cell(loss[kind].value if kind in loss else None)


def _base_row(study: StudyResults, has_seeds: bool) -> list[Cell]:
    base: StudyBase = study.base
    loss = [_loss_cell(base.loss, kind) for kind in ("old", "new", "average")]
    cells = [Cell(("the base (old text only)",)), loss[0], _EMPTY, _EMPTY, loss[1], _EMPTY, loss[2]]
    cells += [_EMPTY] * (bool(study.union) + 2 * has_seeds)
    return [*cells, _tokens_cell(base.tokens), _seconds_cell(base.seconds)]


def _arm_row(arm: StudyArm, study: StudyResults, has_seeds: bool) -> list[Cell]:
    name = plain_text(arm.name, 80)
    if not arm.loss:
        return [Cell((name,)), text_cell(arm.status, "open")]
    old, new = arm.change.get("old"), arm.change.get("new")
    cells = [
        Cell((name, "" if arm.status == "finished" else f" ({plain_text(arm.status, 20)})")),
        _loss_cell(arm.loss, "old"),
        _estimate_cell(old, _change_tone(old)),
        text_cell("reference") if arm.name == study.against else _estimate_cell(arm.removed, share=True),
        _loss_cell(arm.loss, "new"),
        _estimate_cell(new, _change_tone(new)),
        _loss_cell(arm.loss, "average"),
    ]
    if study.union:
        cells.append(text_cell("union") if arm.name == study.union else _estimate_cell(arm.gap.get("average")))
    if has_seeds:
        for kind in ("old", "new"):
            deviation = arm.spread[kind].deviation if kind in arm.spread else None
            cells.append(_EMPTY if deviation is None else Cell((Number(format_fixed(deviation, 4), deviation),)))
    return [*cells, _tokens_cell(arm.tokens), _seconds_cell(arm.seconds)]


def _change_tone(entry: EstimateInterval | None) -> str:
    if entry is None or entry.low is None or entry.high is None:
        return ""
    return "bad" if entry.low > 0 else "good" if entry.high < 0 else "even"


def _tokens_cell(value: float | None) -> Cell:
    return _EMPTY if value is None else Cell((Number(format_compact(value), value),))


def _memory_cell(arm: StudyArm) -> Cell:
    peak = arm.peak_memory
    return _EMPTY if peak is None else Cell((Number(f"{peak / 2**30:.1f} GiB", peak),))


def _seconds_cell(value: float | None) -> Cell:
    return _EMPTY if value is None else Cell((Number(format_duration(value), value),))


def claims_table(study: StudyResults) -> Table | None:
    """The claims with what was measured; None without claims."""
    if not study.claims:
        return None
    body = []
    for number, claim in enumerate(study.claims, 1):
        share = claim.on == "removed"
        bound = f"≥ {format_percent(claim.bound, 0)}" if share else f"≤ {format_signed(claim.bound)}"
        measured = text_cell(claim.why) if finite(claim.value) is None else _estimate_cell(claim, share=share)
        seeds = [format_percent(s, 0) if share else format_signed(s) for s in claim.by_seed]
        body.append(
            (
                text_cell(number),
                text_cell(claim.verdict, _VERDICT_TONES.get(claim.verdict, "open")),
                text_cell(claim.say),
                measured,
                text_cell(bound),
                text_cell(", ".join(seeds)),
            )
        )
    columns = (
        Column(""),
        Column("", is_text=True),
        Column("claim", is_text=True),
        Column("measured (95 %)", fields=VALUE_FIELDS),
        Column("claimed"),
        Column("seed by seed", is_text=True),
    )
    note = (
        "A claim holds (does not hold) when its whole interval lies within (beyond) the claimed bound, for every seed;"
        " otherwise it is not shown."
    )
    return Table("Claims and measurements", columns, tuple(body), (note,))


_COSTS = ("tokens", "tokens_in_all", "seconds", "peak_memory", "skipped_steps")
_CSV_FIELDS = (
    "arm", "seed", "on", "loss", "loss_low", "loss_high", "change", "change_low", "change_high", "removed",
    "removed_low", "removed_high", "against_union", "against_union_low", "against_union_high", "deviation_over_seeds",
    *_COSTS, "status",
)  # fmt: skip


def study_csv(study: StudyResults) -> str:
    """Everything as rows with exact numbers: each arm, seed and held-out set, then the mean over seeds with intervals."""
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow(_CSV_FIELDS)
    for kind, loss in study.base.loss.items():
        tokens = study.base.tokens or ""
        writer.writerow(["(base)", "", kind, *_interval_values(loss), *[""] * 10, tokens, "", *[""] * 4])
    for arm in study.arms:
        writer.writerows(_csv_rows(arm))
    return out.getvalue()


def _csv_rows(arm: StudyArm) -> list[Sequence[object]]:
    name = plain_text(arm.name, 200)
    if name[:1] in "=+-@":
        name = "'" + name
    if not arm.loss:
        return [[name, "", "", *[""] * 18, arm.status]]
    rows: list[Sequence[object]] = [
        [name, seed, kind, repr(value), *[""] * 17, ""]
        for seed, losses in arm.by_seed.items()
        for kind, value in losses.items()
    ]
    for kind, loss in arm.loss.items():
        deviation = arm.spread[kind].deviation if kind in arm.spread else None
        rows.append(
            [
                name,
                "mean",
                kind,
                *_interval_values(loss),
                *_interval_values(arm.change.get(kind)),
                *_interval_values(arm.removed if kind == "old" else None),
                *_interval_values(arm.gap.get(kind)),
                *("" if v is None else repr(v) for v in (deviation, *(getattr(arm, key) for key in _COSTS))),
                arm.status,
            ]
        )
    return rows


def _interval_values(entry: EstimateInterval | None) -> list[str]:
    if entry is None:
        return [""] * 3
    return ["" if value is None else repr(value) for value in (entry.value, entry.low, entry.high)]

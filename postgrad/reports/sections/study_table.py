"""Which rows does a study show? Every arm with its losses, what it forgot and gained, and what it cost; and claims."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence

from postgrad.reports.html.notation import (
    as_list,
    as_mapping,
    as_number,
    format_compact,
    format_duration,
    format_fixed,
    format_percent,
    format_signed,
    plain_text,
)
from postgrad.reports.html.tables import Cell, Column, Number, Table, text_cell, value_cell

_Entry = Mapping[str, object]
_VERDICT_TONES = {"holds": "good", "does not hold": "bad", "not shown": "open"}
_INTERVAL_FIELDS = ("value", "low", "high")


def study_arms_table(results: _Entry, *, brief: bool = False) -> Table:
    """The arms side by side, as the paper has them: loss on old, new, average. `brief`: without what the page has besides."""
    arms = [as_mapping(a) for a in as_list(results.get("arms"))]
    several = len(as_list(results.get("seeds"))) > 1
    columns = [
        Column("arm", is_text=True),
        Column("loss", "old text"),
        Column("change (95 %)", "old text", fields=_INTERVAL_FIELDS),
        Column("removed (95 %)", "old text", fields=_INTERVAL_FIELDS),
        Column("loss", "new text"),
        Column("change (95 %)", "new text", fields=_INTERVAL_FIELDS),
        Column("loss", "average"),
    ]
    if results.get("union"):
        columns.append(Column("against union (95 %)", "average", fields=_INTERVAL_FIELDS))
    if several:
        columns += [Column("old", "± over seeds"), Column("new", "± over seeds")]
    columns += [Column("tokens"), Column("time", fields=("seconds",))]
    in_all = not brief and any(
        as_number(a.get("tokens_in_all")) for a in arms
    )  # a given base does not say what it took
    memory = not brief and any(as_number(a.get("peak_memory")) for a in arms)
    if in_all:
        columns.append(Column("tokens in all"))
    if memory:
        columns.append(Column("memory", fields=("bytes",)))
    wide = len(columns)
    base = _base_row(as_mapping(results.get("base")), several, bool(results.get("union")))
    body = [_pad_row([*base, *([_tokens_cell(as_mapping(results.get("base")).get("tokens"))] if in_all else [])], wide)]
    for arm in arms:
        cost = [*([_tokens_cell(arm.get("tokens_in_all"))] * in_all), *([_memory_cell(arm)] * memory)]
        body.append(_pad_row([*_arm_row(arm, results, several), *(cost if as_mapping(arm.get("loss")) else [])], wide))
    notes = ["Losses and changes in nats per token; intervals by drawing documents, paired over arms; lower is better."]
    if several:
        notes.append("± over seeds: the standard deviation of one seed's loss; it is in no interval.")
    if results.get("against"):
        notes.append(f"Removed: the share of the forgetting of {plain_text(results['against'], 60)} that is not there.")
    return Table(f"{plain_text(results.get('name'), 60)}: every arm", tuple(columns), tuple(body), tuple(notes))


def _pad_row(cells: Sequence[Cell], column_count: int) -> tuple[Cell, ...]:
    return (*cells, *[text_cell("")] * (column_count - len(cells)))[:column_count]


def _interval_cell(entry: _Entry, *, share: bool = False, decimals: int = 3, tone: str = "") -> Cell:
    """A number with its interval below."""
    value, low, high = (as_number(entry.get(key)) for key in _INTERVAL_FIELDS)
    if value is None:
        return text_cell("", tone)

    def text(x: float | None) -> str:
        return format_percent(x, 0) if share else format_signed(x, decimals)

    return Cell((Number(text(value), value),), tone, (Number(text(low), low), " to ", Number(text(high), high)))


def _base_row(base: _Entry, has_several_seeds: bool, has_union: bool) -> list[Cell]:
    loss = as_mapping(base.get("loss"))

    def of(what: str) -> Cell:
        return value_cell(as_mapping(loss.get(what)).get("value"))

    cells = [
        Cell(("the base (old text only)",)),
        of("old"),
        text_cell(""),
        text_cell(""),
        of("new"),
        text_cell(""),
        of("average"),
    ]
    cells += [text_cell("")] * (has_union + 2 * has_several_seeds)
    return [*cells, _tokens_cell(base.get("tokens")), _seconds_cell(base.get("seconds"))]


def _arm_row(arm: _Entry, results: _Entry, has_several_seeds: bool) -> list[Cell]:
    name = plain_text(arm.get("name"), 80)
    if not as_mapping(arm.get("loss")):
        return [Cell((name,)), text_cell(arm.get("status"), "open")]
    loss, changed, gap = (as_mapping(arm.get(key)) for key in ("loss", "change", "gap"))
    old, new = as_mapping(changed.get("old")), as_mapping(changed.get("new"))
    is_reference = arm.get("name") == results.get("against")
    cells = [
        Cell((name, "" if arm.get("status") == "finished" else f" ({plain_text(arm.get('status'), 20)})")),
        value_cell(as_mapping(loss.get("old")).get("value")),
        _interval_cell(old, tone=_change_tone(old)),
        text_cell("reference") if is_reference else _interval_cell(as_mapping(arm.get("removed")), share=True),
        value_cell(as_mapping(loss.get("new")).get("value")),
        _interval_cell(new, tone=_change_tone(new)),
        value_cell(as_mapping(loss.get("average")).get("value")),
    ]
    if results.get("union"):
        cells.append(
            text_cell("union")
            if arm.get("name") == results["union"]
            else _interval_cell(as_mapping(gap.get("average")))
        )
    if has_several_seeds:
        spread = as_mapping(arm.get("spread"))
        for what in ("old", "new"):
            deviation = as_number(as_mapping(spread.get(what)).get("deviation"))
            cells.append(text_cell("") if deviation is None else Cell((Number(format_fixed(deviation, 4), deviation),)))
    return [*cells, _tokens_cell(arm.get("tokens")), _seconds_cell(arm.get("seconds"))]


def _change_tone(entry: _Entry) -> str:
    low, high = as_number(entry.get("low")), as_number(entry.get("high"))
    if low is None or high is None:
        return ""
    return "bad" if low > 0 else "good" if high < 0 else "even"


def _tokens_cell(value: object) -> Cell:
    known = as_number(value)
    return text_cell("") if known is None else Cell((Number(format_compact(known), known),))


def _memory_cell(arm: _Entry) -> Cell:
    peak = as_number(arm.get("peak_memory"))
    return text_cell("") if peak is None else Cell((Number(f"{peak / 2**30:.1f} GiB", peak),))


def _seconds_cell(value: object) -> Cell:
    known = as_number(value)
    return text_cell("") if known is None else Cell((Number(format_duration(known), known),))


def claims_table(results: _Entry) -> Table | None:
    """What was thought, and what was measured."""
    claims = [as_mapping(c) for c in as_list(results.get("claims"))]
    if not claims:
        return None
    body = []
    for place, claim in enumerate(claims, 1):
        share = claim.get("on") == "removed"
        bound = as_number(claim.get("bound"))
        asked = f"≥ {format_percent(bound, 0)}" if share else f"≤ {format_signed(bound)}"
        measured = (
            _interval_cell(claim, share=share)
            if as_number(claim.get("value")) is not None
            else text_cell(claim.get("why"))
        )
        seeds = [format_percent(s, 0) if share else format_signed(s) for s in as_list(claim.get("by_seed"))]
        said = plain_text(claim.get("verdict"), 20)
        body.append(
            (
                text_cell(place),
                text_cell(said, _VERDICT_TONES.get(said, "open")),
                text_cell(claim.get("say")),
                measured,
                text_cell(asked),
                text_cell(", ".join(seeds)),
            )
        )
    columns = (
        Column(""),
        Column("", is_text=True),
        Column("claim", is_text=True),
        Column("measured (95 %)", fields=_INTERVAL_FIELDS),
        Column("claimed"),
        Column("seed by seed", is_text=True),
    )
    return Table(
        "Claims, held against what was measured",
        columns,
        tuple(body),
        (
            "A claim holds (does not hold) when its whole interval lies within (beyond) what is claimed, for every seed; "
            "else it is not shown.",
        ),
    )


def study_csv(results: _Entry) -> str:
    """Everything as rows: each arm, seed and held-out set, then the mean over seeds with intervals; exact numbers."""
    out = io.StringIO()
    writer = csv.writer(out)
    fields = (
        "arm", "seed", "on", "loss", "loss_low", "loss_high", "change", "change_low", "change_high", "removed",
        "removed_low", "removed_high", "against_union", "against_union_low", "against_union_high", "deviation_over_seeds",
        "tokens", "tokens_in_all", "seconds", "peak_memory", "status",
    )  # fmt: skip
    writer.writerow(fields)
    base = as_mapping(results.get("base"))
    for on, entry in as_mapping(base.get("loss")).items():
        writer.writerow(
            [
                "(base)",
                "",
                on,
                *_interval_values(as_mapping(entry)),
                *[""] * 10,
                base.get("tokens") or "",
                "",
                *[""] * 3,
            ]
        )
    for arm in map(as_mapping, as_list(results.get("arms"))):
        name = plain_text(arm.get("name"), 200)
        if name[:1] in "=+-@":
            name = "'" + name
        if not as_mapping(arm.get("loss")):
            writer.writerow([name, "", "", *[""] * 17, arm.get("status")])
            continue
        for seed, losses in as_mapping(arm.get("by_seed")).items():
            for on, value in as_mapping(losses).items():
                writer.writerow([name, seed, on, repr(value), *[""] * 16, ""])
        for on, entry in as_mapping(arm.get("loss")).items():
            deviation = as_mapping(as_mapping(arm.get("spread")).get(on)).get("deviation")
            writer.writerow(
                [
                    name,
                    "mean",
                    on,
                    *_interval_values(as_mapping(entry)),
                    *_interval_values(as_mapping(as_mapping(arm.get("change")).get(on))),
                    *(_interval_values(as_mapping(arm.get("removed"))) if on == "old" else [""] * 3),
                    *_interval_values(as_mapping(as_mapping(arm.get("gap")).get(on))),
                    "" if deviation is None else repr(deviation),
                    *(
                        "" if arm.get(k) is None else repr(arm[k])
                        for k in ("tokens", "tokens_in_all", "seconds", "peak_memory")
                    ),
                    arm.get("status"),
                ]
            )
    return out.getvalue()


def _interval_values(entry: _Entry) -> list[str]:
    return ["" if as_number(entry.get(key)) is None else repr(entry[key]) for key in _INTERVAL_FIELDS]

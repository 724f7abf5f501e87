"""Which rows does a study show? Every arm with its losses, what it forgot and gained, and what it cost; and claims."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence

from postgrad.reports.html.notation import compact, duration, fixed, mapping, number, percent, plain, rows, signed
from postgrad.reports.html.tables import Cell, Column, Number, Table, level, words

_Entry = Mapping[str, object]
_TONES = {"holds": "good", "does not hold": "bad", "not shown": "open"}
_INTERVAL = ("value", "low", "high")


def arms_table(found: _Entry, *, brief: bool = False) -> Table:
    """The arms side by side, as the paper has them: loss on old, new, average. `brief`: without what the page has besides."""
    arms = [mapping(a) for a in rows(found.get("arms"))]
    several = len(rows(found.get("seeds"))) > 1
    columns = [
        Column("arm", words=True),
        Column("loss", "old text"),
        Column("change (95 %)", "old text", fields=_INTERVAL),
        Column("removed (95 %)", "old text", fields=_INTERVAL),
        Column("loss", "new text"),
        Column("change (95 %)", "new text", fields=_INTERVAL),
        Column("loss", "average"),
    ]
    if found.get("union"):
        columns.append(Column("against union (95 %)", "average", fields=_INTERVAL))
    if several:
        columns += [Column("old", "± over seeds"), Column("new", "± over seeds")]
    columns += [Column("tokens"), Column("time", fields=("seconds",))]
    in_all = not brief and any(number(a.get("tokens_in_all")) for a in arms)  # a given base does not say what it took
    memory = not brief and any(number(a.get("peak_memory")) for a in arms)
    if in_all:
        columns.append(Column("tokens in all"))
    if memory:
        columns.append(Column("memory", fields=("bytes",)))
    wide = len(columns)
    base = _base_row(mapping(found.get("base")), several, bool(found.get("union")))
    body = [_row([*base, *([_tokens(mapping(found.get("base")).get("tokens"))] if in_all else [])], wide)]
    for arm in arms:
        cost = [*([_tokens(arm.get("tokens_in_all"))] * in_all), *([_memory(arm)] * memory)]
        body.append(_row([*_arm_row(arm, found, several), *(cost if mapping(arm.get("loss")) else [])], wide))
    notes = ["Losses and changes in nats per token; intervals by drawing documents, paired over arms; lower is better."]
    if several:
        notes.append("± over seeds: the standard deviation of one seed's loss; it is in no interval.")
    if found.get("against"):
        notes.append(f"Removed: the share of the forgetting of {plain(found['against'], 60)} that is not there.")
    return Table(f"{plain(found.get('name'), 60)}: every arm", tuple(columns), tuple(body), tuple(notes))


def _row(cells: Sequence[Cell], wide: int) -> tuple[Cell, ...]:
    return (*cells, *[words("")] * (wide - len(cells)))[:wide]


def _entry(entry: _Entry, *, share: bool = False, decimals: int = 3, tone: str = "") -> Cell:
    """A number with its interval below."""
    value, low, high = (number(entry.get(key)) for key in _INTERVAL)
    if value is None:
        return words("", tone)

    def text(x: float | None) -> str:
        return percent(x, 0) if share else signed(x, decimals)

    return Cell((Number(text(value), value),), tone, (Number(text(low), low), " to ", Number(text(high), high)))


def _base_row(base: _Entry, several: bool, union: bool) -> list[Cell]:
    loss = mapping(base.get("loss"))

    def of(what: str) -> Cell:
        return level(mapping(loss.get(what)).get("value"))

    cells = [Cell(("the base (old text only)",)), of("old"), words(""), words(""), of("new"), words(""), of("average")]
    cells += [words("")] * (union + 2 * several)
    return [*cells, _tokens(base.get("tokens")), _seconds(base.get("seconds"))]


def _arm_row(arm: _Entry, found: _Entry, several: bool) -> list[Cell]:
    name = plain(arm.get("name"), 80)
    if not mapping(arm.get("loss")):
        return [Cell((name,)), words(arm.get("status"), "open")]
    loss, changed, gap = (mapping(arm.get(key)) for key in ("loss", "change", "gap"))
    old, new = mapping(changed.get("old")), mapping(changed.get("new"))
    is_reference = arm.get("name") == found.get("against")
    cells = [
        Cell((name, "" if arm.get("status") == "finished" else f" ({plain(arm.get('status'), 20)})")),
        level(mapping(loss.get("old")).get("value")),
        _entry(old, tone=_tone(old)),
        words("reference") if is_reference else _entry(mapping(arm.get("removed")), share=True),
        level(mapping(loss.get("new")).get("value")),
        _entry(new, tone=_tone(new)),
        level(mapping(loss.get("average")).get("value")),
    ]
    if found.get("union"):
        cells.append(words("union") if arm.get("name") == found["union"] else _entry(mapping(gap.get("average"))))
    if several:
        spread = mapping(arm.get("spread"))
        for what in ("old", "new"):
            deviation = number(mapping(spread.get(what)).get("deviation"))
            cells.append(words("") if deviation is None else Cell((Number(fixed(deviation, 4), deviation),)))
    return [*cells, _tokens(arm.get("tokens")), _seconds(arm.get("seconds"))]


def _tone(entry: _Entry) -> str:
    low, high = number(entry.get("low")), number(entry.get("high"))
    if low is None or high is None:
        return ""
    return "bad" if low > 0 else "good" if high < 0 else "even"


def _tokens(value: object) -> Cell:
    known = number(value)
    return words("") if known is None else Cell((Number(compact(known), known),))


def _memory(arm: _Entry) -> Cell:
    peak = number(arm.get("peak_memory"))
    return words("") if peak is None else Cell((Number(f"{peak / 2**30:.1f} GiB", peak),))


def _seconds(value: object) -> Cell:
    known = number(value)
    return words("") if known is None else Cell((Number(duration(known), known),))


def claims_table(found: _Entry) -> Table | None:
    """What was thought, and what was measured."""
    claims = [mapping(c) for c in rows(found.get("claims"))]
    if not claims:
        return None
    body = []
    for place, claim in enumerate(claims, 1):
        share = claim.get("on") == "removed"
        bound = number(claim.get("bound"))
        asked = f"≥ {percent(bound, 0)}" if share else f"≤ {signed(bound)}"
        measured = _entry(claim, share=share) if number(claim.get("value")) is not None else words(claim.get("why"))
        seeds = [percent(s, 0) if share else signed(s) for s in rows(claim.get("by_seed"))]
        said = plain(claim.get("verdict"), 20)
        body.append(
            (
                words(place),
                words(said, _TONES.get(said, "open")),
                words(claim.get("say")),
                measured,
                words(asked),
                words(", ".join(seeds)),
            )
        )
    columns = (
        Column(""),
        Column("", words=True),
        Column("claim", words=True),
        Column("measured (95 %)", fields=_INTERVAL),
        Column("claimed"),
        Column("seed by seed", words=True),
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


def as_csv(found: _Entry) -> str:
    """Everything as rows: each arm, seed and held-out set, then the mean over seeds with intervals; exact numbers."""
    out = io.StringIO()
    writer = csv.writer(out)
    fields = (
        "arm", "seed", "on", "loss", "loss_low", "loss_high", "change", "change_low", "change_high", "removed",
        "removed_low", "removed_high", "against_union", "against_union_low", "against_union_high", "deviation_over_seeds",
        "tokens", "tokens_in_all", "seconds", "peak_memory", "status",
    )  # fmt: skip
    writer.writerow(fields)
    base = mapping(found.get("base"))
    for on, entry in mapping(base.get("loss")).items():
        writer.writerow(
            ["(base)", "", on, *_three(mapping(entry)), *[""] * 10, base.get("tokens") or "", "", *[""] * 3]
        )
    for arm in map(mapping, rows(found.get("arms"))):
        name = plain(arm.get("name"), 200)
        if name[:1] in "=+-@":
            name = "'" + name
        if not mapping(arm.get("loss")):
            writer.writerow([name, "", "", *[""] * 17, arm.get("status")])
            continue
        for seed, losses in mapping(arm.get("by_seed")).items():
            for on, value in mapping(losses).items():
                writer.writerow([name, seed, on, repr(value), *[""] * 16, ""])
        for on, entry in mapping(arm.get("loss")).items():
            deviation = mapping(mapping(arm.get("spread")).get(on)).get("deviation")
            writer.writerow(
                [
                    name,
                    "mean",
                    on,
                    *_three(mapping(entry)),
                    *_three(mapping(mapping(arm.get("change")).get(on))),
                    *(_three(mapping(arm.get("removed"))) if on == "old" else [""] * 3),
                    *_three(mapping(mapping(arm.get("gap")).get(on))),
                    "" if deviation is None else repr(deviation),
                    *(
                        "" if arm.get(k) is None else repr(arm[k])
                        for k in ("tokens", "tokens_in_all", "seconds", "peak_memory")
                    ),
                    arm.get("status"),
                ]
            )
    return out.getvalue()


def _three(entry: _Entry) -> list[str]:
    return ["" if number(entry.get(key)) is None else repr(entry[key]) for key in _INTERVAL]

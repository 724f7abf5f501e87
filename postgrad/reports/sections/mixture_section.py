"""The training sources: planned and achieved shares, training losses and the token ledger."""

from __future__ import annotations

import math

from postgrad.foreign_text import plain_text
from postgrad.lineage.record import PlannedSource, Record, SourceLoss, TrainedSource
from postgrad.reports.html.charts import paired_bars, stacked_bars
from postgrad.reports.html.document import figure, side_by_side
from postgrad.reports.html.notation import format_fixed, format_percent
from postgrad.reports.html.table import (
    CHANGE_FIELDS,
    Column,
    Table,
    change_cell,
    count_cell,
    difference_cell,
    share_cell,
    text_cell,
    value_cell,
)
from postgrad.reports.sections.curves import MAX_SERIES

_LEDGER_FIELDS = ("read", "held_out", "dropped", "truncated", "placed")


def _sources(record: Record) -> dict[str, tuple[PlannedSource | None, TrainedSource | None]]:
    """Each source by name, as planned and as trained."""
    planned = {source.name: source for source in record.plan.sources}
    trained = {source.name: source for source in record.totals.sources}
    return {name: (planned.get(name), trained.get(name)) for name in dict.fromkeys([*planned, *trained])}


def ledger_table(record: Record) -> Table:
    """Where each token went: read = held out + dropped + truncated + placed, or the rest is shown."""
    keys = (*_LEDGER_FIELDS, "rest", "padding", "context", "trained")
    rows: list[tuple[str, dict[str, int]]] = []
    for name, entry in record.token_ledger.items():
        counts = entry.model_dump()
        counts["rest"] = counts["read"] - sum(counts[key] for key in _LEDGER_FIELDS[1:])
        rows.append((plain_text(name, 200), counts))
    incomplete = [name for name, counts in rows if counts["rest"]]
    if len(rows) > 1:
        rows.append(("all sources", {key: sum(counts[key] for _, counts in rows) for key in keys}))
    body = tuple((text_cell(name), *(count_cell(counts[key]) for key in keys)) for name, counts in rows)
    notes = (
        "From the files: read = held out + dropped + truncated + placed + unaccounted. In the rows: padding fills them up,"
        " context is read without being trained on, and trained counts every pass.",
        f"These do not add up: {', '.join(incomplete)}." if incomplete else "Every token read is accounted for.",
    )
    titles = ("read", "held out", "dropped", "truncated", "placed", "unaccounted", "padding", "context", "trained")
    groups = ["tokens from the files"] * 6 + ["in the training rows"] * 3
    columns = (Column("source", is_text=True), *(Column(t, g) for t, g in zip(titles, groups, strict=True)))
    return Table("Token ledger", columns, body, notes if body else (), len(rows) > 1)


def mixture_table(record: Record) -> Table:
    """Each source's planned and achieved share of the trained tokens, and its passes."""
    body = []
    for name, (plan, done) in _sources(record).items():
        role = plan.role if plan else done.role if done else ""
        body.append(
            (
                text_cell(name),
                text_cell(f"{role}, generated" if plan and plan.generated_by else role),
                share_cell(plan.share if plan else None, 2),
                share_cell(done.share if done else None, 2),
                count_cell(plan.trained_tokens if plan else None),
                count_cell(done.trained_tokens if done else None),
                count_cell(plan.rows if plan else None),
                count_cell(done.rows if done else None),
                value_cell(plan.passes if plan else None, 2),
                value_cell(done.passes if done else None, 2),
                count_cell(plan.available_tokens if plan else None),
            )
        )
    columns = [Column("source", is_text=True), Column("role", is_text=True)]
    columns += [
        Column(w, kind) for kind in ("share", "trained tokens", "rows", "passes") for w in ("planned", "achieved")
    ]
    notes = ("Shares are of all trained tokens of the stage. One pass reads all of a source once.",)
    return Table("Mixture, planned and achieved", (*columns, Column("available tokens")), tuple(body), notes)


def source_losses_table(record: Record) -> Table | None:
    """Each source's share of tokens and loss, and how its training loss moved; None for a single source."""
    known = [(plan, done, done.loss) for plan, done in _sources(record).values() if done and done.loss]
    if len(known) < 2:
        return None
    has_rate = any(loss.change_per_million_tokens is not None for _, _, loss in known)
    body = []
    for plan, done, loss in known:
        requested = plan.requested_share if plan and plan.requested_share is not None else plan.share if plan else None
        body.append(
            (
                text_cell(done.name),
                share_cell(requested),
                share_cell(done.share),
                share_cell(loss.share_of_loss),
                value_cell(loss.first_tenth),
                value_cell(loss.last_tenth),
                difference_cell(_LossChange(loss), unit="step"),
                *([change_cell(loss.change_per_million_tokens)] if has_rate else []),
            )
        )
    columns = (
        Column("source", is_text=True), Column("requested", "trained tokens"), Column("achieved", "trained tokens"),
        Column("share of loss"), Column("first tenth", "training loss"), Column("last tenth", "training loss"),
        Column("change (95 %)", "training loss", fields=CHANGE_FIELDS),
        *([Column("per 1M of its tokens", "training loss")] if has_rate else []),
    )  # fmt: skip
    notes = (
        "Training losses in nats per trained token, over the first and the last tenth of a source's tokens. Learning from one"
        " source moves the others too; only held-out sets measure what was learned.",
    )
    return Table("Sources of the mixture", columns, tuple(body), notes)


class _LossChange:
    """The change of a source's loss as a `difference_cell` takes it."""

    def __init__(self, loss: SourceLoss) -> None:
        self.difference, self.low, self.high = loss.change, loss.low, loss.high


def mixture_section(record: Record) -> str:
    """The section of a run's page."""
    sources = _sources(record)
    more = len(sources) - MAX_SERIES
    note = f"{more} more sources are in the table only." if more > 0 else ""
    pairs = [_share_pair(name, *sources[name]) for name in list(sources)[:MAX_SERIES]]
    charts = []
    if pairs:
        charts.append(
            figure(
                "Share of the trained tokens",
                lambda w: paired_bars(
                    pairs, title="Mixture, planned and achieved", first="planned", second="achieved", width=w
                ),
                note=note,
            )
        )
    bars = [
        (name, [entry.placed, entry.held_out, entry.dropped, entry.truncated])
        for name, entry in list(record.token_ledger.items())[:MAX_SERIES]
    ]
    if bars:
        kinds = ("placed in rows", "held out", "dropped", "truncated")
        charts.append(
            figure(
                "Where the tokens of the files went",
                lambda w: stacked_bars(bars, kinds, title="Token ledger", width=w),
                note=note,
            )
        )
    tables = (source_losses_table(record), mixture_table(record), ledger_table(record))
    return side_by_side(*charts) + "".join(table.html() for table in tables if table and table.rows)


def _share_pair(name: str, plan: PlannedSource | None, done: TrainedSource | None) -> tuple[str, float, float, str]:
    """A source's planned and achieved share, with a note."""
    note = format_percent(plan.share if plan else None)
    if done:
        note += f" \u2192 {format_percent(done.share)}"
    passes = done.passes if done else plan.passes if plan else None
    if passes is not None:
        note += f" \u00b7 {format_fixed(passes, 2)} passes"
    return name, plan.share if plan else 0.0, done.share if done else math.nan, note

"""Which rows does a report show, and how do they read in a terminal, on a page and in a spreadsheet?

A table is built once from a record and written three ways. A number keeps its exact value beside its
rounded text: the page carries it in `<data value>`, the CSV file writes it in full.
"""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from postgrad.reports.html.notation import (
    ABSENT,
    as_list,
    as_mapping,
    as_number,
    display_width,
    escape_html,
    format_count,
    format_fixed,
    format_percent,
    format_signed,
    plain_text,
    truncate,
)

VERDICTS = {  # word in the record: (tone, symbol, what the reader is told)
    "learnt": ("good", "\u2713", "learnt"),
    "kept": ("even", "=", "kept"),
    "forgot": ("bad", "\u25b2", "forgot"),
    "no evidence": ("open", "?", "no evidence"),
}


@dataclass(frozen=True)
class Number:
    """A rounded text and the value it stands for (None: not known)."""

    text: str
    value: float | int | None


@dataclass(frozen=True)
class Cell:
    """Words and numbers in reading order, `below` in brackets or on a second line.

    `tone` colours the cell (good, bad, even, open).
    """

    parts: tuple[str | Number, ...]
    tone: str = ""
    below: tuple[str | Number, ...] = ()

    @property
    def text(self) -> str:
        first, second = _join_parts(self.parts), _join_parts(self.below)
        return f"{first}  ({second})" if second else first


def _join_parts(parts: Sequence[str | Number]) -> str:
    return "".join(plain_text(p) if isinstance(p, str) else p.text for p in parts)


@dataclass(frozen=True)
class Column:
    """A heading; columns with the same `group` stand under one; `fields` name its numbers in a CSV file."""

    title: str
    group: str = ""
    unit: str = ""
    is_text: bool = False
    fields: tuple[str, ...] = ()


@dataclass(frozen=True)
class Table:
    """Rows under columns with a caption above and notes below; the first cell of a row names it."""

    caption: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    notes: tuple[str, ...] = ()
    last_is_total: bool = False

    def text(self, width: int = 0, max_characters: int = 40) -> str:
        """Plain text for a terminal of `width` cells (0: as wide as it comes).

        A table that is too wide goes on below with its first column repeated. A cell of words is cut after
        `most` characters.
        """
        head = [plain_text(f"{c.title} ({c.unit})" if c.unit else c.title, max_characters) for c in self.columns]
        body = [[truncate(cell.text, max_characters) for cell in row] for row in self.rows]
        wide = [max([display_width(h), *(display_width(r[i]) for r in body)]) for i, h in enumerate(head)]
        blocks: list[list[int]] = [[0]]
        for i in range(1, len(wide)):
            taken = sum(wide[j] + 2 for j in blocks[-1])
            group = plain_text(self.columns[i].group)
            starts = group != plain_text(self.columns[blocks[-1][-1]].group)
            if width and len(blocks[-1]) > 1 and taken + max(wide[i], display_width(group) * starts) > width:
                blocks.append([0])
            blocks[-1].append(i)
        lines = [plain_text(self.caption)]
        for number_of_block, block in enumerate(blocks):
            lines += [""] * (number_of_block > 0) + self._text_block(block, head, body, wide)
        return "\n".join([*lines, *(plain_text(note) for note in self.notes)])

    def _text_block(
        self, block: Sequence[int], head: Sequence[str], body: Sequence[Sequence[str]], widths: list[int]
    ) -> list[str]:
        spans: list[tuple[str, list[int]]] = []  # neighbouring columns under one group heading
        for i in block:
            group = plain_text(self.columns[i].group)
            if spans and group and spans[-1][0] == group:
                spans[-1][1].append(i)
            else:
                spans.append((group, [i]))
        for group, span in spans:  # a group's heading may need more room than its columns
            room = sum(widths[i] for i in span) + 2 * (len(span) - 1)
            widths[span[-1]] += max(0, display_width(group) - room)

        def line(texts: Sequence[str]) -> str:
            padded = []
            for i in block:
                space = " " * (widths[i] - display_width(texts[i]))
                padded.append(texts[i] + space if self.columns[i].is_text else space + texts[i])
            return "  ".join(padded).rstrip()

        rule = "\u2500" * (sum(widths[i] for i in block) + 2 * (len(block) - 1))
        above = []
        if any(group for group, _ in spans):
            texts = []
            for group, span in spans:
                room = sum(widths[i] for i in span) + 2 * (len(span) - 1) - display_width(group)
                texts.append(" " * (room // 2) + group + " " * (room - room // 2))
            above = ["  ".join(texts).rstrip()]
        lines = [*above, line(head), rule, *(line(row) for row in body)]
        if self.last_is_total and len(body) > 1:
            lines.insert(len(lines) - 1, rule)
        return lines

    def html(self) -> str:
        """A `<table>` with scoped headings, in a region the keyboard can scroll."""
        caption = escape_html(self.caption)
        groups = ""
        if any(c.group for c in self.columns):
            spans: list[list] = []
            for column in self.columns:
                if spans and column.group and spans[-1][0] == column.group:
                    spans[-1][1] += 1
                else:
                    spans.append([column.group, 1])
            groups = "".join(
                f'<th scope="colgroup" colspan="{n}"><bdi>{escape_html(g, 80)}</bdi></th>' if g else "<td></td>" * n
                for g, n in spans
            )
            groups = f'<tr class="groups">{groups}</tr>'
        head = "".join(
            f'<th scope="col"{_cell_classes(c)}>{escape_html(c.title)}'
            + (f"<small> {escape_html(c.unit)}</small>" if c.unit else "")
            + "</th>"
            for c in self.columns
        )
        body = []
        for i, row in enumerate(self.rows):
            total = ' class="total"' if self.last_is_total and i == len(self.rows) - 1 and i else ""
            line = [f'<th scope="row"><bdi>{_cell_html(row[0])}</bdi></th>'] if row else []
            line += [
                f"<td{_cell_classes(column, cell.tone)}>{_cell_html(cell)}</td>"
                for column, cell in zip(self.columns[1:], row[1:], strict=True)
            ]
            body.append(f"<tr{total}>{''.join(line)}</tr>")
        notes = "".join(f'<p class="note">{escape_html(note)}</p>' for note in self.notes)
        return (
            f'<div class="scroll" tabindex="0" role="region" aria-label="{caption}"><table>'
            f"<caption>{caption}</caption><thead>{groups}<tr>{head}</tr></thead>"
            f"<tbody>{''.join(body)}</tbody></table></div>{notes}"
        )

    def csv(self) -> str:
        """RFC 4180 text with exact values. Words that a spreadsheet would run as a formula get a quote."""
        out = io.StringIO()
        writer = csv.writer(out)
        writer.writerow([_quote_formula(name) for c in self.columns for name in _csv_fields(c)])
        for row in self.rows:
            line: list[str] = []
            for column, cell in zip(self.columns, row, strict=True):
                names = _csv_fields(column)
                numbers = [p for p in (*cell.parts, *cell.below) if isinstance(p, Number)]
                if numbers and not column.is_text:
                    exact = ["" if n.value is None else repr(n.value) for n in numbers]
                    line += (exact + [""] * len(names))[: len(names)]
                else:
                    line += [_quote_formula(cell.text), *[""] * (len(names) - 1)]
            writer.writerow(line)
        return out.getvalue()


def _csv_fields(column: Column) -> list[str]:
    lead = f"{column.group} " if column.group else ""
    return [plain_text(lead + name) for name in (column.fields or (column.title,))]


def _quote_formula(text: str) -> str:
    return "'" + text if text[:1] in ("=", "+", "-", "@", "\t", "\r") else text


def _cell_classes(column: Column, tone: str = "") -> str:
    names = [n for n in ("" if column.is_text else "n", f"t-{tone}" if tone else "") if n]
    return f' class="{" ".join(names)}"' if names else ""


def _cell_html(cell: Cell) -> str:
    below = _parts_html(cell.below)
    return _parts_html(cell.parts) + (f'<small class="below">{below}</small>' if below else "")


def _parts_html(parts: Sequence[str | Number]) -> str:
    return "".join(
        escape_html(p, 200)
        if isinstance(p, str)
        else escape_html(p.text)
        if p.value is None
        else f'<data value="{p.value!r}">{escape_html(p.text)}</data>'
        for p in parts
    )


# --- cells ------------------------------------------------------------------------------------------------


def text_cell(value: object, tone: str = "") -> Cell:
    return Cell((plain_text(value, 200) or ABSENT,), tone)


def _exact_number(value: object) -> float | int | None:
    """The number as it is in the record: a whole number stays one."""
    return value if isinstance(value, int) and not isinstance(value, bool) else as_number(value)


def value_cell(value: object, decimals: int = 3) -> Cell:
    return Cell((Number(format_fixed(value, decimals), as_number(value)),))


def change_cell(value: object, decimals: int = 3, tone: str = "") -> Cell:
    return Cell((Number(format_signed(value, decimals), as_number(value)),), tone)


def count_cell(value: object) -> Cell:
    return Cell((Number(format_count(value), _exact_number(value)),))


def share_cell(value: object, decimals: int = 1) -> Cell:
    return Cell((Number(format_percent(value, decimals), as_number(value)),))


CHANGE_FIELDS = ("difference", "low", "high")  # the numbers of a `difference` cell, by name


def difference_cell(entry: Mapping[str, object], decimals: int = 3, tone: str = "") -> Cell:
    """A difference with its interval (`low` to `high`) below it."""
    low, high = as_number(entry.get("low")), as_number(entry.get("high"))
    ends: tuple[str | Number, ...] = (Number("", None), Number("", None))
    if low is not None and high is not None:
        ends = (Number(format_signed(low, decimals), low), " to ", Number(format_signed(high, decimals), high))
    return Cell((*change_cell(entry.get("difference"), decimals).parts,), tone, ends)


# --- what a record says -----------------------------------------------------------------------------------


def set_names(record: Mapping[str, object]) -> list[str]:
    """Held-out sets in reading order: retained ones first, then learned ones, then test sets, then the rest."""
    scores, changes = as_mapping(record.get("scores")), as_mapping(record.get("changes"))
    found = dict.fromkeys([*changes, *as_mapping(scores.get("before")), *as_mapping(scores.get("after"))])
    rank = {"retained": 0, "learned": 1, "test": 2}
    return sorted(found, key=lambda name: rank.get(str(as_mapping(changes.get(name)).get("role")), 3))


TEST_SET_NOTE = (
    "A test set is looked at once: on the start model and on the published one, when all was trained and chosen."
)


def set_cell(record: Mapping[str, object], name: str) -> Cell:
    """The name of a held-out set; a test set is marked as one."""
    return text_cell(f"{name} (test)" if name in test_set_changes(record) else name)


def selected_step_sentences(record: Mapping[str, object]) -> list[str]:
    """Which step was published and why, as sentences; none where it is the last one by rule."""
    found = as_mapping(record.get("chosen"))
    if as_number(found.get("step")) is None:
        return []
    last, planned = found.get("last"), as_mapping(record.get("plan")).get("steps")
    of = f"{plain_text(found.get('by'), 40)} on {plain_text(found.get('set'), 60)}"
    looks = as_number(found.get("looks")) or 0
    said = [
        f"Published: step {format_count(found.get('step'))} of {format_count(last)}, the best of {format_count(looks)} "
        f"look{'s' * (looks != 1)} by {of} ({format_fixed(found.get('value'), 4)})."
    ]
    limit = as_number(found.get("max_forgetting"))
    if limit is not None and found.get("within") is False:
        said.append(
            f"No look kept the loss on every retained set within {format_percent(limit)}; "
            f"this one forgot least ({format_percent(found.get('rise'))} at the upper end)."
        )
    elif limit is not None:
        said.append(
            f"Looks at which a retained set's loss had risen by more than {format_percent(limit)} were passed over."
        )
    enough = as_number(found.get("enough"))
    if found.get("stopped") and enough is not None and not as_number(found.get("since")):
        said.append(
            f"Training ended at step {format_count(last)} of {format_count(planned)}: {of} had reached {format_fixed(enough, 4)}."
        )
    elif found.get("stopped"):
        said.append(
            f"Training ended at step {format_count(last)} of {format_count(planned)}: {format_count(found.get('since'))} looks without a gain."
        )
    return said


def verdict(entry: Mapping[str, object]) -> str:
    """The verdict of the record; where it has none, what the interval alone can carry, or ""."""
    said = entry.get("verdict")
    if isinstance(said, str) and said in VERDICTS:
        return said
    low, high = as_number(entry.get("low")), as_number(entry.get("high"))
    if low is None or high is None:
        return ""
    if entry.get("role") == "learned":
        return "learnt" if high < 0 else "no evidence"
    return "forgot" if low > 0 else "kept" if high <= 0 else "no evidence"


def is_classifier(record: Mapping[str, object]) -> bool:
    """Whether the model gives labels: of them perplexity and bits per byte say nothing."""
    return as_mapping(record.get("model")).get("task") in ("classify", "tag")


def loss_unit(record: Mapping[str, object]) -> str:
    """What a loss is a mean of."""
    return "nats per label" if is_classifier(record) else "nats per token"


def first_metric(
    before: Mapping[str, object], after: Mapping[str, object]
) -> tuple[str, object, Mapping[str, object]] | None:
    """The headline of what a classifier decides on a set: its name, its value before, and all of it after."""
    for name, found in as_mapping(after.get("metrics")).items():
        return name, as_mapping(as_mapping(before.get("metrics")).get(name)).get("value"), as_mapping(found)
    return None


def score_table(record: Mapping[str, object], brief: bool = False) -> Table:
    """Loss on each held-out set before and after the stage, the paired difference and what it means.

    `brief` leaves the columns a terminal has room for: verdict, loss and perplexity.
    """
    scores, changes = as_mapping(record.get("scores")), as_mapping(record.get("changes"))
    before, after = as_mapping(scores.get("before")), as_mapping(scores.get("after"))
    body = []
    for name in set_names(record):
        b, a, c = as_mapping(before.get(name)), as_mapping(after.get(name)), as_mapping(changes.get(name))
        said = verdict(c)
        tone, symbol, told = VERDICTS.get(said, ("", "", ABSENT))
        units = plain_text(c.get("units")) or ("documents" if "documents" in b else "")
        how_many = c.get("count", b.get("documents"))
        body.append(
            (
                set_cell(record, name),
                text_cell("test (looked at once)" if c.get("role") == "test" else c.get("role")),
                text_cell(f"{symbol} {told}".strip(), tone),
                value_cell(b.get("nats")),
                value_cell(a.get("nats")),
                difference_cell(c, tone=tone),
                Cell((Number(format_percent(c.get("relative")), as_number(c.get("relative"))),)),
                value_cell(b.get("perplexity"), 2),
                value_cell(a.get("perplexity"), 2),
                value_cell(b.get("bits_per_byte"), 4),
                value_cell(a.get("bits_per_byte"), 4),
                change_cell(c.get("bits_per_byte_difference"), 4),
                share_cell(c.get("share_of_range"), 2),
                Cell((Number(format_count(how_many), _exact_number(how_many)), f" {units}" if units else "")),
            )
        )
    nats, bits = loss_unit(record), "bits per byte"
    columns = (
        Column("set", is_text=True), Column("role", is_text=True), Column("verdict", is_text=True),
        Column("before", nats), Column("after", nats),
        Column("difference (95 %)", nats, fields=CHANGE_FIELDS), Column("relative", nats),
        Column("before", "perplexity"), Column("after", "perplexity"),
        Column("before", bits), Column("after", bits), Column("difference", bits),
        Column("share of range"), Column("units"),
    )  # fmt: skip
    notes = (
        "Lower is better everywhere. The difference is after minus before on the same texts; its interval"
        " resamples whole units (paired bootstrap). Retained sets should not rise, learned sets should fall.",
        *([TEST_SET_NOTE] if test_set_changes(record) else []),
    )
    picked = [0, 2, 3, 4, 5, 7, 8] if brief else [*range(len(columns))]
    if is_classifier(record):
        picked = [i for i in picked if columns[i].group not in ("perplexity", bits)]
    columns = tuple(columns[i] for i in picked)
    body = [tuple(row[i] for i in picked) for row in body]
    what = "rows" if is_classifier(record) else "text"
    return Table(f"Loss on held-out {what} before and after", columns, tuple(body), notes)


def pseudo_perplexity_table(record: Mapping[str, object], brief: bool = False) -> Table | None:
    """What a masked language model says of each token when it sees all the others; None when it was not asked."""
    told = as_mapping(record.get("pseudo_perplexity"))
    if not told:
        return None
    table = score_table(told, brief)
    columns = tuple(
        replace(column, group="pseudo-perplexity") if column.group == "perplexity" else column
        for column in table.columns
    )
    notes = (
        "Every token of a part of each set was masked, one at a time, and predicted from all the others (Salazar et al."
        " 2020). Nothing else was hidden and nothing drawn, so these are other numbers than the loss above.",
    )
    return replace(table, caption="Every token given all the others, before and after", columns=columns, notes=notes)


def metrics_table(record: Mapping[str, object]) -> Table | None:
    """How often a classifier is right on each held-out set, before and after; None when nothing was classified."""
    scores = as_mapping(record.get("scores"))
    before, after = as_mapping(scores.get("before")), as_mapping(scores.get("after"))
    body = []
    for name in set_names(record):
        was, now = (as_mapping(as_mapping(side.get(name)).get("metrics")) for side in (before, after))
        for metric in now:
            then, here = as_mapping(was.get(metric)), as_mapping(now.get(metric))
            body.append(
                (
                    set_cell(record, name),
                    text_cell(metric),
                    value_cell(then.get("value")),
                    value_cell(here.get("value")),
                    Cell((Number(f"{format_fixed(here.get('low'))} to {format_fixed(here.get('high'))}", None),)),
                )
            )
    if not body:
        return None
    columns = (
        Column("set", is_text=True), Column("metric", is_text=True), Column("before"), Column("after"), Column("95 %"),
    )  # fmt: skip
    notes = ("The interval is that of the value after, over resampled examples.",)
    return Table("Decisions on held-out examples", columns, tuple(body), notes)


def retained_changes(record: Mapping[str, object]) -> dict[str, Mapping[str, object]]:
    return _role_changes(record, "retained")


def learned_changes(record: Mapping[str, object]) -> dict[str, Mapping[str, object]]:
    return _role_changes(record, "learned")


def test_set_changes(record: Mapping[str, object]) -> dict[str, Mapping[str, object]]:
    return _role_changes(record, "test")


def _role_changes(record: Mapping[str, object], role: str) -> dict[str, Mapping[str, object]]:
    changes = as_mapping(record.get("changes"))
    return {name: as_mapping(c) for name, c in changes.items() if as_mapping(c).get("role") == role}


def mean_difference(entries: Mapping[str, Mapping[str, object]]) -> float | None:
    """Mean over sets of the loss difference in nats per token; None unless every set has one."""
    found = [as_number(entry.get("difference")) for entry in entries.values()]
    known = [value for value in found if value is not None]
    return statistics.fmean(known) if known and len(known) == len(found) else None


def removed_share(arm: object, baseline: object) -> float | None:
    """Share of the baseline's forgetting that an arm removed, 1 - arm / baseline.

    Without forgetting in the baseline there is nothing to remove, and no share.
    """
    of_arm, of_baseline = as_number(arm), as_number(baseline)
    if of_arm is None or of_baseline is None or of_baseline <= 0:
        return None
    result = 1 - of_arm / of_baseline
    return result if math.isfinite(result) else None


def arm_names(records: Sequence[Mapping[str, object]]) -> list[str]:
    """One distinct name an arm: its own, numbered where two arms share it."""
    names: list[str] = []
    for i, record in enumerate(records):
        name = plain_text(as_mapping(record).get("name"), 120) or f"arm {i + 1}"
        names.append(name if name not in names else f"{name} ({i + 1})")
    return names


def comparison_table(records: Sequence[Mapping[str, object]], baseline: str | None = None) -> Table:
    """Arms side by side: loss on each held-out set, its change, and the share of forgetting removed."""
    names = arm_names(records)
    base = records[names.index(baseline)] if baseline in names else None
    sets: dict[str, str] = {}
    for record in records:
        for name in set_names(record):
            role = as_mapping(as_mapping(record.get("changes")).get(name)).get("role")
            sets[name] = sets.get(name) or plain_text(role)
    order = sorted(sets, key=lambda n: {"retained": 0, "learned": 1}.get(sets[n], 2))
    columns = [Column("arm", is_text=True)]
    for name in order:
        group = f"{plain_text(name, 60)} ({sets[name]})" if sets[name] else plain_text(name, 60)
        columns += [Column("loss", group), Column("change (95 %)", group, fields=CHANGE_FIELDS)]
        if base is not None and sets[name] == "retained":
            columns.append(Column("removed", group))
    several = sum(role == "retained" for role in sets.values()) > 1
    if several:
        columns.append(Column("mean forgetting", "all retained sets"))
        if base is not None:
            columns.append(Column("removed", "all retained sets"))
    body = []
    for record, arm in zip(records, names, strict=True):
        after, changes = as_mapping(as_mapping(record.get("scores")).get("after")), as_mapping(record.get("changes"))
        line = [Cell((arm, " (baseline)" if record is base else ""))]
        for name in order:
            c = as_mapping(changes.get(name))
            tone = VERDICTS.get(verdict(c), ("",))[0]
            line += [value_cell(as_mapping(after.get(name)).get("nats")), difference_cell(c, tone=tone)]
            if base is not None and sets[name] == "retained":
                of_base = as_mapping(as_mapping(base.get("changes")).get(name)).get("difference")
                line.append(_removed_cell(record is base, c.get("difference"), of_base))
        if several:
            mean = mean_difference(retained_changes(record))
            line.append(change_cell(mean))
            if base is not None:
                line.append(_removed_cell(record is base, mean, mean_difference(retained_changes(base))))
        body.append(tuple(line))
    notes = [
        "Losses and changes in nats per token; a change is after minus before, with its 95 % interval, and"
        " lower is better."
    ]
    if base is not None:
        notes.append(
            f"Removed is the share of forgetting removed, 1 \u2212 (change of the arm) / (change of"
            f" {plain_text(baseline, 60)}): 100 % is"
            " none left, more than 100 % is better than before the stage, a negative share forgot more."
        )
    elif baseline is not None:
        notes.append(f"The baseline {plain_text(baseline, 60)} is not among the arms.")
    return Table("Arms side by side", tuple(columns), tuple(body), tuple(notes))


def _removed_cell(is_base: bool, arm_change: object, baseline_change: object) -> Cell:
    return text_cell("baseline") if is_base else share_cell(removed_share(arm_change, baseline_change), 0)


LEDGER_FIELDS = ("read", "held_out", "dropped", "truncated", "placed")


def ledger_table(record: Mapping[str, object]) -> Table:
    """Where each token went: read = held out + dropped + truncated + placed, or the rest is shown."""
    ledger = as_mapping(record.get("ledger"))
    keys = (*LEDGER_FIELDS, "rest", "padding", "context", "trained")
    lines: list[tuple[str, dict[str, float | int | None]]] = []
    for name, entry in ledger.items():
        counts = {key: _exact_number(as_mapping(entry).get(key)) for key in keys}
        read, fates = counts["read"], [counts[key] or 0 for key in LEDGER_FIELDS[1:]]
        counts["rest"] = None if read is None or counts["placed"] is None else int(read - sum(fates))
        lines.append((plain_text(name, 200), counts))
    off = [name for name, counts in lines if counts["rest"]]
    if len(lines) > 1:
        total: dict[str, float | int | None] = {}
        for key in keys:
            column = [counts[key] for _, counts in lines]
            known = [value for value in column if value is not None]
            total[key] = sum(known) if len(known) == len(column) else None
        lines.append(("all sources", total))
    body = tuple((text_cell(name), *(count_cell(counts[key]) for key in keys)) for name, counts in lines)
    notes = (
        "From the files: read = held out + dropped + truncated + placed + unaccounted. In the rows: padding"
        " fills them up, context is seen without being trained on, and trained counts every pass.",
        f"These do not add up: {', '.join(off)}." if off else "Every token read is accounted for.",
    )
    titles = (
        "read",
        "held out",
        "dropped",
        "truncated",
        "placed",
        "unaccounted",
        "padding",
        "context",
        "trained",
    )
    source = ["tokens from the files"] * 6 + ["in the training rows"] * 3
    columns = [Column(t, g) for t, g in zip(titles, source, strict=True)]
    return Table(
        "Token ledger", (Column("source", is_text=True), *columns), body, notes if body else (), len(lines) > 1
    )


def mixture_table(record: Mapping[str, object]) -> Table:
    """Each source's planned and achieved share of the trained tokens, and how often it was read."""
    planned = {
        plain_text(as_mapping(s).get("name")): as_mapping(s)
        for s in as_list(as_mapping(record.get("plan")).get("sources"))
    }
    achieved = {
        plain_text(as_mapping(s).get("name")): as_mapping(s)
        for s in as_list(as_mapping(record.get("achieved")).get("sources"))
    }
    body = []
    for name in dict.fromkeys([*planned, *achieved]):
        p, a = planned.get(name, {}), achieved.get(name, {})
        body.append(
            (
                text_cell(name),
                text_cell(f"{p.get('role') or a.get('role')}{', self-made' if p.get('made_by') else ''}"),
                share_cell(p.get("share"), 2),
                share_cell(a.get("share"), 2),
                count_cell(p.get("trained")),
                count_cell(a.get("trained")),
                count_cell(p.get("rows")),
                count_cell(a.get("rows")),
                value_cell(p.get("passes"), 2),
                value_cell(a.get("passes"), 2),
                count_cell(p.get("available")),
            )
        )
    kinds = ("share", "trained tokens", "rows", "passes")
    columns = [Column("source", is_text=True), Column("role", is_text=True)]
    columns += [Column(w, kind) for kind in kinds for w in ("planned", "achieved")]
    notes = ("Shares are of all trained tokens of the stage. One pass reads everything a source has once.",)
    return Table("Mixture, planned and achieved", (*columns, Column("available tokens")), tuple(body), notes)


def source_losses_table(record: Mapping[str, object]) -> Table | None:
    """What each source of a mixture had a share in, and how its training loss moved; None for a single source."""
    planned = {
        plain_text(as_mapping(s).get("name")): as_mapping(s)
        for s in as_list(as_mapping(record.get("plan")).get("sources"))
    }
    achieved = [as_mapping(s) for s in as_list(as_mapping(record.get("achieved")).get("sources"))]
    told = [source for source in achieved if as_mapping(source.get("loss"))]
    if len(told) < 2:
        return None
    long = any("per_million" in as_mapping(source.get("loss")) for source in told)
    body = []
    for source in told:
        loss, name = as_mapping(source.get("loss")), plain_text(source.get("name"))
        of_plan, moved = as_mapping(planned.get(name)), {**loss, "difference": loss.get("change")}
        body.append(
            (
                text_cell(name),
                share_cell(of_plan.get("asked", of_plan.get("share"))),
                share_cell(source.get("share")),
                share_cell(loss.get("share")),
                value_cell(loss.get("first")),
                value_cell(loss.get("last")),
                difference_cell(moved),
                *([change_cell(loss.get("per_million"))] if long else []),
            )
        )
    columns = (
        Column("source", is_text=True), Column("asked", "trained tokens"), Column("achieved", "trained tokens"),
        Column("of all nats"), Column("first", "training loss"), Column("last", "training loss"),
        Column("change (95 %)", "training loss", fields=CHANGE_FIELDS),
        *([Column("per 1M of its tokens", "training loss")] if long else []),
    )  # fmt: skip
    notes = (
        "Losses in nats per trained token, over the first and the last tenth of a source's tokens, on rows as they were"
        " trained. What is learnt from one source moves the others too; held-out sets say what was learnt.",
    )
    return Table("Sources of the mixture", columns, tuple(body), notes)


def lineage_table(tree: Mapping[str, object]) -> Table:
    """The matrix R: row i, column j is the loss on set j after stage i, in nats per token."""
    names, sets = lineage_names(tree)
    body = []
    for i, (name, line) in enumerate(zip(names, as_list(tree.get("R")), strict=False)):
        stage = as_mapping(
            _item_or_none(as_list(tree.get("stages")), i - (len(names) - len(as_list(tree.get("stages")))))
        )
        values = [value_cell(_item_or_none(as_list(line), j)) for j in range(len(sets))]
        body.append((text_cell(name), count_cell(stage.get("tokens")), *values))
    columns = (
        Column("after", is_text=True),
        Column("trained tokens"),
        *(Column(s, "loss, nats per token") for s in sets),
    )
    return Table("Loss on every held-out set after every stage", columns, tuple(body))


def lineage_names(tree: Mapping[str, object]) -> tuple[list[str], list[str]]:
    """Names of the rows and columns of R; a row more than there are stages is the start model."""
    stages = [
        plain_text(as_mapping(s).get("name"), 120) or f"stage {i + 1}"
        for i, s in enumerate(as_list(tree.get("stages")))
    ]
    sets = [
        plain_text(as_mapping(s).get("name"), 120) or f"set {j + 1}" for j, s in enumerate(as_list(tree.get("sets")))
    ]
    matrix = as_list(tree.get("R"))
    if len(matrix) == len(stages) + 1:
        stages = ["start", *stages]
    stages += [f"stage {i + 1}" for i in range(len(stages), len(matrix))]
    width = max((len(as_list(line)) for line in matrix), default=0)
    return stages, [*sets, *(f"set {j + 1}" for j in range(len(sets), width))]


def _item_or_none(values: Sequence[object], index: int) -> object:
    return values[index] if 0 <= index < len(values) else None


def lineage_summary_table(tree: Mapping[str, object]) -> Table:
    """The matrix R in a few numbers, each with the denominator it was divided by."""
    summary = as_mapping(tree.get("summary"))
    denominators = as_mapping(summary.get("denominators"))
    meaning = {
        "ACC": "minus the mean loss over all sets after the last stage, so higher is better, as below",
        "BWT": "backward transfer: change on earlier sets since they were learnt",
        "FWT": "forward transfer: change on later sets before they were learnt",
        "forgetting": "rise of the loss above the best each earlier set ever had (lower is better)",
    }
    body = [
        (text_cell(key), value_cell(value) if key == "ACC" else change_cell(value), text_cell(meaning.get(key)),
         text_cell(denominators.get(key)))
        for key, value in summary.items()
        if key != "denominators"
    ]  # fmt: skip
    columns = (Column("measure", is_text=True), Column("value", unit="nats per token"),
               Column("meaning", is_text=True), Column("divided by", is_text=True))  # fmt: skip
    return Table("The matrix in a few numbers", columns, tuple(body))

"""Tables of the held-out sets: loss, pseudo-perplexity and classification metrics, before and after."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

from postgrad.foreign_text import plain_text
from postgrad.lineage.record import BeforeAfter, ClassRecord, MetricValue, Record, SetChange, SetScore
from postgrad.reports.html.notation import format_fixed
from postgrad.reports.html.table import (
    CHANGE_FIELDS,
    Cell,
    Column,
    Table,
    change_cell,
    count_cell,
    difference_cell,
    interval_cell,
    interval_parts,
    share_cell,
    text_cell,
    value_cell,
)
from postgrad.reports.html.verdicts import tone_of, verdict_cell

_ROLE_ORDER = {"retained": 0, "learned": 1, "test": 2}
_TEST_SET_NOTE = (
    "A test set is scored once, on the start model and on the published model, after training and selection."
)
_CLASSIFIER_NOTE = (
    "The verdict of a classifier is of a metric that is 0 for the same answer to everything (MCC, span F1 or Pearson), and"
    " not of the loss, which also falls where only the frequent class is learned."
)
_MAX_CLASSES = 20


class HasClasses(Protocol):
    """A classifier's scores on a set."""

    @property
    def classes(self) -> Sequence[ClassRecord]: ...

    @property
    def confusion(self) -> Sequence[Sequence[int]]: ...


def set_names(results: Record | BeforeAfter) -> list[str]:
    """Held-out sets in reading order: retained, learned, test, others."""
    names = dict.fromkeys([*results.changes, *results.scores.before, *results.scores.after])
    return sorted(names, key=lambda name: _ROLE_ORDER.get(_role(results, name), 3))


def _role(results: Record | BeforeAfter, name: str) -> str:
    change = results.changes.get(name)
    return change.role if change else ""


def loss_unit(record: Record) -> str:
    """The unit of a loss."""
    return "nats per label" if record.is_classifier else "nats per token"


def main_metric(
    change: SetChange, before: SetScore | None, after: SetScore | None
) -> tuple[str, float | None, MetricValue] | None:
    """The metric that a classifier's verdict is of: its name, its value before, and the metric after."""
    metrics = after.metrics if after else {}
    name = change.metric if change.metric in metrics else next(iter(metrics), None)
    if name is None:
        return None
    earlier = before.metrics.get(name) if before else None
    return name, earlier.value if earlier else None, metrics[name]


def score_table(record: Record, brief: bool = False) -> Table:
    """Loss on each held-out set before and after, the paired difference and its verdict.

    `brief` keeps the columns that fit a terminal: verdict, loss and perplexity.
    """
    return _score_table(record, record.is_classifier, brief)


def _score_table(results: Record | BeforeAfter, is_classifier: bool, brief: bool) -> Table:
    names = set_names(results)
    nats, bits = "nats per label" if is_classifier else "nats per token", "bits per byte"
    columns = (
        Column("set", is_text=True), Column("role", is_text=True), Column("verdict", is_text=True),
        Column("before", nats), Column("after", nats),
        Column("difference (95 %)", nats, fields=CHANGE_FIELDS), Column("relative", nats),
        Column("before", "perplexity"), Column("after", "perplexity"),
        Column("before", bits), Column("after", bits), Column("difference", bits),
        Column("share of range"), Column("units"),
    )  # fmt: skip
    has_test_sets = any(_role(results, name) == "test" for name in names)
    notes = (
        "Lower is better everywhere. The difference is after minus before on the same texts; its interval resamples whole units"
        " (paired bootstrap). Retained sets should not rise, learned sets should fall.",
        *([_TEST_SET_NOTE] if has_test_sets else []),
        *([_CLASSIFIER_NOTE] if is_classifier else []),
    )
    picked = [0, 2, 3, 4, 5, 7, 8] if brief else [*range(len(columns))]
    if is_classifier:
        picked = [i for i in picked if columns[i].group not in ("perplexity", bits)]
    rows = [_score_row(results, name) for name in names]
    return Table(
        f"Loss on held-out {'rows' if is_classifier else 'text'} before and after",
        tuple(columns[i] for i in picked),
        tuple(tuple(row[i] for i in picked) for row in rows),
        notes,
    )


def _score_row(results: Record | BeforeAfter, name: str) -> tuple[Cell, ...]:
    before, after = results.scores.before.get(name), results.scores.after.get(name)
    change = results.changes.get(name)
    is_test = change is not None and change.role == "test"
    number = change.unit_count if change and change.unit_count is not None else before.documents if before else None
    unit = change.units if change and change.units else "documents" if number is not None else ""
    known = change or SetChange()
    return (
        set_cell(results, name),
        text_cell("test (scored once)" if is_test else known.role),
        verdict_cell(change),
        value_cell(before.nats if before else None),
        value_cell(after.nats if after else None),
        difference_cell(change, tone=tone_of(change)),
        share_cell(known.relative_difference),
        value_cell(before.perplexity if before else None, 2),
        value_cell(after.perplexity if after else None, 2),
        value_cell(before.bits_per_byte if before else None, 4),
        value_cell(after.bits_per_byte if after else None, 4),
        change_cell(known.bits_per_byte_difference, 4),
        share_cell(known.share_of_range, 2),
        count_cell(number, unit),
    )


def set_cell(results: Record | BeforeAfter, name: str) -> Cell:
    """The name of a held-out set; test sets are marked."""
    return text_cell(f"{name} (test)" if _role(results, name) == "test" else name)


def expected_losses_table(record: Record) -> Table | None:
    """What short runs predicted of each set, beside what was measured; None where nothing was predicted."""
    if not record.expected_losses:
        return None
    columns = (
        Column("set", is_text=True), Column("expected (95 %)", fields=("expected", "low", "high")), Column("measured"),
        Column("in the interval", is_text=True), Column("measured less expected"),
    )  # fmt: skip
    rows = tuple(
        (
            set_cell(record, name),
            interval_cell(each),
            value_cell(each.measured),
            text_cell("yes" if each.inside else "no"),
            change_cell(each.measured - each.value),
        )
        for name, each in record.expected_losses.items()
    )
    within = sum(each.inside for each in record.expected_losses.values())
    notes = (f"{within} of {len(rows)} losses, in {loss_unit(record)}, came out as pilot runs had predicted.",)
    return Table("Expected and measured loss after the run", columns, rows, notes)


def pseudo_perplexity_table(record: Record, brief: bool = False) -> Table | None:
    """Scores of a masked language model that predicts each token from all others; None when not measured."""
    if record.pseudo_perplexity is None:
        return None
    table = _score_table(record.pseudo_perplexity, False, brief)
    columns = tuple(
        replace(column, group="pseudo-perplexity") if column.group == "perplexity" else column
        for column in table.columns
    )
    notes = (
        "Every token of a part of each set is masked, one at a time, and predicted from all others (Salazar et al. 2020)."
        " These losses are not comparable with those above, which mask random tokens.",
    )
    return replace(table, caption="Pseudo-perplexity before and after", columns=columns, notes=notes)


def unknown_tokens_table(record: Record) -> Table | None:
    """The tokens of text that the vocabulary lacks, apart from all others; None without any."""
    scores = record.scores.after or record.scores.before
    body = []
    for name in set_names(record):
        if (now := scores.get(name)) and now.unknown:
            before = record.scores.before.get(name)
            after = record.scores.after.get(name)
            nats = [side.unknown.nats if side and side.unknown else None for side in (before, after)]
            counts = (count_cell(now.unknown.tokens), share_cell(now.unknown.share, 2))
            body.append((set_cell(record, name), *counts, *map(value_cell, nats)))
    if not body:
        return None
    columns = (
        Column("set", is_text=True), Column("tokens"), Column("of all tokens"), Column("before", "nats per unknown token"),
        Column("after", "nats per unknown token"),
    )  # fmt: skip
    notes = (
        "Unknown tokens stand for text that the vocabulary lacks. Their loss only tells how well the model knows that such text"
        " is there, so no other table counts them.",
    )
    return Table("Unknown tokens, scored apart", columns, tuple(body), notes)


def class_tables(record: Record, max_classes: int = _MAX_CLASSES) -> list[Table]:
    """Of a classifier: each set class by class, and which classes are taken for which; those with the most items first."""
    tables = []
    for name in set_names(record):
        if (after := record.scores.after.get(name)) and after.classes:
            before = record.scores.before.get(name)
            tables += class_score_tables(name, after, before, max_classes)
    return tables


def class_score_tables(name: str, after: HasClasses, before: HasClasses | None, max_classes: int) -> list[Table]:
    """The classes of one held-out set, and its confusion matrix."""
    ranked = sorted(range(len(after.classes)), key=lambda i: -after.classes[i].support)
    shown, hidden = sorted(ranked[:max_classes]), len(ranked[max_classes:])
    earlier = {each.name: each.f1 for each in before.classes} if before else {}
    rows = []
    for each in (after.classes[i] for i in shown):
        cells = [value_cell(value) for value in (each.precision, each.recall, earlier.get(each.name), each.f1)]
        counts = (count_cell(each.support), count_cell(each.predicted))
        rows.append((text_cell(each.name), *counts, *cells[:2], *cells[2 if before else 3 :]))
    columns = (
        Column("class", is_text=True), Column("support"), Column("predicted"), Column("precision"), Column("recall"),
        *([Column("before", "F1")] if before else []), Column("after" if before else "F1", "F1" if before else ""),
    )  # fmt: skip
    notes = (
        "Support: items of the class; predicted: items taken for it. Precision is the share of the predicted that are right,"
        " recall the share of the support that is found.",
        *([f"{hidden:,} classes with fewer items are in the record only."] if hidden else []),
    )
    tables = [Table(f"Class by class: {plain_text(name, 60)}", columns, tuple(rows), notes)]
    if after.confusion and not hidden:
        heads = tuple(Column(each.name, "predicted") for each in after.classes)
        body = tuple(
            (text_cell(each.name), *map(count_cell, line))
            for each, line in zip(after.classes, after.confusion, strict=True)
        )
        caption = f"Confusion matrix: {plain_text(name, 60)}"
        tables.append(Table(caption, (Column("actual", is_text=True), *heads), body))
    return tables


def metrics_table(record: Record) -> Table | None:
    """The metrics of a classifier on each held-out set, before and after; None without any."""
    body = []
    for name in set_names(record):
        before, after = record.scores.before.get(name), record.scores.after.get(name)
        change = record.changes.get(name)
        for metric, value in (after.metrics if after else {}).items():
            earlier = before.metrics.get(metric) if before else None
            body.append(
                (
                    set_cell(record, name),
                    text_cell(metric),
                    value_cell(earlier.value if earlier else None),
                    value_cell(value.value),
                    Cell(interval_parts(value, format_fixed)),
                    verdict_cell(change) if change and metric == change.metric else text_cell(""),
                )
            )
    if not body:
        return None
    columns = (
        Column("set", is_text=True), Column("metric", is_text=True), Column("before"), Column("after"), Column("95 %"),
        Column("verdict", is_text=True),
    )  # fmt: skip
    notes = (
        "The interval is that of the value after, over resampled examples; the verdict is of the paired change. A metric with a"
        " verdict is 0 for a model that gives the same answer to everything, whatever share of it is right.",
    )
    return Table("Classification metrics on held-out examples", columns, tuple(body), notes)

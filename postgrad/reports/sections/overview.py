"""The top of a run's page: the result in a sentence, key facts, notices, and a card for each held-out set."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from postgrad.foreign_text import mask_secrets, plain_text
from postgrad.lineage.record import AbilityGate, Record, RetentionGate, SetChange, SetScore, SkippedStep
from postgrad.reports.html.document import bold_name, format_time, verdict_badge
from postgrad.reports.html.notation import (
    HasEnds,
    escape_html,
    format_compact,
    format_count,
    format_duration,
    format_fixed,
    format_interval,
    format_percent,
    format_signed,
    no_interval,
)
from postgrad.reports.html.verdicts import tone_of, verdict_of
from postgrad.reports.sections.ability_section import gate_sentence
from postgrad.reports.sections.curves import Curves
from postgrad.reports.sections.held_out_tables import loss_unit, main_metric, set_names

_CONTAMINATION_WARNING_PARTS = 100
"""The page warns when more than one in so many held-out documents overlaps with the training text."""
_VERBS = {"learnt": "Learned", "kept": "Kept", "forgot": "Forgot"}
_SETS_PER_ROLE = 3
_DAMAGE_SHOWN = 3


def headline(record: Record, curves: Curves) -> str:
    """The result in plain words: test sets first, then learned ones, then retained ones."""
    sentences = []
    for role in ("test", "learned", "retained"):
        changes = record.changes_with_role(role)
        ranked = sorted(changes, key=lambda n: -abs(changes[n].difference or 0.0))
        for name in ranked[:_SETS_PER_ROLE]:
            scores = record.scores.before.get(name), record.scores.after.get(name)
            sentences.append(_change_sentence(name, changes[name], *scores, loss_unit(record)))
        if len(ranked) > _SETS_PER_ROLE:
            sentences.append(f"{len(ranked) - _SETS_PER_ROLE} more {role} sets are in the table.")
    return f'<p class="lead">{" ".join(sentences)}</p>' if sentences else _last_evaluation(record, curves)


def _change_sentence(name: str, change: SetChange, before: SetScore | None, after: SetScore | None, unit: str) -> str:
    verb = _VERBS.get(verdict_of(change))
    start = f"{verb} {bold_name(name)}" if verb else f"No clear change on {bold_name(name)}"
    if change.role == "test":
        start += " (a test set, scored once)"
    interval = f", {_ends_text(change, format_signed)}"
    if before and after:
        losses = f"{format_fixed(before.nats)} \u2192 {format_fixed(after.nats)} {unit}"
        move = f"{losses} ({format_signed(change.difference)}{interval})"
    else:
        move = f"{format_signed(change.difference)} {unit}{interval}"
    if main := main_metric(change, before, after):
        metric, was, now = main
        ends = _ends_text(now)
        move = f"{escape_html(metric, 30)} {format_fixed(was)} \u2192 {format_fixed(now.value)} ({ends}), loss {move}"
    return f"{start}: {move}."


def _ends_text(entry: HasEnds, write: Callable[[float | None], str] = format_fixed) -> str:
    """`95 % interval 0.1 to 0.2`, or that there is none."""
    text = format_interval(entry.low, entry.high, write)
    return text if text == no_interval() else f"95 % interval {text}"


def _last_evaluation(record: Record, curves: Curves) -> str:
    """The last evaluation of an unfinished run, or that there is none."""
    if not curves.set_losses:
        text = "No held-out text was scored, so learning and forgetting are unknown."
        if set_names(record):
            text = "There are no scores after training, so forgetting is unknown."
        return f'<p class="lead">{text}</p>'
    latest = max(points[-1].x for points in curves.set_losses.values())
    changes = []
    for name, points in list(curves.set_losses.items())[:6]:
        last = points[-1]
        if math.isfinite(last.change):
            interval = f" (95 % interval {format_signed(last.low)} to {format_signed(last.high)})"
            changes.append(
                f"{bold_name(name)} {format_signed(last.change)}{interval if math.isfinite(last.low) else ''}"
            )
    when = f"after {format_compact(latest)} trained tokens"
    return f'<p class="lead">At the last evaluation, {when}, in {loss_unit(record)}: {", ".join(changes)}.</p>'


def verdict_cards(record: Record) -> str:
    """A card for each held-out set."""
    cards = [
        _verdict_card(record, name, record.changes[name])
        for name in set_names(record)[:12]
        if name in record.changes and record.changes[name].difference is not None
    ]
    return f'<ul class="cards" aria-label="Verdicts">{"".join(cards)}</ul>' if cards else ""


def _verdict_card(record: Record, name: str, change: SetChange) -> str:
    before, after = record.scores.before.get(name), record.scores.after.get(name)
    big, unit, lines = format_signed(change.difference), loss_unit(record), []
    if main := main_metric(change, before, after):
        metric, was, now = main
        lines = [_ends_text(now), f"Loss {big} {unit}"]
        big, unit = f"{format_fixed(was)} \u2192 {format_fixed(now.value)}", escape_html(metric, 30)
    elif before and after and before.perplexity is not None and after.perplexity is not None:
        lines = [f"Perplexity {format_fixed(before.perplexity, 2)} \u2192 {format_fixed(after.perplexity, 2)}"]
    if change.unit_count is not None:
        units = f"{format_count(change.unit_count)} {escape_html(change.units or 'units', 30)}"
        lines.append(f"{escape_html(change.role, 30)} set, {units}" if change.role else units)
    return (
        f'<li class="t-{tone_of(change, "open")}"><div class="what"><bdi>{escape_html(name, 80)}</bdi>'
        f'{verdict_badge(verdict_of(change))}</div><p class="big">{big} <small>{unit}</small></p>'
        f"<p>{'<br>'.join(lines)}</p></li>"
    )


def run_facts(record: Record, curves: Curves) -> str:
    """Key facts in one line."""
    model, totals, update = record.model, record.totals, record.sparse_update
    facts = [("from", plain_text(mask_secrets(model.start_model), 80))]
    if model.parameters is not None:
        facts.append(("parameters", format_compact(model.parameters)))
    kind = plain_text(record.stage.get("tuning", {}).get("kind"), 30)
    if kind and model.trainable is not None and model.parameters and model.trainable < model.parameters:
        facts.append(("tuning", f"{kind}, {format_compact(model.trainable)} trainable"))
    if update:
        counts = f"{format_compact(update.updated_weights)} of {format_compact(update.total_weights)} weights"
        facts.append(("each update changes", f"{counts} ({plain_text(update.kind, 30)})"))
    if not totals.tokens:
        facts.append(("planned tokens", format_compact(record.plan.tokens)))
    else:
        facts += [
            ("trained tokens", format_compact(totals.tokens)),
            ("time", format_duration(totals.seconds)),
            ("speed", f"{format_count(totals.tokens_per_second)} tokens/s"),
        ]
    if curves.last_step:
        facts.append(("steps", format_count(curves.last_step)))
    if record.published_checkpoint:
        facts.append(("published", f"step {format_count(record.published_checkpoint.step)}"))
    facts.append(
        ("ended", format_time(record.finished)) if record.finished else ("started", format_time(record.created))
    )
    items = "".join(f"<li>{escape_html(k)} <b><bdi>{escape_html(v)}</bdi></b></li>" for k, v in facts)
    return f'<ul class="facts">{items}</ul>'


def notice_boxes(record: Record, curves: Curves) -> str:
    """What qualifies the numbers: an unfinished run, the retention gate, non-finite losses, contamination."""
    notices = [*_status_notices(record, curves), *_gate_notices(record)]
    if curves.skipped_steps:
        notices.append(("bad", escape_html(skipped_steps_sentence(curves.skipped_steps))))
    if curves.non_finite_count:
        number = format_count(curves.non_finite_count)
        notices.append(("bad", f"{number} training losses are not finite; they are gaps in the curves."))
    notices += _contamination_notices(record)
    return "".join(f'<div class="notice{f" t-{tone}" if tone else ""}"><p>{text}</p></div>' for tone, text in notices)


def damage_notice(damage: Sequence[str]) -> str:
    """A box with the damage of the files that a page is made from."""
    if not damage:
        return ""
    more = f" {format_count(len(damage) - _DAMAGE_SHOWN)} more." if len(damage) > _DAMAGE_SHOWN else ""
    shown = ". ".join(escape_html(each, 300) for each in damage[:_DAMAGE_SHOWN])
    return f'<div class="notice t-bad"><p><b>A file of the run is damaged.</b> {shown}.{more}</p></div>'


def skipped_steps_sentence(steps: Sequence[SkippedStep]) -> str:
    """Which steps changed no weight, and on which rows."""
    listed = "; ".join(f"step {format_count(step.step)} ({plain_text(step.list_rows(), 300)})" for step in steps)
    count = f"{len(steps)} steps were" if len(steps) > 1 else "1 step was"
    return (
        f"{count} skipped, since the loss or the gradient was not finite: {listed}. Skipped steps change no weight, and their "
        f"{format_count(sum(step.tokens for step in steps))} tokens do not count as trained."
    )


def _status_notices(record: Record, curves: Curves) -> list[tuple[str, str]]:
    reached = f"after step {format_count(curves.last_step)} of {format_count(record.plan.steps)}"
    has_scores = bool(record.scores.after)
    if record.status == "stopped":
        rest = "" if has_scores else " There are no scores after training; the curves show how far it came."
        return [("", f"<b>This run was stopped{f' {reached}' if curves.last_step else ''}.</b>{rest}")]
    if record.status == "running":
        last = f" Last seen {reached}." if curves.last_step else ""
        return [("", f"<b>This run is not finished.</b>{last}")]
    return [] if has_scores else [("", "<b>This run has no scores after training.</b>")]


def _gate_notices(record: Record) -> list[tuple[str, str]]:
    gate, bound = record.retention_gate, record.abilities.gate if record.abilities else None
    if gate is None and bound is None:
        return [("bad", "<b>The retention gate failed.</b>")] if record.status == "gate-failed" else []
    return [*(_loss_gate_notices(gate) if gate else []), *(_ability_gate_notices(bound) if bound else [])]


def _ability_gate_notices(gate: AbilityGate) -> list[tuple[str, str]]:
    word, tone = ("passed", "good") if gate.passed else ("failed", "bad")
    sentence = gate_sentence(gate)
    text = f"<b>The gate on abilities {word}.</b> {escape_html(sentence[:1].upper() + sentence[1:], 600)}."
    return [(tone, text)]


def _loss_gate_notices(gate: RetentionGate) -> list[tuple[str, str]]:
    worst = gate.worst
    detail = (
        f"The loss on the worst retained set, {bold_name(worst.set)}, changed by {format_percent(worst.relative_difference)}"
        f" (upper end {format_percent(worst.relative_high)}); {format_percent(gate.max_forgetting)} was allowed."
    )
    word, tone = ("passed", "good") if gate.passed else ("failed", "bad")
    return [(tone, f"<b>The retention gate {word}.</b> {detail}")]


def _contamination_notices(record: Record) -> list[tuple[str, str]]:
    notices = []
    for name, overlap in record.contamination.items():
        if overlap.duplicates or overlap.half_overlap * _CONTAMINATION_WARNING_PARTS > overlap.documents:
            text = (
                f"<b>The training data contains held-out text.</b> {bold_name(name)}: {format_count(overlap.duplicates)} of"
                f" {format_count(overlap.documents)} documents are duplicates, {format_count(overlap.half_overlap)} share at"
                " least half of their 13-grams. Its scores look better than they are."
            )
            notices.append(("bad", text))
    return notices

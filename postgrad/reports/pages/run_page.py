"""How do the JSON files of a run become one page that opens anywhere, offline, years later?

Whatever a record lacks is left out or said, never an error: a report is also for runs
that were stopped.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence

from postgrad.reports.html import figures, tables
from postgrad.reports.html.document import (
    FOOTER,
    bold_name,
    details,
    escaped_passage,
    facts,
    figure,
    format_time,
    intro_paragraph,
    preformatted,
    render_page,
    sample_box,
    side_by_side,
    verdict_badge,
)
from postgrad.reports.html.figures import LimitLine, Series, VerticalMark
from postgrad.reports.html.notation import (
    as_list,
    as_mapping,
    as_number,
    escape_html,
    format_compact,
    format_count,
    format_duration,
    format_fixed,
    format_percent,
    format_signed,
    mask_secrets,
    plain_text,
)
from postgrad.reports.html.tables import VERDICTS, Column, Table
from postgrad.reports.sections import drift_tables, relearning_table, selection_tables, task_tables
from postgrad.reports.sections.curves import (
    EARLY_SHARE,
    EARLY_TEXT,
    MAX_SERIES,
    Curves,
    change_estimates,
    change_series,
    read_curves,
)
from postgrad.stats.stability_gap import EvaluationPoint, StabilityGap, stability_gap

_MAX_SAMPLES = 12
_STEP_COLOUR = 7
"""The colour of what is drawn of each step, behind everything else."""
_OVERLAP_WARNING_SHARE = 0.01
"""Of held-out documents, parts of which may be in the training text before a reader is warned of it."""


def run_page(record: Mapping[str, object], metrics: Iterable[Mapping[str, object]]) -> str:
    """One run as a self-contained HTML page: what was learnt and kept, how, and how to do it again.

    `record` is the run's record and `metrics` its rows (kinds `step` and `evaluation`); any key may be
    absent. The intervals of an evaluation row are those of `change`.
    """
    record = as_mapping(record)
    curves = read_curves(metrics)
    name = plain_text(record.get("name"), 120) or "run without a name"
    sections = [
        ("result", "Result", "What was kept, what was learnt", _result_section(record)),
        ("tasks", "Tasks", "What it was asked", task_tables.tasks_section(record, curves.task_values, curves.unit)),
        ("retention", "Retention", "Forgetting while it trained", _retention_section(record, curves)),
        ("choice", "Choice", "Which step was published", _selection_section(record, curves)),
        ("drift", "Drift", "How far it has moved", drift_tables.drift_section(record)),
        (
            "realign",
            "Re-aligned",
            "What a few steps on old text bring back",
            relearning_table.relearning_section(record),
        ),
        ("training", "Training", "Training", _training_section(record, curves)),
        ("mixture", "Mixture", "What was read", _mixture_section(record)),
        ("selection", "Selection", "Which documents were read", selection_tables.selection_section(record)),
        ("samples", "Samples", "Text before and after", _samples_section(record)),
        ("method", "Method", "Stage and machine", _method_section(record)),
        ("again", "Reproduce", "Where it comes from, and how to do it again", _reproduce_section(record)),
    ]
    header = (
        '<p class="over">postgrad \u00b7 report of one stage</p>'
        f"<h1><bdi>{escape_html(name)}</bdi></h1>{headline(record) or _last_evaluation(record, curves)}"
        f"{_run_facts(record, curves)}"
        f"{_notice_boxes(record, curves)}{_verdict_cards(record)}"
    )
    return render_page(f"{name} \u2013 postgrad", header, sections, FOOTER)


def headline(record: Mapping[str, object]) -> str:
    """The result in plain words, `<p class="lead">`: test sets first, then learned ones, then retained ones."""
    scores = as_mapping(record.get("scores"))
    before, after = as_mapping(scores.get("before")), as_mapping(scores.get("after"))
    sentences = []
    for entries, most in (
        (tables.test_set_changes(record), 3),
        (tables.learned_changes(record), 3),
        (tables.retained_changes(record), 3),
    ):
        ranked = sorted(entries, key=lambda n: -abs(as_number(entries[n].get("difference")) or 0.0))
        for set_name in ranked[:most]:
            entry = entries[set_name]
            sides = as_mapping(before.get(set_name)), as_mapping(after.get(set_name))
            sentences.append(_change_sentence(set_name, entry, *sides, tables.loss_unit(record)))
        if len(ranked) > most:
            sentences.append(f"{len(ranked) - most} more of this kind are in the table.")
    return f'<p class="lead">{" ".join(sentences)}</p>' if sentences else ""


def _last_evaluation(record: Mapping[str, object], curves: Curves) -> str:
    """What an unfinished run can say: the last evaluation on the way, or that there is none."""
    if not curves.set_losses:
        text = "No held-out text was scored, so nothing can be said about learning or forgetting."
        if tables.set_names(record):
            text = "There are no scores after training, so nothing can be said about forgetting yet."
        return f'<p class="lead">{text}</p>'
    latest = max(points[-1][0] for points in curves.set_losses.values())
    found = []
    for name, points in list(curves.set_losses.items())[:6]:
        _, _, change, low, high = points[-1]
        if math.isfinite(change):
            known = math.isfinite(low) and math.isfinite(high)
            span = f" (95 % interval {format_signed(low)} to {format_signed(high)})" if known else ""
            found.append(f"{bold_name(name)} {format_signed(change)}{span}")
    when = (
        f"after {format_compact(latest)} trained tokens" if curves.unit != "step" else f"at step {format_count(latest)}"
    )
    return f'<p class="lead">At the last evaluation, {when}, in {tables.loss_unit(record)}: {", ".join(found)}.</p>'


def _change_sentence(
    set_name: str, entry: Mapping[str, object], before: Mapping[str, object], after: Mapping[str, object], unit: str
) -> str:
    said = tables.verdict(entry)
    difference = entry.get("difference")
    span = ""
    if as_number(entry.get("low")) is not None and as_number(entry.get("high")) is not None:
        span = f", 95 % interval {format_signed(entry.get('low'))} to {format_signed(entry.get('high'))}"
    verb = {"learnt": "Learnt", "kept": "Kept", "forgot": "Forgot"}.get(said)
    start = f"{verb} {bold_name(set_name)}" if verb else f"No clear change on {bold_name(set_name)}"
    if entry.get("role") == "test":
        start += " (a test set, looked at once)"
    was, now = before.get("nats"), after.get("nats")
    if as_number(was) is not None and as_number(now) is not None:
        move = f"{format_fixed(was)} \u2192 {format_fixed(now)} {unit} ({format_signed(difference)}{span})"
    else:
        move = f"{format_signed(difference)} {unit}{span}"
    if met := tables.first_metric(before, after):
        metric, then, here = met
        interval = f"95 % interval {format_fixed(here.get('low'))} to {format_fixed(here.get('high'))}"
        move = f"{escape_html(metric, 30)} {format_fixed(then)} \u2192 {format_fixed(here.get('value'))} ({interval}), loss {move}"
    return f"{start}: {move}."


def _verdict_cards(record: Mapping[str, object]) -> str:
    scores = as_mapping(record.get("scores"))
    before, after = as_mapping(scores.get("before")), as_mapping(scores.get("after"))
    shown, br = [], "<br>"
    for set_name in tables.set_names(record)[:12]:
        entry = as_mapping(as_mapping(record.get("changes")).get(set_name))
        if as_number(entry.get("difference")) is None:
            continue
        said = tables.verdict(entry)
        b, a = as_mapping(before.get(set_name)), as_mapping(after.get(set_name))
        lines = []
        big, unit = format_signed(entry["difference"]), tables.loss_unit(record)
        if met := tables.first_metric(b, a):
            metric, was, now = met
            lines += [
                f"95 % interval {format_fixed(now.get('low'))} to {format_fixed(now.get('high'))}",
                f"Loss {big} {unit}",
            ]
            big, unit = f"{format_fixed(was)} \u2192 {format_fixed(now.get('value'))}", escape_html(metric, 30)
        elif as_number(b.get("perplexity")) is not None and as_number(a.get("perplexity")) is not None:
            lines.append(f"Perplexity {format_fixed(b['perplexity'], 2)} \u2192 {format_fixed(a['perplexity'], 2)}")
        if as_number(entry.get("count")) is not None:
            of = f"{format_count(entry['count'])} {escape_html(entry.get('units') or 'units', 30)}"
            lines.append(f"{escape_html(entry['role'], 30)} set, {of}" if entry.get("role") else of)
        shown.append(
            f'<li class="t-{VERDICTS.get(said, ("open",))[0]}"><div class="what">'
            f"<bdi>{escape_html(set_name, 80)}</bdi>"
            f"{verdict_badge(said)}</div>"
            f'<p class="big">{big} <small>{unit}</small></p>'
            f"<p>{br.join(lines)}</p></li>"
        )
    return f'<ul class="cards" aria-label="Verdicts">{"".join(shown)}</ul>' if shown else ""


def _run_facts(record: Mapping[str, object], curves: Curves) -> str:
    model, achieved, plan = (as_mapping(record.get(k)) for k in ("model", "achieved", "plan"))
    tokens = achieved.get("tokens") if as_number(achieved.get("tokens")) is not None else None
    facts = []
    if model.get("start"):
        facts.append(("from", plain_text(mask_secrets(model["start"]), 80)))
    if as_number(model.get("parameters")) is not None:
        facts.append(("parameters", format_compact(model["parameters"])))
    kind = plain_text(as_mapping(as_mapping(record.get("stage")).get("tuning")).get("kind"), 30)
    moving, all_ = as_number(model.get("trainable")), as_number(model.get("parameters"))
    if kind and moving is not None and all_ and moving < all_:
        facts.append(("tuning", f"{kind}, {format_compact(moving)} of them move"))
    update = as_mapping(record.get("update"))
    if update:
        said = f"{format_compact(update.get('moved'))} of {format_compact(update.get('of'))} at a time, by {plain_text(update.get('kind'), 30)}"
        facts.append(("an update moves", said))
    if tokens is not None:
        facts.append(("trained tokens", format_compact(tokens)))
    elif as_number(plan.get("tokens")) is not None:
        facts.append(("planned tokens", format_compact(plan["tokens"])))
    if as_number(achieved.get("seconds")) is not None:
        facts.append(("time", format_duration(achieved["seconds"])))
    if as_number(achieved.get("tokens_per_second")) is not None:
        facts.append(("speed", f"{format_count(achieved['tokens_per_second'])} tokens/s"))
    if curves.last_step:
        facts.append(("steps", format_count(curves.last_step)))
    if as_number(as_mapping(record.get("chosen")).get("step")) is not None:
        facts.append(("published", f"step {format_count(as_mapping(record['chosen'])['step'])}"))
    if record.get("finished") or record.get("created"):
        word = "ended" if record.get("finished") else "started"
        facts.append((word, format_time(record.get("finished") or record.get("created"))))
    lines = "".join(f"<li>{escape_html(k)} <b><bdi>{escape_html(v)}</bdi></b></li>" for k, v in facts)
    return f'<ul class="facts">{lines}</ul>' if lines else ""


def _notice_boxes(record: Mapping[str, object], curves: Curves) -> str:
    """What a reader must know before the numbers: an unfinished run, a failed gate, a leak, bad losses."""
    notices: list[tuple[str, str]] = []
    status = record.get("status")
    after = as_mapping(as_mapping(record.get("scores")).get("after"))
    planned = as_number(as_mapping(record.get("plan")).get("steps"))
    reached = f" after step {format_count(curves.last_step)}" if curves.last_step else ""
    if reached and planned:
        reached += f" of {format_count(planned)}"
    if status == "stopped":
        rest = "" if after else " There are no scores after training; the curves show how far it came."
        notices.append(("", f"<b>This run was stopped{reached}.</b>{rest}"))
    elif status not in ("finished", "gate-failed"):
        said = f"its status is \u201c{escape_html(status, 40)}\u201d" if status else "its record has no status"
        notices.append(
            ("", f"<b>This run is not known to be finished</b>: {said}{reached and ', last seen'}{reached}.")
        )
    elif not after:
        notices.append(("", "<b>This run has no scores after training.</b>"))
    notices += _gate_notices(record)
    if curves.non_finite_count:
        notices.append(
            (
                "bad",
                f"{format_count(curves.non_finite_count)} training losses are not finite numbers; they are gaps here.",
            )
        )
    for name, entry in as_mapping(record.get("overlap")).items():
        entry = as_mapping(entry)
        many = (as_number(entry.get("half")) or 0) > _OVERLAP_WARNING_SHARE * (as_number(entry.get("documents")) or 0)
        if as_number(entry.get("duplicates")) or many:
            notices.append(
                ("bad", f"<b>Held-out text was also in the training data.</b> {bold_name(name)}:"
                 f" {format_count(entry.get('duplicates'))} of {format_count(entry.get('documents'))} documents are"
                 f" duplicates, {format_count(entry.get('half'))} share at least half of their passages. Its"
                 " scores look better than they are.")
            )  # fmt: skip
    return "".join(f'<div class="notice{f" t-{tone}" if tone else ""}"><p>{text}</p></div>' for tone, text in notices)


def _gate_notices(record: Mapping[str, object]) -> list[tuple[str, str]]:
    gate = as_mapping(record.get("gate"))
    if not gate and record.get("status") == "gate-failed":
        return [("bad", "<b>The retention gate failed.</b> The record does not say by how much.")]
    if not gate:
        return []
    worst = as_mapping(gate.get("worst"))
    detail = ""
    if worst:
        high = worst.get("high")
        detail = f" The loss on the worst retained set, {bold_name(worst.get('set'))}, changed by {format_percent(worst.get('rise'))}"
        detail += f" (upper end {format_percent(high)})." if as_number(high) is not None else "."
    limit = f" At most {format_percent(gate.get('max_forgetting'))} was allowed." if "max_forgetting" in gate else ""
    if gate.get("passed") is True:
        return [("good", f"<b>The retention gate passed.</b>{detail}{limit}")]
    return [("bad", f"<b>The retention gate failed.</b>{detail}{limit}")]


def _result_section(record: Mapping[str, object]) -> str:
    names = tables.set_names(record)
    if not names:
        return ""
    kept = change_estimates(tables.retained_changes(record))
    learnt = [*change_estimates(tables.learned_changes(record)), *change_estimates(tables.test_set_changes(record))]
    gate = as_number(as_mapping(record.get("gate")).get("level"))
    limit = LimitLine(gate, f"gate {format_signed(gate)}") if gate is not None else None
    label = f"change of the loss, {tables.loss_unit(record)}"
    words = {"x_label": label, "left_word": "better", "right_word": "worse"}
    plots = []
    if kept:
        plots.append(
            figure(
                "Retained sets",
                lambda w: figures.forest_plot(kept, title="Change on retained sets", width=w, limit=limit, **words),
                note="What the model knew before. Zero is no change; bars are 95 % intervals.",
            )
        )
    if learnt:
        both = [*learnt, *kept]
        plots.append(
            figure(
                "All sets on one scale"
                if kept
                else "Learned and test sets"
                if tables.test_set_changes(record)
                else "Learned sets",
                lambda w: figures.forest_plot(both, title="Change on all sets", width=w, **words),
                note="What was gained beside what it cost.",
            )
        )
    reading = details(
        "How to read these numbers",
        '<p class="note">Held-out text was kept away from training. The loss says how badly the model'
        " predicts it: in <b>nats per token</b>, the mean of minus the log probability of each true next"
        " token; as <b>perplexity</b>, the number of equally likely tokens the model hesitates between (e to"
        " the power of the loss); in <b>bits per byte</b>, which does not depend on the tokenizer. A 95 %"
        " interval that does not contain zero is evidence of a change. <b>Share of range</b> is the"
        " difference as a share of the range from the loss before to that of a uniform guess, ln V.</p>",
    )
    besides = [
        table.html() for table in (tables.pseudo_perplexity_table(record), tables.metrics_table(record)) if table
    ]
    return "".join((tables.score_table(record).html(), *besides, reading, side_by_side(*plots)))


def _retention_section(record: Mapping[str, object], curves: Curves) -> str:
    if not curves.set_losses:
        return ""
    changes = as_mapping(record.get("changes"))
    groups: dict[str, list[str]] = {"retained": [], "learned": [], "other": []}
    for name in curves.set_losses:
        role = curves.set_roles.get(name) or plain_text(as_mapping(changes.get(name)).get("role"))
        groups.get(role, groups["other"]).append(name)
    planned = as_number(as_mapping(record.get("plan")).get("tokens"))
    whole = max(p[0] for points in curves.set_losses.values() for p in points)
    if curves.unit != "step" and planned and record.get("status") != "finished":
        whole = max(whole, planned)
    gate = as_number(as_mapping(record.get("gate")).get("level"))
    published = _published_mark(record, curves)
    gaps = _stability_gaps(groups["retained"], curves)
    body, again = (
        "".join(intro_paragraph(_gap_sentence(name, gap, record, curves, whole)) for name, gap in gaps.items()),
        False,
    )
    for role, heading in (("retained", "Retained"), ("learned", "Learned"), ("other", "Held-out")):
        names = groups[role]
        if not names:
            continue
        left_out = names[MAX_SERIES:]
        series = [change_series(name, curves.set_losses[name]) for name in names[:MAX_SERIES]]
        levels = [LimitLine(gate, "gate")] if gate is not None and role == "retained" else []
        early = sum(1 for p in curves.set_losses[names[0]] if p[0] <= EARLY_SHARE * whole) >= 3
        words = {
            "x_label": curves.unit,
            "y_label": f"change, {tables.loss_unit(record)}",
            "zero": True,
            "levels": levels,
            "least": 0.01,
        }
        deepest = max(gaps.values(), key=lambda g: g.peak, default=None) if role == "retained" else None
        seen_whole = {**words, "marks": [*published, *([VerticalMark(deepest.peak_x, "gap")] if deepest else [])]}
        numbers = _evaluation_table(names, curves, tables.loss_unit(record))
        first = figure(
            f"{heading} sets, the whole run",
            lambda w, s=series, k=seen_whole, t=heading: figures.line_chart(
                s, title=f"{t} sets through the run", width=w, **k
            ),
            numbers=numbers,
            note=f"{len(left_out)} more sets are in the table only." if left_out else "",
        )
        second = ""
        if early:
            again = True
            second = figure(
                f"{heading} sets, the first {EARLY_TEXT}",
                lambda w, s=series, k=words, t=heading: figures.line_chart(
                    s, title=f"{t} sets in the first {EARLY_TEXT} of the run", width=w,
                    x_range=(0.0, EARLY_SHARE * whole), marks=[VerticalMark(0.0, "switch")], **k
                ),
            )  # fmt: skip
        body += side_by_side(first, second)
    said = (
        "Change of the loss on held-out text since the start of the stage. Above zero is forgetting; the"
        " shaded bands are 95 % intervals."
    )
    if again:
        said += (
            " Most forgetting happens right after the switch, so the first"
            f" {EARLY_TEXT} of the run is drawn again beside the whole."
        )
    return intro_paragraph(said) + body


def _stability_gaps(names: Sequence[str], curves: Curves) -> dict[str, StabilityGap]:
    """The stability gap of each retained set that has one."""
    found = {
        name: stability_gap([EvaluationPoint(x, *rest) for x, _, *rest in curves.set_losses[name]]) for name in names
    }
    return {name: gap for name, gap in found.items() if gap is not None}


def _gap_sentence(
    name: str, gap: StabilityGap, record: Mapping[str, object], curves: Curves, total_tokens: float
) -> str:
    """A dip that heals, as a sentence."""
    unit = "" if curves.unit == "step" else " tokens"
    step = "step " if curves.unit == "step" else ""
    return (
        f"Stability gap of {plain_text(name, 80)}: behind the switch its loss rose by {format_fixed(gap.peak)}"
        f" {tables.loss_unit(record)} (at {step}{format_compact(gap.peak_x)}{unit}, {format_percent(gap.peak_x / total_tokens)} of the stage),"
        f" and {format_percent(gap.recovered_share, 0)} of that came back while it trained on (down to {format_signed(gap.recovery)} at"
        f" {step}{format_compact(gap.recovery_x)}{unit}). A model that is taken from inside of the gap is worse than it need be."
    )


def _published_mark(record: Mapping[str, object], curves: Curves) -> list[VerticalMark]:
    """Where the published step lies, when one was chosen."""
    chosen = as_mapping(record.get("chosen"))
    at = as_number(chosen.get("step" if curves.unit == "step" else "trained"))
    return [] if at is None else [VerticalMark(at, "published")]


def _selection_section(record: Mapping[str, object], curves: Curves) -> str:
    """The value that decided, look by look, and what was decided."""
    lines = tables.selected_step_sentences(record)
    if not lines:
        return ""
    chosen = as_mapping(record.get("chosen"))
    by, of = plain_text(chosen.get("by"), 40), plain_text(chosen.get("set"), 60)
    drawn = ""
    if curves.selection_values:
        series = [Series(by, curves.selection_values, has_markers=True, has_label=False)]
        drawn = figure(
            f"{by[:1].upper()}{by[1:]} on {of}",
            lambda w: figures.line_chart(
                series, title=f"{by} on {of} at each look", x_label=curves.unit, y_label=by, width=w,
                zero=False, marks=_published_mark(record, curves)
            ),
            note=f"Each look scores the whole set. Candidates are the looks from step {format_count(chosen.get('first'))} on.",
        )  # fmt: skip
    return "".join(intro_paragraph(line) for line in lines) + side_by_side(drawn)


def _evaluation_table(names: Sequence[str], curves: Curves, unit: str) -> Table:
    """The table behind the curves: at most 60 of the evaluations, the first and last among them."""
    at: dict[float, dict[str, tuple[float, float, float, float, float]]] = {}
    for name in names:
        for point in curves.set_losses[name]:
            at.setdefault(point[0], {})[name] = point
    xs = sorted(at)
    if len(xs) > 60:
        xs = [xs[round(i * (len(xs) - 1) / 59)] for i in range(60)]
    columns = [Column(curves.unit)]
    for name in names:
        group = plain_text(name, 60)
        columns += [Column("loss", group), Column("change (95 %)", group, fields=tables.CHANGE_FIELDS)]
    body = []
    for x in xs:
        line = [tables.count_cell(int(x) if x == int(x) else x)]
        for name in names:
            _, nats, change, low, high = at[x].get(name, (math.nan,) * 5)
            line += [
                tables.value_cell(nats),
                tables.difference_cell({"difference": change, "low": low, "high": high}, 4),
            ]
        body.append(tuple(line))
    return Table(f"Evaluations during training, {unit}", tuple(columns), tuple(body))


def _training_section(record: Mapping[str, object], curves: Curves) -> str:
    drawn = []
    span = max(len(curves.loss) / 40, 1.0)
    if curves.loss:
        lines = [Series("each step", curves.loss, is_faint=True, has_label=False, colour=_STEP_COLOUR)]
        trained = {name: sum(tokens for _, _, tokens in points) for name, points in curves.source_losses.items()}
        largest = sorted(trained, key=lambda name: -trained[name])[:MAX_SERIES]
        sources = [name for name in trained if name in largest]
        if len(sources) > 1:
            for i, name in enumerate(sources):
                points = curves.source_losses[name]
                mean = figures.smooth_points(
                    [(x, y) for x, y, _ in points], max(len(points) / 40, 1.0), [t for _, _, t in points]
                )
                lines.append(Series(name, mean, colour=i if i < _STEP_COLOUR else i + 1))
        else:
            lines.append(
                Series(
                    "smoothed", figures.smooth_points(curves.loss, span, curves.loss_weights), colour=0, has_label=False
                )
            )
        about = "Faint: every step. Solid: smoothed over trained tokens" + (", by source." if len(sources) > 1 else ".")
        if len(trained) > len(sources):
            about += f" {len(trained) - len(sources)} sources with fewer tokens are in the table only."
        drawn.append(
            figure(
                "Training loss",
                lambda w: figures.line_chart(
                    lines, title="Training loss", x_label=curves.unit, y_label=tables.loss_unit(record), width=w
                ),
                note=about,
            )
        )
    planned = [
        (a, b)
        for pair in as_list(record.get("schedule_curve"))
        for a, b in [_number_pair(pair)]
        if a is not None and b is not None
    ]
    done = [(p[0], r) for p, r in zip(curves.step_positions, [r for _, r in curves.learning_rates], strict=False)]
    rate = planned or done
    follows = bool(planned and as_mapping(as_mapping(record.get("stage")).get("optimizer")).get("loss_adaptive"))
    lines = [Series("the schedule's" if follows else "learning rate", rate, has_label=follows, colour=2)]
    lines += [Series("taken", done, colour=3)] if follows else []
    if rate:
        unit = "step" if planned else curves.unit
        now = (
            [VerticalMark(float(curves.last_step), "ended here" if record.get("chosen") else "stopped here")]
            if _is_stopped_early(planned, curves)
            else []
        )
        drawn.append(
            figure(
                "Learning rate",
                lambda w: figures.line_chart(
                    lines, title="Learning rate",
                    x_label=unit,
                    y_label="learning rate", width=w, zero=False, marks=now
                ),
                note="The rate follows the loss: lower where that is high." if follows
                else "The schedule of the stage." if planned else "As recorded at each step.",
            )
        )  # fmt: skip
    if curves.grad_norm:
        norm = [
            Series("each step", curves.grad_norm, is_faint=True, has_label=False, colour=7),
            Series("smoothed", figures.smooth_points(curves.grad_norm, span), has_label=False, colour=3),
        ]
        drawn.append(
            figure(
                "Gradient norm",
                lambda w: figures.line_chart(
                    norm, title="Gradient norm", x_label=curves.unit, y_label="norm before clipping", width=w
                ),
                note="Spikes are kept when the curve is thinned.",
            )
        )
    pulls = [Series(name, points, colour=i) for i, (name, points) in enumerate(list(curves.penalties.items())[:6])]
    if pulls:
        drawn.append(
            figure(
                "Penalties",
                lambda w: figures.line_chart(
                    pulls, title="Penalties", x_label=curves.unit, y_label="added to the loss", width=w
                ),
                note="The value of each penalty at each step, in nats per token; the training loss is told without them.",
            )
        )
    return side_by_side(*drawn)


def _number_pair(pair: object) -> tuple[float | None, float | None]:
    values = (*as_list(pair), None, None)
    return as_number(values[0]), as_number(values[1])


def _is_stopped_early(planned: Sequence[tuple[float, float]], curves: Curves) -> bool:
    return bool(planned and curves.last_step and curves.last_step < planned[-1][0] * 0.99)


def _mixture_section(record: Mapping[str, object]) -> str:
    plan, achieved = as_mapping(record.get("plan")), as_mapping(record.get("achieved"))
    planned = {plain_text(as_mapping(s).get("name")): as_mapping(s) for s in as_list(plan.get("sources"))}
    done = {plain_text(as_mapping(s).get("name")): as_mapping(s) for s in as_list(achieved.get("sources"))}
    pairs = []
    names = list(dict.fromkeys([*planned, *done]))
    about = f"{len(names) - MAX_SERIES} more sources are in the table only." if len(names) > MAX_SERIES else ""
    for name in names[:MAX_SERIES]:
        p, a = planned.get(name, {}), done.get(name, {})
        passes = a.get("passes") if as_number(a.get("passes")) is not None else p.get("passes")
        note = format_percent(p.get("share"), 1)
        if as_number(a.get("share")) is not None:
            note += f" \u2192 {format_percent(a['share'], 1)}"
        if as_number(passes) is not None:
            note += f" \u00b7 {format_fixed(passes, 2)} passes"
        pairs.append((name, as_number(p.get("share")) or 0.0, as_number(a.get("share")) or math.nan, note))
    drawn = []
    if pairs:
        drawn.append(
            figure(
                "Share of the trained tokens",
                lambda w: figures.paired_bars(
                    pairs, title="Mixture, planned and achieved", first="planned", second="achieved", width=w
                ),
                note=about,
            )
        )
    ledger = as_mapping(record.get("ledger"))
    kinds = ("placed", "held_out", "dropped", "truncated")
    bars = [(name, [as_number(as_mapping(entry).get(k)) or 0.0 for k in kinds]) for name, entry in ledger.items()]
    if bars:
        drawn.append(
            figure(
                "Where the tokens of the files went",
                lambda w: figures.stacked_bars(
                    bars[:MAX_SERIES],
                    ("placed in rows", "held out", "dropped", "truncated"),
                    title="Token ledger",
                    width=w,
                ),
                note=about,
            )
        )
    mixture, table = tables.mixture_table(record), tables.ledger_table(record)
    learnt = tables.source_losses_table(record)
    body = side_by_side(*drawn) + (learnt.html() if learnt else "")
    if mixture.rows:
        body += mixture.html()
    if table.rows:
        body += table.html()
    return body


def _samples_section(record: Mapping[str, object]) -> str:
    samples = [as_mapping(s) for s in as_list(record.get("samples"))]
    shown = []
    for sample in samples[:_MAX_SAMPLES]:
        texts = [(k, t) for k, t in (("Before", "before"), ("After", "after"), ("Reference", "reference"))]
        boxes = "".join(
            f'<div><h4>{word}</h4><p dir="auto">{escaped_passage(sample[key]).strip()}</p></div>'
            for word, key in texts
            if sample.get(key) not in (None, "")
        )
        shown.append(sample_box(sample, boxes))
    if not shown:
        return ""
    more = len(samples) - len(shown)
    end = f'<p class="note">{more} more samples are in the record.</p>' if more > 0 else ""
    return (
        intro_paragraph(
            "The same prompts, continued by the model before and after the stage. Samples illustrate; they"
            " prove nothing."
        )
        + "".join(shown)
        + end
    )


def _method_section(record: Mapping[str, object]) -> str:
    execution, model = as_mapping(record.get("execution")), as_mapping(record.get("model"))
    reasons = as_mapping(execution.get("reasons"))
    choices = []
    for key in dict.fromkeys([*(k for k in execution if k != "reasons"), *reasons]):
        value, why = execution.get(key), reasons.get(key)
        small = f"<small>{escape_html(mask_secrets(why), 300)}</small>" if why else ""
        choices.append(
            f"<dt>{escape_html(key, 60)}</dt><dd><bdi>{escape_html(_format_setting(value), 200)}</bdi>{small}</dd>"
        )
    blocks = []
    if model:
        made = as_mapping(model.get("fresh"))
        blocks.append(("Model", facts((k, _format_setting(v)) for k, v in model.items() if k != "fresh")))
        if made:
            told = facts((k, _format_setting(v)) for k, v in made.items() if k not in ("asked", "config"))
            whole = json.dumps(made.get("config"), indent=1, ensure_ascii=False, default=str)
            blocks.append(("Made anew", told + details("Its configuration", preformatted(whole))))
    if choices:
        blocks.append(("Execution, and why", f'<dl class="kv">{"".join(choices)}</dl>'))
    for told in as_list(record.get("penalties")):
        penalty = as_mapping(told)
        kept = ("strength", "weights", "reference", "importance", "left_out")
        entries = [(key.replace("_", " "), _format_setting(penalty[key])) for key in kept if penalty.get(key)]
        blocks.append((f"Penalty: {escape_html(penalty.get('name'), 60)}", facts(entries)))
    update = as_mapping(record.get("update"))
    if update:
        kept = ("kind", "share", "moved", "of", "whole")
        blocks.append(("Update", facts((key, _format_setting(update[key])) for key in kept if key in update)))
    for key, heading in (("machine", "Machine"), ("versions", "Versions")):
        entries = as_mapping(record.get(key))
        if entries:
            blocks.append((heading, facts((k, _format_setting(v)) for k, v in entries.items())))
    body = "".join(f"<div><h3>{h}</h3>{b}</div>" for h, b in blocks if b)
    body = f'<div class="blocks">{body}</div>' if body else ""
    text = record.get("stage_yaml")
    if not text and record.get("stage"):
        text = json.dumps(record["stage"], indent=2, ensure_ascii=False, default=str)
    if text:
        body += details("The exact stage file", preformatted(text))
    return body


def _format_setting(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return format_count(value)
    if isinstance(value, (dict, list, tuple)):
        return json.dumps(value, ensure_ascii=False, default=str)
    return "" if value is None else str(value)


def _reproduce_section(record: Mapping[str, object]) -> str:
    prints = as_mapping(record.get("fingerprints"))
    flat: list[tuple[str, object]] = []
    for key, value in prints.items():
        if isinstance(value, Mapping):
            flat += [(f"{plain_text(key, 40)}: {plain_text(k, 60)}", v) for k, v in value.items()]
        else:
            flat.append((plain_text(key, 60).replace("_", " "), value))
    body = ""
    parents = [as_mapping(p) for p in as_list(record.get("parents"))]
    if parents:
        lines = "".join(
            f"<li><b><bdi>{escape_html(p.get('name') or 'parent', 80)}</bdi></b>"
            f"<span><bdi>{escape_html(mask_secrets(p.get('path')), 200)}</bdi></span>"
            f"<span><code>{escape_html(p.get('fingerprint'), 20)}</code></span></li>"
            for p in parents
        )
        this = f"<li><b><bdi>{escape_html(record.get('name') or 'this stage', 80)}</bdi></b>"
        this += "<span>this stage</span></li>"
        body += f'<h3>Parents</h3><ol class="chain">{lines}{this}</ol>'
    blocks = ""
    if flat:
        blocks += f"<div><h3>Fingerprints</h3>{facts(flat)}</div>"
    when = facts([("created", format_time(record.get("created"))), ("finished", format_time(record.get("finished")))])
    if when:
        blocks += f"<div><h3>When</h3>{when}</div>"
    body += f'<div class="blocks">{blocks}</div>' if blocks else ""
    if record.get("command"):
        body += (
            "<h3>Run it again</h3>"
            + intro_paragraph("With the same start model, data and versions, in the folder of the stage file:")
            + preformatted(record["command"], 2000)
        )  # fmt: skip
    return body

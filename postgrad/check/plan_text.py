"""A plan as lines of text: sources, held-out sets, tasks, budget and learning-rate curve."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from postgrad.foreign_text import plain_text
from postgrad.lineage.record import Contamination, DocumentSelection
from postgrad.optim import lr_schedules
from postgrad.plan.checkpoint_selection import selection_rule_line
from postgrad.plan.evaluation_plan import EvaluationPlan
from postgrad.plan.plan import Plan
from postgrad.plan.prompted_task import PromptedTask
from postgrad.reports.sections.task_section import omissions_text, prompting_text
from postgrad.run.task_scores import describe_task

_PREVIEW_CHARACTERS = 110
"""Characters of a document that are shown."""


def plan_lines(plan: Plan, source_lines: Sequence[str] = (), width: int = 72) -> list[str]:
    """A plan as text, with the `source_lines` below the table of sources."""
    record, block = plan.as_record(), plan.data.mixture.block_size
    lines = [
        f"stage {plan.stage.name}: {plan.model.start.name} -> {_short_path(plan.output)}",
        f"{record.tokens:,} trained tokens in {plan.steps:,} steps of {block} rows x {plan.model.context_length} tokens",
        "",
        f"  {'source':<18} {'role':<7} {'kind':<9} {'documents':>10} {'trained':>13} {'share':>7} {'passes':>7}",
    ]
    for source in record.sources:
        lines.append(
            f"  {source.name:<18} {source.role:<7} {'synthetic' if source.generated_by else source.kind:<9} "
            f"{source.documents:>10,} {source.trained_tokens:>13,} {source.share:>7.2%} {source.passes:>7.2f}"
        )
    lines += ["", *(f"  {line}" for line in source_lines)] if source_lines else []
    for source in record.sources:
        lines += _selection_lines(source.name, source.selection)
    lines += _evaluation_lines(plan.evaluation, plan.data.overlaps)
    lines += ["", *draw_schedule(plan.schedule, plan.steps, width), *(f"note: {note}" for note in plan.notes)]
    return lines


def _selection_lines(name: str, steps: Sequence[DocumentSelection]) -> Iterator[str]:
    """What each filter of a source keeps, with a few documents of both sides."""
    if steps:
        yield ""
    for step in steps:
        before, after, bounds = step.before, step.after, step.score_bounds
        yield (
            f"  {name}, {step.kind}: {after.documents:,} of {before.documents:,} documents are kept "
            f"({after.documents / before.documents:.1%}), {after.tokens:,} of {before.tokens:,} tokens "
            f"({after.tokens / before.tokens:.1%})"
        )
        yield f"    {step.description}" + (f" ({bounds[0]:.3f} to {bounds[1]:.3f} {step.unit})" if bounds else "")
        for side, documents in (("kept", step.kept), ("dropped", step.dropped)):
            for document in documents:
                score = "" if document.value is None else f"{document.value:+.3f} {step.unit}  "
                yield f"    {side:<7} {score}{plain_text(document.text, _PREVIEW_CHARACTERS)}"
                if document.duplicate_of:
                    yield f"            copy of: {plain_text(document.duplicate_of, _PREVIEW_CHARACTERS)}"


def _evaluation_lines(evaluation: EvaluationPlan, overlaps: dict[str, Contamination]) -> list[str]:
    lines = ["", f"  {'held out':<18} {'role':<9} {'documents':>10} {'tokens':>11} {'bytes':>11}"]
    for h in evaluation.sets:
        lines.append(f"  {h.name:<18} {h.role:<9} {len(h):>10,} {h.tokens:>11,} {int(h.bytes.sum()):>11,}")
    for name, overlap in overlaps.items():
        lines.append(
            f"  {name}: {overlap.duplicates} exact copies in the training text (dropped there), "
            f"{overlap.any_overlap} documents share a 13-gram with it, {overlap.half_overlap} at least half of theirs"
        )
    if evaluation.selection_rule:
        lines.append(f"  {selection_rule_line(evaluation.selection_rule)}")
    if evaluation.tasks:
        lines += ["", f"  {'task':<18} {'role':<9} {'items':>6}  prompts"]
        lines += [f"  {t.name:<18} {t.task.role:<9} {len(t):>6,}  {_describe_task(t)}" for t in evaluation.tasks]
    if evaluation.abilities:
        lines += ["", f"  {'ability':<18} {'probes':>6}  prompts"]
        lines += [f"  {t.name:<18} {len(t):>6,}  {_describe_task(t)}" for t in evaluation.abilities]
    return lines


def _describe_task(task: PromptedTask) -> str:
    """The prompts and metrics of a task, and its omissions."""
    entry = describe_task(task)
    parts = (prompting_text(entry), f"by {', '.join(task.metrics)}", omissions_text(entry))
    return "; ".join(part for part in parts if part)


def draw_schedule(schedule: lr_schedules.Schedule, steps: int, width: int = 72, height: int = 8) -> list[str]:
    """The learning rate over the steps, as characters."""
    shades = " ▁▂▃▄▅▆▇█"
    points = [schedule(max(1.0, (i + 0.5) / width * steps)) for i in range(width)]
    top = max(rate for _, rate in lr_schedules.sample_schedule(schedule, steps, 4000))
    levels = [p / top * height if top else 0 for p in points]
    rows = []
    for row in range(height, 0, -1):
        cells = (min(max(level - (row - 1), 0.0), 1.0) for level in levels)
        label = f"{top:.2e}" if row == height else ("0" if row == 1 else "")
        rows.append(f"  {label:>9} |" + "".join(shades[round(c * 8)] for c in cells))
    rows.append(f"  {'rate':>9} +" + "-" * width)
    rows.append(f"  {'':>9}  step 1: {schedule(1):.2e}".ljust(width - 12) + f"step {steps:,}: {schedule(steps):.2e}")
    return rows


def _short_path(path: Path) -> str:
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)

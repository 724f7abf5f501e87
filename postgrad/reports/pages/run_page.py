"""The report of one run: a self-contained HTML page, also for runs that were stopped."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from postgrad.foreign_text import plain_text
from postgrad.lineage.metrics import MetricsRow
from postgrad.lineage.record import Record
from postgrad.reports.html.document import intro_paragraph, render_page, sample_box
from postgrad.reports.sections.ability_section import abilities_section
from postgrad.reports.sections.curves import read_curves
from postgrad.reports.sections.drift_section import drift_section
from postgrad.reports.sections.method_section import method_section, reproduce_section
from postgrad.reports.sections.mixture_section import mixture_section
from postgrad.reports.sections.overview import damage_notice, headline, notice_boxes, run_facts, verdict_cards
from postgrad.reports.sections.published_step import published_step_section
from postgrad.reports.sections.relearning_section import relearning_section
from postgrad.reports.sections.result_section import result_section
from postgrad.reports.sections.retention_section import retention_section
from postgrad.reports.sections.selection_section import selection_section
from postgrad.reports.sections.task_section import tasks_section
from postgrad.reports.sections.training_section import training_section

_MAX_SAMPLES = 12


def run_page(record: Record, metrics: Iterable[MetricsRow], damage: Sequence[str] = ()) -> str:
    """One run as a page: what was learned and kept, how, and how to reproduce it. `damage`: of the metrics file."""
    curves = read_curves(metrics)
    name = plain_text(record.name, 120)
    sections = [
        ("result", "Result", "Learned and kept", result_section(record)),
        ("tasks", "Tasks", "Tasks", tasks_section(record, curves.task_values)),
        ("abilities", "Abilities", "Abilities", abilities_section(record)),
        ("retention", "Retention", "Forgetting during training", retention_section(record, curves)),
        ("selection", "Checkpoint", "Published checkpoint", published_step_section(record, curves)),
        ("drift", "Drift", "How far the model moved", drift_section(record)),
        ("relearning", "Relearning", "Forgetting recovered by a few steps", relearning_section(record)),
        ("training", "Training", "Training", training_section(record, curves)),
        ("mixture", "Mixture", "Training data", mixture_section(record)),
        ("filters", "Filters", "Document filters", selection_section(record)),
        ("samples", "Samples", "Text before and after", _samples_section(record)),
        ("method", "Method", "Stage and machine", method_section(record)),
        ("again", "Reproduce", "Provenance and reproduction", reproduce_section(record)),
    ]
    lead = headline(record, curves) + run_facts(record, curves) + damage_notice(damage)
    lead += notice_boxes(record, curves) + verdict_cards(record)
    return render_page(name, "report of one stage", name, lead, sections)


def _samples_section(record: Record) -> str:
    if not record.samples:
        return ""
    boxes = "".join(
        sample_box(sample, (("Before", sample.before), ("After", sample.after), ("Reference", sample.reference)))
        for sample in record.samples[:_MAX_SAMPLES]
    )
    more = len(record.samples) - _MAX_SAMPLES
    note = f'<p class="note">{more} more samples are in the record.</p>' if more > 0 else ""
    intro = intro_paragraph(
        "The same prompts continued by the model before and after the stage. Samples only illustrate."
    )
    return intro + boxes + note

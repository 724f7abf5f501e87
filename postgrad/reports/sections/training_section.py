"""The course of the training: loss, learning rate, gradient norm and penalties at each step."""

from __future__ import annotations

from postgrad.lineage.record import Record
from postgrad.reports.html.charts import Series, VerticalMark, line_chart, smooth_points
from postgrad.reports.html.document import figure, side_by_side
from postgrad.reports.sections.curves import MAX_SERIES, X_LABEL, Curves
from postgrad.reports.sections.held_out_tables import loss_unit

_STEP_COLOUR = 7
"""The colour of single steps, behind everything else."""


def training_section(record: Record, curves: Curves) -> str:
    """The section of a run's page."""
    return side_by_side(
        _loss_figure(record, curves),
        _learning_rate_figure(record, curves),
        _grad_norm_figure(curves),
        _penalty_figure(curves),
    )


def _loss_figure(record: Record, curves: Curves) -> str:
    if not curves.loss:
        return ""
    lines = [Series("each step", curves.loss, is_faint=True, has_label=False, colour=_STEP_COLOUR)]
    tokens = {name: sum(t for _, _, t in points) for name, points in curves.source_losses.items()}
    largest = sorted(tokens, key=lambda name: -tokens[name])[:MAX_SERIES]
    sources = [name for name in tokens if name in largest]
    note = "Faint: every step. Solid: smoothed over trained tokens"
    if len(sources) > 1:
        note += ", by source."
        for i, name in enumerate(sources):
            points = curves.source_losses[name]
            mean = smooth_points([(x, y) for x, y, _ in points], max(len(points) / 40, 1.0), [t for _, _, t in points])
            lines.append(Series(name, mean, colour=i if i < _STEP_COLOUR else i + 1))
    else:
        note += "."
        mean = smooth_points(curves.loss, max(len(curves.loss) / 40, 1.0), curves.loss_weights)
        lines.append(Series("smoothed", mean, colour=0, has_label=False))
    if len(tokens) > len(sources):
        note += f" {len(tokens) - len(sources)} sources with fewer tokens are in the table only."
    return figure(
        "Training loss",
        lambda w: line_chart(lines, title="Training loss", x_label=X_LABEL, y_label=loss_unit(record), width=w),
        note=note,
    )


def _learning_rate_figure(record: Record, curves: Curves) -> str:
    planned, rates = record.schedule_curve, curves.learning_rates
    if not planned and not rates:
        return ""
    is_adaptive = bool(planned and record.stage.get("optimizer", {}).get("loss_adaptive"))
    lines = [Series("schedule" if is_adaptive else "learning rate", planned or rates, has_label=is_adaptive, colour=2)]
    if is_adaptive:
        lines.append(Series("applied", rates, colour=3))
    marks = []
    if planned and curves.last_step and curves.last_step < planned[-1][0] * 0.99:
        word = "now" if record.status == "running" else "ended here" if record.published_checkpoint else "stopped here"
        marks.append(VerticalMark(float(curves.last_step), word))
    note = "The schedule of the stage." if planned else "As recorded at each step."
    if is_adaptive:
        note = "The learning rate adapts to the loss: it is lower where the loss is high."
    return figure(
        "Learning rate",
        lambda w: line_chart(
            lines, title="Learning rate", x_label="step", y_label="learning rate", width=w, zero=False, marks=marks
        ),
        note=note,
    )


def _grad_norm_figure(curves: Curves) -> str:
    if not curves.grad_norm:
        return ""
    smoothed = smooth_points(curves.grad_norm, max(len(curves.loss) / 40, 1.0))
    lines = [
        Series("each step", curves.grad_norm, is_faint=True, has_label=False, colour=_STEP_COLOUR),
        Series("smoothed", smoothed, has_label=False, colour=3),
    ]
    return figure(
        "Gradient norm",
        lambda w: line_chart(lines, title="Gradient norm", x_label=X_LABEL, y_label="norm before clipping", width=w),
        note="Spikes are kept when the curve is thinned.",
    )


def _penalty_figure(curves: Curves) -> str:
    lines = [Series(name, points, colour=i) for i, (name, points) in enumerate(list(curves.penalties.items())[:6])]
    if not lines:
        return ""
    return figure(
        "Penalties",
        lambda w: line_chart(lines, title="Penalties", x_label=X_LABEL, y_label="nats per token", width=w),
        note="The penalty terms at each step. The training loss above does not include them.",
    )

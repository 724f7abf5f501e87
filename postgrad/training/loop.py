"""The training loop: a generator of step reports, without callbacks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from postgrad.data.loading.loader import Loader
from postgrad.errors import NonFiniteError
from postgrad.lineage.metrics import SkippedStepRow
from postgrad.lineage.record import SkippedRow
from postgrad.training.step import Run, StepFunction, StepReport, StepWithoutUpdate, train_step


def train_steps(
    run: Run, loader: Loader, last_step: int, step_function: StepFunction = train_step
) -> Iterator[StepReport | SkippedStepRow]:
    """Train up to `last_step`, and yield a report after each step, or the row of a step that was skipped.

    Raises `NonFiniteError` when more than `run.max_skipped_steps` steps have a loss or gradient that is not finite.
    """
    run.model.train()
    while run.step < last_step:
        report = step_function(run, loader(run.step + 1, last=last_step))
        if isinstance(report, StepReport):
            yield report
            continue
        row = _make_row(report, loader, run.sources)
        if run.skipped_steps > run.max_skipped_steps:
            raise NonFiniteError(
                f"loss {report.loss} and gradient norm {report.gradient_norm} ({row.list_rows()}); the weights are unchanged, "
                f"and {run.skipped_steps - 1} earlier steps were skipped",
                where=f"step {row.step}",
                expected=f"at most {run.max_skipped_steps} steps whose loss or gradient is not finite",
                hint="raise optimizer.max_skipped_steps (half of the steps count at most) and repeat the command: it resumes "
                "from the last checkpoint; if most steps fail, lower schedule.peak in a stage with another `output`",
            )
        yield row


def _make_row(report: StepWithoutUpdate, loader: Loader, sources: Sequence[str]) -> SkippedStepRow:
    """The row of the metrics, with the rows of the sources that were not finite; without any, those of the whole step."""
    mixture_rows = loader.rows(report.step)
    first = loader.first_position(report.step)
    indices = [position - first for position in report.positions] or range(len(mixture_rows))
    return SkippedStepRow(
        step=report.step,
        tokens=report.tokens,
        trained_tokens=report.trained_tokens,
        loss=_finite(report.loss),
        grad_norm=_finite(report.gradient_norm),
        rows=[SkippedRow(source=sources[mixture_rows[i][0]], row=mixture_rows[i][1]) for i in indices],
    )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None

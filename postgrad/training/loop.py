"""The training loop: a generator of step reports, without callbacks."""

from __future__ import annotations

from collections.abc import Iterator

from postgrad.data.loading.loader import Loader
from postgrad.training.step import Run, StepFunction, StepReport, train_step


def train_steps(
    run: Run, loader: Loader, last_step: int, step_function: StepFunction = train_step
) -> Iterator[StepReport]:
    """Train up to `last_step`, and yield a report after each step."""
    run.model.train()
    while run.step < last_step:
        step = run.step + 1
        yield step_function(run, loader(step, last=last_step))

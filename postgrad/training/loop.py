"""The loop: a generator of step reports. Whoever iterates it observes; nothing is called back."""

from __future__ import annotations

from collections.abc import Iterator

from postgrad.data.loading.loader import Loader
from postgrad.training.step import Run, StepFunction, StepReport, train_step


def train_steps(
    run: Run, loader: Loader, last_step: int, step_function: StepFunction = train_step
) -> Iterator[StepReport]:
    """Train from where the run stands to step `until` by steps of a sort, handing out a report after each one."""
    run.model.train()
    while run.step < last_step:
        step = run.step + 1
        yield step_function(run, loader(step, last=last_step))

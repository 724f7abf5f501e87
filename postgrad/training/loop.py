"""The loop: a generator of step reports. Whoever iterates it observes; nothing is called back."""

from __future__ import annotations

from collections.abc import Iterator

from postgrad.data.loading.loader import Loader
from postgrad.training.step import Run, Step, StepReport, train_step


def steps(run: Run, loader: Loader, until: int, step_of: Step = train_step) -> Iterator[StepReport]:
    """Train from where the run stands to step `until` by steps of a sort, handing out a report after each one."""
    run.model.train()
    while run.step < until:
        step = run.step + 1
        yield step_of(run, loader(step, last=until))

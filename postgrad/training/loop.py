"""The loop: a generator of step reports. Whoever iterates it observes; nothing is called back."""

from __future__ import annotations

from collections.abc import Iterator

from postgrad.data.loader import Loader
from postgrad.training.step import Run, StepReport, train_step


def steps(run: Run, loader: Loader, until: int) -> Iterator[StepReport]:
    """Train from where the run stands to step `until`, handing out a report after each step."""
    run.model.train()
    while run.step < until:
        step = run.step + 1
        yield train_step(run, loader(step, last=until))

"""Events of a run: what `run_stage` yields, for a terminal, a notebook or a study to show."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from postgrad.hardware.execution import Execution
from postgrad.lineage.metrics import EvaluationRow, SkippedStepRow
from postgrad.lineage.record import Record
from postgrad.plan.plan import Plan
from postgrad.reports.notebook import run_html
from postgrad.run.tuned_model import ParameterCounts
from postgrad.training.step import StepReport


@dataclass(frozen=True)
class RunStarted:
    """The run is built, or restored from a checkpoint; training continues after `step` (0: a new run)."""

    plan: Plan
    execution: Execution
    step: int
    counts: ParameterCounts


@dataclass(frozen=True)
class StepCompleted:
    """One optimizer step.

    `seconds`: its duration, without evaluations and saves. `tokens_per_second`: trained tokens, smoothed over steps.
    `seconds_left`: estimated training time to the last step (NaN before there is an estimate).
    """

    report: StepReport
    seconds: float
    tokens_per_second: float
    seconds_left: float


@dataclass(frozen=True)
class EvaluationCompleted:
    """The held-out sets were scored during training. `row`: the line of metrics.jsonl, losses in nats per token."""

    row: EvaluationRow


@dataclass(frozen=True)
class CheckpointSaved:
    """A checkpoint was published in `folder`."""

    step: int
    folder: Path


@dataclass(frozen=True)
class PhaseStarted:
    """Work other than training steps begins. `is_evaluation`: it scores held-out text."""

    message: str
    is_evaluation: bool = False


@dataclass(frozen=True)
class InfoMessage:
    """A result of the run that is worth showing, as text."""

    message: str


@dataclass(frozen=True)
class WarningMessage:
    """A problem that does not end the run."""

    message: str


@dataclass(frozen=True)
class StepSkipped(WarningMessage):
    """A step changed no weight, since its loss or gradient was not finite. `row`: the line of metrics.jsonl."""

    row: SkippedStepRow


@dataclass(frozen=True)
class RunStopped:
    """The user interrupted the run; it is saved at `step` of `steps`."""

    step: int
    steps: int


@dataclass(frozen=True)
class RunFinished:
    """The run is complete. `already_complete`: an earlier process finished it, nothing was done."""

    record: Record
    run_folder: Path
    already_complete: bool = False

    def _repr_html_(self) -> str:
        return run_html(self.record, self.run_folder)


RunEvent = (
    RunStarted
    | StepCompleted
    | EvaluationCompleted
    | CheckpointSaved
    | PhaseStarted
    | InfoMessage
    | WarningMessage
    | StepSkipped
    | RunStopped
    | RunFinished
)

Result = TypeVar("Result")
Phase = Generator[RunEvent, None, Result]
"""A phase of a run: yields events and returns its result."""

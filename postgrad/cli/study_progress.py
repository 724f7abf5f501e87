"""Progress of a study: a table of its arms on a terminal, plain lines elsewhere, or JSON events."""

from __future__ import annotations

import json
import math
import statistics
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from rich.live import Live
from rich.table import Table

from postgrad.cli.terminal import make_console
from postgrad.lineage.metrics import EvaluationRow
from postgrad.reports.html.notation import format_duration, format_signed
from postgrad.studies.run_step import StepProgress, StepWarning
from postgrad.studies.run_study import StepFailed, StepFinished, StepStarted, StudyEvent, StudyFinished
from postgrad.studies.step_graph import StepGraph

_PLAIN_EVERY_SECONDS = 15.0
_BAR = 16


@dataclass
class StudyProgress:
    """The fraction done of each step, and the changes of loss at each run's last evaluation."""

    work: StepGraph
    expected: Mapping[str, float]
    """Seconds by step, where they were estimated."""
    fractions: dict[str, float] = field(default_factory=dict)
    activities: dict[str, str] = field(default_factory=dict)
    evaluations: dict[str, EvaluationRow] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)
    start_times: dict[str, float] = field(default_factory=dict)
    durations: dict[str, float] = field(default_factory=dict)

    def update(self, event: StudyEvent) -> None:
        """Apply an event."""
        match event:
            case StepStarted(key, _):
                self.activities[key], self.start_times[key] = "starting", time.monotonic()
            case StepProgress(key, activity, done, total, row):
                self.fractions[key] = min(done / max(total, 1), 0.99)
                self.activities[key] = activity
                if row is not None:
                    self.evaluations[key] = row
            case StepFinished(key, _, is_cached):
                self.fractions[key] = 1.0
                self.activities.pop(key, None)
                if not is_cached:
                    self.durations[key] = time.monotonic() - self.start_times[key]
            case StepFailed(key, error):
                self.errors[key] = error
                self.activities.pop(key, None)

    def fraction_done(self, arm: str) -> float:
        """The fraction of an arm that is done, weighted by the estimated time of its steps."""
        keys = {key for chain in self.work.arm_chains(arm) for key in self.work.required_steps(chain.last_step)} - {
            self.work.base_step
        }
        weights = {key: max(self.expected.get(key, 0.0), 1e-3) for key in keys}
        return sum(weights[k] * self.fractions.get(k, 0.0) for k in keys) / sum(weights.values())

    def state(self, arm: str) -> str:
        """`waiting`, `failed`, `done`, or the current activity."""
        keys = {key for chain in self.work.arm_chains(arm) for key in chain.steps}
        if keys & self.errors.keys():
            return "failed"
        activities = [self.activities[key] for key in keys if key in self.activities]
        if activities:
            return activities[0]
        done = sum(self.fractions.get(chain.last_step, 0.0) >= 1 for chain in self.work.arm_chains(arm))
        return "done" if done == len(self.work.arm_chains(arm)) else "waiting" if not done else f"{done} done"

    def mean_change(self, arm: str, role: str) -> float | None:
        """The mean change on the sets of a role at the last evaluation of each seed's last run."""
        changes = []
        for chain in self.work.arm_chains(arm):
            row = next((self.evaluations[key] for key in reversed(chain.steps) if key in self.evaluations), None)
            if row is not None:
                changes += [entry.change for entry in row.sets.values() if entry.role == role]
        return statistics.fmean(changes) if changes else None

    def seconds_left(self) -> float:
        """Remaining seconds: the estimates, scaled by the error of the estimates so far."""
        known = [k for k in self.durations if self.expected.get(k)]
        expected = sum(self.expected[k] for k in known)
        ratio = sum(self.durations[k] for k in known) / expected if expected else 1.0
        return ratio * sum(s * (1 - self.fractions.get(k, 0.0)) for k, s in self.expected.items())


class StudyScreen:
    """Shows the progress of a study."""

    def show_message(self, text: str) -> None:
        """A preparation, before the first step."""

    def show(self, event: StudyEvent, progress: StudyProgress) -> None:
        """An event of the study."""

    def close(self) -> None:
        """The end of the progress."""


def make_study_screen(as_json: bool) -> StudyScreen:
    """JSON lines on request; else a live table on a terminal and plain lines in a file or pipe."""
    if as_json:
        return _JsonStudyScreen()
    return _LiveStudyScreen() if sys.stderr.isatty() else _PlainStudyScreen()


def watch_study(events: Iterable[StudyEvent], progress: StudyProgress, screen: StudyScreen) -> StudyFinished:
    """Show every event and return the last one, the outcome."""
    ended = None
    try:
        for event in events:
            progress.update(event)
            screen.show(event, progress)
            if isinstance(event, StudyFinished):
                ended = event
    finally:
        screen.close()
    assert ended is not None
    return ended


def _time_left(progress: StudyProgress) -> str:
    return f"{format_duration(progress.seconds_left())} left"


def _step_slug(progress: StudyProgress, key: str) -> str:
    return progress.work.steps[key].slug


def _evaluation_text(row: EvaluationRow) -> str:
    return ", ".join(f"{name} {format_signed(entry.change)}" for name, entry in row.sets.items())


class _PlainStudyScreen(StudyScreen):
    """A line when a run starts and ends, and a few in between."""

    def __init__(self) -> None:
        self._last_line_time = -math.inf

    def show_message(self, text: str) -> None:
        if time.monotonic() - self._last_line_time > _PLAIN_EVERY_SECONDS:
            self._line(f"{text} ...")

    def show(self, event: StudyEvent, progress: StudyProgress) -> None:
        match event:
            case StepStarted(key, device):
                on = f" on device {device}" if device else ""
                self._line(f"{_step_slug(progress, key)} starts{on}")
            case StepProgress(key, activity, done, total, row) if (
                time.monotonic() - self._last_line_time > _PLAIN_EVERY_SECONDS
            ):
                evaluation = f"; {_evaluation_text(row)}" if row else ""
                self._line(
                    f"{_step_slug(progress, key)}: {activity}, {done:,} of {total:,}{evaluation}; {_time_left(progress)}"
                )
            case StepFinished(key, seconds, False):
                row = progress.evaluations.get(key)
                evaluation = f": {_evaluation_text(row)}" if row else ""
                self._line(
                    f"{_step_slug(progress, key)} done in {format_duration(seconds)}{evaluation}; {_time_left(progress)}"
                )
            case StepFailed(key, error):
                self._line(f"{_step_slug(progress, key)} FAILED: {error}")
            case StepWarning(key, message):
                self._line(f"{_step_slug(progress, key)}: warning: {message}")

    def _line(self, text: str) -> None:
        self._last_line_time = time.monotonic()
        print(text, file=sys.stderr, flush=True)


class _LiveStudyScreen(StudyScreen):
    """A live table of the arms, and lasting lines above it."""

    def __init__(self) -> None:
        self.console = make_console(stderr=True)
        self.live: Live | None = None

    def show_message(self, text: str) -> None:
        if self.live is None:
            self.live = Live(
                console=self.console,
                refresh_per_second=4,
                transient=True,
                redirect_stdout=False,  # the streams are guarded already
                redirect_stderr=False,
            )
            self.live.start()
        self.live.update(f"{text} ...")

    def show(self, event: StudyEvent, progress: StudyProgress) -> None:
        self.show_message("") if self.live is None else None
        assert self.live is not None
        match event:
            case StepFailed(key, error):
                self.console.print(f"{_step_slug(progress, key)} FAILED: {error}")
            case StepWarning(key, message):
                self.console.print(f"{_step_slug(progress, key)}: warning: {message}")
        self.live.update(progress_table(progress))

    def close(self) -> None:
        if self.live is not None:
            self.live.stop()
            self.live = None


def progress_table(progress: StudyProgress) -> Table:
    """The arms with their progress, the base first."""
    table = Table(title=f"{progress.work.study.name}: about {_time_left(progress)}", title_justify="left")
    for heading in ("arm", "", "now", "forgotten so far", "new text"):
        table.add_column(heading, justify="right" if heading in ("forgotten so far", "new text") else "left")
    base = progress.work.base_step
    if base is not None:
        done = progress.fractions.get(base, 0.0)
        table.add_row(
            "(base)", _progress_bar(done), progress.activities.get(base, "done" if done >= 1 else "waiting"), "", ""
        )
    for arm in progress.work.study.arms:
        old, new = progress.mean_change(arm, "retained"), progress.mean_change(arm, "learned")
        numbers = ["" if value is None else format_signed(value) for value in (old, new)]
        table.add_row(arm, _progress_bar(progress.fraction_done(arm)), progress.state(arm), *numbers)
    return table


def _progress_bar(fraction: float) -> str:
    full = round(fraction * _BAR)
    return "━" * full + "·" * (_BAR - full) + f" {fraction:>4.0%}"


class _JsonStudyScreen(StudyScreen):
    """One JSON object a line on standard error; the result itself goes to standard output."""

    def show_message(self, text: str) -> None:
        self._line({"event": "preparing", "message": text})

    def show(self, event: StudyEvent, progress: StudyProgress) -> None:
        match event:
            case StepStarted(key, device):
                self._line({"event": "started", "step": _step_slug(progress, key), "key": key, "device": device})
            case StepFinished(key, seconds, is_cached):
                row = {
                    "event": "finished",
                    "step": _step_slug(progress, key),
                    "key": key,
                    "seconds": seconds,
                    "is_cached": is_cached,
                }
                self._line({**row, "remaining_seconds": progress.seconds_left()})
            case StepFailed(key, error):
                self._line({"event": "failed", "step": _step_slug(progress, key), "key": key, "error": error})
            case StepWarning(key, message):
                self._line({"event": "warning", "step": _step_slug(progress, key), "message": message})

    @staticmethod
    def _line(row: Mapping[str, Any]) -> None:
        print(json.dumps(row), file=sys.stderr, flush=True)

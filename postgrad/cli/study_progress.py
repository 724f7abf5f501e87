"""What does the user see while a study is carried out? Each arm, how far it is and what it forgot; or lines, or JSON."""

from __future__ import annotations

import json
import math
import statistics
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from rich.console import Console
from rich.live import Live
from rich.table import Table

from postgrad.lineage.metrics import EvaluationRow
from postgrad.reports.html.notation import format_duration, format_signed
from postgrad.studies.run_step import StepProgress, StepWarning
from postgrad.studies.run_study import StepFailed, StepFinished, StepStarted, StudyEvent, StudyFinished
from postgrad.studies.step_graph import StepGraph

_PLAIN_EVERY_SECONDS = 15.0
_BAR = 16


@dataclass
class StudyProgress:
    """How far a study is: each step's part that is done, and what each run has forgotten and learnt at its last look."""

    work: StepGraph
    expected: Mapping[str, float]
    """Seconds by step, as far as they are known beforehand."""
    fractions: dict[str, float] = field(default_factory=dict)
    activities: dict[str, str] = field(default_factory=dict)
    evaluations: dict[str, dict[str, Any]] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)
    start_times: dict[str, float] = field(default_factory=dict)
    durations: dict[str, float] = field(default_factory=dict)

    def update(self, event: StudyEvent) -> None:
        """What an event changes."""
        match event:
            case StepStarted(key, _):
                self.activities[key], self.start_times[key] = "begins", time.monotonic()
            case StepProgress(key, what, done, total, row):
                self.fractions[key] = min(done / max(total, 1), 0.99)
                self.activities[key] = what
                if row is not None:
                    self.evaluations[key] = row
            case StepFinished(key, _, before):
                self.fractions[key] = 1.0
                self.activities.pop(key, None)
                if not before:
                    self.durations[key] = time.monotonic() - self.start_times[key]
            case StepFailed(key, error):
                self.errors[key] = error
                self.activities.pop(key, None)

    def fraction_done(self, arm: str) -> float:
        """How much of an arm is done, by what its steps are expected to take."""
        keys = {key for chain in self.work.arm_chains(arm) for key in self.work.required_steps(chain.last_step)} - {
            self.work.base_step
        }
        weights = {key: max(self.expected.get(key, 0.0), 1e-3) for key in keys}
        return sum(weights[k] * self.fractions.get(k, 0.0) for k in keys) / sum(weights.values())

    def state(self, arm: str) -> str:
        """In a word or two."""
        keys = {key for chain in self.work.arm_chains(arm) for key in chain.steps}
        if keys & self.errors.keys():
            return "failed"
        now = [self.activities[key] for key in keys if key in self.activities]
        if now:
            return now[0]
        there = sum(self.fractions.get(chain.last_step, 0.0) >= 1 for chain in self.work.arm_chains(arm))
        return "done" if there == len(self.work.arm_chains(arm)) else "waits" if not there else f"{there} done"

    def mean_change(self, arm: str, role: str) -> float | None:
        """The mean change on the sets of a role at the last look of each seed's last run."""
        found = []
        for chain in self.work.arm_chains(arm):
            row = next((self.evaluations[key] for key in reversed(chain.steps) if key in self.evaluations), None)
            if row is not None:
                found += [entry.change for entry in row.sets.values() if entry.role == role]
        return statistics.fmean(found) if found else None

    def seconds_left(self) -> float:
        """Seconds for what is left: as estimated, in the measure of how far the estimates have been off."""
        known = [k for k in self.durations if self.expected.get(k)]
        expected = sum(self.expected[k] for k in known)
        off = sum(self.durations[k] for k in known) / expected if expected else 1.0
        return off * sum(s * (1 - self.fractions.get(k, 0.0)) for k, s in self.expected.items())


class StudyScreen(Protocol):
    """Shows how far a study is."""

    def show_message(self, text: str) -> None:
        """Something is being prepared."""

    def show(self, event: StudyEvent, progress: StudyProgress) -> None:
        """Something happened."""

    def close(self) -> None:
        """Nothing more will come."""


def make_study_screen(as_json: bool) -> StudyScreen:
    """JSON lines when asked for; else a live table on a terminal and plain lines in a file or pipe."""
    if as_json:
        return _JsonStudyScreen()
    return _LiveStudyScreen() if sys.stderr.isatty() else _PlainStudyScreen()


def watch_study(events: Iterable[StudyEvent], progress: StudyProgress, screen: StudyScreen) -> StudyFinished:
    """Show every event; the last one tells how it ended."""
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


def _step_slug(progress: StudyProgress, key: str) -> str:
    return progress.work.steps[key].slug


def _evaluation_text(row: EvaluationRow) -> str:
    return ", ".join(f"{name} {format_signed(entry.change)}" for name, entry in row.sets.items())


class _PlainStudyScreen:
    """Lines: one when a run begins and ends, and a few in between."""

    def __init__(self) -> None:
        self._last_line_time = -math.inf

    def show_message(self, text: str) -> None:
        if time.monotonic() - self._last_line_time > _PLAIN_EVERY_SECONDS:
            self._line(f"{text} ...")

    def show(self, event: StudyEvent, progress: StudyProgress) -> None:
        match event:
            case StepStarted(key, device):
                on = f" on device {device}" if device else ""
                self._line(f"{_step_slug(progress, key)} begins{on}")
            case StepProgress(key, what, done, total, row) if (
                time.monotonic() - self._last_line_time > _PLAIN_EVERY_SECONDS
            ):
                look = f"; {_evaluation_text(row)}" if row else ""
                self._line(
                    f"{_step_slug(progress, key)}: {what}, {done:,} of {total:,}{look}; {format_duration(progress.seconds_left())} left"
                )
            case StepFinished(key, seconds, False):
                row = progress.evaluations.get(key)
                look = f": {_evaluation_text(row)}" if row else ""
                self._line(
                    f"{_step_slug(progress, key)} done in {format_duration(seconds)}{look}; {format_duration(progress.seconds_left())} left"
                )
            case StepFailed(key, error):
                self._line(f"{_step_slug(progress, key)} FAILED: {error}")
            case StepWarning(key, what):
                self._line(f"{_step_slug(progress, key)}: warning: {what}")

    def close(self) -> None:
        pass

    def _line(self, text: str) -> None:
        self._last_line_time = time.monotonic()
        print(text, file=sys.stderr, flush=True)


class _LiveStudyScreen:
    """A table of the arms that is drawn anew, and lines above it for what stays worth knowing."""

    def __init__(self) -> None:
        self.console = Console(stderr=True, highlight=False)
        self.live: Live | None = None

    def show_message(self, text: str) -> None:
        if self.live is None:
            self.live = Live(console=self.console, refresh_per_second=4, transient=True)
            self.live.start()
        self.live.update(f"{text} ...")

    def show(self, event: StudyEvent, progress: StudyProgress) -> None:
        self.show_message("") if self.live is None else None
        assert self.live is not None
        match event:
            case StepFailed(key, error):
                self.console.print(f"{_step_slug(progress, key)} FAILED: {error}", markup=False)
            case StepWarning(key, what):
                self.console.print(f"{_step_slug(progress, key)}: warning: {what}", markup=False)
        self.live.update(progress_table(progress))

    def close(self) -> None:
        if self.live is not None:
            self.live.stop()
            self.live = None


def progress_table(progress: StudyProgress) -> Table:
    """The arms, the base first."""
    table = Table(
        title=f"{progress.work.study.name}: about {format_duration(progress.seconds_left())} left", title_justify="left"
    )
    for heading in ("arm", "", "now", "forgotten so far", "new text"):
        table.add_column(heading, justify="right" if heading in ("forgotten so far", "new text") else "left")
    base = progress.work.base_step
    if base is not None:
        done = progress.fractions.get(base, 0.0)
        table.add_row(
            "(base)", _progress_bar(done), progress.activities.get(base, "done" if done >= 1 else "waits"), "", ""
        )
    for arm in progress.work.study.arms:
        old, new = progress.mean_change(arm, "retained"), progress.mean_change(arm, "learned")
        numbers = ["" if value is None else format_signed(value) for value in (old, new)]
        table.add_row(arm, _progress_bar(progress.fraction_done(arm)), progress.state(arm), *numbers)
    return table


def _progress_bar(fraction: float) -> str:
    full = round(fraction * _BAR)
    return "━" * full + "·" * (_BAR - full) + f" {fraction:>4.0%}"


class _JsonStudyScreen:
    """One JSON object a line on standard error; the result itself goes to standard output."""

    def show_message(self, text: str) -> None:
        self._line({"event": "preparing", "what": text})

    def show(self, event: StudyEvent, progress: StudyProgress) -> None:
        match event:
            case StepStarted(key, device):
                self._line({"event": "began", "step": _step_slug(progress, key), "key": key, "device": device})
            case StepFinished(key, seconds, before):
                row = {
                    "event": "ended",
                    "step": _step_slug(progress, key),
                    "key": key,
                    "seconds": seconds,
                    "before": before,
                }
                self._line({**row, "left": progress.seconds_left()})
            case StepFailed(key, error):
                self._line({"event": "failed", "step": _step_slug(progress, key), "key": key, "error": error})
            case StepWarning(key, what):
                self._line({"event": "warning", "step": _step_slug(progress, key), "what": what})

    def close(self) -> None:
        pass

    @staticmethod
    def _line(row: Mapping[str, Any]) -> None:
        print(json.dumps(row), file=sys.stderr, flush=True)

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

from postgrad.reports.html.notation import duration, signed
from postgrad.studies.run_step import Moved, Warned
from postgrad.studies.run_study import Ended, StepBegan, StepEnded, StepFailed, StudyEvent
from postgrad.studies.step_graph import Work

_PLAIN_EVERY_SECONDS = 15.0
_BAR = 16


@dataclass
class Standing:
    """How far a study is: each step's part that is done, and what each run has forgotten and learnt at its last look."""

    work: Work
    expected: Mapping[str, float]
    """Seconds by step, as far as they are known beforehand."""
    done: dict[str, float] = field(default_factory=dict)
    doing: dict[str, str] = field(default_factory=dict)
    looks: dict[str, dict[str, Any]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    begun: dict[str, float] = field(default_factory=dict)
    took: dict[str, float] = field(default_factory=dict)

    def take(self, event: StudyEvent) -> None:
        """What an event changes."""
        match event:
            case StepBegan(key, _):
                self.doing[key], self.begun[key] = "begins", time.monotonic()
            case Moved(key, what, done, total, row):
                self.done[key] = min(done / max(total, 1), 0.99)
                self.doing[key] = what
                if row is not None:
                    self.looks[key] = row
            case StepEnded(key, _, before):
                self.done[key] = 1.0
                self.doing.pop(key, None)
                if not before:
                    self.took[key] = time.monotonic() - self.begun[key]
            case StepFailed(key, error):
                self.failed[key] = error
                self.doing.pop(key, None)

    def part(self, arm: str) -> float:
        """How much of an arm is done, by what its steps are expected to take."""
        keys = {key for chain in self.work.of_arm(arm) for key in self.work.needs(chain.last)} - {self.work.base}
        weights = {key: max(self.expected.get(key, 0.0), 1e-3) for key in keys}
        return sum(weights[k] * self.done.get(k, 0.0) for k in keys) / sum(weights.values())

    def state(self, arm: str) -> str:
        """In a word or two."""
        keys = {key for chain in self.work.of_arm(arm) for key in chain.steps}
        if keys & self.failed.keys():
            return "failed"
        now = [self.doing[key] for key in keys if key in self.doing]
        if now:
            return now[0]
        there = sum(self.done.get(chain.last, 0.0) >= 1 for chain in self.work.of_arm(arm))
        return "done" if there == len(self.work.of_arm(arm)) else "waits" if not there else f"{there} done"

    def change(self, arm: str, role: str) -> float | None:
        """The mean change on the sets of a role at the last look of each seed's last run."""
        found = []
        for chain in self.work.of_arm(arm):
            row = next((self.looks[key] for key in reversed(chain.steps) if key in self.looks), None)
            if row is not None:
                found += [entry["change"] for entry in row["sets"].values() if entry["role"] == role]
        return statistics.fmean(found) if found else None

    def left(self) -> float:
        """Seconds for what is left: as estimated, in the measure of how far the estimates have been off."""
        known = [k for k in self.took if self.expected.get(k)]
        expected = sum(self.expected[k] for k in known)
        off = sum(self.took[k] for k in known) / expected if expected else 1.0
        return off * sum(s * (1 - self.done.get(k, 0.0)) for k, s in self.expected.items())


class StudyScreen(Protocol):
    """Shows how far a study is."""

    def say(self, text: str) -> None:
        """Something is being prepared."""

    def show(self, event: StudyEvent, standing: Standing) -> None:
        """Something happened."""

    def close(self) -> None:
        """Nothing more will come."""


def study_screen(as_json: bool) -> StudyScreen:
    """JSON lines when asked for; else a live table on a terminal and plain lines in a file or pipe."""
    if as_json:
        return _Json()
    return _LiveTable() if sys.stderr.isatty() else _Plain()


def watch_study(events: Iterable[StudyEvent], standing: Standing, screen: StudyScreen) -> Ended:
    """Show every event; the last one tells how it ended."""
    ended = None
    try:
        for event in events:
            standing.take(event)
            screen.show(event, standing)
            if isinstance(event, Ended):
                ended = event
    finally:
        screen.close()
    assert ended is not None
    return ended


def _of(standing: Standing, key: str) -> str:
    return standing.work.steps[key].slug


def _look(row: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {signed(entry['change'])}" for name, entry in row["sets"].items())


class _Plain:
    """Lines: one when a run begins and ends, and a few in between."""

    def __init__(self) -> None:
        self._said = -math.inf

    def say(self, text: str) -> None:
        if time.monotonic() - self._said > _PLAIN_EVERY_SECONDS:
            self._line(f"{text} ...")

    def show(self, event: StudyEvent, standing: Standing) -> None:
        match event:
            case StepBegan(key, device):
                on = f" on device {device}" if device else ""
                self._line(f"{_of(standing, key)} begins{on}")
            case Moved(key, what, done, total, row) if time.monotonic() - self._said > _PLAIN_EVERY_SECONDS:
                look = f"; {_look(row)}" if row else ""
                self._line(
                    f"{_of(standing, key)}: {what}, {done:,} of {total:,}{look}; {duration(standing.left())} left"
                )
            case StepEnded(key, seconds, False):
                row = standing.looks.get(key)
                look = f": {_look(row)}" if row else ""
                self._line(f"{_of(standing, key)} done in {duration(seconds)}{look}; {duration(standing.left())} left")
            case StepFailed(key, error):
                self._line(f"{_of(standing, key)} FAILED: {error}")
            case Warned(key, what):
                self._line(f"{_of(standing, key)}: warning: {what}")

    def close(self) -> None:
        pass

    def _line(self, text: str) -> None:
        self._said = time.monotonic()
        print(text, file=sys.stderr, flush=True)


class _LiveTable:
    """A table of the arms that is drawn anew, and lines above it for what stays worth knowing."""

    def __init__(self) -> None:
        self.console = Console(stderr=True, highlight=False)
        self.live: Live | None = None

    def say(self, text: str) -> None:
        if self.live is None:
            self.live = Live(console=self.console, refresh_per_second=4, transient=True)
            self.live.start()
        self.live.update(f"{text} ...")

    def show(self, event: StudyEvent, standing: Standing) -> None:
        self.say("") if self.live is None else None
        assert self.live is not None
        match event:
            case StepFailed(key, error):
                self.console.print(f"{_of(standing, key)} FAILED: {error}", markup=False)
            case Warned(key, what):
                self.console.print(f"{_of(standing, key)}: warning: {what}", markup=False)
        self.live.update(drawn(standing))

    def close(self) -> None:
        if self.live is not None:
            self.live.stop()
            self.live = None


def drawn(standing: Standing) -> Table:
    """The arms, the base first."""
    table = Table(title=f"{standing.work.study.name}: about {duration(standing.left())} left", title_justify="left")
    for heading in ("arm", "", "now", "forgotten so far", "new text"):
        table.add_column(heading, justify="right" if heading in ("forgotten so far", "new text") else "left")
    base = standing.work.base
    if base is not None:
        done = standing.done.get(base, 0.0)
        table.add_row("(base)", _bar(done), standing.doing.get(base, "done" if done >= 1 else "waits"), "", "")
    for arm in standing.work.study.arms:
        old, new = standing.change(arm, "retained"), standing.change(arm, "learned")
        numbers = ["" if value is None else signed(value) for value in (old, new)]
        table.add_row(arm, _bar(standing.part(arm)), standing.state(arm), *numbers)
    return table


def _bar(part: float) -> str:
    full = round(part * _BAR)
    return "━" * full + "·" * (_BAR - full) + f" {part:>4.0%}"


class _Json:
    """One JSON object a line on standard error; the result itself goes to standard output."""

    def say(self, text: str) -> None:
        self._line({"event": "preparing", "what": text})

    def show(self, event: StudyEvent, standing: Standing) -> None:
        match event:
            case StepBegan(key, device):
                self._line({"event": "began", "step": _of(standing, key), "key": key, "device": device})
            case StepEnded(key, seconds, before):
                row = {"event": "ended", "step": _of(standing, key), "key": key, "seconds": seconds, "before": before}
                self._line({**row, "left": standing.left()})
            case StepFailed(key, error):
                self._line({"event": "failed", "step": _of(standing, key), "key": key, "error": error})
            case Warned(key, what):
                self._line({"event": "warning", "step": _of(standing, key), "what": what})

    def close(self) -> None:
        pass

    @staticmethod
    def _line(row: Mapping[str, Any]) -> None:
        print(json.dumps(row), file=sys.stderr, flush=True)

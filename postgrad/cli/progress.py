"""What does the user see while a stage is carried out? A progress line on a terminal, plain lines elsewhere, or JSON."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterable
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from postgrad.hardware.memory import readable
from postgrad.reports.html.notation import duration
from postgrad.run import run as r

_PLAIN_EVERY_SECONDS, _COUNT_EVERY_SECONDS = 5.0, 2.0


class Screen(Protocol):
    """Shows what happens."""

    def reading(self, name: str, done: int, total: int) -> None:
        """Text of a source is being read and tokenised."""

    def measuring(self, done: int, total: int) -> None:
        """So many labels have been looked at."""

    def show(self, event: r.Event) -> None:
        """Something happened in a run."""

    def close(self) -> None:
        """Nothing more will come."""


def screen_for(as_json: bool) -> Screen:
    """JSON lines when asked for; else a progress bar on a terminal and plain lines in a file or pipe.

    Of several processes only the first one speaks.
    """
    if os.environ.get("RANK", "0") != "0":
        return _SilentScreen()
    if as_json:
        return _JsonScreen()
    return _BarScreen() if sys.stderr.isatty() else _PlainScreen()


def watch(events: Iterable[r.Event], screen: Screen) -> r.Event:
    """Show every event; the last one is the outcome."""
    last: r.Event | None = None
    try:
        for event in events:
            screen.show(event)
            last = event
    finally:
        screen.close()
    assert last is not None
    return last


def moving(event: r.Began) -> str:
    """The weights, and how many of them move."""
    counts = event.counts
    if counts.trainable == counts.parameters:
        return f"{counts.parameters:,} weights"
    return f"{counts.trainable:,} of {counts.parameters:,} weights move"


def said(event: r.Event) -> str:
    """An event as a line, or nothing."""
    match event:
        case r.Began():
            execution = event.execution
            parts = [
                moving(event),
                "bf16 with fp32 masters" if execution.dtype == "bfloat16" else "fp32",
                "compiled" if execution.compile else "not compiled",
                f"{execution.attention} attention",
                f"{execution.threads} thread{'s' * (execution.threads > 1)}",
            ]
            where = f"resuming after step {event.step:,} of" if event.step else "training for"
            return f"{where} {event.plan.steps:,} steps: {', '.join(parts)}"
        case r.Looked():
            return f"step {event.row['step']:>6,}  " + _looked(event.row)
        case r.Saved():
            return f"step {event.step:>6,}  checkpoint {event.place.name} saved and verified"
        case r.Doing():
            return f"{event.what} ..."
        case r.Said():
            return event.what
        case r.Warned():
            return f"warning: {event.what}"
        case _:
            return ""


def _looked(row: dict[str, Any]) -> str:
    parts = []
    for name, found in row["sets"].items():
        parts.append(f"{name} {found['nats']:.3f} ({found['change']:+.3f})")
    choice = row.get("choice")
    if choice:
        best = "no candidate yet" if choice["best"] is None else f"best so far at step {choice['best']:,}"
        parts.append(f"{choice['by']} on {choice['set']} {choice['value']:.4f} ({best})")
    text = "held out: " + ", ".join(parts)
    asked = [f"{name} {found['metric']} {found['value']:.3f}" for name, found in row.get("tasks", {}).items()]
    return text + ("; asked: " + ", ".join(asked) if asked else "")


def _stepped(event: r.Stepped, steps: int) -> str:
    report = event.report
    left = duration(event.seconds_left)
    return (
        f"step {report.step:>6,}/{steps:,}  loss {report.loss:.4f}  rate {report.rate:.2e}  "
        f"{event.tokens_per_second:,.0f} tokens/s  {left} left"
    )


class Progressed(Protocol):
    """How far something is: so many of so many tokens."""

    @property
    def tokens(self) -> int: ...
    @property
    def wanted(self) -> int: ...


def count(steps: Iterable[Progressed], as_json: bool) -> None:
    """Carry something out and say on the way how far it is, a few times a minute."""
    begun = said = time.monotonic()
    for step in steps:
        now = time.monotonic()
        if as_json or now - said < _COUNT_EVERY_SECONDS:
            continue
        said, rate = now, step.tokens / (now - begun)
        left = f", {duration(max(step.wanted - step.tokens, 0) / rate)} left" if rate else ""
        print(f"{step.tokens:,} of {step.wanted:,} tokens, {rate:,.0f} a second{left}", file=sys.stderr, flush=True)


class _SilentScreen:
    """Says nothing."""

    def reading(self, name: str, done: int, total: int) -> None:
        pass

    def measuring(self, done: int, total: int) -> None:
        pass

    def show(self, event: r.Event) -> None:
        pass

    def close(self) -> None:
        pass


class _PlainScreen:
    """Lines, a few a minute."""

    def __init__(self) -> None:
        self.steps = 0
        self._said = 0.0
        self._forgetting = ""

    def reading(self, name: str, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self._said > _PLAIN_EVERY_SECONDS:
            self._said = now
            self._line(f"tokenising {name}: {readable(done)} of {readable(total)}")

    def measuring(self, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self._said > _PLAIN_EVERY_SECONDS:
            self._said = now
            self._line(f"measuring: {done:,} of {total:,} labels")

    def show(self, event: r.Event) -> None:
        if isinstance(event, r.Began):
            self.steps = event.plan.steps
        if isinstance(event, r.Stepped):
            now = time.monotonic()
            if event.report.step in (1, self.steps) or now - self._said > _PLAIN_EVERY_SECONDS:
                self._said = now
                self._line(_stepped(event, self.steps))
        elif line := said(event):
            self._line(line)

    def close(self) -> None:
        pass

    @staticmethod
    def _line(text: str) -> None:
        print(text, file=sys.stderr, flush=True)


class _BarScreen:
    """One moving line, and lines above it for what stays worth knowing."""

    def __init__(self) -> None:
        self.console = Console(stderr=True, highlight=False)
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            TextColumn("{task.percentage:>3.0f}%"),
            TextColumn("{task.fields[more]}"),
            console=self.console,
            transient=True,
            refresh_per_second=4,
        )
        self.started = False
        self.task: TaskID | None = None
        self.name = ""
        self.steps = 0
        self.forgetting = ""

    def _at(self, name: str, done: float, total: float, more: str = "") -> None:
        if not self.started:
            self.progress.start()
            self.started = True
        if self.task is None or self.name != name:
            if self.task is not None:
                self.progress.remove_task(self.task)
            self.task, self.name = self.progress.add_task(name, total=total or None, more=more), name
        self.progress.update(self.task, completed=done, total=total or None, more=more)

    def reading(self, name: str, done: int, total: int) -> None:
        self._at(f"tokenising {name}", done, total, f"{readable(done)} of {readable(total)}")

    def measuring(self, done: int, total: int) -> None:
        self._at("measuring", done, total, f"{done:,} of {total:,} labels")

    def show(self, event: r.Event) -> None:
        match event:
            case r.Stepped():
                left = duration(event.seconds_left)
                more = f"loss {event.report.loss:.3f}  {event.tokens_per_second:,.0f} tok/s  {left} left"
                if self.forgetting:
                    more += f"  {self.forgetting}"
                self._at("training", event.report.step, self.steps, more)
            case r.Doing():
                self._at(event.what, 0, 0)
            case _:
                if isinstance(event, r.Began):
                    self.steps = event.plan.steps
                if isinstance(event, r.Looked):
                    rises = {n: v["change"] for n, v in event.row["sets"].items() if v["role"] == "retained"}
                    if rises:
                        worst = max(rises, key=lambda n: rises[n])
                        self.forgetting = f"{worst} {rises[worst]:+.3f}"
                if line := said(event):
                    self.console.print(line, markup=False)

    def close(self) -> None:
        if self.started:
            self.progress.stop()
            self.started, self.task = False, None


class _JsonScreen:
    """One JSON object a line on standard error; the result itself goes to standard output."""

    def reading(self, name: str, done: int, total: int) -> None:
        pass

    def measuring(self, done: int, total: int) -> None:
        pass

    def show(self, event: r.Event) -> None:
        match event:
            case r.Stepped():
                report = event.report
                row = {"event": "step", "step": report.step, "loss": report.loss, "seconds": event.seconds}
            case r.Looked():
                row = {"event": "evaluation", **{k: v for k, v in event.row.items() if k != "kind"}}
            case r.Saved():
                row = {"event": "saved", "step": event.step, "place": str(event.place)}
            case r.Said():
                row = {"event": "said", "what": event.what}
            case r.Warned():
                row = {"event": "warning", "what": event.what}
            case _:
                return
        print(json.dumps(row), file=sys.stderr, flush=True)

    def close(self) -> None:
        pass

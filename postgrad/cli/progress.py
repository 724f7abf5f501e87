"""Progress of a run: a moving line on a terminal, plain lines elsewhere, or JSON events."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterable
from typing import Protocol, runtime_checkable

from rich.progress import BarColumn, Progress, TaskID, TextColumn

from postgrad.cli.terminal import make_console, raw_stream
from postgrad.foreign_text import visible_text
from postgrad.hardware.memory import format_bytes
from postgrad.lineage.metrics import EvaluationRow
from postgrad.reports.html.notation import format_duration
from postgrad.run import events as r

_PLAIN_EVERY_SECONDS, _COUNT_EVERY_SECONDS = 5.0, 2.0


class Screen:
    """Shows the progress of a command; this one shows nothing."""

    def show_tokenizing(self, name: str, done: int, total: int) -> None:
        """Bytes of a source that are tokenised."""

    def show_measuring(self, done: int, total: int) -> None:
        """Labels whose importance is measured."""

    def show(self, event: r.RunEvent) -> None:
        """An event of a run."""

    def close(self) -> None:
        """The end of the progress."""


def make_screen(as_json: bool) -> Screen:
    """JSON lines on request; else a progress bar on a terminal and plain lines in a file or pipe.

    Of several processes only the first one shows anything.
    """
    if os.environ.get("RANK", "0") != "0":
        return Screen()
    if as_json:
        return _JsonScreen()
    return _BarScreen() if sys.stderr.isatty() else _PlainScreen()


def watch(events: Iterable[r.RunEvent], screen: Screen) -> r.RunEvent:
    """Show every event and return the last one, the outcome."""
    last: r.RunEvent | None = None
    try:
        for event in events:
            screen.show(event)
            last = event
    finally:
        screen.close()
    assert last is not None
    return last


def trainable_text(event: r.RunStarted) -> str:
    """How many weights there are, and how many are trained."""
    counts = event.counts
    if counts.trainable == counts.parameters:
        return f"{counts.parameters:,} weights"
    return f"{counts.trainable:,} of {counts.parameters:,} weights are trained"


def event_text(event: r.RunEvent) -> str:
    """An event as a line; empty for an event that is not shown."""
    match event:
        case r.RunStarted():
            execution = event.execution
            parts = [
                trainable_text(event),
                "bf16 with fp32 masters" if execution.dtype == "bfloat16" else "fp32",
                "compiled" if execution.compile else "not compiled",
                f"{execution.attention} attention",
                f"{execution.threads} thread{'s' * (execution.threads > 1)}",
            ]
            where = f"resuming after step {event.step:,} of" if event.step else "training for"
            return f"{where} {event.plan.steps:,} steps: {', '.join(parts)}"
        case r.EvaluationCompleted():
            return f"step {event.row.step:>6,}  " + _evaluation_text(event.row)
        case r.CheckpointSaved():
            return f"step {event.step:>6,}  checkpoint {event.folder.name} saved and verified"
        case r.PhaseStarted():
            return f"{event.message} ..."
        case r.InfoMessage():
            return event.message
        case r.WarningMessage():
            return f"warning: {event.message}"
        case _:
            return ""


def _evaluation_text(row: EvaluationRow) -> str:
    parts = []
    for name, score in row.sets.items():
        parts.append(f"{name} {score.nats:.3f} ({score.change:+.3f})")
    if choice := row.checkpoint_selection:
        best = "no candidate yet" if choice.best_step is None else f"best so far at step {choice.best_step:,}"
        parts.append(f"{choice.metric} on {choice.set} {choice.value:.4f} ({best})")
    text = "held out: " + ", ".join(parts)
    tasks = [f"{name} {task.metric} {task.value:.3f}" for name, task in row.tasks.items()]
    return text + ("; tasks: " + ", ".join(tasks) if tasks else "")


def _step_text(event: r.StepCompleted, steps: int) -> str:
    report = event.report
    left = format_duration(event.seconds_left)
    return (
        f"step {report.step:>6,}/{steps:,}  loss {report.loss:.4f}  rate {report.rate:.2e}  "
        f"{event.tokens_per_second:,.0f} tokens/s  {left} left"
    )


@runtime_checkable
class TokenProgress(Protocol):
    """An event with the tokens done and their target."""

    @property
    def tokens(self) -> int: ...
    @property
    def target_tokens(self) -> int: ...


def show_token_progress(events: Iterable[object], as_json: bool) -> object:
    """Show progress events a few times a minute; the last item is the result."""
    start_time = last_time = time.monotonic()
    event: object = None
    for event in events:
        now = time.monotonic()
        if as_json or not isinstance(event, TokenProgress) or now - last_time < _COUNT_EVERY_SECONDS:
            continue
        last_time, rate = now, event.tokens / (now - start_time)
        left = f", {format_duration(max(event.target_tokens - event.tokens, 0) / rate)} left" if rate else ""
        print(
            f"{event.tokens:,} of {event.target_tokens:,} tokens, {rate:,.0f} a second{left}",
            file=sys.stderr,
            flush=True,
        )
    return event


class ProgressLine:
    """A single line on a terminal, for work that takes more than two seconds."""

    def __init__(self) -> None:
        self.start_time, self.last_shown = time.perf_counter(), 0.0

    def __call__(self, activity: str, done: int, total: int) -> None:
        now = time.perf_counter()
        stream = raw_stream(sys.stderr)
        if stream.isatty() and now - self.start_time > _COUNT_EVERY_SECONDS and now - self.last_shown > 0.2:
            self.last_shown = now
            print(f"\r{visible_text(activity)}: {done / total:.0%}\x1b[K", end="", file=stream, flush=True)

    def __enter__(self) -> ProgressLine:
        return self

    def __exit__(self, *_: object) -> None:
        if self.last_shown:
            print("\r\x1b[K", end="", file=raw_stream(sys.stderr), flush=True)


class _PlainScreen(Screen):
    """Lines, a few a minute."""

    def __init__(self) -> None:
        self.steps = 0
        self._last_line_time = 0.0

    def show_tokenizing(self, name: str, done: int, total: int) -> None:
        if self._is_due():
            self._line(f"tokenising {name}: {format_bytes(done)} of {format_bytes(total)}")

    def show_measuring(self, done: int, total: int) -> None:
        if self._is_due():
            self._line(f"measuring: {done:,} of {total:,} labels")

    def show(self, event: r.RunEvent) -> None:
        if isinstance(event, r.RunStarted):
            self.steps = event.plan.steps
        if isinstance(event, r.StepCompleted):
            if self._is_due(always=event.report.step in (1, self.steps)):
                self._line(_step_text(event, self.steps))
        elif line := event_text(event):
            self._line(line)

    def _is_due(self, *, always: bool = False) -> bool:
        """Whether a line of a count is to be written: `always`, or when the last one was some seconds ago."""
        now = time.monotonic()
        is_due = always or now - self._last_line_time > _PLAIN_EVERY_SECONDS
        self._last_line_time = now if is_due else self._last_line_time
        return is_due

    @staticmethod
    def _line(text: str) -> None:
        print(text, file=sys.stderr, flush=True)


class _BarScreen(Screen):
    """One moving line, and lasting lines above it."""

    def __init__(self) -> None:
        self.console = make_console(stderr=True)
        self.progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=20),
            TextColumn("{task.percentage:>3.0f}%", markup=False),
            TextColumn("{task.fields[more]}", markup=False),
            console=self.console,
            transient=True,
            refresh_per_second=4,
            redirect_stdout=False,  # the streams are guarded already
            redirect_stderr=False,
        )
        self.is_started = False
        self.task: TaskID | None = None
        self.name = ""
        self.steps = 0
        self.forgetting = ""

    def _update(self, name: str, done: float, total: float, more: str = "") -> None:
        if not self.is_started:
            self.progress.start()
            self.is_started = True
        if self.task is None or self.name != name:
            if self.task is not None:
                self.progress.remove_task(self.task)
            self.task, self.name = self.progress.add_task(name, total=total or None, more=more), name
        self.progress.update(self.task, completed=done, total=total or None, more=more)

    def show_tokenizing(self, name: str, done: int, total: int) -> None:
        self._update(f"tokenising {name}", done, total, f"{format_bytes(done)} of {format_bytes(total)}")

    def show_measuring(self, done: int, total: int) -> None:
        self._update("measuring", done, total, f"{done:,} of {total:,} labels")

    def show(self, event: r.RunEvent) -> None:
        match event:
            case r.StepCompleted():
                left = format_duration(event.seconds_left)
                more = f"loss {event.report.loss:.3f}  {event.tokens_per_second:,.0f} tok/s  {left} left"
                if self.forgetting:
                    more += f"  {self.forgetting}"
                self._update("training", event.report.step, self.steps, more)
            case r.PhaseStarted():
                self._update(event.message, 0, 0)
            case _:
                if isinstance(event, r.RunStarted):
                    self.steps = event.plan.steps
                if isinstance(event, r.EvaluationCompleted):
                    rises = {n: v.change for n, v in event.row.sets.items() if v.role == "retained"}
                    if rises:
                        worst = max(rises, key=lambda n: rises[n])
                        self.forgetting = f"{worst} {rises[worst]:+.3f}"
                if line := event_text(event):
                    self.console.print(line)

    def close(self) -> None:
        if self.is_started:
            self.progress.stop()
            self.is_started, self.task = False, None


class _JsonScreen(Screen):
    """One JSON object a line on standard error; the result itself goes to standard output."""

    def show(self, event: r.RunEvent) -> None:
        match event:
            case r.StepCompleted():
                report = event.report
                row = {"event": "step", "step": report.step, "loss": report.loss, "seconds": event.seconds}
            case r.EvaluationCompleted():
                row = {"event": "evaluation", **{k: v for k, v in event.row.as_json().items() if k != "kind"}}
            case r.CheckpointSaved():
                row = {"event": "checkpoint", "step": event.step, "folder": str(event.folder)}
            case r.InfoMessage():
                row = {"event": "info", "message": event.message}
            case r.WarningMessage():
                row = {"event": "warning", "message": event.message}
            case _:
                return
        print(json.dumps(row), file=sys.stderr, flush=True)

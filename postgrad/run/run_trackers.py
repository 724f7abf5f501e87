"""The processes that forward a run to its trackers: begun with the training, ended with the run, never in its way."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from types import TracebackType

from postgrad.errors import first_line
from postgrad.plan.plan import Plan
from postgrad.run.events import PhaseStarted, RunEvent, RunFinished, RunStarted, RunStopped, WarningMessage
from postgrad.tracking.follower import TrackerProcess

_SECONDS_TO_END, _SECONDS_TO_BREAK_OFF = 30.0, 5.0
"""How long a finished run waits for its last points to be sent, and one that failed."""


class RunTrackers:
    """The tracker processes of a run. `observe` its events before they are yielded."""

    def __init__(self, plan: Plan, is_main: bool) -> None:
        self.plan, self.configs = plan, plan.stage.track if is_main else []
        self._processes: list[TrackerProcess] = []

    def __enter__(self) -> RunTrackers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(Exception):
            for _ in self._end(_SECONDS_TO_BREAK_OFF):
                pass

    def observe(self, event: RunEvent) -> Iterator[RunEvent]:
        """What is to be shown before `event`: problems of trackers, each once."""
        match event:
            case RunStarted():
                yield from self._start()
            case RunFinished() | RunStopped() if self._processes:
                yield PhaseStarted(f"sending the last points to {' and '.join(each.kind for each in self._processes)}")
                yield from self._end(_SECONDS_TO_END)
        for process in self._processes:
            yield from self._warn(process, process.problems)

    def _end(self, seconds: float) -> Iterator[RunEvent]:
        """End all processes within so many seconds."""
        deadline, processes = time.monotonic() + seconds, self._processes
        self._processes = []
        for process in processes:
            process.close_input()
        for process in processes:
            yield from self._warn(process, lambda process=process: process.end(deadline - time.monotonic()))

    def _start(self) -> Iterator[RunEvent]:
        for config in self.configs:
            try:
                self._processes.append(TrackerProcess(self.plan.output, config))
            except Exception as error:
                yield WarningMessage(f"no tracker was started: {first_line(error)}")

    def _warn(self, process: TrackerProcess, find_problems: Callable[[], Iterator[str]]) -> Iterator[RunEvent]:
        command = f"postgrad track {self.plan.output} --to {process.kind}"
        try:
            for problem in find_problems():
                yield WarningMessage(
                    f"{process.kind}: {problem}; the run goes on. What is missing is sent by: {command}"
                )
        except OSError as error:
            yield WarningMessage(f"{process.kind}: {first_line(error)}")

"""Forward a run's points in a process of its own while the run goes on.

A tracker's package may hang, crash, print, start threads or draw random numbers: none of that reaches the run. The process
gets its request on standard input and ends when that is closed, which a killed run does too; its problems are lines of
standard output.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from postgrad.config.trackers import AnyTracker, TrackerConfig
from postgrad.errors import MissingExtra, PostgradError, StageError
from postgrad.tracking.forward import Forwarder, lock_forwarder

_SECONDS_BETWEEN_SENDS, _MAX_SECONDS_BETWEEN_TRIES = 5.0, 300.0


class TrackerProcess:
    """The process that forwards a run to one tracker, as the run sees it. Nothing here waits, except `end`."""

    def __init__(self, run_folder: Path, config: TrackerConfig) -> None:
        self.kind = config.kind
        request = {"run": str(run_folder), "tracker": config.model_dump(mode="json")}
        package_root = str(Path(__file__).parents[2])
        path = os.pathsep.join([package_root, *filter(None, [os.environ.get("PYTHONPATH")])])
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "postgrad.tracking.follower"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": path},
            start_new_session=True,  # Ctrl-C is for the run, which then ends this process
        )
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.write((json.dumps(request) + "\n").encode())
            self._process.stdin.flush()

    def problems(self) -> Iterator[str]:
        """What has gone wrong since the last call."""
        stdout = self._process.stdout
        while stdout is not None and not stdout.closed and select.select([stdout], [], [], 0)[0]:
            line = stdout.readline().decode(errors="replace").strip()
            if not line:
                return
            yield line

    def close_input(self) -> None:
        """Tell the process that the run has ended: it sends what is left."""
        if self._process.stdin is not None:
            with suppress(BrokenPipeError):
                self._process.stdin.close()

    def end(self, seconds: float) -> Iterator[str]:
        """Wait at most so long for the process, then kill it; the last problems."""
        self.close_input()
        try:
            self._process.wait(max(seconds, 0.1))
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            yield "the last points were not sent in time"
        yield from self.problems()
        if self._process.stdout is not None:
            self._process.stdout.close()


def follow_run(
    run_folder: Path, config: TrackerConfig, pause: Callable[[float], bool], report: Callable[[str], object]
) -> None:
    """Forward a run until `pause(seconds)` says that it has ended, and then once more.

    A problem is reported once; after one that may pass, the next try comes later and later.
    """
    reported = ""
    with lock_forwarder(run_folder, config, wait=True):
        forwarder, seconds, has_ended = Forwarder(run_folder, config), _SECONDS_BETWEEN_SENDS, False
        while True:
            try:
                forwarder.forward()
                seconds = _SECONDS_BETWEEN_SENDS
                if has_ended:
                    forwarder.close()
            except PostgradError as error:
                if error.problem != reported:
                    reported = error.problem
                    report(reported)
                if isinstance(error, MissingExtra | StageError):  # the user must do something first
                    return
                seconds = min(2 * seconds, _MAX_SECONDS_BETWEEN_TRIES)
            if has_ended:
                return
            has_ended = pause(seconds)


def _main() -> None:
    with os.fdopen(os.dup(1), "w", buffering=1) as output:
        os.dup2(2, 1)  # what packages print is not ours
        os.nice(10)
        request: dict[str, Any] = json.loads(sys.stdin.readline())
        config: TrackerConfig = TypeAdapter(AnyTracker).validate_python(request["tracker"])

        def report(problem: str) -> None:
            with suppress(BrokenPipeError):
                output.write(problem.replace("\n", " ") + "\n")

        try:
            follow_run(Path(request["run"]), config, _wait_for_end, report)
        except Exception as error:
            report(f"{type(error).__name__}: {error}")


def _wait_for_end(seconds: float) -> bool:
    """Wait for the end of standard input; False when it has not come within `seconds`."""
    return bool(select.select([0], [], [], seconds)[0])


if __name__ == "__main__":
    _main()

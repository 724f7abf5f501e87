"""Standard output and error that outlive their readers, and signals that stop a command.

A reader that has left (`| head -1`), a terminal that is gone or a full disk under the log is no reason to end a training: later
output is dropped, and the command goes on.
"""

from __future__ import annotations

import errno
import io
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

STOP_SIGNALS = (signal.SIGTERM, signal.SIGHUP)
"""Treated as Ctrl-C."""


class LastingFile(io.FileIO):
    """A file descriptor whose first failed write is kept in `error`; what follows is dropped."""

    error: OSError | None = None

    def write(self, data: Any) -> int | None:
        """Write, or drop the data after an error."""
        if self.error is None:
            try:
                return super().write(data)
            except OSError as error:
                self.error = error
        return memoryview(data).nbytes


@contextmanager
def lasting_streams() -> Iterator[Callable[[], OSError | None]]:
    """Inside, output to a closed pipe or a full disk is dropped; yields a function that gives the error of standard output.

    A closed pipe is no error: its reader has read enough.
    """
    streams = {name: getattr(sys, name) for name in ("stdout", "stderr")}
    files: dict[str, LastingFile] = {}
    for name, stream in streams.items():
        try:
            stream.flush()
            files[name] = LastingFile(stream.fileno(), "w", closefd=False)
        except (AttributeError, OSError, ValueError):  # closed, or replaced by something that is no file
            continue
        lasting = io.TextIOWrapper(
            io.BufferedWriter(files[name]),
            stream.encoding,
            stream.errors,
            line_buffering=name == "stderr" or files[name].isatty(),
        )
        setattr(sys, name, lasting)

    def output_error() -> OSError | None:
        if "stdout" not in files:
            return None
        sys.stdout.flush()
        error = files["stdout"].error
        return None if error is None or error.errno == errno.EPIPE else error

    try:
        yield output_error
    finally:
        for name in files:
            getattr(sys, name).flush()
        for name, stream in streams.items():
            setattr(sys, name, stream)


@contextmanager
def stop_on_signals() -> Iterator[None]:
    """Inside, SIGTERM and SIGHUP raise `KeyboardInterrupt`, as Ctrl-C does, unless they are ignored (`nohup`) or handled."""

    def stop(_number: int, _frame: object) -> None:
        raise KeyboardInterrupt

    replaced = [number for number in STOP_SIGNALS if signal.getsignal(number) == signal.SIG_DFL]
    with suppress(ValueError):  # not the main thread, which alone may set handlers
        for number in replaced:
            signal.signal(number, stop)
    try:
        yield
    finally:
        with suppress(ValueError):
            for number in replaced:
                signal.signal(number, signal.SIG_DFL)

"""The errors that users meet, as a tree.

    PostgradError            everything below; `exit_code` is what the command line returns
    ├── StageError           the stage file: unknown key, impossible value
    ├── DataError            a source: missing, empty, broken, in the wrong shape
    ├── ModelError           a model or tokenizer that cannot be used here
    ├── TuningError          a tuning that the model or the request does not support
    ├── ResumeError          a run folder that does not belong to this stage
    ├── BusyError            a run folder that another process is using
    ├── MissingExtra         an optional package that is not installed
    ├── InterruptError       the user interrupted the command
    ├── CheckpointError      a checkpoint that is incomplete or was changed
    ├── DiskError            a full disk, or a folder that cannot be written
    ├── OutOfMemoryError     more memory than this machine or accelerator has
    ├── ServiceError         a tracker or the Hub failed; the same command sends what is missing
    ├── NonFiniteError       too many steps whose loss or gradient is not finite
    └── DistributedError     another process of the run that failed, hangs, was killed or reads other files

Each error states the problem, its place, what was expected, and a hint.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from postgrad.foreign_text import mask_secrets, visible_text


class PostgradError(Exception):
    """A problem with its place (`file:line` or `key.path`), what was expected, and a hint."""

    exit_code = 2
    reported_by: int | None = None
    """Of several processes, the rank that prints an error which all of them raise; None: each that raises it."""

    def __init__(self, problem: str, *, where: str = "", expected: str = "", hint: str = "") -> None:
        # Names and values in a message come from files.
        problem, where, expected, hint = (mask_secrets(visible_text(text)) for text in (problem, where, expected, hint))
        self.problem, self.where, self.expected, self.hint = problem, where, expected, hint
        lines = [f"{where}: {problem}" if where else problem]
        if expected:
            lines.append(f"  expected: {expected}")
        if hint:
            lines.append(f"  hint:     {hint}")
        super().__init__("\n".join(lines))

    def __reduce__(self) -> tuple[Any, ...]:
        parts = {"where": self.where, "expected": self.expected, "hint": self.hint}
        return partial(type(self), self.problem, **parts), (), {"reported_by": self.reported_by}


class StageError(PostgradError):
    """An invalid stage file or command-line option."""


class DataError(PostgradError):
    """A source that is missing, empty, broken or in the wrong shape."""


class ModelError(PostgradError):
    """A model or tokenizer that does not support the request."""


class TuningError(PostgradError):
    """A tuning that the model or the request does not support."""


class ResumeError(PostgradError):
    """A run folder that does not belong to this stage."""


class BusyError(PostgradError):
    """A run folder that another process is using."""


class MissingExtra(PostgradError):
    """An optional package that is not installed."""


class InterruptError(PostgradError):
    """The user interrupted the command."""

    exit_code = 3


class CheckpointError(PostgradError):
    """A checkpoint that is incomplete or does not match its manifest."""

    exit_code = 1


class DiskError(PostgradError):
    """A full disk, or a folder that cannot be written."""

    exit_code = 1


class OutOfMemoryError(PostgradError):
    """More memory than this machine or accelerator has."""

    exit_code = 1


class ServiceError(PostgradError):
    """An experiment tracker or the Hub failed; the same command sends what is missing."""

    exit_code = 1


class NonFiniteError(PostgradError):
    """Too many steps whose loss or gradient is not finite; these changed no weight."""

    exit_code = 1


class DistributedError(PostgradError):
    """Another process of the run failed, hangs, was killed or reads other files."""

    exit_code = 1


def first_line(error: BaseException) -> str:
    """The first line of the message of another package's error, or its type."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)[:500]


def suggest_nearest(word: str, known: Iterable[str]) -> str:
    """A hint `did you mean 'x'?` for a mistyped word, or an empty string."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"did you mean '{close[0]}'?" if close else ""


def suggest_path(missing: Path) -> str:
    """A hint for a path that does not exist: a similar name in the nearest existing folder, or the names in it."""
    parent = missing.parent
    while not parent.is_dir() and parent != parent.parent:
        missing, parent = parent, parent.parent
    try:
        names = sorted(entry.name for entry in parent.iterdir() if not entry.name.startswith("."))
    except OSError:
        return ""
    return suggest_nearest(missing.name, names) or (
        f"{parent} has {format_names(names)}" if names else f"{parent} is empty"
    )


def format_names(names: Iterable[str], limit: int = 6) -> str:
    """The first names, and how many more there are."""
    listed = list(names)
    return ", ".join(listed[:limit]) + (f" and {len(listed) - limit} more" if len(listed) > limit else "")


def suggest_nearest_or_all(word: str, known: Iterable[str]) -> str:
    """The same hint, or, when no known word is near, all of them."""
    known = list(known)
    return suggest_nearest(word, known) or f"known: {', '.join(known)}"


def require_choice(what: str, value: str, choices: Collection[str], *, where: str) -> None:
    """Raise `StageError` when a value is none of the choices, naming them and the nearest; `what` names the value."""
    if value not in choices:
        hint = suggest_nearest(value, choices)
        raise StageError(f"there is no {what} {value!r}", where=where, expected=", ".join(choices), hint=hint)

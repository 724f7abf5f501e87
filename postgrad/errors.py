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
    └── NonFiniteError       a loss or gradient that is not a number

Each error states the problem, its place, what was expected, and a hint.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path

from postgrad.foreign_text import mask_secrets, visible_text


class PostgradError(Exception):
    """A problem with its place (`file:line` or `key.path`), what was expected, and a hint."""

    exit_code = 2

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


class NonFiniteError(PostgradError):
    """A loss or gradient that is not finite; the weights were not changed."""

    exit_code = 1


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

"""What is written to a terminal: text of models and files cannot control it.

`guard_streams` replaces the standard streams while a verb runs, so that its own lines, log lines and warnings of libraries,
and texts of models all pass through one place. What draws on a terminal itself writes to `raw_stream`, and cleans its text.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TextIO

from postgrad.foreign_text import mask_secrets, visible_text

if TYPE_CHECKING:
    from rich.console import Console

_BAR_MOVES = re.compile(r"(\n|\x1b\[A)*")
"""How the progress bars of libraries move between their lines: in a call of its own, with no text."""


class _GuardedStream:
    """A standard stream that makes control characters visible."""

    def __init__(self, raw: TextIO, *, has_secrets: bool) -> None:
        self.raw, self._has_secrets = raw, has_secrets

    def write(self, text: str) -> int:
        """Write a text; a carriage return at its start stays, with which a progress bar overwrites its line."""
        if not _BAR_MOVES.fullmatch(text):
            start = "\r" if text.startswith("\r") else ""
            shown = mask_secrets(text) if self._has_secrets else text
            text = start + visible_text(shown[len(start) :])
        return self.raw.write(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.raw, name)


@contextmanager
def guard_streams() -> Iterator[None]:
    """Inside, control characters become visible on both streams, and secrets are masked in messages (not in results)."""
    before = sys.stdout, sys.stderr
    sys.stdout = _GuardedStream(raw_stream(sys.stdout), has_secrets=False)
    sys.stderr = _GuardedStream(raw_stream(sys.stderr), has_secrets=True)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def raw_stream(stream: TextIO) -> TextIO:
    """The stream that obeys what is written to it."""
    return stream.raw if isinstance(stream, _GuardedStream) else stream


def make_console(*, stderr: bool) -> Console:
    """A console of rich, which controls the terminal itself, but shows control characters of its texts, and no markup."""
    from rich.console import Console, ConsoleOptions
    from rich.segment import Segment

    class GuardedConsole(Console):
        def render(self, renderable: Any, options: ConsoleOptions | None = None) -> Iterable[Segment]:
            for segment in super().render(renderable, options):
                yield segment if segment.control else Segment(visible_text(segment.text), segment.style)

    return GuardedConsole(file=raw_stream(sys.stderr if stderr else sys.stdout), highlight=False, markup=False)

"""What is written while a run goes on? JSON lines, one a step or evaluation, and what is said on the terminal."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from postgrad.storage.atomic import disk_error, write_atomically


class MetricsLog:
    """The append-only `metrics.jsonl` of a run. A line is whole or, after a kill, cut off at the end of the file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def rewind(self, step: int) -> None:
        """Forget what lies after `step`: a resumed run writes those lines again, and they must not be there twice."""
        if self.path.exists():
            kept = [json.dumps(row) + "\n" for row in read_metrics(self.path) if row["step"] <= step]
            write_atomically(self.path, "".join(kept))

    def write(self, row: dict[str, Any]) -> None:
        """Append one row."""
        try:
            with self.path.open("a") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            raise disk_error(error, self.path) from error

    def sync(self) -> None:
        """Make what was written durable; called before a checkpoint that relies on it is published."""
        if self.path.exists():
            handle = os.open(self.path, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a metrics file; a last line that a kill cut off is left out."""
    if not path.exists():
        return
    with path.open() as file:
        for line in file:
            try:
                yield json.loads(line)
            except ValueError:
                return


class Throughput:
    """Tokens per second, smoothed, and the time that is left."""

    def __init__(self) -> None:
        self.last_time = time.perf_counter()
        self.tokens_per_second = 0.0

    def step(self, tokens: int) -> float:
        """Count a step of so many tokens; returns the seconds it took."""
        now = time.perf_counter()
        seconds = max(now - self.last_time, 1e-9)
        self.last_time = now
        self.tokens_per_second = (
            tokens / seconds if not self.tokens_per_second else 0.9 * self.tokens_per_second + 0.1 * tokens / seconds
        )
        return seconds

    def pause(self) -> None:
        """Start the clock again: what came in between (an evaluation, a save) is not a step's time."""
        self.last_time = time.perf_counter()

    def remaining_seconds(self, tokens: float) -> float:
        """Seconds for so many more tokens."""
        return tokens / self.tokens_per_second if self.tokens_per_second else float("nan")

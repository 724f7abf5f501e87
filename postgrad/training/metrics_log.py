"""Metrics of a running stage: the log `metrics.jsonl`, one line per step or evaluation, and the throughput."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

from postgrad.lineage.metrics import MetricsRow, read_metrics
from postgrad.storage.atomic import disk_errors, write_atomically


class MetricsLog:
    """The append-only `metrics.jsonl` of a run. A kill can truncate its last line only."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def rewind(self, step: int) -> None:
        """Remove the lines after `step`, which a resumed run writes again."""
        if self.path.exists():
            lines = [json.dumps(row.as_json()) + "\n" for row in read_metrics(self.path) if row.step <= step]
            write_atomically(self.path, "".join(lines))

    def write(self, row: MetricsRow) -> None:
        """Append one row."""
        with disk_errors(self.path), self.path.open("a") as file:
            file.write(json.dumps(row.as_json()) + "\n")

    def sync(self) -> None:
        """Flush to disk; called before a checkpoint is published, which must not be newer than its log."""
        if self.path.exists():
            handle = os.open(self.path, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)


class Throughput:
    """Tokens per second (exponential moving average) and the remaining time."""

    def __init__(self) -> None:
        self.last_time = time.perf_counter()
        self.tokens_per_second = 0.0

    def step(self, tokens: int) -> float:
        """Count a step of `tokens` tokens; returns its seconds."""
        now = time.perf_counter()
        seconds = max(now - self.last_time, 1e-9)
        self.last_time = now
        self.tokens_per_second = (
            tokens / seconds if not self.tokens_per_second else 0.9 * self.tokens_per_second + 0.1 * tokens / seconds
        )
        return seconds

    def pause(self) -> None:
        """Restart the clock, so that an evaluation or a save does not count as part of a step."""
        self.last_time = time.perf_counter()

    def remaining_seconds(self, tokens: float) -> float:
        """Estimated seconds for `tokens` more tokens; NaN before the first step."""
        return tokens / self.tokens_per_second if self.tokens_per_second else float("nan")

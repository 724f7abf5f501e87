"""Metrics of a running stage: the log `metrics.jsonl`, one line per step or evaluation, and the throughput."""

from __future__ import annotations

import os
import time
from pathlib import Path

from postgrad.lineage.metrics import MetricsRow, format_row, scan_metrics
from postgrad.storage.atomic import disk_errors, write_atomically


class MetricsLog:
    """The append-only `metrics.jsonl` of a run. A kill can truncate its last line only."""

    def __init__(self, path: Path, run_id: str = "") -> None:
        self.path, self.run_id = path, run_id

    def rewind(self, step: int) -> None:
        """Remove the lines after `step`, which a resumed run writes again. A damaged line between the others stays as it is."""
        kept: list[bytes] = []
        damaged: list[bytes] = []
        for line in scan_metrics(self.path, self.run_id):
            if line.row is None:
                damaged.append(line.text)
            elif line.row.step <= step:
                kept += [*damaged, format_row(line.row, self.run_id).encode()]
                damaged = []
        if self.path.exists():
            write_atomically(self.path, b"".join(kept))

    def write(self, row: MetricsRow) -> None:
        """Append one row."""
        with disk_errors(self.path), self.path.open("a") as file:
            file.write(format_row(row, self.run_id))

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

"""A tracker that keeps its points in a file, one line a value, and may be killed or fail at any of its writes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Literal

from postgrad.config.trackers import TrackerConfig
from postgrad.lineage.record import Record
from postgrad.tracking.points import Point
from postgrad.tracking.tracker import TrackedRun, TrackerMemory


class Killed(BaseException):
    """As SIGKILL: nothing after it runs."""


class Budget:
    """How many writes succeed before the process is killed."""

    def __init__(self, writes: int) -> None:
        self.writes = writes

    def spend(self) -> None:
        if self.writes == 0:
            raise Killed
        self.writes -= 1


class FileTracker:
    """Knows the values that its file has."""

    budget: ClassVar[Budget] = Budget(10**9)
    remembers = True
    """Whether `missing_points` is implemented: the mutant's is not."""

    def __init__(self, run: TrackedRun, config: FileConfig, memory: TrackerMemory) -> None:
        self.run, self.path = run, Path(config.address)

    def values(self) -> list[tuple[int, str, float]]:
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        return [(step, name, value) for step, name, value in map(json.loads, lines)]

    def missing_points(self, points: Sequence[Point]) -> Sequence[Point]:
        known = {(step, name) for step, name, _ in self.values()} if self.remembers else set()
        rest = []
        for point in points:
            values = {name: value for name, value in point.values.items() if (point.step, name) not in known}
            rest += [Point(point.index, point.step, point.seconds, values)] if values else []
        return rest

    def send(self, points: Sequence[Point]) -> None:
        for point in points:
            for name, value in point.values.items():
                self.budget.spend()
                with self.path.open("a") as file:
                    file.write(json.dumps([point.step, name, value]) + "\n")

    def finish(self, record: Record, page: Path | None, results: Point) -> None:
        self.budget.spend()

    def close(self) -> None:
        pass


class FileConfig(TrackerConfig):
    implementation: ClassVar[str] = "tests.tracking.fakes:FileTracker"
    packages: ClassVar[tuple[str, ...]] = ("json",)
    kind: Literal["file"] = "file"
    address: str = ""

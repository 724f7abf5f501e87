"""What a tracker is: a small class that sends points, and says which of them it has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from postgrad.foreign_text import mask_secrets
from postgrad.lineage.record import Record
from postgrad.lineage.saved_plan import SavedPlan
from postgrad.tracking.points import Point, unix_time

TRACKING = "tracking"
"""Folder in the run folder."""
TrackerMemory = dict[str, str | int]
"""What a tracker must remember between processes, such as the id that a server gave to the run."""


@dataclass(frozen=True)
class TrackedRun:
    """A run as trackers see it."""

    folder: Path
    id: str
    name: str
    created: float
    """Unix time."""
    settings: Mapping[str, str]
    """The stage: dotted keys and values, without secrets."""

    @property
    def tracking_folder(self) -> Path:
        """Where the cursors are, and the files of trackers that write files."""
        return self.folder / TRACKING

    @property
    def display_name(self) -> str:
        """The name with the beginning of the id, which differs between runs of one name."""
        return f"{self.name}-{self.id[:6]}"


class Tracker(Protocol):
    """Sends points. Its `__init__(run, config, memory)` connects; anything may be raised, and changes nothing in the run."""

    def missing_points(self, points: Sequence[Point]) -> Sequence[Point]:
        """Of the points of a send that was interrupted, those that the tracker has not got."""
        ...

    def send(self, points: Sequence[Point]) -> None:
        """Send points, in the order of their index; `memory` is saved afterwards."""
        ...

    def finish(self, record: Record, page: Path | None, results: Point) -> None:
        """The run is finished; `results` were sent. Idempotent: attaches the page and closes the run."""
        ...

    def close(self) -> None:
        """Flush and disconnect."""
        ...


def describe_run(run_folder: Path, plan: SavedPlan) -> TrackedRun:
    """A run from its plan."""
    settings = {key: mask_secrets(value)[:500] for key, value in _flatten(plan.stage)}
    name = str(plan.stage.get("name") or run_folder.name)
    return TrackedRun(run_folder, plan.id, name, unix_time(plan.created), settings)


def _flatten(value: Any, path: str = "") -> list[tuple[str, str]]:
    """The leaves of a stage with their paths; unset keys are omitted."""
    if isinstance(value, Mapping):
        items = [(f"{path}.{key}" if path else str(key), item) for key, item in value.items()]
    elif isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
        items = [(f"{path}.{_item_name(item, i)}", item) for i, item in enumerate(value)]
    else:
        return [] if value in (None, [], {}) else [(path, str(value))]
    return [leaf for key, item in items for leaf in _flatten(item, key)]


def _item_name(item: Any, number: int) -> str:
    return str(item.get("name", number)) if isinstance(item, Mapping) else str(number)

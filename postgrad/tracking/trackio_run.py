"""trackio: a run in a project on this machine, a Space or a server."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from postgrad.config.trackers import TrackioConfig
from postgrad.lineage.record import Record
from postgrad.tracking.points import Point
from postgrad.tracking.tracker import TrackedRun, TrackerMemory


class TrackioTracker:
    """Logs to one run; each send ends with a flush, since trackio sends from a thread."""

    def __init__(self, run: TrackedRun, config: TrackioConfig, memory: TrackerMemory) -> None:
        import trackio

        self.run, self._trackio, self._project = run, trackio, config.project
        address = config.address
        key = "server_url" if address and address.startswith(("http://", "https://")) else "space_id"
        self._place: Mapping[str, str] = {key: address} if address else {}

    def missing_points(self, points: Sequence[Point]) -> Sequence[Point]:
        """The points whose first value no row of the run has at that step; elsewhere than on this machine, all."""
        if self._place:
            return points
        from trackio.sqlite_storage import SQLiteStorage

        rows = SQLiteStorage.get_logs(self._project, self.run.display_name)
        known = {(row.get("step"), name) for row in rows for name in row}
        return [point for point in points if (point.step, next(iter(point.values), "")) not in known]

    def send(self, points: Sequence[Point]) -> None:
        """Log each point and flush."""
        self._open()
        for point in points:
            self._trackio.log(dict(point.values), step=point.step)
        self._trackio.finish()

    def finish(self, record: Record, page: Path | None, results: Point) -> None:
        """Attach the page."""
        if page is not None:
            self._open()
            self._trackio.log_artifact(page, name=f"report-{self.run.id}", type="report")
            self._trackio.finish()

    def close(self) -> None:
        """Nothing is open."""

    def _open(self) -> None:
        self._trackio.init(
            project=self._project,
            name=self.run.display_name,
            config=dict(self.run.settings),
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
            **self._place,
        )

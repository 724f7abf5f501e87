"""Forward the points of a run to a tracker, each exactly once, while the run goes on or afterwards.

A cursor in the run folder (`tracking/NAME.json`) holds the index of the last point that was sent, and of the last one of a
send that is going on. A process that is killed between the two asks the tracker which of these points it has.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from itertools import islice
from pathlib import Path

from postgrad.config.trackers import TrackerConfig
from postgrad.errors import BusyError, MissingExtra, PostgradError, ServiceError, StageError, first_line
from postgrad.foreign_text import mask_secrets, plain_text
from postgrad.lineage.record import PLAN, RECORD, Record, RecordPart, read_record, validate_part
from postgrad.lineage.saved_plan import read_plan
from postgrad.storage.checked_files import read_checked_json, write_checked_json
from postgrad.storage.file_lock import file_lock, is_locked
from postgrad.storage.fingerprint import fingerprint
from postgrad.tracking.points import MetricsTail, Point, result_point
from postgrad.tracking.tracker import TRACKING, Tracker, TrackerMemory, describe_run

_POINTS_PER_SEND = 200
_PAGE = "report.html"


class Cursor(RecordPart):
    """How far a run has been forwarded to a tracker."""

    sent: int = -1
    """Index of the last point that was sent."""
    sending: int | None = None
    """Index of the last point of a send that has not ended."""
    is_finished: bool = False
    """Whether results and page were sent."""
    points: int = 0
    """Points sent so far."""
    problem: str = ""
    """Why the last attempt failed."""
    memory: TrackerMemory = {}


class Forwarder:
    """Sends what is new of a run to one tracker. Use it inside `lock_forwarder`."""

    def __init__(self, run_folder: Path, config: TrackerConfig) -> None:
        """Raises `StageError` for a folder that is no run folder, or a damaged cursor."""
        if not (run_folder / PLAN).exists():
            raise StageError(f"{run_folder} is not a run folder", expected="the output folder of `postgrad train`")
        self.run, self.config = describe_run(run_folder, read_plan(run_folder)), config
        self.path = cursor_path(run_folder, config)
        self.cursor = read_cursor(self.path, self.run.id)
        self._tail = MetricsTail(run_folder, self.run.id, self.run.created)
        self._tracker: Tracker | None = None

    def forward(self) -> int:
        """Send the points that are new, and the results of a finished run; returns how many were sent.

        Raises `ServiceError`, or `MissingExtra`; the problem is recorded, and the same call goes on.
        """
        before = self.cursor.points
        try:
            while points := list(islice(self._new_points(), _POINTS_PER_SEND)):
                self._send(points)
            record = self._finished_record()
            if record is not None and not self.cursor.is_finished:
                self._finish(record)
        except Exception as error:
            self._fail(error)
        if self.cursor.problem:
            self.cursor.problem = ""
            self._save()
        return self.cursor.points - before

    def close(self) -> None:
        """Disconnect. Raises `ServiceError`."""
        tracker, self._tracker = self._tracker, None
        if tracker is not None:
            try:
                tracker.close()
            except Exception as error:
                self._fail(error)

    def _new_points(self) -> Iterator[Point]:
        return (point for point in self._tail.read() if point.index > self.cursor.sent)

    def _send(self, points: list[Point]) -> None:
        """Send points in order, between two writes of the cursor."""
        tracker, interrupted = self._connect(), self.cursor.sending
        old = [point for point in points if interrupted is not None and point.index <= interrupted]
        rest = [*(tracker.missing_points(old) if old else ()), *points[len(old) :]]
        self.cursor.sending = max(points[-1].index, interrupted if interrupted is not None else -1)
        self._save()
        if rest:
            tracker.send(rest)
        is_settled = interrupted is None or points[-1].index >= interrupted
        self.cursor.sent, self.cursor.sending = points[-1].index, None if is_settled else interrupted
        self.cursor.points += len(rest)
        self._save()

    def _finish(self, record: Record) -> None:
        results = result_point(record)
        if results.index > self.cursor.sent:
            self._send([results])
        page = self.run.folder / _PAGE
        self._connect().finish(record, page if page.exists() else None, results)
        self.cursor.is_finished = True
        self._save()

    def _finished_record(self) -> Record | None:
        if not (self.run.folder / RECORD).exists():
            return None
        record = read_record(self.run.folder)
        return record if record.status in ("finished", "gate-failed") else None

    def _connect(self) -> Tracker:
        if self._tracker is None:
            package = self.config.packages[0]
            spec = find_spec(package)
            if spec is None or spec.origin is None:  # absent, or a folder of that name
                raise MissingExtra(
                    f"{package} is not installed", where=f"track: {package}", hint=f"pip install 'postgrad[{package}]'"
                )
            self._tracker = self.config.load()(self.run, self.config, self.cursor.memory)
        return self._tracker

    def _fail(self, error: Exception) -> None:
        """Record the problem and raise it; what was read and not sent is read again."""
        self._tail = MetricsTail(self.run.folder, self.run.id, self.run.created)
        tracker, self._tracker = self._tracker, None
        if tracker is not None:
            with suppress(Exception):
                tracker.close()
        if not isinstance(error, PostgradError):
            text = mask_secrets(plain_text(first_line(error), 300))
            hint = "check its address, project and key; the same command sends what is missing"
            error = ServiceError(f"{type(error).__name__}: {text}", where=f"track: {self.config.kind}", hint=hint)
        self.cursor.problem = error.problem
        self._save()
        raise error

    def _save(self) -> None:
        write_checked_json(self.path, self.cursor.as_json(), self.run.id)


@contextmanager
def lock_forwarder(run_folder: Path, config: TrackerConfig, *, wait: bool = False) -> Iterator[None]:
    """Let one process forward a run to a tracker. Without `wait`, raises `BusyError` when another one does."""
    lock = cursor_path(run_folder, config).with_suffix(".lock")
    if not wait and is_locked(lock):
        raise BusyError(
            "another process is forwarding this run", where=str(lock), hint="wait for it, or for the run, to end"
        )
    with file_lock(lock):
        yield


def cursor_path(run_folder: Path, config: TrackerConfig) -> Path:
    """The cursor of a run for a tracker, of its own for each address and project."""
    keys = config.model_dump(mode="json", exclude_defaults=True, exclude={"kind"})
    return run_folder / TRACKING / (f"{config.kind}-{fingerprint(keys)[:8]}.json" if keys else f"{config.kind}.json")


def read_cursor(path: Path, run_id: str) -> Cursor:
    """A run's cursor, a new one if there is none. Raises `StageError` for a damaged one."""
    if not path.exists():
        return Cursor()
    hint = f"delete {path.name}, and the run in the tracker, to send the whole run again"
    raw = read_checked_json(path, dict[str, object], run_id, error=StageError, hint=hint)
    return validate_part(Cursor, raw, str(path), hint)

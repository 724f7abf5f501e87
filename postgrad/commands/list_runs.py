"""List the runs below a folder with their state, result and size, and remove what finished runs no longer need."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import quote

from postgrad.commands.results import Result
from postgrad.errors import PostgradError, StageError, suggest_path
from postgrad.hardware.memory import format_bytes
from postgrad.lineage.metrics import METRICS, read_metrics
from postgrad.lineage.record import LOCK, PLAN, RECORD, Record, SetChange, read_record
from postgrad.lineage.saved_plan import read_plan
from postgrad.reports.html.table import Cell, Column, Number, Table, change_cell, difference_cell, share_cell, text_cell
from postgrad.storage.atomic import STAGING, remove_folder
from postgrad.storage.file_lock import is_locked

_MAX_DEPTH = 5
_CHECKPOINTS = "checkpoints"
_ENDED = ("finished", "gate-failed")
"""States of a run that does not go on."""


@dataclass(frozen=True)
class RunRow:
    """A run folder."""

    run: Path
    name: str
    state: str
    """running, interrupted, stopped, finished, gate-failed or damaged."""
    step: int
    steps: int
    bytes: int
    learned: SetChange | None = None
    """The change of the learned set that fell most."""
    forgotten: SetChange | None = None
    """The change of the retained set that rose most."""
    removable: tuple[Path, ...] = ()
    """Folders that the finished run no longer needs: checkpoints that no other run started from or reads, unfinished writes."""
    removable_bytes: int = 0
    problem: str = ""


@dataclass(frozen=True)
class RunList(Result):
    """The runs below a folder."""

    folder: Path
    runs: tuple[RunRow, ...]

    @property
    def removable_bytes(self) -> int:
        """Size of all that may be removed."""
        return sum(run.removable_bytes for run in self.runs)

    def table(self, *, with_links: bool = False) -> Table:
        """The runs, in the order of their names. `with_links`: each name leads to the path of its run below a server's root."""
        columns = (
            Column("run", is_text=True), Column("state", is_text=True), Column("steps"), Column("learned", "nats"),
            Column("retained", "nats"), Column("relative"), Column("size"),
        )  # fmt: skip
        notes = [f"{row.run.name}: {row.problem}" for row in self.runs if row.problem]
        if self.removable_bytes:
            notes.append(
                f"{format_bytes(self.removable_bytes)} are checkpoints and remains that finished runs no longer need."
            )
        return Table(
            f"Runs in {self.folder}", columns, tuple(self._cells(row, with_links) for row in self.runs), tuple(notes)
        )

    def _repr_html_(self) -> str:
        return self.table().html()

    def _cells(self, row: RunRow, with_links: bool) -> tuple[Cell, ...]:
        relative = row.forgotten.relative_difference if row.forgotten else None
        name = os.path.relpath(row.run, self.folder) if row.run != self.folder else row.run.name
        return (
            replace(text_cell(name), link=quote(f"/{name}/") if with_links else ""),
            text_cell(row.state),
            Cell((Number(f"{row.step:,} of {row.steps:,}", row.step),)),
            difference_cell(row.learned) if row.learned else change_cell(None),
            difference_cell(row.forgotten) if row.forgotten else change_cell(None),
            share_cell(relative),
            Cell((Number(format_bytes(row.bytes), row.bytes),)),
        )


def list_runs(folder: Path | str = "runs") -> RunList:
    """The runs in a folder and below. Raises `StageError` when there is no such folder; a damaged run is a row."""
    folder = Path(folder)
    if not folder.is_dir():
        raise StageError(f"there is no folder {folder}", where="FOLDER", hint=suggest_path(folder))
    paths = sorted(find_runs(folder))
    records = {path: _read_record(path) for path in paths}
    needed = [_needed_runs(path, records[path]) for path in paths]
    rows = (
        _make_row(path, records[path], any(each is None or path.resolve() in each for each in needed)) for path in paths
    )
    return RunList(folder, tuple(rows))


def clean_runs(runs: RunList) -> int:
    """Remove the folders that are listed as removable; returns the bytes that are free now. Ask the user first."""
    freed = 0
    for row in runs.runs:
        if is_locked(row.run / LOCK):  # it has gone on since it was listed
            continue
        for path in row.removable:
            if path.is_dir() and not path.is_symlink():
                size = _folder_bytes(path)
                remove_folder(path)
                freed += size
    return freed


def find_runs(folder: Path, depth: int = 0) -> Iterator[Path]:
    """Run folders, which contain no others; hidden folders and links are not searched."""
    if (folder / PLAN).is_file():
        yield folder
    elif depth < _MAX_DEPTH:
        try:
            entries = sorted(folder.iterdir())
        except OSError:
            return
        for entry in entries:
            if entry.is_dir() and not entry.is_symlink() and not entry.name.startswith("."):
                yield from find_runs(entry, depth + 1)


def _read_record(path: Path) -> Record | PostgradError | None:
    """The record of a run; None where it has written none, the error of a damaged one."""
    try:
        return read_record(path) if (path / RECORD).exists() else None
    except PostgradError as error:
        return error


def _needed_runs(path: Path, record: Record | PostgradError | None) -> set[Path] | None:
    """The runs whose checkpoints a run started from, or reads if it goes on; None where that is unknown."""
    names: list[str] = []
    if isinstance(record, Record):
        names += [f"{parent.path}/{_CHECKPOINTS}/{parent.step}" for parent in record.parents if parent.step is not None]
    if not isinstance(record, Record) or record.status not in _ENDED:
        try:
            names += _texts(read_plan(path).stage)
        except PostgradError:
            if not isinstance(record, Record):
                return None
    # The plan has paths as the stage names them, relative to a folder that it does not name: that of the stage file.
    bases = [Path.cwd(), *path.resolve().parents]
    found = (_checkpoint_owner(base, name) for name in names if _CHECKPOINTS in name for base in bases)
    return {run for run in found if run is not None}


def _texts(value: object) -> Iterator[str]:
    """The texts of a stage: models, teachers and references are among them."""
    if isinstance(value, str):
        yield value
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _texts(item)


def _checkpoint_owner(base: Path, name: str) -> Path | None:
    """The run of a checkpoint that `name` is the path of, relative to `base`."""
    try:
        folder = (base / Path(name).expanduser()).resolve()
    except (OSError, ValueError, RuntimeError):  # too long, a NUL, a loop of links: no path
        return None
    return folder.parent.parent if folder.parent.name == _CHECKPOINTS else None


def _make_row(path: Path, record: Record | PostgradError | None, is_branched: bool) -> RunRow:
    size = _folder_bytes(path)
    try:
        if isinstance(record, PostgradError):
            raise record
        locked = is_locked(path / LOCK)
        if record is None or (record.status == "stopped" and locked):
            plan = read_plan(path)
            step = max((row.step for row in read_metrics(path / METRICS, plan.id)), default=0)
            name = str(plan.stage.get("name") or path.name)
            return RunRow(path, name, "running" if locked else "interrupted", step, plan.plan.steps, size)
    except PostgradError as error:
        return RunRow(path, path.name, "damaged", 0, 0, size, problem=f"{error.where}: {error.problem}")
    removable: list[Path] = []
    if record.status in _ENDED and not locked:
        removable = [each for each in path.glob(f"{STAGING}*") if each.is_dir()]
        if (path / _CHECKPOINTS).is_dir() and not is_branched:
            removable.append(path / _CHECKPOINTS)
    return RunRow(
        path,
        record.name,
        record.status,
        record.totals.steps,
        record.plan.steps,
        size,
        _extreme_change(record, "learned", lowest=True),
        _extreme_change(record, "retained", lowest=False),
        tuple(removable),
        sum(map(_folder_bytes, removable)),
    )


def _extreme_change(record: Record, role: str, *, lowest: bool) -> SetChange | None:
    known: Sequence[SetChange] = [c for c in record.changes_with_role(role).values() if c.difference is not None]
    return (min if lowest else max)(known, key=lambda change: change.difference or 0.0, default=None)


def _folder_bytes(folder: Path) -> int:
    total = 0
    for root, _, files in os.walk(folder):
        for name in files:
            path = Path(root, name)
            total += path.lstat().st_size if path.exists() else 0
    return total

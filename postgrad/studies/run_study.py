"""Run a study: every step once, in dependency order, on all devices; an interrupted study resumes.

On a CPU or with one accelerator the steps run in this process, one after the other, so that nothing is imported or
tokenised twice. With several accelerators each has a worker process, which takes the next step whose dependencies are met.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import queue
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from postgrad.data.read.files import list_files
from postgrad.distributed.world import World
from postgrad.errors import PostgradError, StageError, first_line
from postgrad.run.run_folder import lock_run_folder
from postgrad.storage.atomic import write_without_secrets
from postgrad.storage.checked_files import read_cached_json, write_checked_json
from postgrad.storage.read_json import MAX_BYTES, read_file
from postgrad.studies.run_step import (
    MACHINE_FILE,
    StepProgress,
    StepStopped,
    StepWarning,
    StudyFolder,
    read_study_json,
    run_step,
)
from postgrad.studies.step_graph import StepGraph, build_step_graph, is_step_output
from postgrad.studies.study import Study, load_study

TEXT_HASHES = "texts.json"
TIMES_FILE = "times.json"
_SOURCE_COMMENT = "# from "


@dataclass(frozen=True)
class PreparedStudy:
    """A parsed study with its step graph and its folder."""

    study: Study
    graph: StepGraph
    folder: StudyFolder
    file: Path
    overrides: tuple[str, ...] = ()

    @property
    def remaining_steps(self) -> list[str]:
        """Keys of the unfinished steps, in order."""
        return [key for key, step in self.graph.steps.items() if not self.folder.is_finished(step)]


@dataclass(frozen=True)
class StepStarted:
    """A step starts."""

    key: str
    device: str


@dataclass(frozen=True)
class StepFinished:
    """A step is complete (`is_cached`: it was so before the study started)."""

    key: str
    seconds: float
    is_cached: bool = False


@dataclass(frozen=True)
class StepFailed:
    """A step failed; the arms that depend on it are skipped."""

    key: str
    error: str


@dataclass(frozen=True)
class StudyFinished:
    """No runnable step remains."""

    failures: Mapping[str, str]
    is_stopped: bool
    seconds: float


StudyEvent = StepStarted | StepFinished | StepFailed | StepProgress | StepWarning | StudyFinished


def prepare_study(file: Path, cache: Path, overrides: Sequence[str] = ()) -> PreparedStudy:
    """Parse a study file and build its step graph. Raises `StageError` or `DataError`."""
    study = load_study(file, overrides)
    root = file.resolve().parent
    home = (root / (study.output or f"studies/{study.name}")).resolve()
    work = build_step_graph(study, _TextFingerprints(home, root), str(file))
    shelf = (root / study.runs).resolve() if study.runs else home
    return PreparedStudy(study, work, StudyFolder(home, shelf, root, cache), file, tuple(overrides))


def prepare_studies(files: Sequence[Path], cache: Path, overrides: Sequence[str] = ()) -> list[PreparedStudy]:
    """Parse several studies before the first one runs, so that all errors surface at once.

    Raises `StageError` or `DataError`, also for two studies with one output folder.
    """
    found = [prepare_study(file, cache, overrides) for file in files]
    homes: dict[Path, Path] = {}
    for prepared in found:
        home = prepared.folder.path
        if home in homes:
            raise _same_folder_error(prepared, homes[home])
        homes[home] = prepared.file
    return found


def _same_folder_error(prepared: PreparedStudy, other: Path) -> StageError:
    return StageError(
        f"{other.name} has the same output folder, so its results would be overwritten ({prepared.folder.path})",
        where=f"{prepared.file}: name",
        expected="a unique `name`, or an `output`",
        hint="set `runs: FOLDER` in both to share identical runs",
    )


class _TextFingerprints:
    """Fingerprints texts by content; a file is hashed again only when its size or modification time changes."""

    def __init__(self, home: Path, root: Path) -> None:
        self.memo_file, self.root = home / TEXT_HASHES, root
        self.memo = read_cached_json(self.memo_file, dict[str, tuple[int, int, str]]) or {}

    def __call__(self, text: Mapping[str, Any]) -> object:
        options = {key: value for key, value in text.items() if key not in ("name", "share", "role", "max_passes")}
        path = text.get("path")
        if not isinstance(path, str) or is_step_output(path):
            return options
        return [
            options,
            [self._file_hash(file) for file in list_files(path, self.root, str(text.get("name", path))).files],
        ]

    def _file_hash(self, file: Path) -> str:
        stat = file.stat()
        known = self.memo.get(str(file))
        if known is None or known[:2] != (stat.st_size, stat.st_mtime_ns):
            with file.open("rb") as opened:
                digest = hashlib.file_digest(opened, "sha256").hexdigest()
            self.memo[str(file)] = known = (stat.st_size, stat.st_mtime_ns, digest)
            if self.memo_file.parent.exists():
                write_checked_json(self.memo_file, self.memo)
        return known[2]


@dataclass
class _StepQueue:
    """Finished, failed and running steps of a graph."""

    graph: StepGraph
    finished_steps: set[str] = field(default_factory=set)
    failures: dict[str, str] = field(default_factory=dict)
    started_steps: set[str] = field(default_factory=set)

    def take_next(self) -> str | None:
        """The next step whose dependencies are finished."""
        for key, step in self.graph.steps.items():
            if key not in self.finished_steps | self.failures.keys() | self.started_steps and all(
                n in self.finished_steps for n in step.depends_on
            ):
                self.started_steps.add(key)
                return key
        return None

    def mark_failed(self, key: str, error: str) -> None:
        """Mark a step and everything that depends on it as failed."""
        self.failures[key] = error
        for other, step in self.graph.steps.items():
            if key in step.depends_on and other not in self.failures:
                self.mark_failed(other, f"needs {self.graph.steps[key].slug}, which failed")


def run_study(prepared: PreparedStudy, *, command: str, workers: int | None = None) -> Iterator[StudyEvent]:
    """Run every unfinished step.

    `workers`: number of worker processes. Default: one per accelerator, or this process where there are fewer than two.
    Raises `BusyError` while another process works on the study.
    """
    folder, start_time = prepared.folder, time.perf_counter()
    with lock_run_folder(folder.path, World(torch.device("cpu"))):
        _write_study_copy(prepared)
        state = _StepQueue(prepared.graph)
        for key, step in prepared.graph.steps.items():
            if folder.is_finished(step):
                state.finished_steps.add(key)
                yield StepFinished(key, 0.0, is_cached=True)
        earlier_seconds = total_step_seconds(prepared)
        count = torch.cuda.device_count() if workers is None else workers
        use_workers = count > 1 and len(prepared.remaining_steps) > 1
        if use_workers:
            stopped = yield from _run_in_workers(prepared, state, command, count)
        else:
            stopped = yield from _run_in_process(prepared, state, command)
        seconds = time.perf_counter() - start_time
        add_time(folder, seconds, count if use_workers else 1, total_step_seconds(prepared) - earlier_seconds)
        yield StudyFinished(state.failures, stopped, seconds)


def load_times(folder: StudyFolder) -> dict[str, float]:
    """Wall-clock, device and step seconds of the study so far, summed over resumes."""
    return {"wall": 0.0, "devices": 0.0, "inside": 0.0, **read_study_json(folder.path / TIMES_FILE, dict[str, float])}


def total_step_seconds(prepared: PreparedStudy) -> float:
    """Seconds of training, evaluation and preparation in all steps of the study."""
    notes = [prepared.folder.read_note(step).get("seconds", {}) for step in prepared.graph.steps.values()]
    return sum(seconds for note in notes for phase, seconds in note.items() if phase != "other")


def add_time(folder: StudyFolder, seconds: float, devices: int = 1, step_seconds: float = 0.0) -> None:
    """Add to the recorded times; `step_seconds`: training, evaluation and preparation."""
    before = load_times(folder)
    more = {"wall": seconds, "devices": seconds * devices, "inside": step_seconds}
    now = {key: before[key] + more[key] for key in more}
    folder.path.mkdir(parents=True, exist_ok=True)
    write_checked_json(folder.path / TIMES_FILE, now)


def _write_study_copy(prepared: PreparedStudy) -> None:
    """Copy the study file into its folder. Raises `StageError` for a folder that belongs to anything else."""
    home = prepared.folder.path
    if (home / "study.yaml").exists():
        content = read_file(home / "study.yaml", MAX_BYTES, error=StageError)
        first = content.decode(errors="replace").partition("\n")[0]
        other = prepared.folder.root / first.removeprefix(_SOURCE_COMMENT)
        if first.startswith(_SOURCE_COMMENT) and other.name != prepared.file.name and other.is_file():
            raise _same_folder_error(prepared, other)
    else:
        foreign = [
            p.name
            for p in home.iterdir()
            if p.name not in ("lock", TEXT_HASHES, TIMES_FILE, MACHINE_FILE) and not p.name.startswith(".")
        ]
        if foreign:
            raise StageError(
                f"the folder is not empty and holds no study (it contains {foreign[0]})",
                where=str(home),
                hint="set another `output`, or empty the folder",
            )
    write_without_secrets(home / "study.yaml", study_text(prepared))


def study_text(prepared: PreparedStudy) -> str:
    """The study file, preceded by its name and the overrides."""
    overrides = "".join(f"# override: {override}\n" for override in prepared.overrides)
    return f"{_SOURCE_COMMENT}{prepared.file.name}\n{overrides}{prepared.file.read_text()}"


# -- in this process ---------------------------------------------------------------------------------------------------


def _run_in_process(prepared: PreparedStudy, step_queue: _StepQueue, command: str) -> Iterator[StudyEvent]:
    """Run the steps one after the other; returns True when the user interrupted."""
    while (key := step_queue.take_next()) is not None:
        yield StepStarted(key, "")
        begin = time.perf_counter()
        halted = False
        try:
            for event in run_step(prepared.graph, prepared.graph.steps[key], prepared.folder, command):
                if isinstance(event, StepStopped):
                    halted = True
                else:
                    yield event
        except KeyboardInterrupt:
            return True
        except Exception as error:
            step_queue.mark_failed(key, _error_text(error, prepared.folder, key))
            yield StepFailed(key, step_queue.failures[key])
            continue
        if halted:
            return True
        step_queue.finished_steps.add(key)
        yield StepFinished(key, time.perf_counter() - begin)
    return False


def _error_text(error: Exception, folder: StudyFolder, key: str) -> str:
    """The error message; for an unexpected exception also the path of its traceback."""
    if isinstance(error, PostgradError):
        return str(error)
    place = folder.path / "failed" / f"{key}.txt"
    write_without_secrets(place, "".join(traceback.format_exception(error)))
    return f"{type(error).__name__}: {first_line(error)} (its traceback: {place})"


# -- in one process a device -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Outcome:
    """How a step ended in a worker process."""

    status: Literal["made", "halted", "failed"]
    error: str = ""


@dataclass
class _Worker:
    process: Any
    tasks: Any
    key: str | None = None
    started_at: float = 0.0


def _run_in_workers(prepared: PreparedStudy, step_queue: _StepQueue, command: str, count: int) -> Iterator[StudyEvent]:
    """Run the steps in `count` processes; returns True when the user interrupted."""
    context = multiprocessing.get_context("spawn")
    messages: Any = context.Queue()
    workers: dict[int, _Worker] = {}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    devices = [d for d in visible.split(",") if d] or [str(i) for i in range(count)]
    try:
        for number in range(count):
            tasks: Any = context.Queue()
            args = (
                number,
                str(prepared.file),
                prepared.overrides,
                str(prepared.folder.cache),
                command,
                tasks,
                messages,
            )
            with _EnvironmentVariables(CUDA_VISIBLE_DEVICES=devices[number % len(devices)]):
                process = context.Process(target=_worker_main, args=args, daemon=True)
                process.start()
            workers[number] = _Worker(process, tasks)
        return (yield from _dispatch_steps(step_queue, workers, messages))
    finally:
        for worker in workers.values():
            worker.tasks.put(None)
        for worker in workers.values():
            worker.process.join(timeout=60)
            if worker.process.is_alive():
                worker.process.terminate()


def _dispatch_steps(step_queue: _StepQueue, workers: dict[int, _Worker], messages: Any) -> Iterator[StudyEvent]:
    """Assign steps to idle workers and forward their events until all are idle."""
    stopped = False
    while True:
        for number, worker in workers.items():
            if worker.key is None and not stopped and (key := step_queue.take_next()) is not None:
                worker.key, worker.started_at = key, time.perf_counter()
                worker.tasks.put(key)
                yield StepStarted(key, str(number))
        if all(worker.key is None for worker in workers.values()):
            return stopped
        try:
            number, what = messages.get(timeout=1.0)
        except queue.Empty:
            yield from _drop_dead_workers(step_queue, workers)
            continue
        except KeyboardInterrupt:  # the workers receive it too: each saves and reports
            stopped = True
            continue
        if not isinstance(what, _Outcome):
            yield what
            continue
        worker, key = workers[number], workers[number].key
        assert key is not None
        worker.key = None
        if what.status == "halted":
            stopped = True
        elif what.status == "failed":
            step_queue.mark_failed(key, what.error)
            yield StepFailed(key, what.error)
        else:
            step_queue.finished_steps.add(key)
            yield StepFinished(key, time.perf_counter() - worker.started_at)


def _drop_dead_workers(step_queue: _StepQueue, workers: dict[int, _Worker]) -> Iterator[StudyEvent]:
    """Remove workers whose process died, and mark their steps as failed."""
    for number, worker in list(workers.items()):
        if worker.process.is_alive():
            continue
        del workers[number]
        if worker.key is not None:
            step_queue.mark_failed(worker.key, f"its process ended (exit code {worker.process.exitcode})")
            yield StepFailed(worker.key, step_queue.failures[worker.key])


class _EnvironmentVariables:
    """Sets environment variables for child processes."""

    def __init__(self, **values: str) -> None:
        self.values, self.previous = values, dict[str, str | None]()

    def __enter__(self) -> None:
        for key, value in self.values.items():
            self.previous[key] = os.environ.get(key)
            os.environ[key] = value

    def __exit__(self, *_: object) -> None:
        for key, value in self.previous.items():
            if value is None:
                os.environ.pop(key, None)
            else:
                os.environ[key] = value


def _worker_main(
    number: int, file: str, overrides: tuple[str, ...], cache: str, command: str, tasks: Any, messages: Any
) -> None:
    """Entry point of a worker process: runs steps until it receives None."""
    prepared = prepare_study(Path(file), Path(cache), overrides)
    last = 0.0
    while (key := tasks.get()) is not None:
        try:
            outcome = _Outcome("made")
            for event in run_step(prepared.graph, prepared.graph.steps[key], prepared.folder, command):
                if isinstance(event, StepStopped):
                    outcome = _Outcome("halted")
                elif not isinstance(event, StepProgress) or time.perf_counter() - last > 0.2:
                    last = time.perf_counter()
                    messages.put((number, event))
        except KeyboardInterrupt:
            outcome = _Outcome("halted")
        except Exception as error:
            outcome = _Outcome("failed", _error_text(error, prepared.folder, key))
        messages.put((number, outcome))

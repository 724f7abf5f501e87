"""How is a study carried out? Every step once, in order, on every device that is there; stopped anywhere, it goes on.

On a CPU or with one accelerator the steps are made in this process, one after the other, so that nothing is imported or
tokenised twice. With several accelerators one process stands by each, and is given the next step whose needs are there.
"""

from __future__ import annotations

import hashlib
import json
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

from postgrad.data.read.files import find_files
from postgrad.distributed.world import World
from postgrad.errors import PostgradError, StageError
from postgrad.run.run_folder import lock_run_folder
from postgrad.storage.atomic import write_atomically
from postgrad.studies.run_step import (
    MACHINE_FILE,
    StepProgress,
    StepStopped,
    StepWarning,
    StudyFolder,
    read_json_object,
    run_step,
)
from postgrad.studies.step_graph import StepGraph, build_step_graph, is_step_output
from postgrad.studies.study import Study, load_study

TEXT_HASHES = "texts.json"
TIMES_FILE = "times.json"
_SOURCE_COMMENT = "# from "


@dataclass(frozen=True)
class PreparedStudy:
    """A study that was read, with its steps and its folder."""

    study: Study
    graph: StepGraph
    folder: StudyFolder
    file: Path
    overrides: tuple[str, ...] = ()

    @property
    def remaining_steps(self) -> list[str]:
        """The steps that are not there yet, in their order."""
        return [key for key, step in self.graph.steps.items() if not self.folder.is_finished(step)]


@dataclass(frozen=True)
class StepStarted:
    """A step is being made."""

    key: str
    device: str


@dataclass(frozen=True)
class StepFinished:
    """A step is there (`before`: it was there when the study began)."""

    key: str
    seconds: float
    is_cached: bool = False


@dataclass(frozen=True)
class StepFailed:
    """A step could not be made; the arms that need it are left out."""

    key: str
    error: str


@dataclass(frozen=True)
class StudyFinished:
    """No step is left that can be made."""

    failures: Mapping[str, str]
    is_stopped: bool
    seconds: float


StudyEvent = StepStarted | StepFinished | StepFailed | StepProgress | StepWarning | StudyFinished


def prepare_study(file: Path, cache: Path, overrides: Sequence[str] = ()) -> PreparedStudy:
    """Read a study file and work out its steps. Raises `StageError` or `DataError` for what cannot be."""
    study = load_study(file, overrides)
    root = file.resolve().parent
    home = (root / (study.output or f"studies/{study.name}")).resolve()
    work = build_step_graph(study, _TextFingerprints(home, root), str(file))
    shelf = (root / study.runs).resolve() if study.runs else home
    return PreparedStudy(study, work, StudyFolder(home, shelf, root, cache), file, tuple(overrides))


def prepare_studies(files: Sequence[Path], cache: Path, overrides: Sequence[str] = ()) -> list[PreparedStudy]:
    """Read several studies, so that a mistake in the last one is told before the first one is carried out.

    Raises `StageError` or `DataError` for what cannot be, and for two that would write to one folder.
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
        f"{other.name} has the same folder, and what came of it would be overwritten ({prepared.folder.path})",
        where=f"{prepared.file}: name",
        expected="a `name` of its own, or an `output`",
        hint="runs: FOLDER in both shares what coincides",
    )


class _TextFingerprints:
    """Tells texts by their contents; what was hashed once is not read again while its size and time are the same."""

    def __init__(self, home: Path, root: Path) -> None:
        self.memo_file, self.root = home / TEXT_HASHES, root
        self.memo: dict[str, list[Any]] = read_json_object(self.memo_file)

    def __call__(self, text: Mapping[str, Any]) -> object:
        said = {key: value for key, value in text.items() if key not in ("name", "share", "role", "max_passes")}
        path = text.get("path")
        if not isinstance(path, str) or is_step_output(path):
            return said
        return [said, [self._file_hash(file) for file in find_files(path, self.root, str(text.get("name", path)))]]

    def _file_hash(self, file: Path) -> str:
        stat = file.stat()
        known = self.memo.get(str(file))
        if known is None or known[:2] != [stat.st_size, stat.st_mtime_ns]:
            with file.open("rb") as opened:
                digest = hashlib.file_digest(opened, "sha256").hexdigest()
            self.memo[str(file)] = known = [stat.st_size, stat.st_mtime_ns, digest]
            if self.memo_file.parent.exists():
                write_atomically(self.memo_file, json.dumps(self.memo))
        return str(known[2])


@dataclass
class _StepQueue:
    """Which steps are there, which could not be made, and which are being made."""

    graph: StepGraph
    finished_steps: set[str] = field(default_factory=set)
    failures: dict[str, str] = field(default_factory=dict)
    started_steps: set[str] = field(default_factory=set)

    def take_next(self) -> str | None:
        """A step whose needs are there."""
        for key, step in self.graph.steps.items():
            if key not in self.finished_steps | self.failures.keys() | self.started_steps and all(
                n in self.finished_steps for n in step.depends_on
            ):
                self.started_steps.add(key)
                return key
        return None

    def mark_failed(self, key: str, error: str) -> None:
        """Leave out a step and all that needs it."""
        self.failures[key] = error
        for other, step in self.graph.steps.items():
            if key in step.depends_on and other not in self.failures:
                self.mark_failed(other, f"needs {self.graph.steps[key].slug}, which failed")


def run_study(prepared: PreparedStudy, *, command: str, workers: int | None = None) -> Iterator[StudyEvent]:
    """Make every step that is not there.

    `workers`: processes to work in; left out: one an accelerator, and this one where there are fewer than two. Raises
    `BusyError` when another process works on the study.
    """
    folder, begun = prepared.folder, time.perf_counter()
    with lock_run_folder(folder.path, World(torch.device("cpu"))):
        _write_study_copy(prepared)
        state = _StepQueue(prepared.graph)
        for key, step in prepared.graph.steps.items():
            if folder.is_finished(step):
                state.finished_steps.add(key)
                yield StepFinished(key, 0.0, is_cached=True)
        inside = total_step_seconds(prepared)
        count = torch.cuda.device_count() if workers is None else workers
        many = count > 1 and len(prepared.remaining_steps) > 1
        if many:
            stopped = yield from _run_in_workers(prepared, state, command, count)
        else:
            stopped = yield from _run_in_process(prepared, state, command)
        seconds = time.perf_counter() - begun
        add_time(folder, seconds, count if many else 1, total_step_seconds(prepared) - inside)
        yield StudyFinished(state.failures, stopped, seconds)


def load_times(folder: StudyFolder) -> dict[str, float]:
    """Seconds that the study took until now, over all its goes, times the devices it had."""
    return {"wall": 0.0, "devices": 0.0, "inside": 0.0, **read_json_object(folder.path / TIMES_FILE)}


def total_step_seconds(prepared: PreparedStudy) -> float:
    """Seconds of training, evaluation and making in all of the study's steps, whoever made them."""
    notes = [prepared.folder.read_note(step).get("seconds", {}) for step in prepared.graph.steps.values()]
    return sum(seconds for note in notes for phase, seconds in note.items() if phase != "other")


def add_time(folder: StudyFolder, seconds: float, devices: int = 1, step_seconds: float = 0.0) -> None:
    """Add to what the study took; `inside`: the seconds of it that were training, evaluation and making."""
    before = load_times(folder)
    more = {"wall": seconds, "devices": seconds * devices, "inside": step_seconds}
    now = {key: before[key] + more[key] for key in more}
    folder.path.mkdir(parents=True, exist_ok=True)
    write_atomically(folder.path / TIMES_FILE, json.dumps(now))


def _write_study_copy(prepared: PreparedStudy) -> None:
    """Keep the study file beside what came of it. Raises `StageError` for a folder of something else, or of another file."""
    home = prepared.folder.path
    if (home / "study.yaml").exists():
        first = (home / "study.yaml").read_text().partition("\n")[0]
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
                f"the folder is not empty and not a study's ({foreign[0]} is in it)",
                where=str(home),
                hint="give another `output`, or empty the folder",
            )
    write_atomically(home / "study.yaml", study_text(prepared))


def study_text(prepared: PreparedStudy) -> str:
    """The study file, with its name and the overrides that were given above it."""
    given = "".join(f"# given besides: {said}\n" for said in prepared.overrides)
    return f"{_SOURCE_COMMENT}{prepared.file.name}\n{given}{prepared.file.read_text()}"


# -- in this process ---------------------------------------------------------------------------------------------------


def _run_in_process(prepared: PreparedStudy, step_queue: _StepQueue, command: str) -> Iterator[StudyEvent]:
    """Make the steps one after the other; its value is True when the user stopped."""
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
    """An error in words; of one that is not ours, where its traceback lies."""
    if isinstance(error, PostgradError):
        return str(error)
    place = folder.path / "failed" / f"{key}.txt"
    write_atomically(place, "".join(traceback.format_exception(error)))
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first} (its traceback: {place})"


# -- in one process a device -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Outcome:
    """How a step ended in a worker."""

    status: Literal["made", "halted", "failed"]
    error: str = ""


@dataclass
class _Worker:
    process: Any
    tasks: Any
    key: str | None = None
    started_at: float = 0.0


def _run_in_workers(prepared: PreparedStudy, step_queue: _StepQueue, command: str, count: int) -> Iterator[StudyEvent]:
    """Make the steps in `count` processes; its value is True when the user stopped."""
    context = multiprocessing.get_context("spawn")
    told: Any = context.Queue()
    workers: dict[int, _Worker] = {}
    seen = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    devices = [d for d in seen.split(",") if d] or [str(i) for i in range(count)]
    try:
        for number in range(count):
            wishes: Any = context.Queue()
            args = (number, str(prepared.file), prepared.overrides, str(prepared.folder.cache), command, wishes, told)
            with _EnvironmentVariables(CUDA_VISIBLE_DEVICES=devices[number % len(devices)]):
                process = context.Process(target=_worker_main, args=args, daemon=True)
                process.start()
            workers[number] = _Worker(process, wishes)
        return (yield from _dispatch_steps(step_queue, workers, told))
    finally:
        for worker in workers.values():
            worker.tasks.put(None)
        for worker in workers.values():
            worker.process.join(timeout=60)
            if worker.process.is_alive():
                worker.process.terminate()


def _dispatch_steps(step_queue: _StepQueue, workers: dict[int, _Worker], messages: Any) -> Iterator[StudyEvent]:
    """Give every idle worker a step, and pass on what they tell, until all are idle."""
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
        except KeyboardInterrupt:  # the workers had it too: each saves, and says so
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
    """Leave out workers whose process has ended by itself, with what they were making."""
    for number, worker in list(workers.items()):
        if worker.process.is_alive():
            continue
        del workers[number]
        if worker.key is not None:
            step_queue.mark_failed(worker.key, f"its process ended (exit code {worker.process.exitcode})")
            yield StepFailed(worker.key, step_queue.failures[worker.key])


class _EnvironmentVariables:
    """Variables that a process is born with."""

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
    """What a worker does: one step after the other, until it is given none."""
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

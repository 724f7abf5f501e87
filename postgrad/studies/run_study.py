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
from postgrad.run.run_folder import alone
from postgrad.storage.atomic import write_atomically
from postgrad.studies.run_step import MACHINE, Folder, Halted, Moved, Warned, carry_out, kept
from postgrad.studies.step_graph import Work, is_made, work_out
from postgrad.studies.study import Study, load_study

TEXTS = "texts.json"
TIMES = "times.json"
_FROM = "# from "


@dataclass(frozen=True)
class Prepared:
    """A study that was read, with its steps and its folder."""

    study: Study
    work: Work
    folder: Folder
    file: Path
    overrides: tuple[str, ...] = ()

    @property
    def left(self) -> list[str]:
        """The steps that are not there yet, in their order."""
        return [key for key, step in self.work.steps.items() if not self.folder.made(step)]


@dataclass(frozen=True)
class StepBegan:
    """A step is being made."""

    key: str
    device: str


@dataclass(frozen=True)
class StepEnded:
    """A step is there (`before`: it was there when the study began)."""

    key: str
    seconds: float
    before: bool = False


@dataclass(frozen=True)
class StepFailed:
    """A step could not be made; the arms that need it are left out."""

    key: str
    error: str


@dataclass(frozen=True)
class Ended:
    """No step is left that can be made."""

    failed: Mapping[str, str]
    stopped: bool
    seconds: float


StudyEvent = StepBegan | StepEnded | StepFailed | Moved | Warned | Ended


def prepare(file: Path, cache: Path, overrides: Sequence[str] = ()) -> Prepared:
    """Read a study file and work out its steps. Raises `StageError` or `DataError` for what cannot be."""
    study = load_study(file, overrides)
    root = file.resolve().parent
    home = (root / (study.output or f"studies/{study.name}")).resolve()
    work = work_out(study, _Prints(home, root), str(file))
    shelf = (root / study.runs).resolve() if study.runs else home
    return Prepared(study, work, Folder(home, shelf, root, cache), file, tuple(overrides))


def prepare_all(files: Sequence[Path], cache: Path, overrides: Sequence[str] = ()) -> list[Prepared]:
    """Read several studies, so that a mistake in the last one is told before the first one is carried out.

    Raises `StageError` or `DataError` for what cannot be, and for two that would write to one folder.
    """
    found = [prepare(file, cache, overrides) for file in files]
    homes: dict[Path, Path] = {}
    for prepared in found:
        home = prepared.folder.home
        if home in homes:
            raise _same_folder(prepared, homes[home])
        homes[home] = prepared.file
    return found


def _same_folder(prepared: Prepared, other: Path) -> StageError:
    return StageError(
        f"{other.name} has the same folder, and what came of it would be overwritten ({prepared.folder.home})",
        where=f"{prepared.file}: name",
        expected="a `name` of its own, or an `output`",
        way_out="runs: FOLDER in both shares what coincides",
    )


class _Prints:
    """Tells texts by their contents; what was hashed once is not read again while its size and time are the same."""

    def __init__(self, home: Path, root: Path) -> None:
        self.memo_file, self.root = home / TEXTS, root
        self.memo: dict[str, list[Any]] = kept(self.memo_file)

    def __call__(self, text: Mapping[str, Any]) -> object:
        said = {key: value for key, value in text.items() if key not in ("name", "share", "role", "max_passes")}
        path = text.get("path")
        if not isinstance(path, str) or is_made(path):
            return said
        return [said, [self._hashed(file) for file in find_files(path, self.root, str(text.get("name", path)))]]

    def _hashed(self, file: Path) -> str:
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
class _State:
    """Which steps are there, which could not be made, and which are being made."""

    work: Work
    made: set[str] = field(default_factory=set)
    failed: dict[str, str] = field(default_factory=dict)
    taken: set[str] = field(default_factory=set)

    def next(self) -> str | None:
        """A step whose needs are there."""
        for key, step in self.work.steps.items():
            if key not in self.made | self.failed.keys() | self.taken and all(n in self.made for n in step.after):
                self.taken.add(key)
                return key
        return None

    def fail(self, key: str, error: str) -> None:
        """Leave out a step and all that needs it."""
        self.failed[key] = error
        for other, step in self.work.steps.items():
            if key in step.after and other not in self.failed:
                self.fail(other, f"needs {self.work.steps[key].slug}, which failed")


def run_study(prepared: Prepared, *, command: str, workers: int | None = None) -> Iterator[StudyEvent]:
    """Make every step that is not there.

    `workers`: processes to work in; left out: one an accelerator, and this one where there are fewer than two. Raises
    `BusyError` when another process works on the study.
    """
    folder, begun = prepared.folder, time.perf_counter()
    with alone(folder.home, World(torch.device("cpu"))):
        _write_copy(prepared)
        state = _State(prepared.work)
        for key, step in prepared.work.steps.items():
            if folder.made(step):
                state.made.add(key)
                yield StepEnded(key, 0.0, before=True)
        inside = seconds_inside(prepared)
        count = torch.cuda.device_count() if workers is None else workers
        many = count > 1 and len(prepared.left) > 1
        if many:
            stopped = yield from _beside(prepared, state, command, count)
        else:
            stopped = yield from _here(prepared, state, command)
        seconds = time.perf_counter() - begun
        count_time(folder, seconds, count if many else 1, seconds_inside(prepared) - inside)
        yield Ended(state.failed, stopped, seconds)


def spent(folder: Folder) -> dict[str, float]:
    """Seconds that the study took until now, over all its goes, times the devices it had."""
    return {"wall": 0.0, "devices": 0.0, "inside": 0.0, **kept(folder.home / TIMES)}


def seconds_inside(prepared: Prepared) -> float:
    """Seconds of training, evaluation and making in all of the study's steps, whoever made them."""
    notes = [prepared.folder.note(step).get("seconds", {}) for step in prepared.work.steps.values()]
    return sum(seconds for note in notes for phase, seconds in note.items() if phase != "other")


def count_time(folder: Folder, seconds: float, devices: int = 1, inside: float = 0.0) -> None:
    """Add to what the study took; `inside`: the seconds of it that were training, evaluation and making."""
    before = spent(folder)
    more = {"wall": seconds, "devices": seconds * devices, "inside": inside}
    now = {key: before[key] + more[key] for key in more}
    folder.home.mkdir(parents=True, exist_ok=True)
    write_atomically(folder.home / TIMES, json.dumps(now))


def _write_copy(prepared: Prepared) -> None:
    """Keep the study file beside what came of it. Raises `StageError` for a folder of something else, or of another file."""
    home = prepared.folder.home
    if (home / "study.yaml").exists():
        first = (home / "study.yaml").read_text().partition("\n")[0]
        other = prepared.folder.root / first.removeprefix(_FROM)
        if first.startswith(_FROM) and other.name != prepared.file.name and other.is_file():
            raise _same_folder(prepared, other)
    else:
        foreign = [
            p.name
            for p in home.iterdir()
            if p.name not in ("lock", TEXTS, TIMES, MACHINE) and not p.name.startswith(".")
        ]
        if foreign:
            raise StageError(
                f"the folder is not empty and not a study's ({foreign[0]} is in it)",
                where=str(home),
                way_out="give another `output`, or empty the folder",
            )
    write_atomically(home / "study.yaml", study_text(prepared))


def study_text(prepared: Prepared) -> str:
    """The study file, with its name and the overrides that were given above it."""
    given = "".join(f"# given besides: {said}\n" for said in prepared.overrides)
    return f"{_FROM}{prepared.file.name}\n{given}{prepared.file.read_text()}"


# -- in this process ---------------------------------------------------------------------------------------------------


def _here(prepared: Prepared, state: _State, command: str) -> Iterator[StudyEvent]:
    """Make the steps one after the other; its value is True when the user stopped."""
    while (key := state.next()) is not None:
        yield StepBegan(key, "")
        begin = time.perf_counter()
        halted = False
        try:
            for event in carry_out(prepared.work, prepared.work.steps[key], prepared.folder, command):
                if isinstance(event, Halted):
                    halted = True
                else:
                    yield event
        except KeyboardInterrupt:
            return True
        except Exception as error:
            state.fail(key, _told(error, prepared.folder, key))
            yield StepFailed(key, state.failed[key])
            continue
        if halted:
            return True
        state.made.add(key)
        yield StepEnded(key, time.perf_counter() - begin)
    return False


def _told(error: Exception, folder: Folder, key: str) -> str:
    """An error in words; of one that is not ours, where its traceback lies."""
    if isinstance(error, PostgradError):
        return str(error)
    place = folder.home / "failed" / f"{key}.txt"
    write_atomically(place, "".join(traceback.format_exception(error)))
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first} (its traceback: {place})"


# -- in one process a device -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Outcome:
    """How a step ended in a worker."""

    how: Literal["made", "halted", "failed"]
    error: str = ""


@dataclass
class _Worker:
    process: Any
    wishes: Any
    key: str | None = None
    begin: float = 0.0


def _beside(prepared: Prepared, state: _State, command: str, count: int) -> Iterator[StudyEvent]:
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
            with _environment(CUDA_VISIBLE_DEVICES=devices[number % len(devices)]):
                process = context.Process(target=_work, args=args, daemon=True)
                process.start()
            workers[number] = _Worker(process, wishes)
        return (yield from _given_out(state, workers, told))
    finally:
        for worker in workers.values():
            worker.wishes.put(None)
        for worker in workers.values():
            worker.process.join(timeout=60)
            if worker.process.is_alive():
                worker.process.terminate()


def _given_out(state: _State, workers: dict[int, _Worker], told: Any) -> Iterator[StudyEvent]:
    """Give every idle worker a step, and pass on what they tell, until all are idle."""
    stopped = False
    while True:
        for number, worker in workers.items():
            if worker.key is None and not stopped and (key := state.next()) is not None:
                worker.key, worker.begin = key, time.perf_counter()
                worker.wishes.put(key)
                yield StepBegan(key, str(number))
        if all(worker.key is None for worker in workers.values()):
            return stopped
        try:
            number, what = told.get(timeout=1.0)
        except queue.Empty:
            yield from _buried(state, workers)
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
        if what.how == "halted":
            stopped = True
        elif what.how == "failed":
            state.fail(key, what.error)
            yield StepFailed(key, what.error)
        else:
            state.made.add(key)
            yield StepEnded(key, time.perf_counter() - worker.begin)


def _buried(state: _State, workers: dict[int, _Worker]) -> Iterator[StudyEvent]:
    """Leave out workers whose process has ended by itself, with what they were making."""
    for number, worker in list(workers.items()):
        if worker.process.is_alive():
            continue
        del workers[number]
        if worker.key is not None:
            state.fail(worker.key, f"its process ended (exit code {worker.process.exitcode})")
            yield StepFailed(worker.key, state.failed[worker.key])


class _environment:
    """Variables that a process is born with."""

    def __init__(self, **values: str) -> None:
        self.values, self.before = values, dict[str, str | None]()

    def __enter__(self) -> None:
        for key, value in self.values.items():
            self.before[key] = os.environ.get(key)
            os.environ[key] = value

    def __exit__(self, *_: object) -> None:
        for key, value in self.before.items():
            if value is None:
                os.environ.pop(key, None)
            else:
                os.environ[key] = value


def _work(number: int, file: str, overrides: tuple[str, ...], cache: str, command: str, wishes: Any, told: Any) -> None:
    """What a worker does: one step after the other, until it is given none."""
    prepared = prepare(Path(file), Path(cache), overrides)
    last = 0.0
    while (key := wishes.get()) is not None:
        try:
            outcome = _Outcome("made")
            for event in carry_out(prepared.work, prepared.work.steps[key], prepared.folder, command):
                if isinstance(event, Halted):
                    outcome = _Outcome("halted")
                elif not isinstance(event, Moved) or time.perf_counter() - last > 0.2:
                    last = time.perf_counter()
                    told.put((number, event))
        except KeyboardInterrupt:
            outcome = _Outcome("halted")
        except Exception as error:
            outcome = _Outcome("failed", _told(error, prepared.folder, key))
        told.put((number, outcome))

"""Plan and run a stage; its events are what a progress display shows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from postgrad.config.stage import Stage
from postgrad.config.stage_file import parse_stage, read_stage
from postgrad.plan.plan import Plan, make_plan
from postgrad.run.events import RunEvent
from postgrad.run.run import run_stage
from postgrad.storage.cache_folder import cache_folder

StageSource = Stage | Path | str | Mapping[str, object]
"""A `Stage`, the path of a stage file, or a stage's keys as plain data."""


def load_stage(source: StageSource, overrides: Sequence[str] = ()) -> Stage:
    """A stage from a file or from plain data, with `key.sub=value` overrides for a file.

    Raises `StageError` with the path of the key that is wrong, and what was expected.
    """
    if isinstance(source, Stage):
        return source
    if isinstance(source, Mapping):
        return parse_stage(dict(source), "stage")
    return parse_stage(read_stage(Path(source), list(overrides)), str(source))


def plan_stage(
    stage: StageSource,
    overrides: Sequence[str] = (),
    *,
    folder: Path | str | None = None,
    cache: Path | None = None,
    progress: Callable[[str, int, int], None] = lambda source, done, total: None,
) -> Plan:
    """Everything that follows from a stage before a weight moves: sources, steps, schedule, held-out sets.

    `folder`: where relative paths of the stage begin. Default: the folder of the stage file, or the working directory.
    `progress` is called with the source that is tokenised, the bytes done and their total.
    """
    if folder is None:
        folder = Path(stage).resolve().parent if isinstance(stage, Path | str) else Path.cwd()
    return make_plan(load_stage(stage, overrides), Path(folder), cache or cache_folder(), progress)


def train(
    stage: StageSource | Plan,
    overrides: Sequence[str] = (),
    *,
    folder: Path | str | None = None,
    cache: Path | None = None,
    command: str = "postgrad.train(stage)",
) -> Iterator[RunEvent]:
    """Run a stage as an iterator of events; the last one is `RunFinished`, or `RunStopped` after an interrupt.

    The same call resumes from the last checkpoint. `command`: recorded as what resumes the run. `folder` as in `plan_stage`.
    """
    plan = stage if isinstance(stage, Plan) else plan_stage(stage, overrides, folder=folder, cache=cache)
    yield from run_stage(plan, command=command, cache=cache or cache_folder())

"""A study as a library call: plan it, run it as an iterator of events, and read its results as typed values."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from postgrad.commands.results import Result
from postgrad.lineage.record import Interval
from postgrad.storage.cache_folder import cache_folder
from postgrad.studies.outputs import STUDY_JSON, write_outputs
from postgrad.studies.run_study import StudyEvent, StudyFinished, add_time, prepare_study
from postgrad.studies.run_study import run_study as run_prepared_study


@dataclass(frozen=True)
class ArmLosses(Result):
    """An arm of a study, as a mean over its seeds."""

    name: str
    status: str
    seeds: tuple[int, ...]
    loss: Mapping[str, Interval]
    """Nats per token by held-out set, and over all `old`, all `new` and both (`average`); empty for an unfinished arm."""
    change: Mapping[str, Interval]
    """Change of the loss from the base model; `old` above zero is forgetting."""


@dataclass(frozen=True)
class StudyOutcome(Result):
    """The results of a study; all of them are in `study.json` and on its page."""

    folder: Path
    arms: tuple[ArmLosses, ...]
    summary: tuple[str, ...]
    """The results in sentences."""
    failures: Mapping[str, str]
    """The error of each step that failed."""
    is_stopped: bool

    @property
    def json_file(self) -> Path:
        """The file with all results."""
        return self.folder / STUDY_JSON


def run_study(
    file: Path | str, *, overrides: Sequence[str] = (), cache: Path | None = None
) -> Iterator[StudyEvent | StudyOutcome]:
    """Run a study file, as an iterator of events; the last item is its results. The same call resumes.

    `overrides`: key.sub=value. Raises `StageError` or `DataError` for a study that cannot be run.
    """
    start_time = time.perf_counter()
    prepared = prepare_study(Path(file), cache or cache_folder(), overrides)
    add_time(prepared.folder, time.perf_counter() - start_time)
    for event in run_prepared_study(prepared, command=f"postgrad study {file}"):
        yield event
        if isinstance(event, StudyFinished):
            results = write_outputs(prepared, event.failures)
            arms = tuple(
                ArmLosses(
                    arm["name"],
                    arm["status"],
                    tuple(arm["seeds"]),
                    {name: Interval(**value) for name, value in arm.get("loss", {}).items()},
                    {name: Interval(**value) for name, value in arm.get("change", {}).items()},
                )
                for arm in results["arms"]
            )
            yield StudyOutcome(
                prepared.folder.path, arms, tuple(results["summary"]), results["failed"], event.is_stopped
            )

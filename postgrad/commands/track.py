"""Forward a run to experiment trackers, from where an earlier call or the run itself got to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from pydantic import TypeAdapter, ValidationError

from postgrad.commands.results import Result
from postgrad.config.quantities import get_kinds
from postgrad.config.stage_file import parse_recorded_stage
from postgrad.config.trackers import AnyTracker, TrackerConfig
from postgrad.errors import StageError, require_choice
from postgrad.lineage.record import PLAN
from postgrad.lineage.saved_plan import read_plan
from postgrad.tracking.forward import Forwarder, lock_forwarder

TRACKER_KINDS = get_kinds(get_args(AnyTracker)[0])


@dataclass(frozen=True)
class TrackerResult:
    """What one tracker got."""

    kind: str
    sent: int
    """Points (steps, evaluations, results) that this call sent."""
    points: int
    """Points that were sent in all."""
    is_finished: bool
    """The run is finished, and its results and page were sent."""


@dataclass(frozen=True)
class TrackingReport(Result):
    """A run that was forwarded to trackers."""

    run: Path
    trackers: tuple[TrackerResult, ...]


def track_run(
    run: Path | str, to: Sequence[str | TrackerConfig] = (), *, project: str | None = None, address: str | None = None
) -> TrackingReport:
    """Send what each tracker has not got of a run, whether it is going on, was stopped or is finished.

    `to`: `tensorboard`, `wandb`, `mlflow`, `trackio`, or configurations of `postgrad.config.trackers`. Default: those of the
    stage. Raises `MissingExtra`, `ServiceError` (the same call goes on), `BusyError` while the run forwards itself.
    """
    folder = Path(run)
    if not (folder / PLAN).exists():
        raise StageError(f"{run} is not a run folder", expected="the output folder of `postgrad train`")
    configs = [_make_config(each, project, address) for each in to] or _stage_trackers(folder)
    results = []
    for config in configs:
        with lock_forwarder(folder, config):
            forwarder = Forwarder(folder, config)
            try:
                sent = forwarder.forward()
            finally:
                forwarder.close()
            cursor = forwarder.cursor
            results.append(TrackerResult(config.kind, sent, cursor.points, cursor.is_finished))
    return TrackingReport(folder, tuple(results))


def _make_config(tracker: str | TrackerConfig, project: str | None, address: str | None) -> TrackerConfig:
    if isinstance(tracker, TrackerConfig):
        return tracker
    require_choice("tracker", tracker, TRACKER_KINDS, where="--to")
    keys = {"project": project, "address": address}
    given = {"kind": tracker, **{key: value for key, value in keys.items() if value is not None}}
    try:
        return TypeAdapter(AnyTracker).validate_python(given)
    except ValidationError as error:
        first = error.errors()[0]
        key = str(first["loc"][-1])
        if key == tracker:  # the whole of it, such as a NUL character in a text
            raise StageError(first["msg"].removeprefix("Value error, "), where="--to") from None
        raise StageError(f"{tracker} has no {key}", where=f"--{key}") from None


def _stage_trackers(folder: Path) -> list[TrackerConfig]:
    plan = read_plan(folder)
    trackers = parse_recorded_stage(plan.stage, folder.name).track
    if not trackers:
        raise StageError(
            f"no tracker is named, and the stage of {folder.name} has none",
            where="--to",
            expected=", ".join(TRACKER_KINDS),
        )
    return list(trackers)

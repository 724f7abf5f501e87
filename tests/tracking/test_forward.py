"""Each point of a run reaches a tracker exactly once, whatever is killed; and a run is the same with and without trackers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from postgrad.config.stage_file import parse_stage
from postgrad.errors import BusyError, MissingExtra, PostgradError, ServiceError, StageError
from postgrad.lineage.metrics import METRICS
from postgrad.lineage.record import RECORD, read_record
from postgrad.plan.plan import make_plan
from postgrad.run import run_trackers
from postgrad.run.events import RunFinished, WarningMessage
from postgrad.run.run import run_stage
from postgrad.tracking import forward as forwarding
from postgrad.tracking.follower import follow_run
from postgrad.tracking.forward import Forwarder, cursor_path, lock_forwarder, read_cursor
from postgrad.tracking.points import result_point
from tests.conftest import StageOf
from tests.tiny_lineage import LineageRuns
from tests.tiny_stages import run_trace
from tests.tracking.fakes import Budget, FileConfig, FileTracker, Killed


@pytest.fixture
def run(runs: LineageRuns, tmp_path: Path) -> Path:
    """A copy of a finished run, without its weights."""
    ignore = shutil.ignore_patterns("checkpoints", "model", "tracking")
    return Path(shutil.copytree(runs.replay, tmp_path / "replay", ignore=ignore))


@pytest.fixture(autouse=True)
def sends(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few points a send, so that there are several."""
    monkeypatch.setattr(forwarding, "_POINTS_PER_SEND", 5)
    monkeypatch.setattr(FileTracker, "budget", Budget(10**9))


def forward(run: Path, config: FileConfig) -> int:
    forwarder = Forwarder(run, config)
    sent = forwarder.forward()
    forwarder.close()
    return sent


def values(config: FileConfig) -> list[list[object]]:
    return [json.loads(line) for line in Path(config.address).read_text().splitlines()]


def test_steps_evaluations_and_results_arrive_in_order(run: Path, tmp_path: Path) -> None:
    config = FileConfig(address=str(tmp_path / "out"))
    sent, record = forward(run, config), read_record(run)
    found = values(config)
    names = {name for _, name, _ in found}
    assert {"train/loss", "train/learning_rate", "train/share/old", "held_out/old-heldout/change_low"} <= names
    assert {"results/old-heldout/change_high", "results/share/new", "results/old-heldout/kl_divergence"} <= names
    losses = [step for step, name, _ in found if name == "train/loss"]
    assert losses == list(range(1, record.totals.steps + 1))
    assert all(record.changes["old-heldout"].difference == v for _, n, v in found if n == "results/old-heldout/change")
    assert sent == record.totals.metrics_lines + 1 if record.totals.metrics_lines else False
    assert forward(run, config) == 0 and values(config) == found
    cursor = read_cursor(cursor_path(run, config), record.id)
    assert cursor.is_finished and cursor.points == sent and cursor.sending is None


@pytest.mark.parametrize("remembers", [True, False])
def test_killed_at_any_write_no_value_arrives_twice(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, remembers: bool
) -> None:
    """A tracker that does not say what it has (the mutant) gets values twice."""
    lines = (run / METRICS).read_bytes().splitlines(keepends=True)
    (run / METRICS).write_bytes(b"".join([*lines[:2], *lines[-2:]]))
    monkeypatch.setattr(forwarding, "_POINTS_PER_SEND", 2)
    whole = FileConfig(address=str(tmp_path / "whole"))
    forward(run, whole)
    expected, saved = values(whole), Forwarder._save
    monkeypatch.setattr(FileTracker, "remembers", remembers)

    def save(forwarder: Forwarder) -> None:
        FileTracker.budget.spend()
        saved(forwarder)

    monkeypatch.setattr(Forwarder, "_save", save)
    doubled = 0
    for first in range(0, len(expected) + 12, 3 if remembers else 9):
        config = FileConfig(address=str(tmp_path / f"killed-{first}"))
        for writes in (first, 3, 1, 10**9):
            monkeypatch.setattr(FileTracker, "budget", Budget(writes))
            try:
                forward(run, config)
            except Killed:
                continue
        found = values(config)
        doubled += len(found) - len(expected)
        assert not remembers or found == expected
    assert (doubled == 0) is remembers


def test_a_run_that_is_killed_and_resumed_sends_no_step_twice(run: Path, tmp_path: Path) -> None:
    """A resumed run takes back the lines after its checkpoint and writes them again, with other durations."""
    config = FileConfig(address=str(tmp_path / "out"))
    lines, record = (run / METRICS).read_bytes().splitlines(keepends=True), (run / RECORD).read_bytes()
    (run / RECORD).unlink()
    half = len(lines) * 2 // 3
    (run / METRICS).write_bytes(b"".join(lines[:half]) + lines[half][:20])  # killed within a line
    follower = Forwarder(run, config)
    assert follower.forward() == half
    for count in (half // 2, half - 1, len(lines)):
        (tmp_path / "new").write_bytes(b"".join(lines[:count]))
        (tmp_path / "new").replace(run / METRICS)
        follower.forward()
    assert forward(run, config) == 0
    (run / RECORD).write_bytes(record)
    assert forward(run, config) == 1
    whole = FileConfig(address=str(tmp_path / "whole"))
    forward(run, whole)
    assert values(config) == values(whole)


def test_a_problem_is_reported_once_and_recorded_and_passes(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, problems, pauses = FileConfig(address=str(tmp_path / "out")), [], []

    def refuse(*_: object) -> None:
        raise ConnectionError("no route to the host\nand more lines, https://me:secretword1@host/x")

    monkeypatch.setattr(FileTracker, "send", refuse)
    follow_run(run, config, lambda s: bool(pauses.append(s)) or len(pauses) > 3, problems.append)
    assert problems == ["ConnectionError: no route to the host"] and pauses == [10.0, 20.0, 40.0, 80.0]
    assert read_cursor(cursor_path(run, config), read_record(run).id).problem == problems[0]
    with pytest.raises(ServiceError, match="no route"):
        forward(run, config)
    monkeypatch.undo()
    forward(run, config)
    cursor = read_cursor(cursor_path(run, config), read_record(run).id)
    assert cursor.problem == "" and cursor.is_finished


def test_what_is_missing_is_named(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = FileConfig(address=str(tmp_path / "out"))
    monkeypatch.setattr(FileConfig, "packages", ("no_such_tracker",))
    with pytest.raises(MissingExtra, match=r"no_such_tracker is not installed"):
        forward(run, config)
    with pytest.raises(StageError, match="is not a run folder"):
        Forwarder(tmp_path, config)
    with lock_forwarder(run, config), pytest.raises(BusyError, match="another process"), lock_forwarder(run, config):
        pass
    cursor_path(run, config).write_text("{broken")
    with pytest.raises(StageError, match=r"hint: +delete"):
        Forwarder(run, config)


def test_results_have_no_name_that_a_tracker_refuses(runs: LineageRuns) -> None:
    record = read_record(runs.naive)
    record.changes["we/ird <b> ä\n%"] = record.changes["old-heldout"]
    names = result_point(record).values
    assert "results/we/ird _b_ ä__/change" in names


FAKE = """
import os, sys, time, atexit
print("noise" * 100_000)
{behaviour}
"""
BEHAVIOURS = {
    "trackio": "os._exit(7)",  # as a segmentation fault
    "wandb": "raise RuntimeError('broken package')",
    "mlflow": "time.sleep(600)",
}


def test_a_run_with_failing_trackers_is_the_same_to_the_bit(
    stage_of: StageOf, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One tracker crashes, one raises, one hangs, one may be absent: the run warns, and neither waits nor differs."""
    for name, behaviour in BEHAVIOURS.items():
        (tmp_path / f"{name}.py").write_text(FAKE.format(behaviour=behaviour))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(run_trackers, "_SECONDS_TO_END", 4.0)
    track = ["trackio", "wandb", {"kind": "mlflow", "address": "http://127.0.0.1:9"}]
    traces, warnings = [], []
    for trackers in ([], track):
        raw = stage_of(output=str(tmp_path / f"run-{len(trackers)}"), track=trackers, tokens=800)
        plan = make_plan(parse_stage(raw, "t"), tmp_path, cache)
        events = list(run_stage(plan, command="t", cache=cache))
        assert isinstance(events[-1], RunFinished)
        traces.append(run_trace(plan.output))
        warnings = [event.message for event in events if isinstance(event, WarningMessage)]
    assert traces[0] == traces[1]
    assert [message.split(":")[0] for message in sorted(warnings)] == ["mlflow", "wandb"], warnings
    assert "broken package" in sorted(warnings)[1] and "in time" in sorted(warnings)[0]


def test_a_tracker_changes_no_fingerprint(stage_of: StageOf) -> None:
    plain, tracked = (parse_stage(stage_of(**more), "t") for more in ({}, {"track": ["tensorboard"]}))
    assert plain.fingerprint() == tracked.fingerprint()
    assert "track" not in plain.model_dump(mode="json")
    assert tracked.model_dump(mode="json")["track"][0]["kind"] == "tensorboard"
    with pytest.raises(PostgradError, match="tensorboard"):
        parse_stage(stage_of(track=["tensorbord"]), "t")

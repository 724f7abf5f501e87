"""Law: a file of a run folder that a resume reads is this run's and whole, is made again, or is an error that names it.

One run is stopped half-way; each test resumes a copy of it with one file missing, damaged or of another run, and compares it
with the run that was never stopped.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from postgrad.errors import PostgradError, ResumeError, StageError
from postgrad.lineage.record import read_record
from postgrad.run import training_session
from postgrad.run.events import RunEvent, RunFinished, RunStarted, StepCompleted, WarningMessage
from postgrad.run.run import run_stage
from postgrad.storage.atomic import MANIFEST, sha256
from postgrad.training import checkpoint_state
from postgrad.training.checkpoint_state import checkpoint_bytes
from tests.run.test_run import plan_of, trace
from tests.tiny_lineage import tiny_stage

Stage = Callable[..., dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Runs:
    """A run that was never stopped, one that was stopped after a checkpoint, and a finished one of another seed."""

    whole: Path
    stopped: Path
    other: Path
    cache: Path
    base: Path

    def stage(self, output: Path, **changes: Any) -> dict[str, Any]:
        data = {"sequence_length": 32, "sources": [{"name": "new", "path": str(self.base / "new.jsonl")}]}
        return tiny_stage(
            self.base,
            output,
            **{"name": "resumed", "tokens": 1500, "data": data, "save": {"every": "2 steps"}, **changes},
        )

    def resume(self, output: Path, **changes: Any) -> list[RunEvent]:
        return list(run_stage(plan_of(self.stage(output, **changes), self.cache), command="test", cache=self.cache))


@pytest.fixture(scope="module")
def runs(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    home = tmp_path_factory.mktemp("resumed")
    made = Runs(home / "whole", home / "stopped", home / "other", tmp_path_factory.getbasetemp() / "cache", base)
    made.resume(made.whole)
    made.resume(made.other, seed=1)
    plan = plan_of(made.stage(made.stopped), made.cache)
    for event in run_stage(plan, command="test", cache=made.cache):
        if isinstance(event, StepCompleted) and event.report.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
    assert read_record(made.stopped).status == "stopped"
    return made


@pytest.fixture
def stopped(runs: Runs, tmp_path: Path) -> Path:
    shutil.copytree(runs.stopped, tmp_path / "run")
    return tmp_path / "run"


def newest(run: Path) -> Path:
    return sorted((run / "checkpoints").iterdir())[-1]


def test_lost_start_scores_are_measured_again_with_the_start_model(
    runs: Runs, stopped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (stopped / "scores" / "start.npz").unlink()
    shutil.copytree(stopped, stopped.with_name("mutant"))
    events = runs.resume(stopped)
    assert next(e.step for e in events if isinstance(e, RunStarted)) == 3
    assert trace(stopped) == trace(runs.whole)

    # The mutant measures them after the checkpoint is restored: changes are smaller than they are.
    real, held = training_session.restore_run, []
    monkeypatch.setattr(training_session, "_read_start_scores", lambda context, run: held.append(context) or {})
    measure = runs_start_scores

    def late(run: Any, folder: Path) -> None:
        real(run, folder)
        held.append(measure(held[0], run))

    monkeypatch.setattr(training_session, "restore_run", late)
    made = training_session.TrainingSession
    monkeypatch.setattr(
        training_session, "TrainingSession", lambda *args: dataclasses.replace(made(*args), start_scores=held[-1])
    )
    runs.resume(stopped.with_name("mutant"))
    assert trace(stopped.with_name("mutant")) != trace(runs.whole)


runs_start_scores = training_session._read_start_scores


@pytest.mark.parametrize("name", ["scores/before.npz", "scores/samples-before.json", "record.json", "report.html"])
def test_what_can_be_made_again_is(name: str, runs: Runs, stopped: Path) -> None:
    (stopped / name).unlink()
    assert isinstance(runs.resume(stopped)[-1], RunFinished)
    assert trace(stopped) == trace(runs.whole)
    whole, again = read_record(runs.whole), read_record(stopped)
    assert again.changes == whole.changes and again.samples == whole.samples


def test_a_model_folder_of_a_killed_process_is_published_again(runs: Runs, stopped: Path) -> None:
    shutil.copytree(runs.other / "model", stopped / "model")
    runs.resume(stopped)
    assert trace(stopped) == trace(runs.whole)


def test_the_record_of_another_run_is_refused(runs: Runs, stopped: Path) -> None:
    shutil.copy(runs.other / "record.json", stopped)
    with pytest.raises(
        StageError, match=r"this file is of the run \w+, and record.json beside it of the run"
    ) as caught:
        runs.resume(stopped)
    assert caught.value.where == str(stopped / "plan.json") and "move record.json out" in caught.value.hint
    (stopped / "record.json").unlink()
    runs.resume(stopped)
    assert trace(stopped) == trace(runs.whole)


def test_another_seeds_checkpoint_is_refused(runs: Runs, stopped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(newest(runs.other), stopped / "checkpoints" / newest(runs.other).name)
    with pytest.raises(ResumeError, match=r"seed 1, not 0; run .*; stage ") as caught:
        runs.resume(stopped)
    assert caught.value.where == str(newest(stopped))
    monkeypatch.setattr(checkpoint_state.CheckpointOwner, "differences", lambda self, progress: [])  # the mutant
    runs.resume(stopped)
    assert trace(stopped) != trace(runs.whole)


def test_another_tunings_checkpoint_is_refused(runs: Runs, stopped: Path, tmp_path: Path) -> None:
    runs.resume(tmp_path / "tuned", tuning={"kind": "lora", "rank": 2})
    shutil.copytree(newest(tmp_path / "tuned"), stopped / "checkpoints" / newest(tmp_path / "tuned").name)
    with pytest.raises(ResumeError, match="tuning lora, not full"):
        runs.resume(stopped)


def test_a_checkpoint_of_an_earlier_version_resumes(runs: Runs, stopped: Path) -> None:
    """Its state has no run, seed and tuning."""
    path = newest(stopped) / "state.json"
    state = {k: v for k, v in json.loads(path.read_text()).items() if k not in ("run", "seed", "tuning")}
    path.write_text(json.dumps(state))
    manifest = json.loads((newest(stopped) / MANIFEST).read_text())
    manifest["state.json"] = {"size": path.stat().st_size, "sha256": sha256(path)}
    (newest(stopped) / MANIFEST).write_text(json.dumps(manifest))
    events = runs.resume(stopped)
    assert next(e.step for e in events if isinstance(e, RunStarted)) == 3
    assert trace(stopped) == trace(runs.whole)


def test_only_listed_weights_are_read(runs: Runs, stopped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = load_file(newest(stopped) / "model.safetensors")
    save_file({name: torch.zeros_like(t) for name, t in weights.items()}, newest(stopped) / "z.safetensors")
    shutil.copytree(stopped, stopped.with_name("mutant"))
    runs.resume(stopped)
    assert trace(stopped) == trace(runs.whole)
    real = checkpoint_state.read_weights
    monkeypatch.setattr(  # the mutant
        checkpoint_state, "read_weights", lambda folder, names: real(folder, [p.name for p in folder.iterdir()])
    )
    runs.resume(stopped.with_name("mutant"))
    assert trace(stopped.with_name("mutant")) != trace(runs.whole)


def test_a_log_that_was_removed_is_told(runs: Runs, stopped: Path) -> None:
    (stopped / "metrics.jsonl").unlink()
    events = runs.resume(stopped)
    assert any(isinstance(e, WarningMessage) and "metrics.jsonl lacks 3 of 3 steps" in e.message for e in events)
    assert trace(stopped)[-1] == trace(runs.whole)[-1]  # the weights


def test_a_log_that_selects_a_checkpoint_must_be_whole(runs: Runs, tmp_path: Path) -> None:
    stage = runs.stage(tmp_path / "run", save={"every": "2 steps", "choose": {"set": "new-heldout"}})
    for event in run_stage(plan_of(stage, runs.cache), command="test", cache=runs.cache):
        if isinstance(event, StepCompleted) and event.report.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
    (tmp_path / "run" / "metrics.jsonl").unlink()
    with pytest.raises(ResumeError, match="lacks the evaluation at step 1") as caught:
        list(run_stage(plan_of(stage, runs.cache), command="test", cache=runs.cache))
    assert caught.value.where == str(tmp_path / "run" / "metrics.jsonl")


def test_a_missing_page_of_a_finished_run_is_made_again(runs: Runs, tmp_path: Path) -> None:
    shutil.copytree(runs.whole, tmp_path / "run")
    page = (tmp_path / "run" / "report.html").read_text()
    (tmp_path / "run" / "report.html").unlink()
    assert len(runs.resume(tmp_path / "run")) == 1
    assert (tmp_path / "run" / "report.html").read_text() == page


def test_a_refused_run_leaves_nothing_behind(runs: Runs, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    with pytest.raises(ResumeError):
        runs.resume(tmp_path / "mine")
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.txt"]
    with pytest.raises(PostgradError):  # found out when the model is built
        runs.resume(tmp_path / "a" / "b", tuning={"kind": "lora", "rank": 2, "targets": ["nowhere"]})
    assert not (tmp_path / "a").exists()


TUNINGS = [
    {"kind": "full"},
    {"kind": "lora", "rank": 4},
    pytest.param({"kind": "blocks", "last": 1}, marks=pytest.mark.slow),
    pytest.param({"kind": "prefix", "length": 3, "hidden": 8}, marks=pytest.mark.slow),
    pytest.param({"kind": "osf"}, marks=pytest.mark.slow),
]


@pytest.mark.parametrize("tuning", TUNINGS, ids=lambda tuning: tuning["kind"])
def test_the_room_that_is_asked_for_is_what_a_checkpoint_takes(
    tuning: dict[str, Any], runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint_state, "_SMALL_FILES_BYTES", 0)
    asked: list[int] = []
    real = checkpoint_bytes
    monkeypatch.setattr(training_session, "checkpoint_bytes", lambda run: (asked.append(real(run)), asked[-1])[1])
    runs.resume(tmp_path / "run", tuning=tuning)
    taken = sum(path.stat().st_size for path in newest(tmp_path / "run").glob("*.safetensors"))
    headers = 20_000  # names of tensors, which weigh in a model of this size
    assert taken <= asked[0] + headers and asked[0] <= 1.021 * taken

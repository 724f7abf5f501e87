"""Runs are listed in every state, and only what nobody needs is removed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from postgrad.commands import list_runs as module
from postgrad.commands.list_runs import RunList, clean_runs, list_runs
from postgrad.errors import StageError
from postgrad.lineage.record import LOCK, PLAN, RECORD, read_record, write_record
from postgrad.lineage.saved_plan import read_plan, write_plan
from postgrad.storage.atomic import STAGING
from postgrad.storage.file_lock import file_lock
from tests.tiny_lineage import LineageRuns


@pytest.fixture
def home(runs: LineageRuns, tmp_path: Path) -> Path:
    """Runs in every state, two of them deeper."""
    for name, source in (("one", runs.first), ("study/two", runs.naive), ("study/three", runs.replay)):
        shutil.copytree(source, tmp_path / name)
    for name in ("broken", "interrupted", "stopped"):
        shutil.copytree(runs.naive, tmp_path / name, ignore=shutil.ignore_patterns("model"))
    (tmp_path / "broken" / RECORD).write_text("{")
    (tmp_path / "interrupted" / RECORD).unlink()
    stopped = read_record(tmp_path / "stopped")
    write_record(tmp_path / "stopped", stopped.model_copy(update={"status": "stopped"}))
    (tmp_path / "one" / f"{STAGING}x").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "one")
    return tmp_path


def states(found: RunList) -> dict[str, str]:
    return {str(row.run.relative_to(found.folder)): row.state for row in found.runs}


def test_every_run_is_listed_with_its_state_and_result(home: Path) -> None:
    found = list_runs(home)
    assert states(found) == {
        "broken": "damaged", "interrupted": "interrupted", "one": "finished", "stopped": "stopped",
        "study/three": "finished", "study/two": "finished",
    }  # fmt: skip
    two = next(row for row in found.runs if row.run.name == "two")
    record = read_record(two.run)
    assert two.learned == record.changes["new-heldout"] and two.forgotten == record.changes["old-heldout"]
    assert two.bytes == sum(path.stat().st_size for path in two.run.rglob("*") if path.is_file())
    assert "record.json" in next(row.problem for row in found.runs if row.state == "damaged")
    assert "study/two" in found.table().text() and "<table" in found._repr_html_()
    assert json.dumps(found.as_dict())
    with file_lock(home / "interrupted" / LOCK):
        assert states(list_runs(home))["interrupted"] == "running"
    with pytest.raises(StageError, match="there is no folder"):
        list_runs(home / "nowhere")
    assert not list_runs(home / "one" / "model").runs


@pytest.mark.parametrize("guarded", [True, False])
def test_only_what_finished_runs_do_not_need_is_removed(
    home: Path, monkeypatch: pytest.MonkeyPatch, guarded: bool
) -> None:
    """Checkpoints of a run that may go on, and those that another run started from, stay: not so the mutant."""
    three = read_record(home / "study" / "three")
    three.parents[0].step, three.parents[0].path = 5, str(home / "study" / "two")
    write_record(home / "study" / "three", three)
    if not guarded:
        make = module._make_row
        monkeypatch.setattr(module, "_make_row", lambda path, record, is_branched: make(path, record, False))
    models = {path: path.read_bytes() for path in home.rglob("model/*") if path.is_file()}
    found = list_runs(home)
    freed = clean_runs(found)
    assert freed == found.removable_bytes > 0
    gone = {name for name in states(found) if not (home / name / "checkpoints").exists()}
    assert (gone == {"one", "study/three"}) is guarded
    assert not list((home / "one").glob(f"{STAGING}*"))
    assert all(path.read_bytes() == data for path, data in models.items())
    assert states(list_runs(home)) == states(found) and list_runs(home).removable_bytes == 0


@pytest.mark.parametrize("state", ["started from", "reads", "damaged"])
@pytest.mark.parametrize("guarded", [True, False])
def test_what_an_unfinished_run_needs_stays(
    home: Path, monkeypatch: pytest.MonkeyPatch, state: str, guarded: bool
) -> None:
    """Its plan alone names what it started from, or its teacher, relative to a folder above it: not so the mutant."""
    needed, child = home / "study" / "two", home / "interrupted"
    plan = read_plan(child)
    if state == "started from":
        plan.stage["model"] = "study/two/checkpoints/step-00000005"
    else:
        plan.stage["objectives"] = [{"kind": "distill", "teacher": str(needed / "checkpoints" / "step-00000005")}]
    write_plan(child, plan)
    if state == "damaged":  # what it needs is unknown
        (child / PLAN).write_text("{")
    if not guarded:
        monkeypatch.setattr(module, "_needed_runs", lambda path, record: set())
    clean_runs(list_runs(home))
    assert (needed / "checkpoints").exists() is guarded
    assert (home / "one" / "checkpoints").exists() is (guarded and state == "damaged")


def test_a_run_that_is_locked_now_is_left_alone(home: Path) -> None:
    found = list_runs(home)
    with file_lock(home / "one" / LOCK):
        clean_runs(found)
    assert (home / "one" / "checkpoints").exists() and (home / "one" / PLAN).exists()

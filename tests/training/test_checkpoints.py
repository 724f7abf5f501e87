"""Law: the newest whole checkpoint of a run is never removed, and a resume finds it, whatever lies beside it.

A state machine saves, pins, damages, copies and resumes in any order. The truth is kept apart from the code: a checkpoint of
step N is whole when it has exactly the bytes that step N writes.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from postgrad.errors import CheckpointError, DiskError, ResumeError
from postgrad.storage import atomic
from postgrad.training import checkpoints as module
from postgrad.training.checkpoint_state import CheckpointOwner, TrainingProgress, read_progress
from postgrad.training.checkpoints import Checkpoints

OWNER = CheckpointOwner("stage", "this run", 0, "full")
OTHER = CheckpointOwner("stage", "another run", 1, "full")


def contents(step: int, owner: CheckpointOwner = OWNER) -> dict[str, bytes]:
    progress = TrainingProgress(step, step, {"new": step}, {}, 0.1, **asdict(owner))
    return {"state.json": json.dumps(asdict(progress)).encode(), "model.safetensors": f"weights of {step}".encode()}


def writer(step: int, owner: CheckpointOwner = OWNER) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        for name, data in contents(step, owner).items():
            (folder / name).write_bytes(data)

    return write


def is_whole(folder: Path, step: int) -> bool:
    try:
        return json.loads((folder / "manifest.json").read_bytes()) and all(
            (folder / name).read_bytes() == data for name, data in contents(step).items()
        )
    except (OSError, ValueError):
        return False


def tree(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


def flip(folder: Path) -> None:
    path = folder / "model.safetensors"
    if path.exists():
        data = bytearray(path.read_bytes() or b"\0")
        data[-1] ^= 4
        path.write_bytes(bytes(data))


def truncate(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"")


def lose_state(folder: Path) -> None:
    (folder / "state.json").unlink(missing_ok=True)


def lose_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink(missing_ok=True)


class Retention(RuleBasedStateMachine):
    keep: int

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp()) / "checkpoints"
        self.folder.mkdir()
        self.step, self.pinned, self.strays = 0, None, dict[Path, dict[str, bytes]]()
        self.resume()

    def teardown(self) -> None:
        shutil.rmtree(self.folder.parent)

    def whole(self) -> list[int]:
        names = {path.name: path for path in self.folder.iterdir()}
        return [n for n in range(1, 100) if (path := names.get(f"step-{n:08d}")) and is_whole(path, n)]

    def saved(self) -> list[Path]:
        """Every folder of this run's checkpoints, whole or not."""
        return [p for p in sorted(self.folder.glob("step-????????")) if p not in self.strays]

    @rule(steps=st.integers(1, 3), pin=st.booleans())
    def save(self, steps: int, pin: bool) -> None:
        self.step += steps
        if pin:
            self.pinned = self.step
        before = self.whole()
        self.checkpoints.save(self.step, writer(self.step), self.pinned)
        earlier = sorted({n for n in before if n < self.step} | {self.step})
        later = [n for n in before if n > self.step]
        kept = {*earlier[-self.keep :], *later, *({self.pinned} & {*before, self.step})}
        assert set(self.whole()) == kept, "the newest whole checkpoints and the pinned one, no others"

    @rule()
    def resume(self) -> None:
        self.warnings: list[str] = []
        self.checkpoints = Checkpoints(self.folder, OWNER, keep=self.keep, max_pinned=1, warn=self.warnings.append)
        whole, saved = self.whole(), self.saved()
        try:
            newest = self.checkpoints.find_newest()
        except CheckpointError:
            assert saved and not whole
            shutil.rmtree(self.folder)  # as the error says
            self.folder.mkdir()
            self.strays.clear()
            newest = None
        else:
            assert newest == (self.folder / f"step-{whole[-1]:08d}" if whole else None)
        told = "\n".join(self.warnings)
        assert all(str(path) in told for path in self.strays), "strays are named"
        self.step = whole[-1] if whole else 0
        if self.pinned not in whole:
            self.pinned = None

    @precondition(lambda self: self.saved())
    @rule(data=st.data(), how=st.sampled_from([flip, truncate, lose_state, lose_manifest, shutil.rmtree]))
    def damage(self, data: st.DataObject, how: Callable[[Path], None]) -> None:
        how(data.draw(st.sampled_from(self.saved()), label="checkpoint"))

    @precondition(lambda self: self.whole())
    @rule(
        name=st.sampled_from(["step-{}", "step-{:08d}.bak", "step-{:09d}", "copy-{}", "step-00000x{}", "Step-{:08d}"])
    )
    def stray(self, name: str) -> None:
        step = self.whole()[-1]
        path = self.folder / name.format(step)
        if not path.exists():
            shutil.copytree(self.folder / f"step-{step:08d}", path)
            self.strays[path] = tree(path)

    @rule(far=st.integers(1, 5), how=st.sampled_from([truncate, lose_state, lose_manifest]))
    def half_copied(self, far: int, how: Callable[[Path], None]) -> None:
        """A newer checkpoint that is not whole."""
        path = self.folder / f"step-{self.step + far:08d}"
        if not path.exists():
            atomic.publish_folder(path, writer(self.step + far))
            how(path)

    @rule(far=st.integers(3, 9))
    def foreign(self, far: int) -> None:
        """Another run's checkpoint under a proper name: a resume refuses it, and the user moves it out."""
        path = self.folder / f"step-{self.step + far:08d}"
        if path.exists():
            return
        atomic.publish_folder(path, writer(self.step + far, OTHER))
        with pytest.raises(ResumeError, match="run another run, not this run"):
            Checkpoints(self.folder, OWNER, keep=self.keep).find_newest()
        shutil.rmtree(path)

    @invariant()
    def strays_are_left_alone(self) -> None:
        assert all(tree(path) == content for path, content in self.strays.items())


def check(keep: int, examples: int) -> None:
    machine = type("Retention", (Retention,), {"keep": keep})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=12,
            deadline=None,
            derandomize=True,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        ),
    )


@pytest.fixture(autouse=True)
def no_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atomic.os, "fsync", lambda handle: None)


@pytest.mark.parametrize("keep", [1, 2])
def test_the_newest_whole_checkpoints_are_kept_and_found(keep: int) -> None:
    check(keep, examples=15)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_newest_whole_checkpoints_are_kept_and_found_in_a_thousand_sequences(keep: int) -> None:
    check(keep, examples=1000)


def by_name(self: Checkpoints, step: int, pinned: int | None) -> None:
    """The mutant: whatever is there counts, whole or not."""
    for old in self.list_folders()[: -self.keep]:
        if pinned is None or old != self.step_folder(pinned):
            atomic.remove_folder(old)


MUTANTS: dict[str, tuple[int, Any, str, Any]] = {
    "damaged ones count": (1, Checkpoints, "_remove_old", by_name),
    "every name counts": (1, Checkpoints, "list_folders", lambda self: sorted(self.folder.glob("step-*"))),
    "not verified": (1, module, "verify", lambda folder: {}),
    "any run's": (1, CheckpointOwner, "differences", lambda self, progress: []),
    "nothing is removed": (1, Checkpoints, "_remove_old", lambda self, step, pinned: None),
    "the pinned one is removed": (
        1,
        Checkpoints,
        "save",
        lambda self, step, write, pinned=None, save=Checkpoints.save: save(self, step, write),
    ),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_careless_retention_would_be_caught(mutant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    keep, *wrong = MUTANTS[mutant]
    monkeypatch.setattr(*wrong)
    with pytest.raises((AssertionError, OSError, pytest.fail.Exception)):
        check(keep, examples=40)


@pytest.mark.parametrize("is_checked_once_for_all", [False, True])
def test_a_checkpoint_damaged_after_its_verification_does_not_count(
    is_checked_once_for_all: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if is_checked_once_for_all:  # the mutant
        monkeypatch.setattr(module, "_stamp", lambda folder: ())
    checkpoints = Checkpoints(tmp_path, OWNER, keep=2)
    for step in (1, 2):
        checkpoints.save(step, writer(step))
    flip(checkpoints.step_folder(2))
    checkpoints.save(3, writer(3))
    assert checkpoints.step_folder(1).exists() != is_checked_once_for_all


def test_a_kept_checkpoint_is_hashed_once_by_a_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[str] = []
    real = atomic.sha256
    monkeypatch.setattr(atomic, "sha256", lambda path: (hashed.append(path.parent.name), real(path))[1])
    first = Checkpoints(tmp_path, OWNER, keep=3)
    for step in range(1, 6):
        first.save(step, writer(step))
        assert {name for name in hashed if not name.startswith(".")} == {f"step-{step:08d}"}
        hashed.clear()
    later = Checkpoints(tmp_path, OWNER, keep=3)
    assert later.find_newest()
    hashed.clear()
    later.save(6, writer(6))  # the resumed process meets the older of the three for the first time
    assert {name for name in hashed if not name.startswith(".")} == {"step-00000006", "step-00000004"}
    hashed.clear()
    later.save(7, writer(7))
    assert {name for name in hashed if not name.startswith(".")} == {"step-00000007"}


def test_what_is_in_the_way_of_a_checkpoint_is_renamed(tmp_path: Path) -> None:
    (tmp_path / "step-00000001").mkdir()
    (tmp_path / "step-00000001" / "thesis.txt").write_text("mine")
    warnings: list[str] = []
    checkpoints = Checkpoints(tmp_path, OWNER, keep=1, warn=warnings.append)
    assert is_whole(checkpoints.save(1, writer(1)), 1)
    assert (tmp_path / "step-00000001.aside-1" / "thesis.txt").read_text() == "mine"
    assert "step-00000001.aside-1" in warnings[-1]


def test_checkpoints_of_earlier_versions_belong_to_the_run_of_their_stage(tmp_path: Path) -> None:
    def write(stage: str) -> Callable[[Path], None]:
        state = {"step": 4, "trained": 9, "trained_by_source": {}, "updates": {}, "rate": 0.1, "stage": stage}
        return lambda folder: (folder / "state.json").write_text(json.dumps(state))

    atomic.publish_folder(tmp_path / "step-00000004", write("stage"))
    assert Checkpoints(tmp_path, OWNER).find_newest() == tmp_path / "step-00000004"
    assert read_progress(tmp_path / "step-00000004").run is None
    shutil.rmtree(tmp_path / "step-00000004")
    atomic.publish_folder(tmp_path / "step-00000004", write("another stage"))
    with pytest.raises(ResumeError, match="stage another stage, not stage"):
        Checkpoints(tmp_path, OWNER).find_newest()


def test_room_is_asked_for_what_will_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: SimpleNamespace(free=300))
    checkpoints = Checkpoints(tmp_path, OWNER, keep=2)
    checkpoints.require_room(100, total=5)  # two, and a new one before the oldest is removed
    checkpoints.require_room(150, total=2)
    with pytest.raises(DiskError, match="need 303 bytes, only 300 are free"):
        checkpoints.require_room(101, total=5)

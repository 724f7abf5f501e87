"""Law: kill anywhere and resume = never killed, bit for bit.

A random moment has little power on a tiny model, so the run is killed at every boundary of a write inside its folder: before
each creation, rename and removal, and at each fsync (once before it, once with the file cut in half). The oracle is every
loss as hex, every evaluation, the rows that were read, and the hash of the final weights.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from postgrad.errors import PostgradError
from postgrad.run.events import RunFinished
from postgrad.run.run import run_stage
from postgrad.storage import atomic as publishing
from tests.conftest import StageOf
from tests.run.test_run import plan_of, trace

KILLED = 77


def in_child(work: Callable[[], None], until: float | None = None) -> int:
    """Run `work` in a forked process (torch is imported already); its exit status, or minus the signal's number."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        except PostgradError as error:
            print(error, file=sys.stderr)
        finally:
            os._exit(status)
    if until is not None:
        time.sleep(until)
        os.kill(child, signal.SIGKILL)
    _, raw = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(raw)


def finish(raw: dict[str, Any], cache: Path) -> None:
    events = list(run_stage(plan_of(raw, cache), command="test", cache=cache))
    assert isinstance(events[-1], RunFinished)


class Boundaries:
    """Counts what touches the run folder, and kills the process at the n-th such moment."""

    def __init__(self, home: Path, kill_at: int) -> None:
        self.home, self.kill_at, self.count = str(home), kill_at, 0
        self.fsync = os.fsync
        self.durable: dict[str, int] = {}

    def install(self) -> None:
        os.fsync = self.syncing
        sys.addaudithook(self.heard)

    def heard(self, event: str, args: tuple[Any, ...]) -> None:
        path = args[0] if args else None
        if not isinstance(path, (str, os.PathLike)) or not os.fspath(path).startswith(self.home):
            return
        writing = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if writing or event in ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate"):
            self.here()

    def syncing(self, handle: int) -> None:
        path = os.readlink(f"/proc/self/fd/{handle}")
        if path.startswith(self.home):
            self.here()
            if os.path.isfile(path):
                self.here(half=path)
                self.durable[path] = os.path.getsize(path)
        self.fsync(handle)

    def here(self, half: str | None = None) -> None:
        self.count += 1
        if self.count == self.kill_at:
            if half:  # half of what no earlier fsync has made durable is lost
                with open(half, "r+b") as file:
                    file.truncate((self.durable.get(half, 0) + os.path.getsize(half)) // 2)
            os._exit(KILLED)


def small(stage_of: StageOf, home: Path) -> dict[str, Any]:
    return stage_of(output=str(home), tokens=1000, save={"every": "2 steps", "keep": 1}, evaluation={
        **stage_of()["evaluation"], "eval_tokens": 100, "max_tokens": 200, "samples": 0,
    })  # fmt: skip


def swept(stage_of: StageOf, cache: Path, tmp_path: Path, *, every: int) -> tuple[int, list[str]]:
    """Kill a run at every n-th boundary, resume it, compare; returns the points tried and what went wrong."""
    whole = tmp_path / "whole"
    assert in_child(lambda: finish(small(stage_of, whole), cache)) == 0
    wanted = trace(whole)
    failures = []
    tried, point = 0, 1
    while True:
        home = tmp_path / f"killed-{point}"
        raw = small(stage_of, home)

        def killed(raw: dict[str, Any] = raw, home: Path = home, point: int = point) -> None:
            Boundaries(home, point).install()
            finish(raw, cache)

        status = in_child(killed)
        if status == 0:  # there are fewer boundaries than this
            return tried, failures
        tried += 1
        if status != KILLED:
            failures.append(f"point {point}: status {status}")
        elif in_child(lambda raw=raw: finish(raw, cache)) != 0:
            failures.append(f"point {point}: cannot be resumed")
        elif trace(home) != wanted:
            failures.append(f"point {point}: another result")
        point += every


def test_killed_at_boundaries_of_writes_it_ends_with_the_same_bits(
    stage_of: StageOf, cache: Path, tmp_path: Path
) -> None:
    tried, failures = swept(stage_of, cache, tmp_path, every=11)
    assert tried >= 12 and not failures


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_at_every_boundary_of_a_write_it_ends_with_the_same_bits(
    stage_of: StageOf, cache: Path, tmp_path: Path
) -> None:
    tried, failures = swept(stage_of, cache, tmp_path, every=1)
    print(f"{tried} boundaries, {len(failures)} failures")
    assert tried >= 120 and not failures


def in_place(place: Path, write: Callable[[Path], None]) -> Path:
    """The mutant: files are written where they belong, without staging."""
    place.mkdir(parents=True, exist_ok=True)
    write(place)
    listing = publishing.make_manifest(place)
    (place / publishing.MANIFEST).write_text(json.dumps(listing))
    return place


@pytest.mark.slow
def test_a_saver_that_writes_in_place_would_be_caught(
    stage_of: StageOf, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from postgrad.distributed import shard_files
    from postgrad.run import publish_model

    monkeypatch.setattr(shard_files, "publish_folder", in_place)
    monkeypatch.setattr(publish_model, "publish_folder", in_place)
    _, failures = swept(stage_of, cache, tmp_path, every=5)
    assert failures


def random_kills(stage_of: StageOf, cache: Path, tmp_path: Path, *, runs: int, seed: int) -> None:
    whole = tmp_path / "whole"
    raw = stage_of(output=str(whole), tokens=3000)
    begin = time.perf_counter()
    assert in_child(lambda: finish(raw, cache)) == 0
    took = time.perf_counter() - begin
    wanted = trace(whole)
    rng = random.Random(seed)
    for run in range(runs):
        raw = stage_of(output=str(tmp_path / f"random-{run}"), tokens=3000)
        # Killed up to three times, some of them soon after a resume.
        for _ in range(rng.randint(1, 3)):
            in_child(lambda raw=raw: finish(raw, cache), until=rng.uniform(0.05, 1.0) * took)
        assert in_child(lambda raw=raw: finish(raw, cache)) == 0
        assert trace(tmp_path / f"random-{run}") == wanted


def test_killed_at_random_moments_it_ends_with_the_same_bits(stage_of: StageOf, cache: Path, tmp_path: Path) -> None:
    random_kills(stage_of, cache, tmp_path, runs=4, seed=0)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_at_twenty_random_moments_it_ends_with_the_same_bits(
    stage_of: StageOf, cache: Path, tmp_path: Path
) -> None:
    random_kills(stage_of, cache, tmp_path, runs=20, seed=1)

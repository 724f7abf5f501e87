"""Law: ranks decide as one. Other files on one rank are an error on all; a rank that fails, hangs or is killed is named.

Two gloo ranks are forked from this process (torch is imported already), which holds their store as `torchrun` does.
"""

from __future__ import annotations

import os
import pickle
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from postgrad.config.stage_file import parse_stage
from postgrad.distributed import peers
from postgrad.distributed.world import World
from postgrad.errors import DistributedError, PostgradError
from postgrad.models.architecture_errors import as_model_error
from postgrad.plan.plan import make_plan
from postgrad.run.events import RunStarted
from postgrad.run.run import run_stage
from tests.conftest import StageOf
from tests.run.test_run import plan_of
from tests.tiny_models import make_llama

Outcome = BaseException | Any


def on_ranks(folder: Path, work: Callable[[int], Any], size: int = 2) -> list[Outcome]:
    """What `work(rank)` returns or raises on each rank; None for a rank that was killed."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    environment = {"WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port}
    children = []
    for rank in range(size):
        child = os.fork()
        if child == 0:
            os.environ.update({name: str(value) for name, value in environment.items()})
            os.environ.update(RANK=str(rank), TORCHELASTIC_USE_AGENT_STORE="True")
            try:
                outcome = work(rank)
            except BaseException as error:
                outcome = error if isinstance(error, PostgradError) else repr(error)
            try:
                (folder / f"outcome-{rank}").write_bytes(pickle.dumps(outcome))
            finally:
                os._exit(0)
        children.append(child)
    is_over = [False] * size
    while not all(is_over):
        for rank, child in enumerate(children):
            if not is_over[rank]:
                is_over[rank] = os.waitpid(child, os.WNOHANG)[0] != 0
        if sum(is_over) == size - 1 and all((folder / f"outcome-{r}").exists() for r in range(size) if is_over[r]):
            stopped = children[is_over.index(False)]
            if Path(f"/proc/{stopped}/stat").read_text().rsplit(")", 1)[1].split()[0] == "T":
                os.kill(stopped, signal.SIGKILL)  # as torchrun does in the end
        time.sleep(0.02)
    paths = [folder / f"outcome-{rank}" for rank in range(size)]
    return [pickle.loads(path.read_bytes()) if path.exists() else None for path in paths]


def train_on(raw: dict[str, Any], cache: Path) -> list[object]:
    return list(run_stage(plan_of(raw, cache), command="test", cache=cache))


def small(stage_of: StageOf, output: Path, **changes: Any) -> dict[str, Any]:
    raw = stage_of(output=str(output), tokens=1000, save={"every": "2 steps"}, **changes)
    raw["evaluation"] = {**raw["evaluation"], "eval_tokens": 100, "max_tokens": 200, "samples": 0}
    return raw


@pytest.fixture
def begun(stage_of: StageOf, cache: Path, tmp_path: Path) -> Path:
    """The folder of a run that has a checkpoint and no model."""
    train_on(small(stage_of, tmp_path / "first"), cache)
    for name in ("record.json", "report.html", "model"):
        path = tmp_path / "first" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return tmp_path / "first"


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "_PERIOD_SECONDS", 0.1)
    monkeypatch.setattr(peers, "_GRACE_SECONDS", 1.0)


def is_difference(error: Outcome, where: str) -> bool:
    return isinstance(error, DistributedError) and where in error.where and "rank 1 reads" in error.problem


def test_ranks_with_other_views_of_the_run_folder_are_refused(
    begun: Path, stage_of: StageOf, cache: Path, tmp_path: Path
) -> None:
    """Today's failure: one resumes, the other begins, and they train on different shards."""
    outputs = [begun, tmp_path / "second"]
    errors = on_ranks(tmp_path, lambda rank: train_on(small(stage_of, outputs[rank]), cache))
    assert all(is_difference(error, "plan.json") for error in errors), errors
    assert not (tmp_path / "second").exists()


def test_ranks_resume_at_the_same_step_of_a_run_with_a_harmless_change(
    begun: Path, stage_of: StageOf, cache: Path, tmp_path: Path
) -> None:
    compute = {**stage_of()["compute"], "collective_timeout_seconds": 60}

    def begin(rank: int) -> list[int]:
        events = train_on(small(stage_of, begun, compute=compute), cache)
        return [event.step for event in events if isinstance(event, RunStarted)]

    newest = max(int(path.name.removeprefix("step-")) for path in (begun / "checkpoints").iterdir())
    assert on_ranks(tmp_path, begin) == [[newest], [newest]]


def without_checkpoint(folder: Path) -> None:
    shutil.rmtree(sorted((folder / "checkpoints").iterdir())[-1])


def flipped_checkpoint(folder: Path) -> None:
    path = sorted((folder / "checkpoints").iterdir())[-1] / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("damage", [without_checkpoint, flipped_checkpoint])
def test_ranks_with_other_checkpoints_are_refused(
    damage: Callable[[Path], None], begun: Path, stage_of: StageOf, cache: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(begun, copy)
    damage(copy)
    outputs = [begun, copy]

    first, second = on_ranks(tmp_path, lambda rank: train_on(small(stage_of, outputs[rank]), cache))
    newest = sorted((begun / "checkpoints").iterdir())[-1].name
    assert isinstance(first, DistributedError) and first.problem.startswith("rank 1: ") and newest in first.where
    assert isinstance(second, PostgradError) and str(copy / "checkpoints" / newest) in second.where


@pytest.mark.parametrize("is_compared", [True, False])
def test_ranks_with_other_text_are_refused(
    is_compared: bool, stage_of: StageOf, cache: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = (base / "new.jsonl").read_text().splitlines(keepends=True)
    for rank, text in enumerate((lines, lines[::-1])):
        (tmp_path / f"view-{rank}").mkdir()
        (tmp_path / f"view-{rank}" / "new.jsonl").write_text("".join(text))
    data = {"sequence_length": 32, "sources": [{"name": "new", "path": "new.jsonl"}]}
    stage = parse_stage(small(stage_of, tmp_path / "run", data=data), "test")

    def train(rank: int) -> str:
        list(run_stage(make_plan(stage, tmp_path / f"view-{rank}", cache), command="test", cache=cache))
        return "trained"

    if not is_compared:  # the mutant: each rank trains on its own text
        monkeypatch.setattr(World, "require_same", lambda self, work: None)
        assert on_ranks(tmp_path, train) == ["trained", "trained"]
        return
    for error in on_ranks(tmp_path, train):
        assert isinstance(error, DistributedError) and error.where == "new.jsonl"
        assert error.problem.startswith("data.new: rank 1 reads ")
    assert not (tmp_path / "run").exists()


def all_reduces(
    rank: int,
    misbehave: Callable[[], None],
    *,
    timeout: float = 1.5,
    inside: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> None:
    with World.init_process_group(torch.device("cpu"), timedelta(seconds=timeout)) as world:
        world.note("the step after step 6")
        world.all_reduce(torch.ones(1))
        if rank == 1:
            misbehave()
        with inside():
            for _ in range(3):
                world.all_reduce(torch.ones(1))
        world.barrier()


def stop() -> None:
    time.sleep(0.5)  # some heartbeats
    os.kill(os.getpid(), signal.SIGSTOP)


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def hang() -> None:
    time.sleep(4)


def fail() -> None:
    raise PostgradError("this row is wrong", where="text.jsonl:7")


def crash() -> None:
    raise ValueError("a bug")


CASES: dict[Callable[[], None], Sequence[str]] = {
    stop: [
        "rank 1: it was killed or has stopped; last seen at the step after step 6",
        "compute.collective_timeout_seconds",
    ],
    kill: ["rank 1: it was killed or has stopped"],
    hang: ["rank 1: it hangs at the step after step 6"],
    fail: ["rank 1 ended the run: text.jsonl:7: this row is wrong"],
    crash: ["rank 1 ended the run: ValueError: a bug"],
}


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("misbehave", CASES, ids=lambda case: case.__name__)
def test_a_rank_that_hangs_or_ends_is_named(misbehave: Callable[[], None], tmp_path: Path) -> None:
    error, other = on_ranks(tmp_path, lambda rank: all_reduces(rank, misbehave))
    assert isinstance(error, DistributedError)
    assert all(words in str(error) for words in CASES[misbehave]), str(error)
    if misbehave is fail:
        assert type(other) is PostgradError and other.where == "text.jsonl:7"


@pytest.mark.usefixtures("quick")
def test_a_killed_rank_is_named_in_a_trial_of_the_model_too(tmp_path: Path) -> None:
    """What fails in the trial of an architecture is an error of the model, unless another rank is its cause."""
    model = make_llama()
    error, _ = on_ranks(
        tmp_path, lambda rank: all_reduces(rank, kill, inside=lambda: as_model_error(model, "a training step"))
    )
    assert isinstance(error, DistributedError) and CASES[kill][0] in str(error), repr(error)


@pytest.mark.usefixtures("quick")
def test_without_heartbeats_a_stopped_rank_is_not_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutant."""
    monkeypatch.setattr(peers.Peers, "_suspect", lambda self, before, now: (0, "some rank does not respond"))
    error, _ = on_ranks(tmp_path, lambda rank: all_reduces(rank, stop))
    assert isinstance(error, DistributedError) and "rank 1" not in str(error)


@pytest.mark.usefixtures("quick")
def test_an_error_that_all_ranks_have_is_reported_by_one(tmp_path: Path) -> None:
    def work(rank: int) -> None:
        with World.init_process_group(torch.device("cpu")):
            fail()

    errors = on_ranks(tmp_path, work)
    assert errors[0].reported_by == errors[1].reported_by in (0, 1)

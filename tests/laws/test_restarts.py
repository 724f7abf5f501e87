"""Law: a run that `torchrun` starts again goes on from its last whole checkpoint, on the ranks that are left."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
import yaml

from postgrad.distributed.store_namespace import open_namespace
from postgrad.errors import DistributedError
from tests.laws.test_meshes import checkpoint_at, difference, last_checkpoint, losses, read_tensors, train_mesh
from tests.laws.test_meshes import small as small
from tests.laws.test_ranks_agree import on_ranks

OpenPart = Callable[[dist.Store, int, int, timedelta], dist.Store]
TIMEOUT = timedelta(seconds=20)


@pytest.fixture
def store() -> dist.TCPStore:
    """A store that outlives its ranks, as `torchrun` keeps it."""
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def join(store: dist.TCPStore, rank: int, size: int, open_part: OpenPart, timeout: timedelta = TIMEOUT) -> str:
    """What a rank reads where the first one writes its address, unless somebody has."""
    part = open_part(dist.TCPStore("127.0.0.1", store.port, is_master=False), rank, size, timeout)
    if rank == 0 and not part.check(["address"]):
        part.set("address", str(os.getpid()))
    part.wait(["address"], timeout)
    return part.get("address").decode()


def start(store: dist.TCPStore, size: int, scratch: Path, open_part: OpenPart = open_namespace) -> set[str]:
    """What the ranks of one start read; the first one comes last."""
    scratch.mkdir()

    def work(rank: int) -> str:
        time.sleep(0.2 * (size - rank))
        return join(store, rank, size, open_part)

    outcomes = on_ranks(scratch, work, size)
    assert all(isinstance(outcome, str) for outcome in outcomes), outcomes
    return set(outcomes)


def test_each_start_of_the_ranks_has_its_own_part_of_the_store(store: dist.TCPStore, tmp_path: Path) -> None:
    """The ranks of a start read the same; never what an earlier start has left, also with fewer ranks or more."""
    read = [start(store, size, tmp_path / str(number)) for number, size in enumerate((3, 3, 2, 4))]
    assert [len(each) for each in read] == [1] * 4
    assert len(set.union(*read)) == 4


def test_ranks_that_share_the_store_of_the_last_start_are_caught(store: dist.TCPStore, tmp_path: Path) -> None:
    """The mutant: the store as `torchrun` gives it. The second start reads the address of a dead process."""

    def shared(store: dist.Store, rank: int, size: int, timeout: timedelta) -> dist.Store:
        return store

    assert start(store, 2, tmp_path / "first", shared) == start(store, 2, tmp_path / "second", shared)


def test_a_rank_that_does_not_join_is_named(store: dist.TCPStore, tmp_path: Path) -> None:
    """Neither does the token that a dead process has left count as its arrival."""
    dist.PrefixStore("postgrad-start", store).set("arrived-2", "of a dead process")

    def work(missing: int) -> Callable[[int], object]:
        return lambda rank: rank != missing and join(store, rank, 3, open_namespace, timedelta(seconds=1))

    first = on_ranks(tmp_path, work(missing=2), 3)[0]
    assert isinstance(first, DistributedError) and first.where == "rank 2"
    assert "did not join within 1 s" in first.problem
    _, *others = on_ranks(tmp_path, work(missing=0), 3)
    assert all(isinstance(other, DistributedError) and other.where == "rank 0" for other in others)


@contextmanager
def torchrun(options: Sequence[str], file: Path, cache: Path) -> Iterator[subprocess.Popen[bytes]]:
    """`torchrun` with a stage; what it leaves behind is killed at the end."""
    command = [sys.executable, "-m", "torch.distributed.run", *options, "-m", "postgrad", "train", str(file)]
    environment = {**os.environ, "POSTGRAD_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
    with file.with_suffix(".log").open("ab") as log:
        agent = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        yield agent
    finally:
        kill_all(agent)


def workers(agent: subprocess.Popen[bytes]) -> list[int]:
    """The processes that an agent has started, by rank in it."""
    children = Path(f"/proc/{agent.pid}/task/{agent.pid}/children")
    ranks = {}
    for child in children.read_text().split() if children.exists() else ():
        with suppress(OSError):
            environment = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
            ranks.update({int(e[11:]): int(child) for e in environment if e.startswith(b"LOCAL_RANK=")})
    return [ranks[rank] for rank in sorted(ranks)]


def kill_all(agent: subprocess.Popen[bytes]) -> None:
    for process in [agent.pid, *workers(agent)] if agent.poll() is None else ():
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    agent.wait()


def wait_for(checkpoint: Path, agent: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + 120
    while not checkpoint.exists():
        assert agent.poll() is None and time.monotonic() < end
        time.sleep(0.02)


@pytest.fixture
def many_steps(small: dict[str, Any]) -> dict[str, Any]:
    """A stage that is still training while a test looks for its first checkpoint."""
    compute = {**small["compute"], "collective_timeout_seconds": 30}
    return {**small, "tokens": 10_000, "save": {"every": "4 steps", "keep": "all"}, "compute": compute}


def make_file(raw: dict[str, Any], output: Path) -> Path:
    file = output.with_suffix(".yaml")
    file.write_text(yaml.safe_dump({**raw, "output": str(output)}))
    return file


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("victim", [0, 1])
def test_torchrun_starts_a_run_again_after_a_rank_was_killed(
    victim: int, many_steps: dict[str, Any], cache: Path, tmp_path: Path
) -> None:
    """Killed twice, it ends with the bits of the run that was not."""
    train_mesh("3", many_steps, tmp_path / "whole", cache)
    file = make_file(many_steps, tmp_path / "killed")
    options = ["--standalone", "--nproc-per-node", "3", "--max-restarts", "2"]
    with torchrun(options, file, cache) as agent:
        for step in (4, 12):
            wait_for(checkpoint_at(tmp_path / "killed", step), agent)
            os.kill(workers(agent)[victim], signal.SIGKILL)
        assert agent.wait(200) == 0, file.with_suffix(".log").read_text()[-5000:]
    assert file.with_suffix(".log").read_text().count("resuming after step") == 2
    homes = tmp_path / "killed", tmp_path / "whole"
    assert difference(*(read_tensors(last_checkpoint(home)) for home in homes)) == 0
    assert losses(homes[0]) == losses(homes[1])


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_goes_on_without_a_node_and_with_it_again(
    many_steps: dict[str, Any], cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two agents stand for two nodes. One is killed with its process; later another one joins."""
    # Without it a node that joins later waits for an address that torchrun publishes once, at its first start.
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    raw = {**many_steps, "tokens": 30_000}
    train_mesh("1", raw, tmp_path / "whole", cache)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    home = tmp_path / "elastic"
    options = ["--nnodes", "1:2", "--nproc-per-node", "1", "--max-restarts", "3", "--rdzv-backend", "c10d"]
    options += ["--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "test", "--rdzv-conf"]
    file = make_file(raw, home)
    with ExitStack() as nodes:
        first = nodes.enter_context(torchrun([*options, "last_call_timeout=3,is_host=true"], file, cache))
        second = nodes.enter_context(torchrun([*options, "last_call_timeout=3,is_host=false"], file, cache))
        wait_for(checkpoint_at(home, 4), first)
        kill_all(second)
        newest = max((home / "checkpoints").glob("step-*"))
        at_death = int(newest.name.removeprefix("step-"))
        wait_for(checkpoint_at(home, at_death + 8), first)
        third = nodes.enter_context(torchrun([*options, "last_call_timeout=3,is_host=false"], file, cache))
        assert first.wait(300) == 0, file.with_suffix(".log").read_text()[-5000:]
        assert third.wait(60) == 0
    assert file.with_suffix(".log").read_text().count("resuming after step") == 2
    assert losses(home) == pytest.approx(losses(tmp_path / "whole"), rel=1e-6)
    assert difference(*(read_tensors(last_checkpoint(each)) for each in (home, tmp_path / "whole"))) < 1e-6

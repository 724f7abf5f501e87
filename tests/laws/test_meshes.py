"""Law: the shape of the mesh does not matter. Ranks in shards, and replicas of shards, make the steps of one process; what
they save, any number of ranks resumes; what they publish is one plain folder.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from postgrad.distributed import shards
from postgrad.distributed.world import World
from postgrad.errors import CheckpointError, StageError
from postgrad.lineage.metrics import StepRow, read_metrics
from postgrad.models.weight_files import StoredTensors
from postgrad.penalties import anchor
from postgrad.run.events import RunStarted, WarningMessage
from postgrad.storage.atomic import verify
from postgrad.storage.fingerprint import holds_moments
from postgrad.training.checkpoints import Checkpoints
from tests.conftest import StageOf
from tests.laws.test_ranks_agree import on_ranks, train_on

MESHES: dict[str, tuple[int, dict[str, int] | None]] = {
    "1": (1, None),
    "2": (2, None),
    "2x1": (2, {"replicate": 2}),
    "3": (3, None),
    "4": (4, None),
    "2x2": (4, {"replicate": 2, "shard": 2}),
}
STEPS, MIDDLE = 4, 2


@pytest.fixture
def small(stage_of: StageOf) -> dict[str, Any]:
    """A stage of few steps, with a penalty and a checkpoint in the middle; 12 rows divide among 1, 2, 3 and 4 ranks."""
    raw = stage_of(
        tokens=1500,
        save={"every": f"{MIDDLE} steps", "keep": "all"},
        batch={"global_batch_size": 12, "micro_batch_size": 1},
        penalties=[{"kind": "anchor", "strength": 2.0}],
    )
    raw["evaluation"] = {**raw["evaluation"], "eval_tokens": 100, "max_tokens": 200, "samples": 0}
    return raw


def train_mesh(mesh: str, raw: dict[str, Any], output: Path, cache: Path) -> tuple[int, list[str]]:
    """The step at which the ranks of a mesh began (-1: the run was complete), and what the first one warned of."""
    size, parallel = MESHES[mesh]
    raw = {**raw, "output": str(output), **({"parallel": parallel} if parallel else {})}

    def work(rank: int) -> tuple[int, list[str]]:
        events = train_on(raw, cache)
        warnings = [event.message for event in events if isinstance(event, WarningMessage)]
        return next((event.step for event in events if isinstance(event, RunStarted)), -1), warnings

    if size == 1:
        return work(0)
    scratch = output.with_name(f"{output.name} outcomes")
    scratch.mkdir(exist_ok=True)
    outcomes = on_ranks(scratch, work, size)
    assert all(isinstance(outcome, tuple) for outcome in outcomes), outcomes
    assert len({step for step, _ in outcomes}) == 1
    return outcomes[0]


def step_rows(home: Path) -> list[StepRow]:
    return [row for row in read_metrics(home / "metrics.jsonl") if row.kind == "step"]


def losses(home: Path) -> list[float]:
    return [row.loss for row in step_rows(home)]


def pulls(home: Path) -> list[float]:
    return [row.penalties["anchor"] for row in step_rows(home)]


def read_tensors(folder: Path, *, is_moments: bool = False) -> dict[str, Tensor]:
    """The weights of a folder, or the moments."""
    files = [path for path in folder.glob("*.safetensors") if holds_moments(path.name) == is_moments]
    return {name: tensor.clone() for name, tensor in StoredTensors(files).items()}


def checkpoint_at(home: Path, step: int) -> Path:
    return home / "checkpoints" / f"step-{step:08d}"


def difference(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def last_checkpoint(home: Path) -> Path:
    return max((home / "checkpoints").iterdir())


def rewind(home: Path, copy: Path) -> Path:
    """A copy of a finished run as it was when it was killed after the checkpoint in the middle."""
    shutil.copytree(home, copy)
    for name in ("record.json", "report.html"):
        (copy / name).unlink()
    shutil.rmtree(copy / "model")
    for folder in (copy / "checkpoints").iterdir():
        if folder > checkpoint_at(copy, MIDDLE):
            shutil.rmtree(folder)
    return copy


def assert_resumes(source: Path, before: str, after: str, raw: dict[str, Any], cache: Path) -> None:
    copy = rewind(source, source.with_name(f"{before} to {after}"))
    assert train_mesh(after, raw, copy, cache)[0] == MIDDLE
    worst = difference(*(read_tensors(last_checkpoint(home)) for home in (copy, source)))
    assert worst == 0 if before == after else worst < 1e-6, (before, after)


def assert_equal_runs(home: Path, one: Path) -> None:
    assert losses(home) == pytest.approx(losses(one), rel=1e-6)
    assert pulls(home) == pytest.approx(pulls(one), rel=1e-4, abs=1e-9) and pulls(one)[-1] > 0
    ends = checkpoint_at(home, STEPS), checkpoint_at(one, STEPS)
    assert difference(*map(read_tensors, ends)) < 1e-6
    assert difference(*(read_tensors(end, is_moments=True) for end in ends)) < 1e-6


@pytest.mark.timeout(300)
def test_meshes_make_the_steps_of_one_process_and_resume_one_another(
    small: dict[str, Any], cache: Path, tmp_path: Path
) -> None:
    homes = {mesh: tmp_path / mesh for mesh in ("1", "2", "2x2")}
    for mesh, home in homes.items():
        step, warnings = train_mesh(mesh, small, home, cache)
        assert step == 0 and not any("reads the whole model" in warning for warning in warnings)
    for mesh in ("2", "2x2"):
        assert_equal_runs(homes[mesh], homes["1"])
        for folder in (checkpoint_at(homes[mesh], STEPS), homes[mesh] / "model"):
            files = set(json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"].values())
            assert len(files) == MESHES[mesh][0]
            assert {*verify(folder)} >= {*files, "config.json", "tokenizer.json"}
            plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
            alone = AutoModelForCausalLM.from_pretrained(homes["1"] / folder.relative_to(homes[mesh])).state_dict()
            assert difference(plain, alone) < 1e-6
    assert_resumes(homes["2x2"], "2x2", "1", small, cache)
    assert_resumes(homes["2"], "2", "2", small, cache)
    lose_a_shard(homes["2x2"])


def lose_a_shard(home: Path) -> None:
    """The file is named; the checkpoint before it is whole."""
    lost = checkpoint_at(home, STEPS) / "optimizer-00003-of-00004.safetensors"
    lost.unlink()
    warnings: list[str] = []
    checkpoints = Checkpoints(home / "checkpoints", warn=warnings.append)
    assert checkpoints.find_newest() == checkpoint_at(home, MIDDLE)
    assert lost.name in warnings[0]
    with pytest.raises(CheckpointError, match=lost.name):
        checkpoints.check(lost.parent)


def test_a_sum_that_counts_replicas_is_caught(
    small: dict[str, Any], cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mutant: the penalty of each replica is added."""
    train_mesh("1", small, tmp_path / "1", cache)
    monkeypatch.setattr(anchor, "sum_over_shards", shards.sum_over_ranks)
    train_mesh("2x1", small, tmp_path / "2x1", cache)
    assert losses(tmp_path / "2x1") == pytest.approx(losses(tmp_path / "1"), rel=1e-6)
    assert pulls(tmp_path / "2x1")[-1] == pytest.approx(2 * pulls(tmp_path / "1")[-1], rel=1e-4)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_any_number_of_ranks_resumes_what_any_number_saved(small: dict[str, Any], cache: Path, tmp_path: Path) -> None:
    meshes = ("1", "2", "3", "4")
    for mesh in meshes:
        train_mesh(mesh, small, tmp_path / mesh, cache)
        assert_equal_runs(tmp_path / mesh, tmp_path / "1")
    for before in meshes:
        for after in meshes:
            assert_resumes(tmp_path / before, before, after, small, cache)


TUNINGS: dict[str, tuple[dict[str, Any], bool]] = {
    "lora": ({"kind": "lora", "rank": 4}, False),
    "pissa": ({"kind": "lora", "rank": 4, "variant": "pissa"}, True),
    "dora": ({"kind": "lora", "rank": 4, "variant": "dora"}, True),
    "adapter": ({"kind": "adapter", "variant": "houlsby"}, False),
    "prefix": ({"kind": "prefix", "length": 3, "hidden": 8}, False),
    "prompt": ({"kind": "prompt", "length": 3}, True),
    "blocks": ({"kind": "blocks", "last": 1}, False),
    "osf": ({"kind": "osf"}, True),
}
"""Tunings, and whether they compute from the weights of the start model, so that each rank reads all of it."""


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", TUNINGS)
def test_tunings_on_meshes_make_the_steps_of_one_process(
    name: str, small: dict[str, Any], cache: Path, tmp_path: Path
) -> None:
    tuning, is_whole = TUNINGS[name]
    raw = {**small, "tuning": tuning, "penalties": []}
    train_mesh("1", raw, tmp_path / "1", cache)
    _, warnings = train_mesh("2x2", raw, tmp_path / "2x2", cache)
    assert any("reads the whole model" in warning for warning in warnings) == is_whole
    assert losses(tmp_path / "2x2") == pytest.approx(losses(tmp_path / "1"), rel=1e-6)
    models = tmp_path / "2x2" / "model", tmp_path / "1" / "model"
    assert difference(*map(read_tensors, models)) < 1e-5
    assert_resumes(tmp_path / "2x2", "2x2", "2", raw, cache)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_moments_in_float8_are_rounded_alike_on_meshes(small: dict[str, Any], cache: Path, tmp_path: Path) -> None:
    """A rank rounds its rows as one process does; sums in another order move a few entries to the other neighbour."""
    raw = {**small, "optimizer": {"moment_dtype": "float8"}, "penalties": []}
    train_mesh("1", raw, tmp_path / "1", cache)
    train_mesh("2x2", raw, tmp_path / "2x2", cache)
    assert losses(tmp_path / "2x2") == pytest.approx(losses(tmp_path / "1"), rel=1e-5)
    assert_resumes(tmp_path / "2x2", "2x2", "2", raw, cache)


@pytest.mark.parametrize(
    ("size", "parallel"), [(2, {"replicate": 4}), (2, {"replicate": 2, "shard": 2}), (1, {"replicate": 2})]
)
def test_a_mesh_of_another_number_of_ranks_is_refused(
    size: int, parallel: dict[str, int], small: dict[str, Any], cache: Path, tmp_path: Path
) -> None:
    raw, begin = {**small, "parallel": parallel}, time.monotonic()
    if size == 1:
        with pytest.raises(StageError, match="parallel") as caught:
            train_on(raw, cache)
        errors: list[Any] = [caught.value]
    else:
        errors = on_ranks(tmp_path, lambda rank: train_on(raw, cache), size)
    for error in errors:
        assert isinstance(error, StageError) and error.where == "parallel" and error.reported_by == 0
        assert f"torchrun --nproc-per-node {4 if size > 1 else 2}" in error.hint
    assert time.monotonic() - begin < 30
    assert not (tmp_path / "run" / "plan.json").exists()


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("mesh", ["2", "2x2"])
def test_killed_at_any_moment_it_resumes(mesh: str, small: dict[str, Any], cache: Path, tmp_path: Path) -> None:
    """One of the ranks is killed; the others end, and the next start goes on from a whole checkpoint."""
    raw = {
        **small,
        "save": {"every": "1 steps", "keep": 2},
        "compute": {**small["compute"], "collective_timeout_seconds": 20},
    }
    begin = time.monotonic()
    train_mesh(mesh, raw, tmp_path / "whole", cache)
    seconds, generator = time.monotonic() - begin, random.Random(0)
    for trial in range(int(os.environ.get("POSTGRAD_KILLS", "5"))):
        home = tmp_path / f"killed {trial}"
        victim, moment = generator.randrange(MESHES[mesh][0]), generator.uniform(0.1, 0.95) * seconds

        def work(rank: int, victim: int = victim, moment: float = moment, home: Path = home) -> None:
            if rank == victim:
                signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
                signal.setitimer(signal.ITIMER_REAL, moment)
            parallel = MESHES[mesh][1]
            train_on({**raw, "output": str(home), **({"parallel": parallel} if parallel else {})}, cache)

        scratch = tmp_path / f"outcomes {trial}"
        scratch.mkdir()
        outcomes = on_ranks(scratch, work, MESHES[mesh][0])
        print(f"trial {trial}: rank {victim} killed after {moment:.1f} s: {outcomes}")
        train_mesh(mesh, raw, home, cache)
        ends = checkpoint_at(home, STEPS), checkpoint_at(tmp_path / "whole", STEPS)
        assert difference(*map(read_tensors, ends)) == 0, (trial, victim, moment)
        assert losses(home) == losses(tmp_path / "whole")


def test_a_single_process_has_no_mesh() -> None:
    with World.init_process_group(torch.device("cpu")) as world:
        assert world.mesh is None and world.size == 1

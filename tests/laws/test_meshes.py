"""Law: the shape of the mesh does not matter. Ranks in shards, and replicas of shards, make the steps of one process; what
they save, any number of ranks resumes; what they publish is one plain folder.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from postgrad.lineage.metrics import read_metrics
from postgrad.models.weight_files import StoredTensors
from postgrad.run.events import RunStarted
from postgrad.storage.atomic import verify
from postgrad.storage.fingerprint import holds_moments
from tests.conftest import StageOf
from tests.laws.test_ranks_agree import on_ranks, train_on

Parallel = dict[str, int] | None
MESHES: dict[str, tuple[int, Parallel]] = {
    "1": (1, None),
    "2": (2, None),
    "2x1": (2, {"replicate": 2}),
    "3": (3, None),
    "4": (4, None),
    "2x2": (4, {"replicate": 2, "shard": 2}),
}


def losses(home: Path) -> list[float]:
    return [row.loss for row in read_metrics(home / "metrics.jsonl") if row.kind == "step"]


def train_mesh(mesh: str, raw: dict[str, Any], cache: Path, scratch: Path) -> list[Any]:
    """What the ranks of a mesh return: the step at which each began, or its error."""
    size, parallel = MESHES[mesh]
    raw = {**raw, "parallel": parallel} if parallel else raw

    def work(rank: int) -> int:
        return next(event.step for event in train_on(raw, cache) if isinstance(event, RunStarted))

    return on_ranks(scratch, work, size) if size > 1 else [work(0)]


@pytest.fixture
def small(stage_of: StageOf, tmp_path: Path) -> dict[str, Any]:
    """A stage of few steps, with a checkpoint in the middle; 12 rows divide among 1, 2, 3 and 4 ranks."""
    batch = {"global_batch_size": 12, "micro_batch_size": 1}
    raw = stage_of(tokens=1500, save={"every": "2 steps", "keep": "all"}, batch=batch)
    raw["evaluation"] = {**raw["evaluation"], "eval_tokens": 100, "max_tokens": 200, "samples": 0}
    return raw


def weights(folder: Path) -> dict[str, Tensor]:
    files = [path for path in folder.glob("*.safetensors") if not holds_moments(path.name)]
    return {name: tensor.clone() for name, tensor in StoredTensors(files).items()}


def moments(folder: Path) -> dict[str, Tensor]:
    files = [path for path in folder.glob("*.safetensors") if holds_moments(path.name)]
    return {name: tensor.clone() for name, tensor in StoredTensors(files).items()}


def checkpoint_at(home: Path, step: int) -> Path:
    return home / "checkpoints" / f"step-{step:08d}"


def difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def rewind(home: Path, step: int, copy: Path) -> Path:
    """A copy of a finished run as it was when it was killed after the checkpoint of `step`."""
    shutil.copytree(home, copy)
    for name in ("record.json", "report.html"):
        (copy / name).unlink()
    shutil.rmtree(copy / "model")
    for folder in (copy / "checkpoints").iterdir():
        if folder.name > checkpoint_at(copy, step).name:
            shutil.rmtree(folder)
    return copy


@pytest.mark.timeout(300)
def test_every_mesh_makes_the_steps_of_one_process(small: dict[str, Any], cache: Path, tmp_path: Path) -> None:
    homes = {mesh: tmp_path / mesh for mesh in ("1", "2", "2x2")}
    for mesh, home in homes.items():
        began = train_mesh(mesh, {**small, "output": str(home)}, cache, tmp_path)
        assert set(began) == {0}, began
    one = homes.pop("1")
    for mesh, home in homes.items():
        assert losses(home) == pytest.approx(losses(one), rel=1e-6)
        for read in (weights, moments):
            assert difference(read(checkpoint_at(home, 4)), read(checkpoint_at(one, 4))) < 1e-6
        size = MESHES[mesh][0]
        # Whole tensors, each in one file: whatever reads Hugging Face's folders reads checkpoint and model.
        for folder in (checkpoint_at(home, 4), home / "model"):
            index = json.loads((folder / "model.safetensors.index.json").read_text())
            assert len(set(index["weight_map"].values())) == size
            assert {*verify(folder)} >= {*index["weight_map"].values(), "config.json", "tokenizer.json"}
            plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
            assert (
                difference(
                    dict(plain.state_dict()),
                    dict(
                        AutoModelForCausalLM.from_pretrained(
                            one / folder.relative_to(home), dtype=torch.float32
                        ).state_dict()
                    ),
                )
                < 1e-6
            )
    # Resumed on other meshes.
    for before, after in (("2", "1"), ("2x2", "2"), ("2", "2"), ("1", "2")):
        source = one if before == "1" else homes[before]
        copy = rewind(source, 2, tmp_path / f"{before}-{after}")
        began = train_mesh(after, {**small, "output": str(copy)}, cache, tmp_path)
        assert set(began) == {2}, began
        worst = difference(weights(checkpoint_at(copy, 4)), weights(checkpoint_at(source, 4)))
        print(before, after, worst)
        assert worst == 0 if before == after else worst < 1e-6

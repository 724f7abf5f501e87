"""Law: world size does not matter. Two processes over gloo, sharded by FSDP2, make the steps of one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from postgrad.data.loading.loader import Loader
from postgrad.lineage.metrics import read_metrics
from postgrad.lineage.record import read_record
from postgrad.models.pretrained import load_pretrained, locate_model
from postgrad.penalties.importance_file import ImportanceMetadata, write_importance
from postgrad.run.events import RunStarted
from postgrad.run.run import run_stage
from postgrad.tuning.open_model import start_fingerprint
from tests.conftest import StageOf
from tests.run.test_run import plan_of
from tests.run.test_task_stages import mixed
from tests.tiny_stages import make_workspace


def losses(home: Path) -> list[float]:
    return [row.loss for row in read_metrics(home / "metrics.jsonl") if row.kind == "step"]


def told(record: dict[str, Any]) -> list[dict[str, Any]]:
    """What was read of each source; its losses are those of the steps."""
    return [{k: v for k, v in source.items() if k != "loss"} for source in record["achieved"]["sources"]]


def train_on_two(file: Path, cache: Path) -> str:
    """A stage carried out by two processes, and what they said."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0"]
    command += ["--standalone", "-m", "postgrad", "train", str(file)]
    environment = {**os.environ, "POSTGRAD_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


TUNINGS = [
    {"kind": "full"},
    pytest.param({"kind": "lora", "rank": 4}, marks=pytest.mark.slow),
    pytest.param({"kind": "adapter", "variant": "houlsby"}, marks=pytest.mark.slow),
    pytest.param({"kind": "prefix", "length": 3, "hidden": 8}, marks=pytest.mark.slow),
    pytest.param({"kind": "prompt", "length": 3}, marks=pytest.mark.slow),
    pytest.param({"kind": "blocks", "last": 2, "unfreeze_every": "3 steps"}, marks=pytest.mark.slow),
]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("tuning", TUNINGS, ids=lambda tuning: tuning["kind"])
def test_two_ranks_make_the_steps_of_one(
    tuning: dict[str, Any], stage_of: StageOf, cache: Path, tmp_path: Path
) -> None:
    changes = {
        "tuning": tuning,
        "tokens": 3000,
        "save": {"every": "4 steps"},
        "batch": {"global_batch_size": 8, "micro_batch_size": 2},
    }
    alone = stage_of(output=str(tmp_path / "one"), **changes)
    list(run_stage(plan_of(alone, cache), command="test", cache=cache))
    file = tmp_path / "two.yaml"
    file.write_text(yaml.safe_dump(stage_of(output=str(tmp_path / "two"), **changes)))
    train_on_two(file, cache)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-6)
    one, two = read_record(tmp_path / "one"), read_record(tmp_path / "two")
    assert told(two) == told(one)
    for name, before in one.scores.before.items():
        assert two.scores.before[name].nats == pytest.approx(before.nats, rel=1e-6)
        assert two.scores.after[name].nats == pytest.approx(one.scores.after[name].nats, rel=1e-4)
    # A checkpoint is whole: one process goes on from what two began.
    home = tmp_path / "two"
    for name in ("record.json", "report.html"):
        (home / name).unlink()
    for place in (home / "model", sorted((home / "checkpoints").iterdir())[-1]):
        shutil.rmtree(place)
    resumed = list(run_stage(plan_of(yaml.safe_load(file.read_text()), cache), command="test", cache=cache))
    began = next(event for event in resumed if isinstance(event, RunStarted))
    assert 0 < began.step < began.plan.steps
    assert losses(home) == pytest.approx(losses(tmp_path / "one"), rel=1e-6)


UPDATES: list[dict[str, Any]] = [
    {"optimizer": {"sparse_update": {"kind": "mofo", "share": 0.1}}},
    {"optimizer": {"sparse_update": {"kind": "migu", "share": 0.3}, "loss_adaptive": {"initial_share": 0.5}}},
    {"optimizer": {"sparse_update": {"kind": "mofo", "share": 0.2}}, "tuning": {"kind": "lora", "rank": 3}},
    {"optimizer": {"sparse_update": {"kind": "migu", "share": 0.3}}, "tuning": {"kind": "lora", "rank": 4}},
]


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "case",
    [UPDATES[0], *(pytest.param(case, marks=pytest.mark.slow) for case in UPDATES[1:])],
    ids=["momentum", "magnitude", "momentum of lora", "magnitude of lora"],
)
def test_two_ranks_move_the_same_numbers_as_one(
    case: dict[str, Any], stage_of: StageOf, cache: Path, tmp_path: Path
) -> None:
    """The largest are those of the whole tensor, whichever rank its rows lie on."""
    changes = {**case, "tokens": 2000, "batch": {"global_batch_size": 8, "micro_batch_size": 2}}
    list(run_stage(plan_of(stage_of(output=str(tmp_path / "one"), **changes), cache), command="test", cache=cache))
    file = tmp_path / "two.yaml"
    file.write_text(yaml.safe_dump(stage_of(output=str(tmp_path / "two"), **changes)))
    train_on_two(file, cache)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    counts = [
        [row.updated_weights for row in read_metrics(tmp_path / name / "metrics.jsonl") if row.kind == "step"]
        for name in ("one", "two")
    ]
    assert counts[0] == counts[1]
    one, two = (read_record(tmp_path / name) for name in ("one", "two"))
    assert set(counts[0]) == {one.sparse_update.updated_weights} and two.sparse_update == one.sparse_update


PENALTIES: list[dict[str, Any]] = [
    {"penalties": [{"kind": "anchor", "strength": 2.0}]},
    {"penalties": [{"kind": "anchor", "strength": 2.0, "storage": "mmap", "targets": ["model.layers.0"]}]},
    {"penalties": [{"kind": "anchor", "strength": 5.0, "decoupled": True}]},
    {"penalties": [{"kind": "anchor", "strength": "auto"}], "tuning": {"kind": "lora", "rank": 4}},
    {"penalties": [{"kind": "anchor", "strength": 2.0}], "tuning": {"kind": "lora", "rank": 4, "variant": "dora"}},
    {"penalties": [{"kind": "anchor", "strength": 2.0}], "tuning": {"kind": "osf"}},
]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("weighed", [False, True], ids=["l2-sp", "ewc"])
@pytest.mark.parametrize("case", PENALTIES, ids=["full", "mapped", "decoupled", "lora", "dora", "osf"])
def test_penalties_pull_on_two_ranks_as_on_one(
    case: dict[str, Any], weighed: bool, base: Path, stage_of: StageOf, cache: Path, tmp_path: Path
) -> None:
    if weighed:
        case = {**case, "penalties": [{**case["penalties"][0], "importance": str(drawn(base, tmp_path))}]}
    changes = {**case, "tokens": 2000, "batch": {"global_batch_size": 8, "micro_batch_size": 2}}
    alone = stage_of(output=str(tmp_path / "one"), **changes)
    list(run_stage(plan_of(alone, cache), command="test", cache=cache))
    file = tmp_path / "two.yaml"
    file.write_text(yaml.safe_dump(stage_of(output=str(tmp_path / "two"), **changes)))
    train_on_two(file, cache)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    pulls = [
        [row.penalties["anchor"] for row in read_metrics(tmp_path / name / "metrics.jsonl") if row.kind == "step"]
        for name in ("one", "two")
    ]
    assert pulls[1] == pytest.approx(pulls[0], rel=1e-4, abs=1e-9)
    assert pulls[0][-1] > 0
    one, two = (read_record(tmp_path / name).penalties[0] for name in ("one", "two"))
    assert two.strength == pytest.approx(one.strength, rel=1e-2)  # three digits of it are kept


def drawn(base: Path, home: Path) -> Path:
    """Importance of the tests' model, drawn at random."""
    start = locate_model(str(base / "base"), base)
    generator = torch.Generator().manual_seed(3)
    made = {n: torch.rand(p.shape, generator=generator) for n, p in load_pretrained(start).model.named_parameters()}
    about = ImportanceMetadata("fisher", "token", 100, "base", start_fingerprint(start), 0.5)
    write_importance(home / "importance.safetensors", made, about, torch.float32)
    return home / "importance.safetensors"


@pytest.mark.timeout(600)
@pytest.mark.parametrize("model", ["llama", pytest.param("t5", marks=pytest.mark.slow)])
def test_two_ranks_of_mixed_rows_make_the_steps_of_one(model: str, cache: Path, tmp_path: Path) -> None:
    """Rows of two sorts, of which one rank or the other has more in most steps; without a silent row they would wait
    for one another for ever."""
    shelf = make_workspace(tmp_path / "shelf", cache)
    raw = mixed(shelf, model, batch={"global_batch_size": 10, "micro_batch_size": 1}, tokens=1500)
    plan = shelf.plan(raw)
    silent = [
        part.is_padding
        for step in range(1, plan.steps + 1)
        for rank in range(2)
        for part in Loader(
            plan.data.rows,
            plan.data.mixture,
            micro_batch_size=1,
            objectives=plan.objective_indices,
            rank=rank,
            world_size=2,
        ).micro_batches(step)
    ]
    assert any(silent) and plan.steps > 3
    list(run_stage(plan, command="test", cache=cache))
    two = {**raw, "output": str(tmp_path / "two")}
    file = tmp_path / "two.yaml"
    file.write_text(yaml.safe_dump(two))
    train_on_two(file, cache)
    assert losses(tmp_path / "two") == pytest.approx(losses(Path(raw["output"])), rel=1e-4)
    one, two = read_record(Path(raw["output"])), read_record(tmp_path / "two")
    assert told(two) == told(one)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_ranks_answer_what_one_answers(cache: Path, tmp_path: Path) -> None:
    """Before, each rank asks a part of the start model; after, of what was published."""
    shelf = make_workspace(tmp_path, cache)
    tasks = [
        {"name": "kinds", "path": shelf.file("labelled", held_out=True), "shots": 2, "seeds": 2, "during_training": True,
         "few_shot": {"path": shelf.file("labelled")}},
        {"name": "named", "path": shelf.file("completion", held_out=True), "max_new_tokens": 6, "metrics": ["chrF"]},
    ]  # fmt: skip
    records = []
    for name in ("one", "two"):
        raw = shelf.stage(name, sources=[shelf.source("completion")])
        raw["evaluation"] = {**shelf.text_evaluation, "tasks": tasks}
        if name == "one":
            shelf.run(raw)
        else:
            file = tmp_path / "two.yaml"
            file.write_text(yaml.safe_dump(raw))
            said = train_on_two(file, tmp_path / "no-cache")
            assert (
                said.count("kinds: evaluated only before and after training, as a sharded model cannot generate") == 1
            )
        records.append(read_record(tmp_path / "runs" / name))
    one, two = ({entry["name"]: entry for entry in record["tasks"]} for record in records)
    for name in one:
        assert one[name]["before"] == two[name]["before"]
        for metric, value in one[name]["after"].items():
            assert two[name]["after"][metric]["value"] == pytest.approx(value["value"], rel=0.05)


TAUGHT = {
    "a second model": ({"kind": "full"}, {}),
    "switched off": ({"kind": "lora", "rank": 4}, {}),
    "asked once": ({"kind": "full"}, {"cache": {"kind": "top-k", "k": 8}}),
}


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("how", TAUGHT)
def test_two_ranks_are_taught_as_one(how: str, stage_of: StageOf, cache: Path, tmp_path: Path) -> None:
    """A teacher is sharded like the model, or is the model; what it was asked beforehand is parted among the ranks."""
    tuning, distill = TAUGHT[how]
    objectives = [{"kind": "next-token"}, {"kind": "distill", "on": ["old"], "weight": 2.0, **distill}]
    changes = {
        "tuning": tuning,
        "objectives": objectives,
        "tokens": 2000,
        "batch": {"global_batch_size": 8, "micro_batch_size": 2},
    }
    list(run_stage(plan_of(stage_of(output=str(tmp_path / "one"), **changes), cache), command="test", cache=cache))
    file = tmp_path / "two.yaml"
    file.write_text(yaml.safe_dump(stage_of(output=str(tmp_path / "two"), **changes)))
    for folder in (cache / "told").glob("*") if distill else ():
        shutil.rmtree(folder)
    train_on_two(file, cache)
    both = [
        [row.losses_by_objective for row in read_metrics(tmp_path / name / "metrics.jsonl") if row.kind == "step"]
        for name in ("one", "two")
    ]
    for one, two in zip(*both, strict=True):
        assert two == pytest.approx(one, rel=1e-4, abs=1e-6)
    assert both[0][-1]["distill"] > 1e-4

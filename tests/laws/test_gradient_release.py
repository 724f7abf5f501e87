"""Law: a step that releases its gradients is the step that holds them, to the bit, and never holds more than a weight's."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from postgrad.config.stage_file import parse_stage
from postgrad.data.loading.batch import Batch
from postgrad.errors import NonFiniteError, PostgradError
from postgrad.hardware.memory import ModelDimensions, StateDtypes, estimate_memory
from postgrad.lineage.metrics import StepRow, read_metrics
from postgrad.objectives.objective import CombinedLoss
from postgrad.optim.optimizer import Optimizer, Weight, Weights
from postgrad.run import build
from postgrad.training import step as step_module
from postgrad.training.step import Run, StepReport, StepWithoutUpdate
from postgrad.training.step_in_backward import train_step_releasing
from tests.laws.test_meshes import assert_resumes, difference, last_checkpoint, losses, read_tensors, train_mesh
from tests.laws.test_meshes import small as small
from tests.tiny_stages import Workspace, make_workspace, run_interrupted, run_trace

RELEASED: dict[str, Any] = {"release_gradients": True, "max_grad_norm": None}
HELD: dict[str, Any] = {"max_grad_norm": None}
BATCH: dict[str, Any] = {"global_batch_size": 8, "micro_batch_size": 8}
CASES: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16-copies": {"compute": {"dtype": "bfloat16"}},
    "bf16-masters": {
        "compute": {"dtype": "bfloat16"},
        "optimizer": {"master_dtype": "bfloat16", "moment_dtype": "float8"},
    },
    "muon": {"optimizer": {"kind": "muon"}},
    "recomputed": {"compute": {"activation_checkpointing": True}},
    "lora": {"tuning": {"kind": "lora", "rank": 4}},
    "unfreezing": {"tuning": {"kind": "blocks", "last": 2, "unfreeze_every": "2 steps"}},
    "loss-adaptive": {"optimizer": {"loss_adaptive": {"initial_share": 0.5}}},
}
SLOW = ("muon", "lora", "recomputed", "loss-adaptive")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return make_workspace(tmp_path_factory.mktemp("release"), tmp_path_factory.getbasetemp() / "cache")


def stage(workspace: Workspace, name: str, case: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    return workspace.stage(
        name, batch=BATCH, tokens=3840, **{**case, "optimizer": {**case.get("optimizer", {}), **options}}
    )


def end(run_folder: Path) -> dict[str, Tensor]:
    folder = max((run_folder / "checkpoints").iterdir())
    return {**read_tensors(folder), **read_tensors(folder, is_moments=True)}


def steps(run_folder: Path) -> list[StepRow]:
    return [row for row in read_metrics(run_folder / "metrics.jsonl") if row.kind == "step"]


def differ(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    assert one.keys() == other.keys()
    return [name for name in one if not torch.equal(one[name], other[name])]


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in CASES])
def test_released_gradients_make_the_same_bits(name: str, workspace: Workspace) -> None:
    held, released = (
        workspace.run(stage(workspace, f"{name}-{kind}", CASES[name], options)).run_folder
        for kind, options in (("held", HELD), ("released", RELEASED))
    )
    assert differ(end(released), end(held)) == []
    for one, two in zip(steps(released), steps(held), strict=True):
        assert (one.loss, one.learning_rate) == (two.loss, two.learning_rate)
        assert one.grad_norm == pytest.approx(two.grad_norm, rel=1e-5)
    assert len(steps(held)) > 3


def test_copies_that_are_not_written_back_are_caught(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutant: the model computes with the weights of its start."""
    case = CASES["bf16-copies"]
    held = workspace.run(stage(workspace, "mutant-held", case, HELD)).run_folder
    step_weight = Optimizer.step_weight

    def without_copy(self: Optimizer, weight: Weight, rate: float) -> None:
        before = weight.parameter.detach().clone()
        step_weight(self, weight, rate)
        if weight.has_master_copy:
            weight.parameter.data.copy_(before)

    monkeypatch.setattr(Optimizer, "step_weight", without_copy)
    released = workspace.run(stage(workspace, "mutant-released", case, RELEASED)).run_folder
    assert differ(end(released), end(held))


def test_an_interrupted_run_ends_with_the_same_bits(workspace: Workspace) -> None:
    case = CASES["bf16-masters"]
    whole = workspace.run(stage(workspace, "interrupted-whole", case, RELEASED))
    parts = run_interrupted(workspace, stage(workspace, "interrupted", case, RELEASED))
    assert run_trace(parts.run_folder) == run_trace(whole.run_folder)


@pytest.mark.parametrize("is_released", [True, False])
def test_only_one_gradient_is_held(is_released: bool, workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """At every update; a step that holds them has all."""
    held: list[float] = []
    weights: Weights

    def gradient_bytes() -> int:
        tensors = {id(t): t for w in weights.entries for t in (w.parameter.grad, w.master.grad) if t is not None}
        return sum(t.nbytes for t in tensors.values())

    def watch(name: str) -> None:
        original = getattr(Optimizer, name)

        def watched(self: Optimizer, *args: Any) -> Any:
            nonlocal weights
            weights = self.weights
            held.append(gradient_bytes() / max(4 * w.master.numel() for w in weights.entries))
            return original(self, *args)

        monkeypatch.setattr(Optimizer, name, watched)

    watch("step_weight")
    watch("step")
    options = RELEASED if is_released else HELD
    workspace.run(stage(workspace, f"held-{is_released}", CASES["bf16-copies"], options))
    assert max(held) <= 1 if is_released else min(held) > 2


def test_the_estimate_foretells_what_is_saved() -> None:
    shape = ModelDimensions(8_000, 8_000, 4, 64, 256, 4, 1000, tables=2_000)
    settings: dict[str, Any] = {"rows": 1, "length": 8, "bf16": False, "checkpointing": False, "sdpa": True}
    held, released = (
        estimate_memory(shape, **settings, state=StateDtypes(releases_gradients=flag)) for flag in (False, True)
    )
    assert (held.gradients, released.gradients) == (4 * 8_000, 4 * 2_000)
    assert held.total - released.total == 4 * 6_000


def watch_masters(monkeypatch: pytest.MonkeyPatch, at_step: int) -> list[list[Tensor]]:
    """The masters before a step and after it."""
    seen: list[list[Tensor]] = []

    def step(run: Run, micro_batches: Sequence[Batch]) -> StepReport | StepWithoutUpdate:
        if run.step != at_step - 1:
            return train_step_releasing(run, micro_batches)
        copies = [[w.master.detach().clone() for w in run.weights.entries]]
        try:
            return train_step_releasing(run, micro_batches)
        finally:
            seen.extend([*copies, [w.master.detach().clone() for w in run.weights.entries]])

    monkeypatch.setattr(build, "train_step_releasing", step)
    return seen


def test_a_loss_that_is_not_finite_moves_no_weight(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, calls, combine = watch_masters(monkeypatch, at_step=2), itertools.count(1), step_module.combine_losses

    def second_is_infinite(*args: Any) -> CombinedLoss:
        combined = combine(*args)
        factor = math.inf if next(calls) == 2 else 1.0
        return CombinedLoss(combined.loss * factor, combined.sums_J * factor, combined.rows_B * factor)

    monkeypatch.setattr(step_module, "combine_losses", second_is_infinite)
    run = workspace.run(stage(workspace, "infinite-loss", {}, RELEASED)).run_folder
    skipped = [row.step for row in read_metrics(run / "metrics.jsonl") if row.kind == "skipped"]
    assert skipped == [2]
    assert all(torch.equal(before, after) for before, after in zip(*seen, strict=True))


def test_a_gradient_that_is_not_finite_ends_the_run(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checkpoint before it is whole, and the same command finishes."""
    take = Weights.take_gradient

    def poisoned(self: Weights, weight: Weight) -> None:
        take(self, weight)
        assert weight.master.grad is not None
        if weight is self.entries[0] and next(calls) == 4:
            weight.master.grad.fill_(math.nan)

    raw, calls = stage(workspace, "nan-gradient", {"save": {"every": "1 steps"}}, RELEASED), itertools.count(1)
    with monkeypatch.context() as patch:
        patch.setattr(Weights, "take_gradient", poisoned)
        with pytest.raises(NonFiniteError, match="step 4: gradient norm nan") as caught:
            workspace.run(raw)
        assert "resumes from the last checkpoint" in caught.value.hint
    whole = workspace.run(stage(workspace, "no-nan", {"save": {"every": "1 steps"}}, RELEASED)).run_folder
    assert differ(end(workspace.run(raw).run_folder), end(whole)) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": {"release_gradients": True}}, "max_grad_norm: null"),
        ({"optimizer": {**RELEASED, "sparse_update": {"kind": "mofo"}}}, "sparse_update"),
        ({"optimizer": {**RELEASED, "sharpness_aware": {"radius": 0.05}}}, "sharpness_aware"),
        ({"penalties": [{"kind": "anchor", "strength": 1}]}, "each adds its gradient"),
        ({"tuning": {"kind": "lora", "rank": 2, "orthogonal": 0.5}}, "each adds its gradient"),
        ({"batch": {"global_batch_size": 8, "micro_batch_size": 4}}, "several micro-batches of 4"),
        ({"data": {"packing": False}}, "several sorts or lengths"),
    ],
)
def test_what_needs_the_whole_gradient_is_refused(changes: dict[str, Any], message: str, workspace: Workspace) -> None:
    raw = workspace.stage("refused", **{"batch": BATCH, "optimizer": RELEASED, **changes})
    if "data" in changes:
        raw["data"] = {**workspace.stage("plain")["data"], **changes["data"]}
    with pytest.raises(PostgradError, match=message):
        workspace.run(raw)


def test_a_stage_without_it_keeps_its_fingerprint(workspace: Workspace) -> None:
    plain, off = (
        parse_stage(workspace.stage("plain", optimizer=options), "test")
        for options in ({}, {"release_gradients": False})
    )
    assert "release_gradients" not in plain.model_dump()["optimizer"] and plain.fingerprint() == off.fingerprint()


@pytest.mark.timeout(120)
def test_ranks_release_what_one_process_releases(small: dict[str, Any], cache: Path, tmp_path: Path) -> None:
    raw = {**small, "penalties": [], "optimizer": RELEASED, "batch": {"global_batch_size": 12}}
    train_mesh("1", raw, tmp_path / "1", cache)
    train_mesh("2", raw, tmp_path / "2", cache)
    homes = tmp_path / "2", tmp_path / "1"
    assert losses(homes[0]) == pytest.approx(losses(homes[1]), rel=1e-6)
    assert [row.grad_norm for row in steps(homes[0])] == pytest.approx([r.grad_norm for r in steps(homes[1])], rel=1e-4)
    assert difference(*(read_tensors(last_checkpoint(home)) for home in homes)) < 1e-6
    assert_resumes(homes[0], "2", "1", raw, cache)

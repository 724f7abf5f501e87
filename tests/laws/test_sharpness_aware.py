"""Laws of sharpness-aware steps: the gradient by hand, for any micro-batches; exact weights and resume; when, at what cost."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from postgrad.check.check import check_stage
from postgrad.errors import PostgradError
from postgrad.models.model import CausalModel
from postgrad.run.run import run_stage
from postgrad.training import sharpness_aware as module
from postgrad.training.sharpness_aware import SharpnessAwareGradients
from postgrad.training.step import Run, StepReport, compute_gradients, train_step
from tests.laws.test_step import batches, run_of
from tests.tiny_models import make_llama
from tests.tiny_stages import Workspace, make_workspace, run_interrupted, run_trace

RADIUS = 0.5
"""Far enough for the two gradients to differ."""


def gradient_by_hand(model: Any) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradient of the whole batch, by transformers and autograd."""
    model.zero_grad()
    (batch,) = batches([8])
    logits = model(**batch.inputs, use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels.flatten())
    loss.backward()
    return float(loss.detach()), {name: p.grad.clone() for name, p in model.named_parameters()}


class Captured:
    """A penalty that pulls at nothing, and sees the gradient and the weights before the update."""

    name = "captured"

    def __init__(self, run: Run) -> None:
        self.run = run

    def __call__(self) -> torch.Tensor:
        self.gradients = {w.name: w.master.grad.clone() for w in self.run.weights.entries if w.master.grad is not None}
        self.weights = {w.name: w.master.detach().clone() for w in self.run.weights.entries}
        return torch.zeros(())


def captured(sizes: list[int], radius: float = RADIUS, first_step: int = 1) -> tuple[Captured, StepReport, Run]:
    run = run_of()
    seen = Captured(run)
    run.penalties = [seen]
    report = train_step(run, batches(sizes), SharpnessAwareGradients(radius, first_step))
    assert isinstance(report, StepReport)
    return seen, report, run


def is_close(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return all(torch.allclose(first[name], second[name], rtol=1e-3, atol=2e-6) for name in second)


@pytest.mark.parametrize("sizes", [[8], [4, 3, 1]])
@pytest.mark.parametrize("mutant", [None, "plain", "downhill", "each micro-batch"])
def test_the_gradient_is_that_of_two_steps_by_hand(
    sizes: list[int], mutant: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_llama()
    loss, first = gradient_by_hand(model)
    norm = torch.stack([g.norm() for g in first.values()]).norm()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p += RADIUS * first[name] / norm
    _, second = gradient_by_hand(model)
    assert not is_close(first, second)

    if mutant == "plain":
        monkeypatch.setattr(SharpnessAwareGradients, "__call__", lambda self, *a: compute_gradients(*a))
    if mutant == "each micro-batch":  # the step uphill is that of a part of the batch
        calls: list[int] = []

        def first_part(run: Run, parts: Any, count: int) -> Any:
            calls.append(1)
            return compute_gradients(run, parts[:1] if len(calls) == 1 and len(parts) > 1 else parts, count)

        monkeypatch.setattr(module, "compute_gradients", first_part)
    seen, report, run = captured(sizes, -RADIUS if mutant == "downhill" else RADIUS)
    is_whole = mutant == "each micro-batch" and len(sizes) == 1
    assert is_close(seen.gradients, second) == (mutant is None or is_whole)
    if mutant is None:
        assert report.loss == pytest.approx(loss, rel=1e-5)  # at the weights, not uphill
        assert isinstance(run.model, CausalModel)
        fresh = dict(make_llama().named_parameters())
        assert all(torch.equal(weight, fresh[name]) for name, weight in seen.weights.items())


def test_steps_before_the_first_are_plain_and_a_zero_gradient_is_no_direction() -> None:
    (plain, _, _), (later, _, _) = captured([8], first_step=2), captured([8], 0.0)
    assert all(torch.equal(plain.gradients[name], g) for name, g in later.gradients.items())
    run = run_of()
    run.objectives = [type(run.objectives[0])(weight=0.0)]  # type: ignore[call-arg]
    assert isinstance(train_step(run, batches([8]), SharpnessAwareGradients(RADIUS, 1)), StepReport)


def test_a_gradient_that_is_not_finite_uphill_leaves_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_of()
    before = {w.name: w.master.detach().clone() for w in run.weights.entries}
    (batch,) = batches([8])
    batch = replace(batch, position_B=np.arange(8))
    report = train_step(run, [batch], SharpnessAwareGradients(1e30, 1))
    assert not isinstance(report, StepReport)
    assert all(torch.equal(w.master, before[w.name]) for w in run.weights.entries)


SHARP: dict[str, Any] = {
    "optimizer": {"sharpness_aware": {"radius": RADIUS}},
    "schedule": {"kind": "wsd", "peak": 1e-2, "floor": 1e-3, "warmup": 0, "decay": "50%"},
}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return make_workspace(tmp_path_factory.mktemp("sharp"), tmp_path_factory.getbasetemp() / "cache")


def test_killed_and_stopped_it_ends_with_the_same_bits(workspace: Workspace) -> None:
    whole = workspace.run(workspace.stage("whole", **SHARP))
    parts = run_interrupted(workspace, workspace.stage("parts", **SHARP))
    assert run_trace(parts.run_folder) == run_trace(whole.run_folder)


@pytest.mark.parametrize(
    ("schedule", "over", "first"),
    [
        (SHARP["schedule"], "decay", 4),
        (SHARP["schedule"], "2 steps", 5),
        ({"kind": "rewarm", "peak": 1e-2, "floor": 1e-3, "warmup": "2 steps"}, "decay", 3),
        ({"kind": "linear", "peak": 1e-2, "floor": 1e-3, "warmup": 0}, "100%", 1),
    ],
)
def test_the_decay_is_the_part_at_the_end_in_which_the_rate_falls(
    workspace: Workspace, schedule: dict[str, Any], over: str, first: int
) -> None:
    raw = workspace.stage("phases", schedule=schedule, optimizer={"sharpness_aware": {"over": over}})
    assert workspace.plan(raw).sharpness_start == first


def test_check_tells_the_cost(workspace: Workspace) -> None:
    found = check_stage(workspace.plan(workspace.stage("cost", **SHARP)), cache=workspace.cache)
    assert found["sharpness_aware_steps"] == 3 and "the last 3 of 6 steps compute their gradient twice" in found["text"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schedule": {"kind": "constant", "peak": 1e-2}}, "does not decay at the end"),
        ({"optimizer": {"sharpness_aware": {"over": "1%"}}}, "is no step"),
        ({"compute": {"threads": 1, "dtype": "bfloat16", "compile": False}}, "lost in the rounding of bfloat16"),
    ],
)
def test_what_does_not_fit_is_an_error(workspace: Workspace, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(PostgradError, match=message):
        plan = workspace.plan(workspace.stage("refused", **{**SHARP, **changes}))
        list(run_stage(plan, command="test", cache=workspace.cache))

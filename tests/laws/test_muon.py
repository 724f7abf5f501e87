"""Laws of Muon: orthogonal updates of matrices at AdamW's size, AdamW elsewhere, exact resume, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from postgrad.errors import PostgradError
from postgrad.optim import optimizer as module
from postgrad.run.run import run_stage
from tests.tiny_stages import Workspace, make_workspace, run_interrupted, run_trace, train_for

MUON: dict[str, Any] = {"kind": "muon", "weight_decay": 0.0}
RATE = 1e-2


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return make_workspace(tmp_path_factory.mktemp("muon"), tmp_path_factory.getbasetemp() / "cache")


@pytest.mark.parametrize("mutant", [None, "original-size"])
def test_a_first_update_is_orthogonal_and_of_the_size_of_adamw(
    mutant: str | None, workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its singular values are near 0.2 sqrt(max(rows, columns)) times the rate, so an entry's mean square is near 0.2 rate."""
    if mutant:
        original = torch.optim.Muon.__init__
        monkeypatch.setattr(
            torch.optim.Muon,
            "__init__",
            lambda self, groups, **k: original(self, groups, **{**k, "adjust_lr_fn": "original"}),
        )
    before, after, _ = train_for(workspace, workspace.stage(f"first-{mutant}", optimizer=MUON), 1)
    name = "model.layers.0.mlp.down_proj.weight"
    update = (before[name] - after[name]) / RATE
    expected = 0.2 * max(update.shape) ** 0.5
    singular = torch.linalg.svdvals(update)[: min(update.shape)] / expected
    is_orthogonal = bool(((singular > 0.6) & (singular < 1.3)).all())
    assert is_orthogonal == (mutant is None)


def test_embeddings_and_vectors_are_updated_by_adamw(workspace: Workspace) -> None:
    adam = {"weight_decay": 0.0}
    before, by_muon, _ = train_for(workspace, workspace.stage("by-muon", optimizer=MUON), 1)
    _, by_adam, _ = train_for(workspace, workspace.stage("by-adam", optimizer=adam), 1)
    for name, weight in by_muon.items():
        is_matrix = weight.ndim == 2 and "embed" not in name and "lm_head" not in name
        assert torch.equal(weight, by_adam[name]) != is_matrix, name
        assert not torch.equal(weight, before[name])


@pytest.mark.parametrize(
    "changes",
    [{}, {"tuning": {"kind": "lora", "rank": 2}}, {"optimizer": {**MUON, "sparse_update": {"kind": "migu"}}}],
    ids=["full", "lora", "migu"],
)
def test_killed_and_stopped_it_ends_with_the_same_bits(
    workspace: Workspace, changes: dict[str, Any], request: Any
) -> None:
    name = request.node.callspec.id
    options = {"optimizer": {**MUON, "momentum": 0.9}, **changes}
    whole = workspace.run(workspace.stage(f"{name}-whole", **options))
    parts = run_interrupted(workspace, workspace.stage(name, **options))
    assert run_trace(parts.run_folder) == run_trace(whole.run_folder)


def test_a_lost_momentum_would_be_caught(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = workspace.run(workspace.stage("kept", optimizer=MUON))
    monkeypatch.setattr(module, "restore_moment", lambda *_: True)
    parts = run_interrupted(workspace, workspace.stage("lost", optimizer=MUON))
    assert run_trace(parts.run_folder) != run_trace(whole.run_folder)


def test_moments_carry_over_to_a_next_stage_of_the_same_optimizer(workspace: Workspace) -> None:
    workspace.run(workspace.stage("first-stage", optimizer=MUON))
    following = {"model": "runs/first-stage", "optimizer": {**MUON, "moments": "keep"}}
    plan = workspace.plan(workspace.stage("second-stage", **following))
    list(run_stage(plan, command="test", cache=workspace.cache))
    adam = workspace.plan(workspace.stage("by-another", **{**following, "optimizer": {"moments": "keep"}}))
    with pytest.raises(PostgradError, match="another optimizer wrote it"):
        list(run_stage(adam, command="test", cache=workspace.cache))


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        ({"momentum": 0.9}, "AdamW has `betas`"),
        ({**MUON, "moments": "keep-second"}, "no second moment"),
        ({**MUON, "sparse_update": {"kind": "mofo"}}, "AdamW's momentum"),
    ],
)
def test_what_does_not_fit_is_an_error(workspace: Workspace, optimizer: dict[str, Any], message: str) -> None:
    with pytest.raises(PostgradError, match=message):
        workspace.plan(workspace.stage("refused", optimizer=optimizer))

"""Laws of optimizer state in fewer bits: exact resume, moments that carry over between formats, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from postgrad.errors import PostgradError
from postgrad.optim import low_precision_adamw
from postgrad.run.run import run_stage
from tests.tiny_stages import Workspace, make_workspace, run_interrupted, run_trace

FLOAT8: dict[str, Any] = {"optimizer": {"moment_dtype": "float8"}}
BFLOAT16: dict[str, Any] = {
    "optimizer": {"moment_dtype": "bfloat16", "master_dtype": "bfloat16"},
    "compute": {"dtype": "bfloat16"},
}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return make_workspace(tmp_path_factory.mktemp("low"), tmp_path_factory.getbasetemp() / "cache")


@pytest.mark.parametrize("mutant", [None, "same-key-at-every-update"])
@pytest.mark.parametrize("changes", [FLOAT8, BFLOAT16], ids=["float8-moments", "bfloat16-weights"])
def test_killed_and_stopped_it_ends_with_the_same_bits(
    workspace: Workspace, changes: dict[str, Any], mutant: str | None, monkeypatch: pytest.MonkeyPatch, request: Any
) -> None:
    name = request.node.callspec.id
    whole = workspace.run(workspace.stage(f"{name}-whole", **changes))
    if mutant:  # another random stream after the interruption
        keys = low_precision_adamw.LowPrecisionAdamW._rounding_keys
        monkeypatch.setattr(
            low_precision_adamw.LowPrecisionAdamW, "_rounding_keys", lambda self, weight, update: keys(self, weight, 0)
        )
    parts = run_interrupted(workspace, workspace.stage(name, **changes))
    assert (run_trace(parts.run_folder) == run_trace(whole.run_folder)) == (mutant is None)


def test_moments_carry_over_to_another_format(workspace: Workspace) -> None:
    workspace.run(workspace.stage("wide", schedule={"kind": "constant", "peak": 1e-3, "warmup": 0}))
    following = {"model": "runs/wide", "schedule": {"kind": "constant", "peak": 1e-30, "warmup": 0}}
    options = {"moments": "keep", "betas": [0.999999, 0.999999]}
    checkpoints = {}
    for dtype in (None, "float8"):
        stage = workspace.stage(f"to-{dtype}", **following, optimizer={**options, "moment_dtype": dtype})
        run = workspace.run(stage).run_folder
        checkpoints[dtype] = load_file(max((run / "checkpoints").iterdir()) / "optimizer.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"
    exact, codes = checkpoints[None][f"{name}.exp_avg_sq"], checkpoints["float8"][f"{name}.exp_avg_sq"]
    scale = checkpoints["float8"][f"{name}.exp_avg_sq_scale"]
    assert codes.dtype == torch.float8_e4m3fn
    decoded = (codes.float().unflatten(-1, (scale.shape[-1], -1)) * scale[..., None]).flatten(-2).square()
    assert float((decoded - exact).norm() / exact.norm()) < 0.2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": {"kind": "muon", "moment_dtype": "float8"}}, "are AdamW's"),
        ({"optimizer": {"moment_dtype": "float8", "sparse_update": {"kind": "mofo"}}}, "selects by fp32 moments"),
        ({"optimizer": {"master_dtype": "bfloat16"}}, "compute: {dtype: bfloat16}"),
        ({**BFLOAT16, "penalties": [{"kind": "anchor", "strength": 1}]}, "lost in bfloat16"),
        ({**BFLOAT16, "tuning": {"kind": "lora", "rank": 2}}, "other kinds train few weights"),
    ],
)
def test_what_does_not_fit_is_an_error(workspace: Workspace, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(PostgradError, match=message):
        list(run_stage(workspace.plan(workspace.stage("refused", **changes)), command="test", cache=workspace.cache))

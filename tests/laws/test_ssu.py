"""Laws of source-shielded updates: the importance is that of the definition, and the most important columns never change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from postgrad.commands.importance import measure_importance
from postgrad.data.loading.batch import Batch
from postgrad.errors import PostgradError
from postgrad.evaluation.activation_importance import estimate_activation_importance
from postgrad.evaluation.fisher import ImportanceEstimate
from postgrad.models.model import CausalModel
from postgrad.optim.ssu import SsuMask
from postgrad.penalties.importance_file import ImportanceFile
from postgrad.run.run import run_stage
from postgrad.tuning.targets import block_layers
from tests.tiny_stages import Workspace, make_workspace, run_interrupted, run_trace, train_for
from tests.tuning.families import build_model


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return make_workspace(tmp_path_factory.mktemp("ssu"), tmp_path_factory.getbasetemp() / "cache")


@pytest.fixture(scope="module")
def importance(workspace: Workspace) -> str:
    sources = workspace.stage("old")["data"]["sources"]
    out = workspace.folder / "importance.safetensors"
    model = str(workspace.folder / workspace.stage("old")["model"])
    files = [str(workspace.folder / sources[0]["path"])]
    measure_importance(model, files, out=out, tokens=400, kind="activation", cache=workspace.cache, context=32)
    return str(out)


def update(importance: str, share: str = "50%") -> dict[str, Any]:
    return {"sparse_update": {"kind": "ssu", "importance": importance, "share": share}, "weight_decay": 0.1}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_importance_is_that_of_the_definition(family: str) -> None:
    """`|W| sqrt(mean X^2)`; GPT-2 stores its weights transposed."""
    model = CausalModel(build_model(family, "lm"))
    ids = torch.randint(5, 30, (3, 9), generator=torch.Generator().manual_seed(0))
    batches = [
        Batch({"input_ids": row[None]}, row[None], torch.zeros(1).numpy(), torch.tensor([9]).numpy()) for row in ids
    ]
    *_, estimate = estimate_activation_importance(model, block_layers(model.pretrained), batches, 27)
    assert isinstance(estimate, ImportanceEstimate) and estimate.labels == 27
    name = next(n for n in estimate.tensors if n.endswith(("up_proj.weight", "c_fc.weight")))
    layer = model.pretrained.get_submodule(name.removesuffix(".weight"))
    inputs: list[Tensor] = []
    hook = layer.register_forward_pre_hook(lambda _module, args: inputs.append(args[0].flatten(0, -2)))
    with torch.no_grad():
        model(input_ids=ids)
    hook.remove()
    size_I = torch.cat(inputs).square().mean(0).sqrt()
    weight = layer.weight.detach().abs()
    expected = weight * (size_I[:, None] if family == "gpt2" else size_I)
    torch.testing.assert_close(estimate.tensors[name], expected, rtol=1e-4, atol=1e-7)
    assert estimate.convergence[-1]["correlation"] > 0.5
    heads = ("lm_head", "wte", "embed_tokens")
    assert not any(part in n for n in estimate.tensors for part in heads)


@pytest.mark.parametrize("mutant", [None, "the least important columns", "rows"])
def test_the_most_important_columns_keep_their_values(
    mutant: str | None, workspace: Workspace, importance: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if mutant == "the least important columns":
        monkeypatch.setattr(ImportanceFile, "__getitem__", lambda self, name: -self._file.get_tensor(name))
    original = SsuMask.__init__
    if mutant == "rows":
        monkeypatch.setattr(
            SsuMask,
            "__init__",
            lambda self, share, columns, masters: original(
                self, share, [(m, i, 1 - d) for m, i, d in columns if m.shape[0] == m.shape[1]], masters
            ),
        )
    before, after, run = train_for(
        workspace, workspace.stage(f"ssu {mutant}".replace(" ", "-"), optimizer=update(importance)), 2
    )
    monkeypatch.undo()
    file, held = ImportanceFile(Path(importance)), []
    for name in file.names:
        order = file[name].sum(0).argsort(stable=True)
        half = max(1, round(0.5 * len(order)))
        changed = (before[name] != after[name]).any(0)
        held.append(bool(changed[order[:half]].any()) and not bool(changed[order[half:]].any()))
    assert all(held) == (mutant is None)
    if mutant is None:
        assert not torch.equal(before["model.embed_tokens.weight"], after["model.embed_tokens.weight"])
        counted = sum(int((before[name] != after[name]).sum()) for name in before)
        assert counted <= run.optimizer.update_mask.num_updated < sum(t.numel() for t in before.values())


def test_it_resumes_to_the_same_bits_and_its_file_may_not_change(workspace: Workspace, importance: str) -> None:
    whole = workspace.run(workspace.stage("whole", optimizer=update(importance)))
    parts = run_interrupted(workspace, workspace.stage("parts", optimizer=update(importance)))
    assert run_trace(parts.run_folder) == run_trace(whole.run_folder)
    dense = workspace.run(workspace.stage("dense", optimizer={"weight_decay": 0.1}))
    every = workspace.run(workspace.stage("every", optimizer=update(importance, "100%")))
    weights = [(run.run_folder / "model/model.safetensors").read_bytes() for run in (dense, every)]
    assert weights[0] == weights[1]


def test_what_it_cannot_use_is_an_error(workspace: Workspace, importance: str) -> None:
    for changes, message in (
        ({"optimizer": update("nothing.safetensors")}, "there is no file"),
        ({"optimizer": update(importance), "tuning": {"kind": "lora", "rank": 2}}, "trains no linear layer"),
    ):
        plan = workspace.plan({**workspace.stage("refused"), **changes})
        with pytest.raises(PostgradError, match=message):
            list(run_stage(plan, command="test", cache=workspace.cache))

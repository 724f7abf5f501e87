"""A checkpoint of a full tuning is restored for families whose published files have other names, or one name, of a weight."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from postgrad.distributed.world import World
from postgrad.errors import CheckpointError
from postgrad.hardware.execution import Execution
from postgrad.models import pretrained as saving
from postgrad.models.location import locate_model
from postgrad.models.pretrained import load_model
from postgrad.models.task import Task
from postgrad.run.build import build_run, make_loader
from postgrad.run.tuned_model import make_tuned_model
from postgrad.storage.atomic import MANIFEST
from postgrad.training import checkpoint_state
from postgrad.training.checkpoint_state import CheckpointMetadata, CheckpointOwner, restore_run, write_checkpoint
from postgrad.training.step import Run, train_step
from tests.conftest import new_text, write_jsonl
from tests.model_families import make_tiny_model, tiny_config
from tests.tiny_models import bert_tokenizer, make_tokenizer
from tests.tiny_stages import Workspace, save_model

FAMILIES = {
    "mixtral": (Task.CAUSAL, make_tokenizer),  # its files have a tensor for each expert
    "granitemoe": (Task.CAUSAL, make_tokenizer),
    "camembert": (Task.MASKED, bert_tokenizer),  # the name that is saved is not the first name of the tied weight
}
META = CheckpointMetadata(CheckpointOwner("stage", "run", 0, "full"), {}, {})


def build(workspace: Workspace, name: str) -> tuple[Run, PreTrainedTokenizerFast]:
    source = {"name": "text", "path": str(workspace.folder / "text.jsonl"), "max_passes": 100}
    raw = workspace.stage(name, model="model", sources=[source], evaluation={"samples": 0})
    plan, world = workspace.plan(raw), World(torch.device("cpu"))
    execution = Execution("float32", False, "sdpa", 1, 2, False, 0.0)
    run = build_run(plan, make_tuned_model(plan, world), execution, world)
    train_step(run, make_loader(plan, execution, world)(1, last=1))
    return run, plan.model.tokenizer  # type: ignore[return-value]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_full_checkpoint_is_restored(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task, make = FAMILIES[family]
    workspace = Workspace(tmp_path, tmp_path / "cache")
    save_model(make_tiny_model(tiny_config(family), task), make(), tmp_path / "model")
    write_jsonl(tmp_path / "text.jsonl", new_text(30, 3))
    run, tokenizer = build(workspace, "first")
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    write_checkpoint(folder, run, tokenizer, META)
    listed = {path.name: {} for path in folder.iterdir()}
    monkeypatch.setattr(checkpoint_state, "read_manifest", lambda _: listed)
    wanted = {w.name: w.master.detach().clone() for w in run.weights.entries}
    for w in run.weights.entries:
        w.master.data.add_(1.0)
    restore_run(run, folder)
    assert all(torch.equal(w.master, wanted[w.name]) for w in run.weights.entries)
    assert MANIFEST not in listed
    # As a start model it is the same, read by plain transformers.
    again = dict(load_model(locate_model(str(folder), tmp_path)).named_parameters())
    assert all(torch.equal(again[name], tensor) for name, tensor in wanted.items())
    if family != "camembert":
        # The mutant: the names of published files.
        monkeypatch.setattr(
            checkpoint_state, "save_pretrained", lambda *a, original_names, **k: saving.save_pretrained(*a, **k)
        )
        other = tmp_path / "other"
        other.mkdir()
        write_checkpoint(other, run, tokenizer, META)
        with pytest.raises(CheckpointError, match="lacks"):
            restore_run(run, other)

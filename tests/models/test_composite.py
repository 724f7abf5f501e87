"""Checkpoints of vision-language models: the language part is continued and put back, all else leaves as it came."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from postgrad.models import pretrained
from postgrad.models.pretrained import detect_config_task
from postgrad.models.task import Task
from tests.conftest import new_text, write_jsonl
from tests.model_families import make_tiny_model, tiny_config
from tests.tiny_models import make_tokenizer
from tests.tiny_stages import Workspace, save_model

FAMILIES = ["llama4"]
MORE = ["gemma3", "qwen2_5_vl", "mistral3", "qwen3_vl", "qwen3_5", "qwen3_vl_moe", "internvl", "llava"]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


@pytest.mark.parametrize("family", [*FAMILIES, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)])
def test_only_the_language_part_is_trained(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    workspace = Workspace(tmp_path, tmp_path / "cache")
    config = tiny_config(family)
    model = make_tiny_model(config, Task.CAUSAL, auto_class=AutoModelForImageTextToText)
    save_model(model, make_tokenizer(), tmp_path / "model")
    write_jsonl(tmp_path / "text.jsonl", new_text(30, 3))
    source = {"name": "text", "path": str(tmp_path / "text.jsonl"), "max_passes": 100}
    evaluation: dict[str, Any] = {"samples": 0, "drift_tokens": 0}

    def train(name: str) -> dict[str, torch.Tensor]:
        raw = workspace.stage(name, model="model", sources=[source], evaluation=evaluation, save={}, tokens=4 * 48)
        assert workspace.run(raw).record
        return weights(Path(raw["output"]) / "model")

    before, after = weights(tmp_path / "model"), train("run")
    assert detect_config_task(model.config) == Task.CAUSAL
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    images = {name for name in before if any(part in name for part in ("vision", "visual", "projector", "image"))}
    assert images
    assert changed
    assert not changed & images
    assert any("layers.0" in name for name in changed)
    if family == "llama4":  # the mutant: the class without images
        monkeypatch.setattr(pretrained, "_auto_class", lambda config, task: pretrained._CLASSES[task])
        assert before.keys() - train("text").keys() >= images

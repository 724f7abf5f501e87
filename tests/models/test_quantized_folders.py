"""Folders with quantised weights: dequantised to the value, trained, and published as plain models; or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from postgrad.errors import ModelError
from postgrad.models import pretrained
from postgrad.models.location import ModelLocation
from postgrad.models.pretrained import load_pretrained, save_pretrained
from postgrad.models.task import Task
from tests.conftest import new_text, write_jsonl
from tests.model_families import make_tiny_model, tiny_config
from tests.tiny_models import make_tokenizer
from tests.tiny_stages import Workspace, save_model

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""The numbers of four bits without their sign."""


def quantize_mxfp4(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Replace the experts' weights by random ones in mxfp4, in place; their values."""
    generator = torch.Generator().manual_seed(0)
    values = {}
    for name in [name for name in weights if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, inputs, outputs = weights.pop(name).shape
        codes = torch.randint(0, 16, (experts, outputs, inputs // 32, 16, 2), generator=generator)
        exponents = torch.randint(-4, -1, (experts, outputs, inputs // 32), generator=generator)
        numbers = torch.tensor([*E2M1, *(-number for number in E2M1)])[codes] * 2.0 ** exponents[..., None, None]
        values[name] = numbers.flatten(2).mT
        weights[f"{name}_blocks"] = (codes[..., 0] + 16 * codes[..., 1]).to(torch.uint8)
        weights[f"{name}_scales"] = (exponents + 127).to(torch.uint8)
    return values


def quantize_fp8(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Replace the blocks' matrices by fp8 ones with one scale each, in place; their values."""
    values = {}
    for name in [name for name in weights if name.endswith("_proj.weight")]:
        scale = weights[name].abs().max() / 448
        weights[name] = (weights[name] / scale).to(torch.float8_e4m3fn)
        weights[f"{name}_scale_inv"] = scale.reshape(1, 1)
        values[name] = weights[name].float() * scale
    return values


FORMS: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "mxfp4": (
        "gpt_oss",
        quantize_mxfp4,
        {"modules_to_not_convert": ["self_attn", "router", "embed_tokens", "lm_head"]},
    ),
    "fp8": ("qwen3_moe", quantize_fp8, {"activation_scheme": "dynamic", "weight_block_size": [128, 128]}),
}


def make_folder(folder: Path, method: str) -> dict[str, Tensor]:
    """A folder of a tiny model in a quantisation; the values of the quantised weights by their names in the file."""
    family, quantize, settings = FORMS[method]
    save_model(make_tiny_model(tiny_config(family), Task.CAUSAL), make_tokenizer(), folder)
    weights = load_file(folder / "model.safetensors")
    values = quantize(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    set_quantization(folder, {"quant_method": method, **settings})
    return values


def set_quantization(folder: Path, settings: dict[str, Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))


@pytest.mark.parametrize("method", FORMS)
def test_they_are_read_to_the_value_and_saved_as_plain_models(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = make_folder(tmp_path / "model", method)
    assert values
    loaded = load_pretrained(ModelLocation("m", tmp_path / "model"))
    assert method in loaded.notes[0]
    assert "GB in float32" in loaded.notes[0]
    assert {p.dtype for p in loaded.model.parameters()} == {torch.float32}

    def saved(name: str, model: Any) -> Path:
        save_pretrained(model, make_tokenizer(), tmp_path / name, dtype=torch.float32)
        return tmp_path / name

    folder = saved("plain", loaded.model)
    written = load_file(folder / "model.safetensors")
    for name, value in values.items():
        torch.testing.assert_close(written[name], value, rtol=1e-6, atol=0)
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    again = load_pretrained(ModelLocation("again", folder))
    assert not again.notes
    ids = torch.arange(5, 30)[None]
    with torch.no_grad():
        assert torch.equal(again.model(input_ids=ids).logits, loaded.model(input_ids=ids).logits)
    # The mutant: what transformers does by itself, whose folder of gpt-oss it cannot read.
    monkeypatch.setattr(pretrained, "make_plain", lambda *_: "")
    if method == "mxfp4":
        mutant = load_pretrained(ModelLocation("m", tmp_path / "model")).model
        with pytest.raises(ModelError, match="lacks 4 weights"):
            load_pretrained(ModelLocation("mutant", saved("mutant", mutant)))


def test_a_stage_trains_and_publishes_a_dequantized_model(tmp_path: Path) -> None:
    make_folder(tmp_path / "model", "mxfp4")
    for name, seed in (("new", 3), ("held-out", 4)):
        write_jsonl(tmp_path / f"{name}.jsonl", new_text(30, seed))
    workspace = Workspace(tmp_path, tmp_path / "cache")
    evaluation = {"learned": [str(tmp_path / "held-out.jsonl")], "samples": 0, "drift_tokens": 0}
    raw = workspace.stage("run", model="model", sources=[workspace.source("new")], evaluation=evaluation, tokens=4 * 48)
    record = workspace.run(raw).record
    assert record.changes["held-out"].difference < 0
    assert any("mxfp4" in note for note in record.notes)


@pytest.mark.parametrize("settings", [{"quant_method": "gptq", "bits": 4}, {"load_in_4bit": True}, {"bits": 2}])
def test_other_quantizations_are_refused_with_the_way_out(settings: dict[str, Any], tmp_path: Path) -> None:
    save_model(make_tiny_model(tiny_config("qwen3"), Task.CAUSAL), make_tokenizer(), tmp_path / "model")
    set_quantization(tmp_path / "model", settings)
    with pytest.raises(ModelError, match="quantised") as caught:
        load_pretrained(ModelLocation("m", tmp_path / "model"))
    assert "dequantize" in caught.value.hint

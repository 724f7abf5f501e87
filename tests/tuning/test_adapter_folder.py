"""Laws of the folder of a tuning: what `save_tuning` writes, `load_tuning` and PEFT read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from postgrad.data.render.frame import Frame
from postgrad.errors import TuningError
from postgrad.models.location import ModelLocation
from postgrad.storage.atomic import publish_folder, verify
from postgrad.tuning.adapter_folder import load_tuning, read_export, save_tuning
from postgrad.tuning.attach import attach
from postgrad.tuning.open_model import BaseReference
from postgrad.tuning.tuning import Tuning
from tests.tuning.checks import tokenizer, train
from tests.tuning.families import batch, build_model, first_virtual, logits

BASE = {"name": "a/base", "fingerprint": "f00d"}

OPTIONS: list[dict[str, Any]] = [
    {"kind": "adapter", "size": 4},
    {"kind": "prefix", "length": 3, "hidden": 8},
    {"kind": "prompt", "length": 3},
    {"kind": "p-tuning", "length": 3, "encoder": "mlp"},
    {"kind": "lora", "rank": 2},
    {"kind": "head"},
    {"kind": "expand"},
    {"kind": "osf"},
]
OF_PEFT = [options for options in OPTIONS if options["kind"] in ("prefix", "prompt", "lora")]


def kind_of(options: dict[str, Any]) -> str:
    return str(options["kind"])


def trained(options: dict[str, Any], family: str = "llama") -> tuple[PreTrainedModel, Tuning]:
    model = build_model(family, "lm")
    tuning = attach(model, options, tokenizer=tokenizer())
    train(model, tuning, family, "lm", steps=2)
    return model, tuning


def answers(model: PreTrainedModel, tuning: Tuning, family: str = "llama") -> Tensor:
    first = first_virtual(model)
    return logits(model, batch(family, "lm", seed=8, virtual=range(first, first + tuning.num_virtual_tokens)))


@pytest.mark.parametrize("options", OPTIONS, ids=kind_of)
def test_a_folder_gives_the_tuning_back(options: dict[str, Any], tmp_path: Path) -> None:
    model, tuning = trained(options)
    expected = answers(model, tuning)
    folder = publish_folder(tmp_path / "tuning", lambda into: save_tuning(tuning, into, BASE))
    fresh = build_model("llama", "lm")
    again = load_tuning(fresh, folder, tokenizer(), fingerprint="f00d")
    assert again.kind == options["kind"]
    assert (answers(fresh, again) - expected).abs().max() < 1e-5
    assert not torch.equal(expected[:, -6:], logits(build_model("llama", "lm"), batch("llama", "lm", seed=8))[:, -6:])


def test_a_folder_says_what_it_holds(tmp_path: Path) -> None:
    _, tuning = trained({"kind": "adapter", "variant": "pfeiffer", "size": 4})
    folder = publish_folder(tmp_path / "tuning", lambda into: save_tuning(tuning, into, BASE))
    said = json.loads((folder / "tuning.json").read_text())
    assert said["format"] == 1
    assert said["base"] == BASE
    assert said["options"]["kind"] == "adapter"
    assert said["options"]["size"] == 4
    assert said["parameters"] == sum(p.numel() for p in tuning.model.parameters() if p.requires_grad)
    assert set(verify(folder)) == {"tuning.json", "tuning.safetensors"}


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize("options", [{"kind": "lora", "rank": 2}], ids=kind_of)
def test_peft_loads_the_folder(options: dict[str, Any], tmp_path: Path) -> None:
    model, tuning = trained(options)
    save_tuning(tuning, tmp_path, BASE)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == "a/base"
    theirs = PeftModel.from_pretrained(build_model("llama", "lm"), str(tmp_path)).eval()
    inputs = batch("llama", "lm", seed=8)
    assert (logits(theirs, inputs) - logits(model, inputs)).abs().max() < 1e-5


@pytest.mark.parametrize("options", OF_PEFT, ids=kind_of)
def test_pefts_own_two_files_are_enough(options: dict[str, Any], tmp_path: Path) -> None:
    model, tuning = trained(options)
    save_tuning(tuning, tmp_path, BASE)
    (tmp_path / "tuning.json").unlink()
    (tmp_path / "tuning.safetensors").unlink()
    fresh = build_model("llama", "lm")
    again = load_tuning(fresh, tmp_path)
    assert (answers(fresh, again) - answers(model, tuning)).abs().max() < 1e-5


def test_another_base_is_refused_unless_it_is_forced(tmp_path: Path) -> None:
    _, tuning = trained({"kind": "prompt", "length": 3})
    save_tuning(tuning, tmp_path, BASE)
    model = build_model("llama", "lm")
    with pytest.raises(TuningError, match=r"(?s)a/base with the fingerprint f00d, but this model's is beef.*`base`"):
        load_tuning(model, tmp_path, fingerprint="beef")
    assert load_tuning(model, tmp_path, fingerprint="beef", force=True).kind == "prompt"
    assert load_tuning(build_model("llama", "lm"), tmp_path).kind == "prompt"


def test_a_folder_that_does_not_fit_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    _, tuning = trained({"kind": "adapter", "size": 4})
    save_tuning(tuning, tmp_path, BASE)
    said = json.loads((tmp_path / "tuning.json").read_text())
    said["options"]["size"] = 8
    (tmp_path / "tuning.json").write_text(json.dumps(said))
    model = build_model("llama", "lm")
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    with pytest.raises(TuningError, match="shape"):
        load_tuning(model, tmp_path)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before


def empty(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


def pickled(folder: Path) -> None:
    empty(folder)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2}))
    torch.save({}, folder / "adapter_model.bin")


def foreign(folder: Path) -> None:
    (folder / "tuning.json").unlink()
    (folder / "tuning.safetensors").rename(folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "VERA"}))


def cut(folder: Path) -> None:
    (folder / "tuning.safetensors").write_bytes((folder / "tuning.safetensors").read_bytes()[:40])


def later(folder: Path) -> None:
    (folder / "tuning.json").write_text(json.dumps({"format": 2, "options": {}}))


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (empty, "no tuning in this folder"),
        (pickled, "adapter_model.safetensors"),
        (foreign, "VERA is not supported"),
        (cut, "tensors cannot be read"),
        (lambda folder: (folder / "tuning.safetensors").unlink(), "tensors cannot be read"),
        (lambda folder: (folder / "tuning.json").write_text("{"), "broken JSON"),
        (lambda folder: (folder / "tuning.json").write_bytes(b"\xff"), "broken JSON"),
        (lambda folder: (folder / "tuning.json").write_text("[]"), "should be an object"),
        (later, "format 2"),
    ],
)
def test_a_folder_that_cannot_be_read_is_told(spoil: Any, says: str, tmp_path: Path) -> None:
    _, tuning = trained({"kind": "adapter", "size": 4})
    save_tuning(tuning, tmp_path, BASE)
    spoil(tmp_path)
    model = build_model("llama", "lm")
    with pytest.raises(TuningError, match=says):
        load_tuning(model, tmp_path)
    assert len(list(model.modules())) == len(list(build_model("llama", "lm").modules()))


OLD_OPTIONS: dict[str, dict[str, str]] = {
    "adapter": {"variant": "form", "skip_layers": "leave_out", "also_train": "also"},
    "prefix": {"also_train": "also"},
    "prompt": {"init": "start", "also_train": "also"},
    "lora": {"variant": "form"},
}
"""Options of a folder and their names in earlier versions."""


@pytest.mark.parametrize("options", [o for o in OPTIONS if o["kind"] in OLD_OPTIONS], ids=kind_of)
def test_folders_of_earlier_versions_are_read(options: dict[str, Any], tmp_path: Path) -> None:
    model, tuning = trained(options)
    save_tuning(tuning, tmp_path, BASE)
    description = json.loads((tmp_path / "tuning.json").read_text())
    names = OLD_OPTIONS[options["kind"]]
    assert names.keys() <= description["options"].keys()
    old = {names.get(name, name): value for name, value in description["options"].items()}
    (tmp_path / "tuning.json").write_text(json.dumps({**description, "options": old}))
    fresh = build_model("llama", "lm")
    again = load_tuning(fresh, tmp_path, tokenizer())
    assert torch.equal(answers(fresh, again), answers(model, tuning))
    assert read_export(tmp_path).options == tuning.export().options


def test_a_base_of_earlier_versions_is_read(tmp_path: Path) -> None:
    frame = {"before": [120, 121], "between": [3], "after": []}
    base = {"name": "a/base", "task": "causal", "frame": frame, "below": "b/base", "prefixes": True}
    (tmp_path / "tuning.json").write_text(json.dumps({"format": 1, "options": {}, "base": base}))
    reference = BaseReference.read_folder(ModelLocation("run", tmp_path, base=ModelLocation("a/base", None)))
    assert reference == BaseReference(
        "a/base", None, None, "causal", None, Frame((120, 121), (3,), ()), base_of_base="b/base", is_prefix_lm=True
    )

"""LoRA on the weights of fused experts: PEFT's own updates, and the promises of a tuning."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from postgrad.errors import TuningError
from postgrad.models.task import Task
from postgrad.tuning import lora
from postgrad.tuning.attach import attach
from postgrad.tuning.expert_weights import expert_weights
from postgrad.tuning.lora import LoraAdapter, from_peft
from postgrad.tuning.merge_adapters import merge_adapters
from postgrad.tuning.tuning import trainable_parameters
from postgrad.tuning.weight_delta import ExpertsDelta
from tests.model_families import make_tiny_model, tiny_config
from tests.tiny_models import make_tokenizer
from tests.tiny_stages import Workspace, make_workspace, run_interrupted, run_trace, save_model

FAMILIES = ["qwen3_moe", "gpt_oss"]
"""The second stores its matrices the other way round."""
every_family = pytest.mark.parametrize("family", FAMILIES)
IDS = torch.arange(5, 45)[None]
TARGETS = ["all-linear", "experts"]


def make(family: str) -> PreTrainedModel:
    return make_tiny_model(tiny_config(family), Task.CAUSAL)


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(input_ids=IDS).logits


def randomize(tuning: LoraAdapter, seed: int = 1) -> LoraAdapter:
    """Give an adapter tensors that have an effect."""
    generator = torch.Generator().manual_seed(seed)
    tuning.load({n: t + 0.05 * torch.randn(t.shape, generator=generator) for n, t in tuning.state().items()})
    return tuning


def moved(family: str) -> LoraAdapter:
    return randomize(LoraAdapter(make(family), rank=2, targets=TARGETS))


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@every_family
def test_answers_and_gradients_are_peft_s(family: str, tmp_path: Path) -> None:
    """PEFT's model from the folder that is published for it, and ours from the folder that PEFT writes."""
    tuning = moved(family)
    published = tuning.peft()
    assert published is not None
    assert len(published.config["target_parameters"]) == len(expert_weights(tuning.model))
    (tmp_path / "adapter_config.json").write_text(json.dumps(published.config))
    tensors = {name: tensor.contiguous() for name, tensor in published.state.items()}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    theirs = PeftModel.from_pretrained(make(family), str(tmp_path), is_trainable=True).eval()
    assert torch.equal(logits(theirs), logits(tuning.model))
    gradients = []
    for model, adapter in ((tuning.model, tuning.adapter_name), (theirs, "default")):
        model(input_ids=IDS, labels=IDS).loss.backward()
        named = trainable_parameters(model).items()
        gradients.append({n.split("layers.")[1].replace(f".{adapter}.", "."): p.grad for n, p in named})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(gradient, gradients[1][name]) for name, gradient in gradients[0].items())
    theirs.save_pretrained(tmp_path / "theirs")
    ours = make(family)
    config = json.loads((tmp_path / "theirs" / "adapter_config.json").read_text())
    from_peft(ours, config, load_file(tmp_path / "theirs" / "adapter_model.safetensors"))
    assert torch.equal(logits(ours), logits(tuning.model))


@every_family
def test_it_is_disabled_detached_published_and_merged(family: str) -> None:
    base, model = make(family), make(family)
    names = [name for name, _ in base.named_parameters()]
    tuning = LoraAdapter(model, rank=2, targets=TARGETS)
    assert torch.equal(logits(model), logits(base)), "a new adapter changes something"
    trainable = trainable_parameters(model)
    assert all(".lora_" in name for name in trainable)
    randomize(tuning)
    trained = logits(model)
    assert not torch.allclose(trained, logits(base), atol=1e-3)
    with tuning.disable():
        assert torch.equal(logits(model), logits(base))
    other = make(family)
    attach(other, tuning.export().options).load(tuning.export().state)
    assert torch.equal(logits(other), trained)
    # One on top of the other, with the lower one frozen.
    upper = LoraAdapter(model, rank=3, targets=TARGETS, seed=1)
    assert trainable_parameters(model).keys().isdisjoint(trainable)
    close(logits(model), trained)
    upper.detach()
    assert torch.equal(logits(model), trained)
    tuning.merge()
    close(logits(model), trained)
    assert [name for name, _ in model.named_parameters()] == names
    randomize(LoraAdapter(base, rank=2, targets=["experts"])).detach()
    assert [name for name, _ in base.named_parameters()] == names
    assert torch.equal(logits(base), logits(make(family)))


@every_family
def test_the_delta_of_a_weight_is_what_merging_adds(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And its gradients are those of autograd. The mutant: the layout of the other families."""
    tuning = moved(family)
    weights = dict(tuning.model.named_parameters())
    before = {name: weights[name].detach().clone() for name in tuning.weight_deltas() if "experts" in name}
    assert len(before) == len(expert_weights(tuning.model))
    deltas = {name: delta for name, delta in tuning.weight_deltas().items() if name in before}
    for name, delta in deltas.items():
        values = [parameter.detach().requires_grad_() for parameter in delta.parameters]
        added = delta.weight_delta.delta(values)
        assert added.shape == delta.shape == weights[name].shape
        factor = torch.randn(delta.shape, generator=torch.Generator().manual_seed(2))
        wanted = torch.autograd.grad((added * factor).sum(), values)
        for found, gradient in zip(delta.weight_delta.backward(values, factor), wanted, strict=True):
            close(found, gradient)
    tuning.merge()
    for name, weight in before.items():
        close(weights[name].detach() - weight, deltas[name].weight_delta.delta(deltas[name].parameters).detach())

    def other_layout(scale: float, experts: int, transposed: bool) -> ExpertsDelta:
        return ExpertsDelta(scale, experts, not transposed)

    monkeypatch.setattr(lora, "ExpertsDelta", other_layout)
    wrong = moved(family).weight_deltas()
    assert any(delta.weight_delta.delta(delta.parameters).shape != delta.shape for delta in wrong.values())


def test_patterns_choose_tensors_and_every_other_group_leaves_them_out() -> None:
    for targets, wanted in (("all-linear", 0), (["experts.down_proj"], 2), (["layers.0.mlp.experts"], 2)):
        tuning = LoraAdapter(make("qwen3_moe"), rank=2, targets=targets)
        assert sum(name.endswith(".lora_A.experts") for name in tuning.state()) == wanted
        assert bool(tuning.notes)
    excluded = LoraAdapter(make("qwen3_moe"), rank=2, targets=TARGETS, exclude=["experts.down_proj"])
    assert {n for n in excluded.state() if n.endswith("A.experts")} == {
        f"model.layers.{i}.mlp.experts.gate_up_proj.lora_A.experts" for i in (0, 1)
    }


@pytest.mark.parametrize("options", [{"dropout": 0.1}, {"variant": "dora"}, {"variant": "pissa"}])
def test_what_peft_has_not_for_tensors_is_refused(options: dict[str, Any]) -> None:
    model = make("qwen3_moe")
    with pytest.raises(TuningError, match="fused experts") as caught:
        LoraAdapter(model, rank=2, targets=TARGETS, **options)
    assert caught.value.where == f"tuning.{next(iter(options))}"
    assert not any(".lora_" in name for name, _ in model.named_parameters())


def test_adapters_of_experts_are_not_summed() -> None:
    tuning = moved("qwen3_moe")
    with pytest.raises(TuningError, match="fused experts"):
        merge_adapters(make("qwen3_moe"), [(tuning.export(), 1.0)])


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    made = make_workspace(tmp_path_factory.mktemp("adapters"), tmp_path_factory.mktemp("cache"))
    for family in FAMILIES:
        save_model(make(family), make_tokenizer(), made.folder / family)
    return made


@pytest.mark.parametrize("family", [FAMILIES[0], pytest.param(FAMILIES[1], marks=pytest.mark.slow)])
def test_a_stage_resumes_to_the_bit_and_is_anchored(workspace: Workspace, family: str) -> None:
    tuning = {"kind": "lora", "rank": 2, "targets": TARGETS}
    changes = {"model": family, "penalties": [{"kind": "anchor", "strength": 0.1}]}
    whole, parts = (workspace.stage(f"{family}-{name}", tuning, **changes) for name in ("whole", "parts"))
    record = workspace.run(whole).record
    run_interrupted(workspace, parts)
    assert run_trace(Path(whole["output"])) == run_trace(Path(parts["output"]))
    published = load_file(Path(whole["output"]) / "model" / "tuning.safetensors")
    assert any(name.endswith(".lora_A.experts") for name in published)
    assert record.changes["new-heldout"].difference < 0
